"""The manifest of a folder that is written once: size and hash of each file, so that a change is detected."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from lowrank_tune.json_files import MAX_BYTES, parse_json
from lowrank_tune.regular_files import check_regular_file, read_regular_file

MANIFEST = "manifest.json"


def content_hash(data: bytes) -> str:
    """Returns the hash of a file's bytes."""
    return blake2b(data, digest_size=16).hexdigest()


def manifest_bytes(entries: Mapping[str, Any]) -> bytes:
    """Returns the manifest's bytes. `total` is the hash of all other entries."""
    manifest = dict(entries)
    manifest.pop("total", None)
    manifest["total"] = content_hash(json.dumps(manifest, sort_keys=True).encode())
    return json.dumps(manifest, sort_keys=True, indent=1).encode()


def manifest_files(folder: Path) -> dict[str, str]:
    """Returns the hash of each file by its name relative to the folder; empty if the folder has no valid manifest."""
    try:
        raw = read_regular_file(folder / MANIFEST, MAX_BYTES)
        manifest = parse_json(raw)
        if manifest_bytes(manifest) != raw:
            return {}
        return {name: str(facts["blake2b"]) for name, facts in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def changed_file(folder: Path, names: Iterable[str]) -> str | None:
    """Returns the first of these files that is missing or differs from the manifest of the folder; None if there is
    none. Files that are not in the manifest are not read."""
    expected = manifest_files(folder)
    for name in names:
        if name in expected and _hash_of(folder / name) != expected[name]:
            return name
    return None


def _hash_of(path: Path) -> str | None:
    try:
        check_regular_file(path)
        return content_hash(path.read_bytes())
    except OSError:
        return None
