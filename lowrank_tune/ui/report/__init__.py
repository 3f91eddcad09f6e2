"""`report.html`: a whole run in one file that loads nothing else, with a dark and a print style."""

from __future__ import annotations

from pathlib import Path

from lowrank_tune.checkpoint import write_file
from lowrank_tune.checkpoint.run_format import check_run_format
from lowrank_tune.ui.report.page import chain_page, page
from lowrank_tune.ui.report.run_log import read_chain, read_run_log
from lowrank_tune.ui.run_paths import is_chain

__all__ = [
    "chain_page",
    "page",
    "read_chain",
    "read_run_log",
    "write_report",
]


def write_report(folder: Path) -> Path:
    """Writes the report of a run beside its events, or those of a chain and of each of its stages; returns the path.

    Raises `UserError` if the folder contains no run.
    """
    check_run_format(folder)
    if not is_chain(folder):
        return _write(folder, page(read_run_log(folder)))
    chain = read_chain(folder)
    for run_log in chain.started_stages:
        _write(run_log.folder, page(run_log))
    return _write(folder, chain_page(chain))


def _write(folder: Path, html: str) -> Path:
    target = folder / "report.html"
    write_file(target, html.encode("utf-8"))
    return target
