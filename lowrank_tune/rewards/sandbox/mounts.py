"""What a confined process may read: Python's own standard library and the system's libraries that it loads. Nothing
else."""

from __future__ import annotations

import os
import sys

SYSTEM_PATHS = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo")
DEVICES = ("/dev/null", "/dev/urandom")
WRITABLE = ("/dev/null",)


def library_paths() -> list[str]:
    """Where Python imports its standard library from, as real paths; without site-packages."""
    return [os.path.realpath(path) for path in sys.path if os.path.exists(path)]


def readable(paths: list[str]) -> list[str]:
    """All that may be read, the outermost only: `paths`, the libraries beside them, the system's. What is missing here
    is left out."""
    lib_dirs = [os.path.dirname(path) for path in paths if os.path.basename(os.path.dirname(path)) == "lib"]
    existing = sorted(
        {os.path.realpath(path) for path in (*paths, *lib_dirs, *SYSTEM_PATHS, *DEVICES) if os.path.exists(path)}
    )
    return [path for path in existing if not any(path.startswith(other + "/") for other in existing)]


def root_symlinks() -> list[tuple[str, str]]:
    """Names at the root that lead elsewhere, as /lib to /usr/lib: (name, where to)."""
    return [(path, os.path.realpath(path)) for path in SYSTEM_PATHS[:4] if os.path.islink(path)]
