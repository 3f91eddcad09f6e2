"""The files of a run folder and of a chain.

`run.json` names the stages of a chain, and each stage is a run folder of its own: `1-sft`, `2-dpo`, ...
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lowrank_tune.events import KINDS, Event, from_json
from lowrank_tune.json_files import MAX_NUMBER, as_mapping, get_mapping, parse_json, read_json_object
from lowrank_tune.regular_files import check_regular_file

EVENTS = "events.jsonl"
RUN_FILES = ("run.json", EVENTS, "summary.json")
"""A folder with one of these files is that of a run or of a chain."""
MODEL_FILES = ("config.json", "adapter_config.json")
"""A folder with one of these files is a model or an adapter."""
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


def is_run_folder(path: Path) -> bool:
    """Returns whether a folder is that of a run or of a chain, finished or not, damaged or not."""
    return any(os.path.lexists(path / name) for name in RUN_FILES)


def run_folders(folder: Path) -> list[Path]:
    """Returns the folders of runs and chains in `folder`, the one whose last session started last first.

    Raises OSError if the folder cannot be read.
    """
    runs = [path for path in folder.iterdir() if path.is_dir() and is_run_folder(path)]
    return sorted(
        runs,
        key=_session_start,
        reverse=True,
    )


def newest_run(folder: Path) -> Path | None:
    """Returns the run or chain in `folder` whose last session started last; None if `folder` contains no run."""
    with suppress(OSError):
        return next(iter(run_folders(folder)), None)
    return None


def is_folder_of_runs(path: Path) -> bool:
    """Returns whether a folder contains runs and is not itself a run, a chain, an adapter or a model."""
    if is_run_folder(path) or any(os.path.lexists(path / name) for name in MODEL_FILES):
        return False
    return newest_run(path) is not None


def _session_start(run: Path) -> tuple[float, str]:
    """Returns when the last session of a run started, and its name. Each session writes `run.json` at its start."""
    for name in RUN_FILES:
        with suppress(OSError, ValueError):
            return (run / name).stat().st_mtime, run.name
    return 0.0, run.name


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


def is_locked(path: Path) -> bool:
    """Returns whether a process of this machine holds the lock of a run, and so is writing its folder."""
    try:
        inode = (path / ".lock").stat().st_ino
        return bool(_lock_holders(inode))
    except OSError:
        return False


def running_process(path: Path) -> int | None:
    """Returns the number of the process on this machine that holds the lock of a run, None if there is none."""
    try:
        with (path / ".lock").open() as lock:
            process = int(lock.read())
            inode = os.fstat(lock.fileno()).st_ino
        holders = _lock_holders(inode)
    except (OSError, ValueError, OverflowError):
        return None
    return process if process in holders else None


def _lock_holders(inode: int) -> set[int]:
    """Returns the processes that hold a lock on the file of this inode.

    The list of locks is read instead of trying the lock, which would refuse it to a run that starts at this moment.
    Raises OSError if there is no such list.
    """
    holders = set[int]()
    for line in LOCKS.read_text().splitlines():
        # 1: FLOCK ADVISORY WRITE 8867 fe:00:2269874 0 EOF
        fields = line.split()
        if len(fields) > 5 and fields[5].endswith(f":{inode}"):
            holders.add(int(fields[4]))
    return holders


def read_event_lines(path: Path) -> Iterator[Event]:
    """Yields the events of a file. A half-written line, and one that is not an event, is skipped. Raises OSError for a
    file that cannot be read or is not regular."""
    check_regular_file(path)
    with path.open("rb") as file:
        for line in file:
            event = parse_event(line)
            if event is not None:
                yield event


def parse_event(line: bytes) -> Event | None:
    """Returns the event in a line of JSON, None if the line does not contain one or a field has another type."""
    try:
        data = parse_json(line)
        event = from_json(data) if isinstance(data, dict) else None
    except (ValueError, TypeError):
        return None
    return event if event is not None and _has_valid_fields(event) else None


def _has_valid_fields(event: Event) -> bool:
    """Returns whether each field has its type. A statistic may be nan, as that of a step that diverged."""
    stats = as_mapping(getattr(event, "stats", None))
    if not all(isinstance(value, float) or _is_of_type(value, int) for value in stats.values()):
        return False
    return all(_is_of_type(getattr(event, name), kind) for name, kind in _field_types(event.kind))


@cache
def _field_types(kind_of_event: str) -> list[tuple[str, Any]]:
    """Returns each field of an event with its type; lists and objects are without the types of their content."""
    event_type = KINDS[kind_of_event]
    hints = get_type_hints(event_type)
    types = {field.name: hints[field.name] for field in fields(event_type)}
    containers = (list, Mapping)
    return [(name, get_origin(kind) if get_origin(kind) in containers else kind) for name, kind in types.items()]


def _is_of_type(value: Any, kind: Any) -> bool:
    """Returns whether a value has the type of an annotation; a number must be finite."""
    if kind in (int, float):
        return isinstance(value, (int, kind)) and abs(value) < MAX_NUMBER
    if isinstance(kind, type):
        return isinstance(value, kind)
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    return any(_is_of_type(value, part) for part in get_args(kind))
