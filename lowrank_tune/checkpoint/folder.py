"""The run folder: created, continued or refused, and locked against other processes."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, Literal, Self

from lowrank_tune.checkpoint.atomic_files import (
    as_user_error,
    clean_stale,
    replace_nonfinite,
    write_file,
    write_fully,
)
from lowrank_tune.checkpoint.run_format import VERSION, check_run_format
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit, LogMessage, warning
from lowrank_tune.json_files import read_json
from lowrank_tune.run_summary import SUMMARY, read_done_summary, summary_problem

_locks: set[int] = set()


def _release_lock_in_child() -> None:
    """Closes the locks in a forked worker, which would keep them after the parent is killed, so that the run could not
    be continued."""
    for descriptor in _locks:
        os.close(descriptor)
    _locks.clear()


os.register_at_fork(after_in_child=_release_lock_in_child)


def _with_name(path: Path) -> Path:
    """Returns the path with a last part that can be extended to another name."""
    return path.resolve() if path.name in ("", "..") else path


class RunFolder:
    """A run's folder, locked against other processes until `close`. `continued`: it contained an unfinished run."""

    def __init__(self, path: Path) -> None:
        """Does not create or lock the folder; use `RunFolder.open`."""
        self.path = path
        self.continued = False
        self.checkpoints = path / "checkpoints"
        self.final = path / "final"
        self.events = path / "events.jsonl"
        self.samples = path / "samples.jsonl"
        self.summary = path / SUMMARY
        self.console_log = path / "console.log"
        self._lock: int | None = None

    @classmethod
    def open(
        cls,
        path: Path,
        recipe: dict[str, Any],
        text: str,
        differences: Callable[[dict[str, Any], dict[str, Any]], list[str]],
        is_explicit_path: bool,
        emit: Emit,
    ) -> Self:
        """Returns the folder for this recipe: new, or that of its unfinished run; after a finished run NAME-2, NAME-3
        and so on.

        `text` becomes `recipe.yaml`. `differences(old, new)` lists the changes that prevent continuing.
        `is_explicit_path`: the user named the folder. Raises `UserError` for a run of another recipe, a folder that is
        not a run, one in use, or one that cannot be written.
        """
        path = _with_name(path)
        for folder in cls._candidates(path):
            try:
                folder._acquire_lock(emit)
                if folder._state() == "finished":
                    # another process finished it before the lock was taken
                    folder.close()
                    continue
                folder._check_summary(emit)
                folder._create(recipe, text, differences)
            except BaseException:
                folder.close()
                raise
            if folder.path != path:
                message = f"{path} contains a finished run and is not changed: this run is written to {folder.path}"
                emit(
                    LogMessage(
                        message=message,
                        level="warning" if is_explicit_path else "info",
                    )
                )
            return folder
        raise AssertionError("count never ends")

    @classmethod
    def pick(cls, path: Path) -> Path:
        """Returns the folder that `open` would use, without creating it. Raises `UserError` for a folder that is not a
        run."""
        return next(cls._candidates(_with_name(path))).path

    @classmethod
    def unfinished(cls, path: Path) -> Self | None:
        """Returns the unfinished run that `open` would continue, None if it would begin a new one.

        Raises `UserError` for a folder that is not a run.
        """
        folder = next(cls._candidates(_with_name(path)))
        if folder._state() == "unfinished":
            return folder
        return None

    @classmethod
    def _candidates(cls, path: Path) -> Iterator[Self]:
        """Yields the folder, then NAME-2, NAME-3 and so on, without finished runs and folders that are not runs."""
        for number in count(1):
            candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
            folder = cls(candidate)
            state = folder._state()
            if state == "foreign" and number == 1:
                raise UserError(f"{path} exists and is not a run: give another folder with --out")
            if state not in ("foreign", "finished"):
                yield folder

    def stored_recipe(self) -> Any:
        """Returns the recipe in `run.json`. Raises OSError, ValueError, KeyError or TypeError."""
        return read_json(self.path / "run.json")["recipe"]

    def has_checkpoints(self) -> bool:
        """Returns whether the run, or a stage of the chain, has saved a checkpoint."""
        return any(self.checkpoints.glob("step-*")) or any(self.path.glob("*/checkpoints/step-*"))

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step}"

    def write_text(
        self,
        name: str,
        text: str,
    ) -> None:
        """Replaces the file atomically. Raises `UserError` or `TrainingError`."""
        write_file(self.path / name, text.encode("utf-8", "backslashreplace"))

    def write_json(
        self,
        name: str,
        value: Any,
    ) -> None:
        """Replaces a JSON file atomically; numbers that are not finite become null."""
        self.write_text(name, json.dumps(replace_nonfinite(value), indent=2) + "\n")

    def close(self) -> None:
        """Releases the lock."""
        if self._lock in _locks:
            _locks.remove(self._lock)
            os.close(self._lock)
        self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _state(self) -> Literal["new", "unfinished", "finished", "foreign"]:
        with as_user_error(self.path):
            if not os.path.lexists(self.path):
                return "new"
            names = {file.name for file in self.path.iterdir() if not file.name.startswith(".tmp-")}
        if names <= {".lock"}:
            # also the folder of a process that was killed right after it created it
            return "new"
        if "run.json" not in names:
            return "foreign"
        return "unfinished" if read_done_summary(self.path) is None else "finished"

    def _acquire_lock(self, emit: Emit) -> None:
        with as_user_error(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
            _locks.add(self._lock)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                process = os.read(self._lock, 20).decode(errors="replace").strip()
                writer = f"process {process}" if process else "another process"
                raise UserError(f"{self.path} is being written by {writer}") from error
            except OSError as error:
                emit(warning(f"{self.path} cannot be locked ({error.strerror}): do not start a second run in it"))
            os.ftruncate(self._lock, 0)
            write_fully(self._lock, f"{os.getpid()}\n".encode())

    def _check_summary(self, emit: Emit) -> None:
        """Emits a warning if `summary.json` is damaged. Raises `UserError` if there is no checkpoint either: the run
        would begin again, over the results of one that may be done."""
        problem = summary_problem(self.path)
        if not problem:
            return
        fault = f"{self.summary} is damaged ({problem})"
        if not self.has_checkpoints():
            raise UserError(
                f"{fault}, and the run has no checkpoint to continue from: restore the file from a copy, or give "
                "another folder with --out"
            )
        emit(warning(f"{fault}: the run is continued as one that is not done"))

    def _create(
        self,
        recipe: dict[str, Any],
        text: str,
        differences: Callable[[dict[str, Any], dict[str, Any]], list[str]],
    ) -> None:
        """Checks that an unfinished run can be continued, and writes `run.json`, which makes the folder a run, and
        `recipe.yaml`."""
        hint = f"Give another folder with --out, or delete {self.path}."
        self.continued = self._state() == "unfinished"
        # A run without checkpoints (in all stages of a chain) can start again in the same folder with another recipe.
        if self.continued and self.has_checkpoints():
            check_run_format(self.path)
            try:
                old = self.stored_recipe()
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"{self.path / 'run.json'} cannot be understood. {hint}") from error
            lines = differences(old, recipe)
            if lines:
                changes = "".join(f"\n  {line}" for line in lines)
                raise UserError(f"{self.path} contains an unfinished run of another recipe:{changes}\n{hint}")
        clean_stale(self.path)
        self.write_json("run.json", {"version": VERSION, "recipe": recipe})
        self.write_text("recipe.yaml", text)
