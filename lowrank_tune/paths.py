"""Paths that may not exist."""

from __future__ import annotations

import os
from pathlib import Path


def nearest_existing(path: Path) -> Path:
    """Returns the path with its links resolved, or its nearest parent that exists. A path that cannot be looked up
    counts as missing: its name may be too long, or it may be in the folder of another user."""
    real = Path(os.path.realpath(path))
    # Path.exists raises OSError for a path that cannot be looked up.
    return next(ancestor for ancestor in (real, *real.parents) if os.path.lexists(ancestor))
