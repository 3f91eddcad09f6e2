"""The file of a comparison's page: runs compared again overwrite their page, and pages of other runs stay."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

from lowrank_tune.ui.compare.runs import ComparedRun

MAX_NAMES = 100
"""Bytes of the names of the runs in the name of a file; most file systems have a limit of 255 for the whole name."""


def page_file(runs: Sequence[ComparedRun]) -> Path:
    """Returns `compare-A-B.html` beside the first run, or `compare-A-B-2.html` and so on if there is a page of other
    runs under that name."""
    return next(path for path in _candidates(runs) if not path.exists() or _is_of_runs(path, runs))


def runs_digest(runs: Sequence[ComparedRun]) -> str:
    """Returns a digest of the folders of the runs, which the page contains."""
    folders = "\0".join(str(run.folder.resolve()) for run in runs)
    return hashlib.sha256(folders.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _candidates(runs: Sequence[ComparedRun]) -> Iterator[Path]:
    folder = runs[0].folder.resolve().parent
    names = re.sub(
        r"[^\w.+-]+",
        "-",
        "-".join(run.label for run in runs),
    )
    names = names.encode()[:MAX_NAMES].decode(errors="ignore")
    for number in count(1):
        suffix = "" if number == 1 else f"-{number}"
        yield folder / f"compare-{names}{suffix}.html"


def _is_of_runs(
    path: Path,
    runs: Sequence[ComparedRun],
) -> bool:
    """Returns whether a file is the page of these runs. One that cannot be read is not."""
    try:
        return f'data-runs="{runs_digest(runs)}"' in path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
