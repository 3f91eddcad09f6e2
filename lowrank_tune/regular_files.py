"""Reading of files whose names come from elsewhere: only regular files, and only up to a size.

Opening a FIFO waits for a writer, and a device such as /dev/zero has no end.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)
PIPE_SECONDS = 10.0
"""Time in which all of a pipe's content must arrive."""


class UnreadableFile(OSError):
    """Error for a file that is not regular, or larger than a limit; `strerror` is the reason."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(errno.EINVAL, reason, str(path))


def read_regular_file(path: Path, max_bytes: int) -> bytes:
    """Returns the content of a regular file. Raises OSError, which is UnreadableFile for any other kind of file and for
    a file that is larger than `max_bytes`."""
    with _opened(path) as descriptor:
        _check_status(path, os.fstat(descriptor), max_bytes)
        with open(descriptor, "rb", closefd=False) as file:
            # Files of /proc have size 0.
            return _within(path, file.read(max_bytes + 1), max_bytes)


def read_file_or_pipe(path: Path, max_bytes: int) -> bytes:
    """Returns the content of a regular file, or of a pipe such as that of a shell's `<(command)`. Raises OSError, which
    is UnreadableFile for a pipe without a writer, and for one that is not closed in `PIPE_SECONDS`."""
    if not stat.S_ISFIFO(path.stat().st_mode):
        return read_regular_file(path, max_bytes)
    with _opened(path) as pipe:
        data = _read_pipe(path, pipe, max_bytes)
    if not data:
        raise UnreadableFile(path, "it is a FIFO, and no process writes to it")
    return _within(path, data, max_bytes)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Yields a descriptor, also for a FIFO without waiting for its writer, and for a folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _read_pipe(
    path: Path,
    pipe: int,
    max_bytes: int,
) -> bytes:
    """Returns what the pipe contains until its writers close it, at most one byte more than the limit."""
    deadline = time.monotonic() + PIPE_SECONDS
    data = b""
    while len(data) <= max_bytes:
        try:
            # Without a writer this returns nothing at once, and `select` would wait for one.
            block = os.read(pipe, max_bytes + 1 - len(data))
        except BlockingIOError:
            ready, _, _ = select.select(
                [pipe],
                [],
                [],
                max(0.0, deadline - time.monotonic()),
            )
            if not ready:
                raise UnreadableFile(
                    path, f"it is a FIFO, and its writer has not closed it after {PIPE_SECONDS:g} s"
                ) from None
            continue
        if not block:
            break
        data += block
    return data


def kind_of(mode: int) -> str:
    """Returns the kind of a file, in words."""
    return next((name for is_kind, name in KINDS if is_kind(mode)), "a regular file")


def _within(
    path: Path,
    data: bytes,
    max_bytes: int,
) -> bytes:
    if len(data) > max_bytes:
        raise UnreadableFile(path, f"it has more than {max_bytes:,} bytes, the limit")
    return data


def check_regular_file(path: Path, max_bytes: int | None = None) -> None:
    """Raises OSError unless the path leads to a regular file, of at most `max_bytes` if given."""
    _check_status(path, path.stat(), max_bytes)


def _check_status(
    path: Path,
    status: os.stat_result,
    max_bytes: int | None,
) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableFile(path, f"it is {kind_of(status.st_mode)}, not a regular file")
    if max_bytes is not None and status.st_size > max_bytes:
        raise UnreadableFile(path, f"it has {status.st_size:,} bytes, and the limit is {max_bytes:,}")
