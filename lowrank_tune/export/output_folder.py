"""The folder of an export: complete or absent, and never in place of files that are not an export.

An older folder is replaced only if it is an export of this program and contains nothing else: `export.json` lists its
files with their hashes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowrank_tune.checkpoint import as_user_error, atomic_folder, clean_stale
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit, Progress
from lowrank_tune.full_disk import EXPORT_CURE
from lowrank_tune.json_files import read_json_object

MANIFEST = "export.json"
DISK_MARGIN = 64 << 20
"""Bytes for tokenizer and configuration."""


def check_disk_space(
    target: Path,
    num_bytes: int,
    label: str,
) -> None:
    """Raises UserError if the disk of `target` has less than `num_bytes` free for `label`, with a margin."""
    folder = Path("/")
    for parent in target.resolve().parents:
        if parent.is_dir():
            folder = parent
            break
    needed = num_bytes + DISK_MARGIN
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{target}: {label} needs {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free there; give another "
            "folder with --out, or free some space"
        )


def check_overwritable(target: Path) -> None:
    """Raises UserError if `target` exists and is not a folder that an export may replace."""
    if not os.path.lexists(target):
        return
    if not target.is_dir() or target.is_symlink():
        raise UserError(f"{target} is not a folder; give another one with --out")
    with as_user_error(target):
        existing = {str(path.relative_to(target)) for path in target.rglob("*") if not path.is_dir()}
    own: set[str] = set()
    listed = read_json_object(target / MANIFEST).get("files")
    if isinstance(listed, Mapping):
        own = {MANIFEST, *listed}
    foreign = existing - own
    if foreign:
        raise UserError(
            f"{target} exists and contains {min(foreign)}, which is not part of an export of this program; give "
            "another folder with --out"
        )


@contextmanager
def export_folder(
    target: Path,
    facts: Mapping[str, Any],
    emit: Emit,
    needed: int = 0,
) -> Iterator[Path]:
    """Yields an empty folder, which becomes `target` with an `export.json` after the block; after any exception
    `target` is unchanged. `needed` bytes are named in the message about a full disk."""
    check_overwritable(target)
    clean_stale(target.parent, target.name)
    with atomic_folder(target, needed=needed, cure=EXPORT_CURE) as folder:
        yield folder
        manifest = {
            "version": 1,
            **facts,
            "files": _file_entries(folder, emit),
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2))


def _file_entries(folder: Path, emit: Emit) -> dict[str, dict[str, Any]]:
    """Returns size and hash of all files, by relative name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {}
    for number, path in enumerate(files, 1):
        with path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        entries[str(path.relative_to(folder))] = {"size": path.stat().st_size, "sha256": digest}
        emit(
            Progress(
                description="hashing what was written",
                done=number,
                total=len(files),
            )
        )
    return entries
