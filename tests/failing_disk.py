"""A disk that fails: put in front of `open` and the functions of `os` that write, in a process of its own."""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "full": errno.ENOSPC, "short": None}
"""What happens at the drawn call: an error, once; `full`: a write writes a part, and every later call fails; `short`: a
write writes a part, once."""


@dataclass(frozen=True)
class Fault:
    """`kind` at call `at`, counted from 0, of those that write below the run's folders."""

    kind: str
    at: int


class FailingDisk:
    """Counts the calls that write below `folders`, and fails the drawn one."""

    def __init__(self, folders: list[str], fault: Fault | None) -> None:
        self.folders = tuple(os.path.realpath(folder) + os.sep for folder in folders)
        self.fault, self.calls, self.hit = fault, Counter[str](), ""
        self._left = fault.at if fault else 0

    def install(self) -> None:
        for name, call, path in (
            ("open", "open", path_opened),
            ("fsync", "fsync", path_of),
            ("mkdir", "mkdir", path_made),
            ("replace", "rename", path_renamed),
            ("rename", "rename", path_renamed),
        ):
            setattr(os, name, self._checked(getattr(os, name), call, path))
        os.write = self._checked_write(os.write)  # type: ignore[assignment]
        builtins.open = io.open = self._checked_open(io.open)  # type: ignore[assignment]

    def fails(self, call: str, path: str) -> bool:
        """Counts the call; returns whether it must fail."""
        if not f"{path}{os.sep}".startswith(self.folders):
            return False
        self.calls[call] += 1
        if self.fault is None or (self.fault.kind == "short" and call != "write"):
            return False
        self._left -= 1
        if self._left == -1:
            self.hit = f"{call} {path}"
        return self._left == -1 or (self._left < 0 and self.fault.kind == "full")

    def raise_error(self, path: str) -> None:
        assert self.fault is not None
        number = KINDS[self.fault.kind]
        if number is not None:
            raise OSError(number, os.strerror(number), path)

    def check(self, call: str, path: str) -> None:
        if self.fails(call, path):
            self.raise_error(path)

    def part_to_write(self, path: str, data: Any) -> Any:
        """What a write writes: all, or a part. Raises where it fails."""
        if not self.fails("write", path):
            return data
        assert self.fault is not None
        half = memoryview(data).cast("B")[: memoryview(data).nbytes // 2]
        if self._left == -1 and half and self.fault.kind in ("short", "full"):
            return half
        self.raise_error(path)
        return data

    def _checked(self, real: Callable[..., Any], call: str, path: Callable[..., str]) -> Callable[..., Any]:
        def checked(*given: Any, **more: Any) -> Any:
            self.check(call, path(*given, **more))
            return real(*given, **more)

        return checked

    def _checked_write(self, real: Callable[[int, Any], int]) -> Callable[[int, Any], int]:
        def write(descriptor: int, data: Any) -> int:
            return real(descriptor, self.part_to_write(path_of(descriptor), data))

        return write

    def _checked_open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        disk = self

        class CheckedFile(io.FileIO):
            def write(self, data: Any, /) -> int:
                return super().write(disk.part_to_write(path_of(self.fileno()), data))

        def checked(file: Any, mode: str = "r", *given: Any, **more: Any) -> Any:
            path = path_of(file) if isinstance(file, int) else str(Path(os.fsdecode(file)).resolve())
            if not set(mode) & set("wax") or not path.startswith(disk.folders):
                return real(file, mode, *given, **more)
            if not isinstance(file, int):
                disk.check("open", path)
            binary = io.BufferedWriter(CheckedFile(file, mode.replace("b", "").replace("t", "")))
            return binary if "b" in mode else io.TextIOWrapper(binary, encoding=more.get("encoding"))

        return checked


def path_of(descriptor: int) -> str:
    """The path of an open file; nothing for what is no file."""
    try:
        return str(Path(f"/proc/self/fd/{descriptor}").readlink())
    except OSError:
        return ""


def path_opened(path: Any, flags: int, *_: Any, **__: Any) -> str:
    """The path of `os.open`, where it is to be written."""
    return str(path) if flags & (os.O_WRONLY | os.O_RDWR) else ""


def path_made(path: Any, *_: Any, **__: Any) -> str:
    return str(path)


def path_renamed(_: Any, target: Any, **__: Any) -> str:
    return str(target)
