"""The manifest of a folder that is written in one piece: size and hash of each file, so that a change is found."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def content_hash(data: bytes) -> str:
    """The hash of a file's bytes."""
    return blake2b(data, digest_size=16).hexdigest()


def manifest_bytes(entries: Mapping[str, Any]) -> bytes:
    """The manifest's bytes; `total` guards the manifest itself."""
    entries = {key: value for key, value in entries.items() if key != "total"}
    total = content_hash(json.dumps(entries, sort_keys=True).encode())
    return json.dumps({**entries, "total": total}, sort_keys=True, indent=1).encode()


def manifest_files(folder: Path) -> dict[str, str]:
    """Hash of each file by its name relative to the folder; nothing where the folder has no valid manifest."""
    try:
        raw = (folder / MANIFEST).read_bytes()
        manifest = json.loads(raw)
        if manifest_bytes(manifest) != raw:
            return {}
        return {name: str(facts["blake2b"]) for name, facts in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def changed_file(folder: Path, names: Iterable[str]) -> str | None:
    """The first of these files that is missing or differs from what the manifest of the folder lists. Files that it
    does not list are not read."""
    expected = manifest_files(folder)
    for name in names:
        if name in expected and _hash_of(folder / name) != expected[name]:
            return name
    return None


def _hash_of(path: Path) -> str | None:
    try:
        return content_hash(path.read_bytes())
    except OSError:
        return None
