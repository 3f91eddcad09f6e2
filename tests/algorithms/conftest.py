"""Fixtures of short runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from models import CPU

from lowrank_tune import Recipe, run


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("LOWRANK_TUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def sft_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short SFT run, whose adapter stays frozen below others."""
    recipe = {
        "name": "sft",
        "algorithm": "sft",
        "base": {"model": "tiny-tutor", "bits": 4},
        "adapters": {"policy": {"r": 4}},
        "data": {"train": [{"dataset": "builtin:arithmetic", "max_samples": 40}]},
        "train": {"max_steps": 3, "global_batch_size": 8, "learning_rate": 5e-3, "gradient_checkpointing": False},
    }
    out = tmp_path_factory.mktemp("below") / "sft"
    run(Recipe.from_dict(recipe), out=out, ui="none", device=CPU)
    return out
