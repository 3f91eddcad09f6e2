"""The paths that a confined process may read: only Python's standard library and the system libraries that it loads."""

from __future__ import annotations

import os
import sys

SYSTEM_PATHS = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo")
DEVICES = ("/dev/null", "/dev/urandom")
WRITABLE = ("/dev/null",)


def library_paths() -> list[str]:
    """Returns the paths from which Python imports its standard library, as real paths, without site-packages."""
    return [os.path.realpath(path) for path in sys.path if os.path.exists(path)]


def readable(paths: list[str]) -> list[str]:
    """Returns all paths that may be read: `paths`, the libraries beside them, and those of the system. Paths that do
    not exist, and paths below another one, are left out."""
    candidates = [*paths, *SYSTEM_PATHS, *DEVICES]
    for parent in map(os.path.dirname, paths):
        if os.path.basename(parent) == "lib":
            candidates.append(parent)
    existing = {os.path.realpath(path) for path in candidates if os.path.exists(path)}
    return [path for path in sorted(existing) if not _is_below_any(path, existing)]


def _is_below_any(path: str, others: set[str]) -> bool:
    return any(path.startswith(other + "/") for other in others)


def root_symlinks() -> list[tuple[str, str]]:
    """Returns (name, target) of the symbolic links at the root, as /lib to /usr/lib."""
    return [(path, os.path.realpath(path)) for path in SYSTEM_PATHS[:4] if os.path.islink(path)]
