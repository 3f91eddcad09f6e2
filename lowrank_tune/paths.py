"""The folder of the caches, and paths that may not exist."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Returns the folder of the caches. Raises RuntimeError if none is named and there is no home folder."""
    return Path(environ.get("LOWRANK_TUNE_CACHE") or "~/.cache/lowrank_tune").expanduser()


def hub_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Returns the folder in which the Hugging Face libraries store models and data sets."""
    return Path(environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()


def nearest_existing(path: Path) -> Path:
    """Returns the path with its links resolved, or its nearest parent that exists. A path that cannot be looked up
    counts as missing: its name may be too long, or it may be in the folder of another user."""
    real = Path(os.path.realpath(path))
    # Path.exists raises OSError for a path that cannot be looked up.
    return next(ancestor for ancestor in (real, *real.parents) if os.path.lexists(ancestor))
