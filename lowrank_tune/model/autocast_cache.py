"""Autocast without its cache of casts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_autocast_cache() -> Iterator[None]:
    """Disables autocast's cache of casts, so that a graph that is captured or traced casts its own weights."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
