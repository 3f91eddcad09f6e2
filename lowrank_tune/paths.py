"""Paths that may not exist."""

from __future__ import annotations

import os
from pathlib import Path


def nearest_existing(path: Path) -> Path:
    """The path with its links followed, or its nearest parent that exists. A path that cannot be looked up, such as one
    with a name that is too long or one in the folder of another user, counts as one that does not exist."""
    real = Path(os.path.realpath(path))
    # Path.exists raises OSError where a path cannot be looked up
    return next(ancestor for ancestor in (real, *real.parents) if os.path.lexists(ancestor))
