"""The stages of a chain on disk: `run.json` names them, and each is a run folder of its own, `1-sft`, `2-dpo`, ..."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EVENTS = "events.jsonl"


def stage_folders(path: Path) -> list[Path]:
    """The folders of a chain's stages in their order, begun or not; the path itself for a single run."""
    if (path / EVENTS).is_file():
        return [path]
    return [path / f"{number}-{name}" for number, name in enumerate(_names(path / "run.json"), 1)] or [path]


def ended_process(path: Path) -> int | None:
    """The process that wrote a run last, if no process of its number is on this machine and none holds the lock of the
    run, as one in a container or on another machine can; None otherwise, or where the folder does not name it."""
    try:
        with (path / ".lock").open() as lock:
            process = int(lock.read())
            try:
                os.kill(process, 0)
            except ProcessLookupError:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return process
    except (OSError, ValueError, OverflowError):
        return None
    return None


def is_chain(path: Path) -> bool:
    return stage_folders(path) != [path]


def _names(file: Path) -> list[str]:
    """As `run.json` has them. One that could lead out of the folder was not written by a run."""
    try:
        recipe: Any = json.loads(file.read_bytes())["recipe"]
        stages: Any = recipe["stages"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    if not isinstance(stages, list) or not all(isinstance(stage, Mapping) for stage in stages):
        return []
    names = [stage.get("name") for stage in stages]
    if all(isinstance(name, str) and name and not {"/", "\\", "\0"} & {*name} for name in names):
        return names
    return []
