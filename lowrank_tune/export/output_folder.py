"""Where an export lies: a folder that is whole or absent, and that never takes the place of something else.

It is written beside its target and gets its name last. A folder there before is replaced only where it is an export of
this program and holds nothing else: `export.json` lists its files with their hashes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any

from lowrank_tune.checkpoint import as_user_error
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit, Progress

MANIFEST = "export.json"
DISK_MARGIN = 64 << 20  # bytes for tokenizer and configuration


def check_disk_space(target: Path, needed: int, label: str) -> None:
    """Raises UserError where the disk of `target` has not `needed` bytes for `label`, before anything is written."""
    folder = next((parent for parent in target.resolve().parents if parent.is_dir()), Path("/"))
    free = shutil.disk_usage(folder).free
    if free < needed + DISK_MARGIN:
        raise UserError(
            f"{target}: {label} needs {(needed + DISK_MARGIN) / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free "
            "there; give another folder with --out, or make room"
        )


def check_overwritable(target: Path) -> None:
    """Raises UserError where something lies at `target` that an export may not replace."""
    if not os.path.lexists(target):
        return
    if not target.is_dir() or target.is_symlink():
        raise UserError(f"{target} is no folder; give another one with --out")
    with as_user_error(target):
        existing = {str(path.relative_to(target)) for path in target.rglob("*") if not path.is_dir()}
    try:
        listed = json.loads((target / MANIFEST).read_bytes())["files"]
        own = {MANIFEST, *listed}
    except (OSError, ValueError, KeyError, TypeError):
        own = set()
    if existing and not (MANIFEST in existing and existing <= own):
        foreign = min(existing - own) if own else min(existing)
        raise UserError(
            f"{target} exists and holds what is no export of this program ({foreign} for one); give another folder "
            f"with --out"
        )


@contextmanager
def export_folder(target: Path, facts: Mapping[str, Any], emit: Emit) -> Iterator[Path]:
    """An empty folder beside `target` that becomes it at the end, with `export.json`; after any exception nothing is
    left of it."""
    check_overwritable(target)
    with as_user_error(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        clean_stale(target)
        fresh = target.with_name(f".tmp-{target.name}-{token_hex(4)}")
        try:
            fresh.mkdir()
            yield fresh
            (fresh / MANIFEST).write_text(json.dumps({"version": 1, **facts, "files": _files(fresh, emit)}, indent=2))
            for path in (*fresh.rglob("*"), fresh):
                _sync(path)
            _replace_target(fresh, target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def clean_stale(target: Path) -> None:
    """Removes what an earlier export or merge into the same place left when it was killed; one that was stepping aside
    comes back."""
    for leftover in target.parent.glob(f".tmp-{target.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for backup in target.parent.glob(f".aside-{target.name}"):
        if os.path.lexists(target):
            shutil.rmtree(backup, ignore_errors=True)
        else:
            backup.replace(target)


def _files(folder: Path, emit: Emit) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {}
    for number, path in enumerate(files, 1):
        with path.open("rb") as opened:
            hashes[str(path.relative_to(folder))] = {
                "size": path.stat().st_size,
                "sha256": hashlib.file_digest(opened, "sha256").hexdigest(),
            }
        emit(Progress(description="hashing what was written", done=number, total=len(files)))
    return hashes


def _replace_target(fresh: Path, target: Path) -> None:
    """Renames onto the target. A folder cannot be renamed onto a full one, so that steps aside."""
    if not target.is_dir():
        fresh.replace(target)
        return
    backup = target.with_name(f".aside-{target.name}")
    target.replace(backup)
    try:
        fresh.replace(target)
    except BaseException:
        backup.replace(target)
        raise
    shutil.rmtree(backup, ignore_errors=True)


def _sync(path: Path) -> None:
    """To the disk itself, before the folder gets its name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems cannot do it for a folder
            raise
    finally:
        os.close(descriptor)
