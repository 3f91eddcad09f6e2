"""Checkpoints on disk: atomic saving, verified loading, selection of the newest valid one, deletion of old ones."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from lowrank_tune.checkpoint.atomic_files import (
    as_user_error,
    atomic_folder,
    clean_stale,
    temporary_path,
    write_new,
)
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit, warning
from lowrank_tune.json_files import parse_json
from lowrank_tune.manifest import (
    MANIFEST,
    changed_file,
    content_hash,
    manifest_bytes,
    manifest_files,
)

VERSION = 1
REQUIRED_FILES = ("adapter_config.json", "adapter_model.safetensors")
ADAPTER_FILES = (*REQUIRED_FILES, "stack.json", "rope.json")
STEP_NAME = re.compile(r"step-(0|[1-9]\d*)")


class CorruptCheckpoint(UserError):
    """Error for a checkpoint whose files differ from what was written."""

    def __init__(
        self,
        path: Path,
        reason: str,
    ) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"the checkpoint {path} is broken: {reason}")


@dataclass
class Snapshot:
    """Content of a checkpoint by file name relative to its folder: `*.safetensors` files of named tensors, `*.json`
    documents, and `raw_files` as bytes."""

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    documents: dict[str, Any] = field(default_factory=dict)
    raw_files: dict[str, bytes] = field(default_factory=dict)


def write_atomically(target: Path, snapshot: Snapshot) -> Path:
    """Writes the snapshot as the folder `target`, replaces an older one as a whole, and returns `target`.

    Raises `UserError` or `TrainingError` with path and reason; then nothing has changed, and no temporary folder is
    left.
    """
    with as_user_error(target):
        if target.is_dir() and not (target / MANIFEST).is_file() and any(target.iterdir()):
            raise UserError(f"cannot write {target}: it contains files that this program did not write")
    with atomic_folder(target, needed=_num_bytes(snapshot)) as folder:
        entries = {}
        for name, data in _files(snapshot):
            (folder / name).parent.mkdir(
                parents=True,
                exist_ok=True,
            )
            write_new(folder / name, data)
            entries[name] = {"size": len(data), "blake2b": content_hash(data)}
        manifest = {
            "version": VERSION,
            "name": target.name,
            "files": entries,
        }
        write_new(folder / MANIFEST, manifest_bytes(manifest))
    return target


def _num_bytes(snapshot: Snapshot) -> int:
    """Returns the bytes of the tensors and the raw files; the documents are small."""
    size = sum(len(data) for data in snapshot.raw_files.values())
    for tensors in snapshot.tensors.values():
        size += sum(tensor.nbytes for tensor in tensors.values())
    return size


def _files(snapshot: Snapshot) -> Iterator[tuple[str, bytes]]:
    """Yields name and bytes of each file.

    Tensors are serialized to bytes first, because the errors of safetensors' own file writer hide their reason.
    """
    for name, tensors in snapshot.tensors.items():
        _check_name(name, ".safetensors")
        # copies, since safetensors refuses tensors that share storage
        copies = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
        yield name, safetensors.torch.save(copies, metadata={"format": "pt"})
    for name, document in snapshot.documents.items():
        _check_name(name, ".json")
        # Python's NaN and Infinity are allowed: a state is restored exactly
        yield name, json.dumps(document, indent=1).encode()
    for name, data in snapshot.raw_files.items():
        _check_name(name, "")
        assert name not in (*snapshot.tensors, *snapshot.documents), name
        yield name, data


def _check_name(name: str, suffix: str) -> None:
    assert name.endswith(suffix) and _is_inside(name) and name != MANIFEST, name


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts


def load(path: Path, name: str | None = None) -> Snapshot:
    """Returns the checkpoint after verifying every byte; with `name`, it must also have been written under that name.

    Raises `CorruptCheckpoint`; or `UserError` for a checkpoint that cannot be opened or has a newer version. Files that
    the manifest does not list are not read.
    """
    raw_manifest = _read(path, MANIFEST)
    try:
        manifest = parse_json(raw_manifest)
        if manifest_bytes(manifest) != raw_manifest:
            raise CorruptCheckpoint(path, f"{MANIFEST} has changed")
        version = manifest["version"]
        if version != VERSION:
            raise UserError(f"{path} was written by another version of this program (format {version}, not {VERSION})")
        if name is not None and manifest["name"] != name:
            raise CorruptCheckpoint(path, f"it was written as {manifest['name']}")
        snapshot = Snapshot()
        for file, entry in manifest["files"].items():
            _load_file(snapshot, path, file, entry)
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CorruptCheckpoint(path, f"it cannot be understood ({error})") from error
    return snapshot


def _load_file(
    snapshot: Snapshot,
    path: Path,
    file: str,
    entry: Mapping[str, Any],
) -> None:
    """Verifies one file of the manifest and adds it to the snapshot."""
    if not _is_inside(file):
        raise CorruptCheckpoint(path, f"{MANIFEST} names {file!r}, which is outside of the folder")
    data = _read(path, file)
    if len(data) != entry["size"]:
        raise CorruptCheckpoint(path, f"{file} has {len(data)} bytes, not {entry['size']}")
    if content_hash(data) != entry["blake2b"]:
        raise CorruptCheckpoint(path, f"the content of {file} has changed")
    if file.endswith(".safetensors"):
        snapshot.tensors[file] = safetensors.torch.load(data)
    elif file.endswith(".json"):
        snapshot.documents[file] = parse_json(data)
    else:
        snapshot.raw_files[file] = data


def _read(path: Path, name: str) -> bytes:
    try:
        return (path / name).read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise CorruptCheckpoint(path, f"{name} is missing") from error
    except OSError as error:
        if error.errno == errno.EIO:
            raise CorruptCheckpoint(path, f"{name} cannot be read from the disk") from error
        # a missing permission does not make the checkpoint corrupt
        raise UserError(f"cannot read {path / name}: {error.strerror}") from error


def latest_checkpoint(checkpoints: Path, emit: Emit) -> tuple[int, Snapshot] | None:
    """Returns step and content of the newest valid `step-N`, None without one.

    Corrupt checkpoints are renamed to `broken-step-N` with a warning, and temporary files of a crash are removed.
    """
    clean_stale(checkpoints)
    for step, path in reversed(saved_steps(checkpoints)):
        try:
            return step, load(path, path.name)
        except CorruptCheckpoint as broken:
            quarantined = _quarantine(path)
            emit(
                warning(
                    f"the checkpoint {path.name} is broken ({broken.reason}): it was set aside as {quarantined.name}"
                )
            )
    return None


def _quarantine(path: Path) -> Path:
    """Renames a broken folder to `broken-NAME`, or `broken-NAME-2`, `broken-NAME-3` and so on, and returns its path."""
    quarantined = path.with_name(f"broken-{path.name}")
    numbers = count(2)
    while quarantined.exists():
        quarantined = path.with_name(f"broken-{path.name}-{next(numbers)}")
    with as_user_error(quarantined):
        path.replace(quarantined)
    return quarantined


def broken_final_reason(final: Path) -> str | None:
    """Returns why the final folder of a finished run must be written again, None if it is complete.

    It or its adapter is missing, its manifest is invalid, or an adapter in it has changed. Files that a user can edit,
    such as the model card, are not read.
    """
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
    """Returns whether the final folder of a finished run must be written again; a broken one is renamed to
    `broken-final` with a warning.

    Raises UserError if the run has no checkpoint to write it from; then nothing has changed.
    """
    reason = broken_final_reason(final)
    if reason is None:
        return False
    checkpoints = final.with_name("checkpoints")
    if not saved_steps(checkpoints):
        raise UserError(
            f"{reason}, and {checkpoints} contains no checkpoint to write it from: restore {final} from a copy, or "
            f"delete {final.parent} to train this stage again"
        )
    if not final.is_dir():
        message = f"{reason}: it is written again from a checkpoint"
    else:
        quarantined = _quarantine(final)
        message = f"{reason}: {final.name} was set aside as {quarantined.name}, and is written again from a checkpoint"
    emit(warning(message))
    return True


def rotate(
    checkpoints: Path,
    keep: int,
    best: int | None = None,
) -> None:
    """Deletes all checkpoints except the newest `keep` and the best step. Folders without a manifest are kept."""
    ours = [(step, path) for step, path in saved_steps(checkpoints) if (path / MANIFEST).is_file()]
    for step, path in ours[: max(0, len(ours) - keep)]:
        if step == best:
            continue
        # a partly deleted folder must not look like a checkpoint
        doomed = temporary_path(path)
        # a folder that cannot be deleted takes space, but must not stop the run
        with suppress(OSError):
            path.replace(doomed)
            shutil.rmtree(doomed)


def saved_steps(checkpoints: Path) -> list[tuple[int, Path]]:
    """Returns number and folder of all checkpoints, oldest first."""
    steps = []
    for path in checkpoints.glob("step-*"):
        match = STEP_NAME.fullmatch(path.name)
        if match is not None:
            steps.append((int(match[1]), path))
    return sorted(steps)
