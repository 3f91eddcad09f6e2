"""The files of a run folder and of a chain.

`run.json` names the stages of a chain, and each stage is a run folder of its own: `1-sft`, `2-dpo`, ...
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lowrank_tune.events import Event, from_json
from lowrank_tune.json_files import get_mapping, read_json_object

EVENTS = "events.jsonl"
LOCKS = Path("/proc/locks")
"""What Linux reports of locks on files."""


def stage_folders(path: Path) -> list[Path]:
    """Returns the folders of a chain's stages in their order, begun or not; `[path]` for a single run."""
    if (path / EVENTS).is_file():
        return [path]
    names = _stage_names(read_recipe(path))
    return [path / f"{number}-{name}" for number, name in enumerate(names, 1)] or [path]


def is_chain(path: Path) -> bool:
    return stage_folders(path) != [path]


def read_recipe(folder: Path) -> Mapping[str, Any]:
    """Returns the recipe in the `run.json` of a folder, empty if it cannot be read."""
    return get_mapping(read_json_object(folder / "run.json"), "recipe")


def _stage_names(recipe: Mapping[str, Any]) -> list[str]:
    """Returns the names of the stages. A name that could lead out of the folder was not written by a run."""
    stages = recipe.get("stages")
    if not isinstance(stages, list) or not all(isinstance(stage, Mapping) for stage in stages):
        return []
    names = [stage.get("name") for stage in stages]
    if all(isinstance(name, str) and name and not {"/", "\\", "\0"} & {*name} for name in names):
        return names
    return []


def ended_process(path: Path) -> int | None:
    """Returns the number of the process that last wrote a run, if that process has ended; None otherwise.

    It has ended if this machine has no process of that number and no process holds the lock of the run. A process in a
    container or on another machine can hold the lock under another number. None also if the folder names no process.
    """
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


def running_process(path: Path) -> int | None:
    """Returns the number of the process on this machine that holds the lock of a run, None if there is none.

    The list of locks is read instead of trying the lock, which would refuse it to a run that starts at this moment.
    """
    try:
        with (path / ".lock").open() as lock:
            process = int(lock.read())
            inode = os.fstat(lock.fileno()).st_ino
        locks = LOCKS.read_text()
    except (OSError, ValueError, OverflowError):
        return None
    for line in locks.splitlines():
        # 1: FLOCK ADVISORY WRITE 8867 fe:00:2269874 0 EOF
        fields = line.split()
        if len(fields) > 5 and fields[4] == str(process) and fields[5].endswith(f":{inode}"):
            return process
    return None


def read_event_lines(path: Path) -> Iterator[Event]:
    """Yields the events of a file. A half-written line, and one that is not an event, is skipped."""
    with path.open("rb") as file:
        for line in file:
            event = parse_event(line)
            if event is not None:
                yield event


def parse_event(line: bytes) -> Event | None:
    """Returns the event in a line of JSON, None if the line does not contain one."""
    try:
        data = json.loads(line)
        event = from_json(data) if isinstance(data, dict) else None
    except (ValueError, TypeError, RecursionError):
        return None
    if event is None or not isinstance(event.time, (int, float)):
        return None
    return event
