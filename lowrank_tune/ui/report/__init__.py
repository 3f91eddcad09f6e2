"""`report.html`: a whole run in one file that needs nothing else. It opens from a disk, in the dark too, and prints."""

from __future__ import annotations

from pathlib import Path

from lowrank_tune.checkpoint import write_file
from lowrank_tune.ui.report.page import page
from lowrank_tune.ui.report.record import read_record

__all__ = ["page", "read_record", "write_report"]


def write_report(folder: Path) -> Path:
    """Writes the report of a run beside its events. Raises `UserError` where the folder holds no run."""
    target = folder / "report.html"
    write_file(target, page(read_record(folder)).encode("utf-8"))
    return target
