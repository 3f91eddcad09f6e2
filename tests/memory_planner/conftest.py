"""Each test has an empty cache of simulations: one that changes the planner must not read what another one stored."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("LOWRANK_TUNE_CACHE", str(folder))
    return folder
