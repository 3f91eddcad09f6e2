"""Files and folders that are complete or absent after a crash, and errors that state why one cannot be written."""

from __future__ import annotations

import errno
import glob
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

from lowrank_tune.errors import TrainingError, UserError
from lowrank_tune.full_disk import RUN_CURE, describe_full_disk, full_disk_reason

_REASONS = {
    errno.EFBIG: "the limit on the size of a file is reached",
    errno.EACCES: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.EEXIST: "it is a file, not a folder",
    errno.ENAMETOOLONG: "the name is too long",
}
_USER_FIXABLE_ERRNOS = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
}
# file systems that cannot fsync a folder, Windows drives under WSL2 among them
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}


def write_error(
    path: Path,
    error: OSError,
    needed: int = 0,
    cure: str = RUN_CURE,
) -> UserError:
    """Returns the error for an `OSError` of a write: `UserError` if another path helps, else `TrainingError`.

    For a full disk it contains the bytes that are needed (0: unknown) and what to do.
    """
    kind = UserError if error.errno in _USER_FIXABLE_ERRNOS else TrainingError
    reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
    full = full_disk_reason(error)
    if full:
        reason = describe_full_disk(
            path,
            full,
            cure,
            needed,
        )
    return kind(f"cannot write {path}: {reason}")


@contextmanager
def as_user_error(
    path: Path,
    needed: int = 0,
    cure: str = RUN_CURE,
) -> Iterator[None]:
    """Raises `write_error` of `path` instead of an `OSError`."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error, needed, cure) from error


def replace_nonfinite(value: Any) -> Any:
    """Returns the JSON value with null for every number that is not finite, which JSON cannot represent."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: replace_nonfinite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [replace_nonfinite(entry) for entry in value]
    return value


def write_fully(descriptor: int, data: bytes) -> None:
    """Writes all bytes; one call of the system can write fewer."""
    view = memoryview(data)
    while view:
        written = os.write(descriptor, view)
        view = view[written:]


def temporary_path(path: Path) -> Path:
    """Returns a new hidden name beside `path`, which `clean_stale` removes after a crash."""
    return path.with_name(f".tmp-{path.name}-{token_hex(4)}")


def write_file(path: Path, data: bytes) -> None:
    """Replaces the file atomically.

    Raises `UserError` or `TrainingError` with path and reason; the old file is then unchanged.
    """
    fresh = temporary_path(path)
    with as_user_error(path, len(data)):
        try:
            write_new(fresh, data)
            _fsync(fresh)
            fresh.replace(path)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
        fsync_dir(path.parent)


def write_new(path: Path, data: bytes) -> None:
    """Writes a file that does not exist yet, without fsync."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        write_fully(descriptor, data)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_folder(
    target: Path,
    overwrite: bool = True,
    needed: int = 0,
    cure: str = RUN_CURE,
) -> Iterator[Path]:
    """Yields an empty temporary folder, which becomes `target` after the block.

    All files are synced before the rename, so that a crash leaves the complete new folder or the old state. With
    `overwrite` an older folder is replaced, else a folder with files at `target` is an error. `needed` (bytes) and
    `cure` are for the message about a full disk.

    Raises `UserError` or `TrainingError` with path and reason. After any exception `target` is unchanged and the
    temporary folder is removed.
    """
    fresh = temporary_path(target)
    with as_user_error(target, needed, cure):
        try:
            fresh.mkdir(parents=True)
            yield fresh
            _fsync_tree(fresh)
            if overwrite and target.is_dir():
                _replace_folder(fresh, target)
            else:
                fresh.replace(target)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        fsync_dir(target.parent)


def _replace_folder(fresh: Path, target: Path) -> None:
    """Renames `fresh` to `target`. A folder cannot be renamed to a folder with files, so the old one is renamed first;
    `clean_stale` renames it back after a crash."""
    backup = target.with_name(f".aside-{target.name}")
    shutil.rmtree(backup, ignore_errors=True)
    target.replace(backup)
    try:
        fresh.replace(target)
    except BaseException:
        backup.replace(target)
        raise
    shutil.rmtree(backup, ignore_errors=True)


def _fsync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            fsync_dir(path)
        else:
            _fsync(path)


def _fsync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_dir(folder: Path) -> None:
    """Makes the names in the folder durable: fsync of a file does not store its name."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def clean_stale(folder: Path, name: str | None = None) -> None:
    """Removes temporary files and folders that a crash left in `folder`, and renames a replaced folder back.

    With `name` only those of the file or folder of this name: other programs can use the folder too.
    """
    if name is None:
        temporary, replaced = ".tmp-*", ".aside-*"
    else:
        temporary, replaced = f".tmp-{glob.escape(name)}-*", f".aside-{glob.escape(name)}"
    for leftover in folder.glob(temporary):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            with suppress(OSError):
                leftover.unlink()
    for backup in folder.glob(replaced):
        target = backup.with_name(backup.name.removeprefix(".aside-"))
        if os.path.lexists(target):
            shutil.rmtree(backup, ignore_errors=True)
        else:
            with as_user_error(target):
                backup.replace(target)
