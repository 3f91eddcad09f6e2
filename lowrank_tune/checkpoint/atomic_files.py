"""Writing files so that each is whole or absent, and saying in a sentence why one cannot be written."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

from lowrank_tune.errors import TrainingError, UserError

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the limit on the size of a file is reached",
    errno.EACCES: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.EEXIST: "it is a file, not a folder",
    errno.ENAMETOOLONG: "the name is too long",
}
_USER_FIXABLE_ERRNOS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}
# file systems that cannot fsync a folder, Windows drives under WSL2 among them
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}


def write_error(path: Path, error: OSError) -> UserError:
    """The sentence for an `OSError` of writing: a `UserError` where another path helps, else `TrainingError`."""
    kind = UserError if error.errno in _USER_FIXABLE_ERRNOS else TrainingError
    return kind(f"cannot write {path}: {_REASONS.get(error.errno or 0, error.strerror or str(error))}")


@contextmanager
def as_user_error(path: Path) -> Iterator[None]:
    """Turns an `OSError` inside into the sentence about `path`."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


def replace_nonfinite(value: Any) -> Any:
    """The JSON value with null for every number that is not finite: JSON has no word for those."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: replace_nonfinite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [replace_nonfinite(entry) for entry in value]
    return value


def write_fully(descriptor: int, data: bytes) -> None:
    """Writes every byte, however few the system takes at once."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def write_file(path: Path, data: bytes) -> None:
    """Replaces the file in one instant. Raises `UserError` or `TrainingError` with path and reason; the old file is
    then still there."""
    fresh = path.with_name(f".tmp-{path.name}-{token_hex(4)}")
    with as_user_error(path):
        try:
            write_new(fresh, data)
            fresh.replace(path)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
        fsync_dir(path.parent)


def write_new(path: Path, data: bytes) -> None:
    """Writes a file that is not there yet, to the disk itself."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        write_fully(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_dir(folder: Path) -> None:
    """Makes the folder's names durable: fsync of a file does not keep its name."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def clean_stale(folder: Path) -> None:
    """Removes what a crash left half written, and brings back a folder that was stepping aside."""
    for leftover in folder.glob(".tmp-*"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            with suppress(OSError):
                leftover.unlink()
    for backup in folder.glob(".aside-*"):
        target = backup.with_name(backup.name.removeprefix(".aside-"))
        if target.exists():
            shutil.rmtree(backup, ignore_errors=True)
        else:
            with as_user_error(target):
                backup.replace(target)
