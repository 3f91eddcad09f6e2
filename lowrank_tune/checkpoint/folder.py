"""The run folder: new, continued or refused, and locked against other processes."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, Literal, Self

from lowrank_tune.checkpoint.atomic_files import as_user_error, clean_stale, replace_nonfinite, write_file, write_fully
from lowrank_tune.checkpoint.run_format import VERSION, check_run_format
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit, LogMessage

_locks: set[int] = set()


def _release_lock_in_child() -> None:
    """A forked worker would share the lock, and keep it when its parent is killed: the run could then not be
    continued."""
    for descriptor in _locks:
        os.close(descriptor)
    _locks.clear()


os.register_at_fork(after_in_child=_release_lock_in_child)


def _with_name(path: Path) -> Path:
    """The path with a last part that another name can be made of."""
    return path.resolve() if path.name in ("", "..") else path


class RunFolder:
    """A run's folder, locked against other processes until `close`. `continued` tells an unfinished run from a new
    one."""

    def __init__(self, path: Path) -> None:
        """Takes the folder as it is. Use `RunFolder.open`."""
        self.path = path
        self.continued = False
        self.checkpoints = path / "checkpoints"
        self.final = path / "final"
        self.events = path / "events.jsonl"
        self.samples = path / "samples.jsonl"
        self.summary = path / "summary.json"
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
        """The folder for this recipe: new, or that of its unfinished run; beside a finished run the next free NAME-2,
        NAME-3.

        `text` becomes `recipe.yaml`; `differences(old, new)` says in lines what forbids to continue;
        `is_explicit_path`: the person named the folder. Raises `UserError` for a run of another recipe, for a folder
        that is no run, for one in use or one that cannot be written.
        """
        path = _with_name(path)
        for folder in cls._candidates(path):
            try:
                folder._acquire_lock(emit)
                if folder._state() == "finished":  # by another process, a moment ago
                    folder.close()
                    continue
                folder._create(recipe, text, differences)
            except BaseException:
                folder.close()
                raise
            if folder.path != path:
                message = f"{path} holds a finished run and is left alone: this one goes to {folder.path}"
                emit(LogMessage(message=message, level="warning" if is_explicit_path else "info"))
            return folder
        raise AssertionError("count never ends")

    @classmethod
    def pick(cls, path: Path) -> Path:
        """The folder that `open` would take now. Creates nothing. Raises `UserError` for a folder that is no run."""
        return next(cls._candidates(_with_name(path))).path

    @classmethod
    def unfinished(cls, path: Path) -> Self | None:
        """The unfinished run that `open` would continue here; None where it would begin a new one. Raises `UserError`
        for a folder that is no run."""
        folder = next(cls._candidates(_with_name(path)))
        if folder._state() == "unfinished":
            return folder
        return None

    @classmethod
    def _candidates(cls, path: Path) -> Iterator[Self]:
        """The folder, then NAME-2, NAME-3 and so on, without those of finished runs and of something else."""
        for number in count(1):
            folder = cls(path if number == 1 else path.with_name(f"{path.name}-{number}"))
            if (state := folder._state()) == "foreign" and number == 1:
                raise UserError(f"{path} exists and is no run: give another folder with --out")
            if state not in ("foreign", "finished"):
                yield folder

    def stored_recipe(self) -> Any:
        """What `run.json` holds as the recipe. Raises OSError, ValueError, KeyError or TypeError."""
        return json.loads((self.path / "run.json").read_bytes())["recipe"]

    def has_checkpoints(self) -> bool:
        """Whether the run, or a stage of the chain, has saved anything."""
        return any(self.checkpoints.glob("step-*")) or any(self.path.glob("*/checkpoints/step-*"))

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step}"

    def write_text(self, name: str, text: str) -> None:
        """Replaces the file in one instant. Raises `UserError` or `TrainingError`."""
        write_file(self.path / name, text.encode("utf-8", "backslashreplace"))

    def write_json(self, name: str, value: Any) -> None:
        """The same for a JSON value; numbers that are not finite become null."""
        self.write_text(name, json.dumps(replace_nonfinite(value), indent=2) + "\n")

    def close(self) -> None:
        """Lets other processes have the folder."""
        if self._lock in _locks:
            _locks.remove(self._lock)
            os.close(self._lock)  # its children have closed theirs
        self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _state(self) -> Literal["new", "unfinished", "finished", "foreign"]:
        with as_user_error(self.path):
            if not os.path.lexists(self.path):
                return "new"
            names = {
                file.name for file in self.path.iterdir() if file.name != ".lock" and not file.name.startswith(".tmp-")
            }
        if not names:
            return "new"  # or a process died right after it had made it
        if "run.json" not in names:
            return "foreign"
        with suppress(OSError, ValueError, AttributeError):
            if json.loads(self.summary.read_bytes()).get("status") == "done":
                return "finished"
        return "unfinished"

    def _acquire_lock(self, emit: Emit) -> None:
        with as_user_error(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
            _locks.add(self._lock)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                process = os.read(self._lock, 20).decode(errors="replace").strip()
                raise UserError(
                    f"{self.path} is being written by {f'process {process}' if process else 'another process'}"
                ) from error
            except OSError as error:
                emit(
                    LogMessage(
                        message=f"{self.path} cannot be locked ({error.strerror}): start no second run in it",
                        level="warning",
                    )
                )
            os.ftruncate(self._lock, 0)
            write_fully(self._lock, f"{os.getpid()}\n".encode())

    def _create(
        self,
        recipe: dict[str, Any],
        text: str,
        differences: Callable[[dict[str, Any], dict[str, Any]], list[str]],
    ) -> None:
        """Checks that an unfinished run may be continued, and writes what the folder is. `run.json` comes first: it
        makes it a run."""
        hint = f"Give another folder with --out, or delete {self.path}."
        self.continued = self._state() == "unfinished"
        # A run (of a chain: all stages) that never saved has nothing to lose: whoever mends its recipe starts again in
        # the same folder.
        if self.continued and self.has_checkpoints():
            check_run_format(self.path)
            try:
                old = self.stored_recipe()
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"{self.path / 'run.json'} cannot be understood. {hint}") from error
            if lines := differences(old, recipe):
                changes = "".join(f"\n  {line}" for line in lines)
                raise UserError(f"{self.path} holds an unfinished run of another recipe:{changes}\n{hint}")
        clean_stale(self.path)
        self.write_json("run.json", {"version": VERSION, "recipe": recipe})
        self.write_text("recipe.yaml", text)
