"""Skips tests that need the fake GPU where it cannot be used."""

from __future__ import annotations

import os

import pytest
from fake_guard import unavailable


def require_fake_gpu() -> None:
    """Skips the test if there is no fake GPU here, and fails it if the variable `CI` is set: a build server that skips
    these tests would not notice the faults that only they find."""
    reason = unavailable()
    if reason is None:
        return
    if os.environ.get("CI"):
        pytest.fail(f"{reason}, and CI is set")
    pytest.skip(reason)
