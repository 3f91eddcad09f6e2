"""The format of run folders. A folder of another format is refused with the version that reads it."""

from __future__ import annotations

from pathlib import Path

from lowrank_tune.errors import UserError
from lowrank_tune.json_files import read_json

RUN_FILE = "run.json"
VERSION = 2
"""2: settings, metrics and events have the names of TRL and transformers."""
LAST_READER = {1: "0.1.0 at commit 302efd4"}
"""Format -> the last version that reads it."""


def check_run_format(run: Path) -> None:
    """Raises UserError if the `run.json` of a folder has another format than this version writes.

    A folder without a readable `run.json` passes: callers have their own message for it.
    """
    try:
        version = read_json(run / RUN_FILE)["version"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if version == VERSION:
        return
    reader = LAST_READER.get(version) if isinstance(version, int) else None
    if reader:
        which = f"use lowrank_tune {reader}"
    else:
        which = "a newer lowrank_tune wrote it: install that one"
    raise UserError(f"{run} has run format {version}, and this version reads format {VERSION}: {which}")
