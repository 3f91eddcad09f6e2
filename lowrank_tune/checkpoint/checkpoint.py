"""Snapshots on disk: atomic saving, verified loading, the newest valid one, and the deletion of old ones."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path, PurePosixPath
from secrets import token_hex
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from lowrank_tune.checkpoint.atomic_files import as_user_error, clean_stale, fsync_dir, write_new
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit, LogMessage
from lowrank_tune.manifest import MANIFEST, changed_file, content_hash, manifest_bytes, manifest_files

VERSION = 1
REQUIRED_FILES = ("adapter_config.json", "adapter_model.safetensors")
ADAPTER_FILES = (*REQUIRED_FILES, "stack.json", "rope.json")
_STEP = re.compile(r"step-(0|[1-9]\d*)")


class CorruptCheckpoint(UserError):
    """A checkpoint that is not what was written."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"the checkpoint {path} is broken: {reason}")


@dataclass
class Snapshot:
    """What a checkpoint holds, by file name relative to its folder: `*.safetensors` files of named tensors, `*.json`
    documents, and `raw_files` as they are."""

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    documents: dict[str, Any] = field(default_factory=dict)
    raw_files: dict[str, bytes] = field(default_factory=dict)


def write_atomically(target: Path, snapshot: Snapshot) -> Path:
    """Writes the snapshot as the folder `target`, replacing an older one in whole.

    Raises `UserError` or `TrainingError` with path and reason; then nothing has changed, and no temporary folder is
    left.
    """
    fresh = target.with_name(f".tmp-{target.name}-{token_hex(4)}")
    with as_user_error(target):
        if target.is_dir() and not (target / MANIFEST).is_file() and any(target.iterdir()):
            raise UserError(f"cannot write {target}: it holds files that this program did not write")
        try:
            fresh.mkdir(parents=True)
            files = {}
            for name, data in _files(snapshot):
                (fresh / name).parent.mkdir(parents=True, exist_ok=True)
                write_new(fresh / name, data)
                files[name] = {"size": len(data), "blake2b": content_hash(data)}
            write_new(fresh / MANIFEST, manifest_bytes({"version": VERSION, "name": target.name, "files": files}))
            for folder in {
                parent for name in files for parent in (fresh / name).parents if parent.is_relative_to(fresh)
            } | {fresh}:
                fsync_dir(folder)
            _replace_folder(fresh, target)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        fsync_dir(target.parent)
    return target


def _replace_folder(fresh: Path, target: Path) -> None:
    """Renames onto the target. A folder cannot be renamed onto a full one, so that steps aside; `clean_stale` brings it
    back after a crash."""
    if not target.is_dir():
        fresh.replace(target)
        return
    backup = target.with_name(f".aside-{target.name}")
    shutil.rmtree(backup, ignore_errors=True)
    target.replace(backup)
    try:
        fresh.replace(target)
    except BaseException:
        backup.replace(target)
        raise
    shutil.rmtree(backup, ignore_errors=True)


def _files(snapshot: Snapshot) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each file. Bytes first, then our own write: safetensors' own writing hides the reason of a
    failure."""
    for name, tensors in snapshot.tensors.items():
        assert name.endswith(".safetensors") and _inside(name), name
        # no shared storage
        alone = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
        yield name, safetensors.torch.save(alone, metadata={"format": "pt"})
    for name, document in snapshot.documents.items():
        assert name.endswith(".json") and _inside(name) and name != MANIFEST, name
        yield name, json.dumps(document, indent=1).encode()  # Python's NaN and Infinity: a state comes back exactly
    for name, data in snapshot.raw_files.items():
        assert _inside(name) and name != MANIFEST and name not in (*snapshot.tensors, *snapshot.documents), name
        yield name, data


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts


def load(path: Path, name: str | None = None) -> Snapshot:
    """The checkpoint, with every byte verified; with `name`, it must also have been written under that name.

    Raises `CorruptCheckpoint`; or `UserError` for one that cannot be opened or is of a newer version. Files outside the
    manifest are not read.
    """
    raw = _read(path, MANIFEST)
    try:
        manifest = json.loads(raw)
        if manifest_bytes(manifest) != raw:
            raise CorruptCheckpoint(path, f"{MANIFEST} has changed")
        if manifest["version"] != VERSION:
            raise UserError(
                f"{path} was written by another version of this program (format {manifest['version']}, not {VERSION})"
            )
        if name is not None and manifest["name"] != name:
            raise CorruptCheckpoint(path, f"it was written as {manifest['name']}")
        snapshot = Snapshot()
        for file, facts in manifest["files"].items():
            if not _inside(file):
                raise CorruptCheckpoint(path, f"{MANIFEST} names {file!r}, which lies outside")
            data = _read(path, file)
            if len(data) != facts["size"]:
                raise CorruptCheckpoint(path, f"{file} has {len(data)} bytes, not {facts['size']}")
            if content_hash(data) != facts["blake2b"]:
                raise CorruptCheckpoint(path, f"the content of {file} has changed")
            if file.endswith(".safetensors"):
                snapshot.tensors[file] = safetensors.torch.load(data)
            elif file.endswith(".json"):
                snapshot.documents[file] = json.loads(data)
            else:
                snapshot.raw_files[file] = data
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CorruptCheckpoint(path, f"it cannot be understood ({error})") from error
    return snapshot


def _read(path: Path, name: str) -> bytes:
    try:
        return (path / name).read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise CorruptCheckpoint(path, f"{name} is missing") from error
    except OSError as error:
        if error.errno == errno.EIO:
            raise CorruptCheckpoint(path, f"{name} cannot be read from the disk") from error
        # permissions: no reason to set it aside
        raise UserError(f"cannot read {path / name}: {error.strerror}") from error


def latest_checkpoint(checkpoints: Path, emit: Emit) -> tuple[int, Snapshot] | None:
    """The newest valid `step-N`. A broken one is renamed to `broken-step-N` with a warning; what a crash left behind is
    removed."""
    clean_stale(checkpoints)
    for step, path in reversed(_steps(checkpoints)):
        try:
            return step, load(path, path.name)
        except CorruptCheckpoint as broken:
            quarantined = _quarantine(path)
            message = f"the checkpoint {path.name} is broken ({broken.reason}): it was set aside as {quarantined.name}"
            emit(LogMessage(message=message, level="warning"))
    return None


def _quarantine(path: Path) -> Path:
    """Renames a broken folder to `broken-NAME`, or the next free name like it."""
    names = (f"broken-{path.name}" + (f"-{k}" if k > 1 else "") for k in count(1))
    quarantined = next(candidate for candidate in map(path.with_name, names) if not candidate.exists())
    with as_user_error(quarantined):
        path.replace(quarantined)
    return quarantined


def broken_final_reason(final: Path) -> str | None:
    """Why the final folder of an ended run must be written again: it or its adapter is missing, its manifest is not
    valid, or an adapter in it is no longer what was written. None where it is whole. What a person may edit, such as
    the model card, is not read."""
    if not final.is_dir():
        return f"{final} is missing"
    listed = manifest_files(final)
    if not listed and (final / MANIFEST).exists():
        return f"{final / MANIFEST} has changed since it was written"
    for name in REQUIRED_FILES:
        if not (final / name).exists():
            return f"{final / name} is missing"
    adapter_files = [name for name in listed if PurePosixPath(name).name in ADAPTER_FILES]
    changed = changed_file(final, adapter_files)
    if changed is None:
        return None
    return f"{final / changed} is missing or has changed since it was written"


def quarantine_broken_final(final: Path, emit: Emit) -> bool:
    """Whether the final folder of an ended run must be written again: with a warning, and after renaming what is there
    to `broken-final`. Raises UserError where the run has no checkpoint to write it from; then nothing has changed."""
    reason = broken_final_reason(final)
    if reason is None:
        return False
    checkpoints = final.with_name("checkpoints")
    if not _steps(checkpoints):
        raise UserError(
            f"{reason}, and {checkpoints} holds no checkpoint to write it from: restore {final} from a copy, or delete "
            f"{final.parent} to train this stage again"
        )
    if not final.is_dir():
        message = f"{reason}: it is written again from a checkpoint"
    else:
        quarantined = _quarantine(final)
        message = f"{reason}: {final.name} was set aside as {quarantined.name}, and is written again from a checkpoint"
    emit(LogMessage(message=message, level="warning"))
    return True


def rotate(checkpoints: Path, keep: int, best: int | None = None) -> None:
    """Deletes all but the newest `keep` checkpoints and the best step. Folders without our manifest are not touched."""
    ours = [(step, path) for step, path in _steps(checkpoints) if (path / MANIFEST).is_file()]
    for step, path in ours[: max(0, len(ours) - keep)]:
        if step == best:
            continue
        doomed = path.with_name(f".tmp-{path.name}-{token_hex(4)}")  # half deleted, it must not look like a checkpoint
        with suppress(OSError):  # what cannot be deleted costs space, not the run
            path.replace(doomed)
            shutil.rmtree(doomed)


def _steps(checkpoints: Path) -> list[tuple[int, Path]]:
    matches = ((_STEP.fullmatch(path.name), path) for path in checkpoints.glob("step-*"))
    return sorted((int(match[1]), path) for match, path in matches if match)
