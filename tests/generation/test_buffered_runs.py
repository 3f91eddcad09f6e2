"""Whole runs whose completions are drawn several tokens at a time, as on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from algorithm_helpers import run_with_events
from crash import logged_events, run_fingerprint, small_recipe
from test_run import stopped_after

from lowrank_tune.generation import Engine


@pytest.fixture
def buffered(monkeypatch: pytest.MonkeyPatch) -> None:
    """All engines decode with buffers: rollouts, held-out answers and samples."""
    init = Engine.__init__

    def with_buffers(engine: Engine, *arguments: Any, **options: Any) -> None:
        init(engine, *arguments, **options)
        engine.buffered = True

    monkeypatch.setattr(Engine, "__init__", with_buffers)


@pytest.mark.usefixtures("buffered")
@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_a_continued_run_is_bit_equal(algorithm: str, tmp_path: Path) -> None:
    recipe = small_recipe(algorithm, max_steps=4)
    straight, _ = run_with_events(recipe, tmp_path / "straight")
    assert stopped_after(recipe, tmp_path / "run", 2) == 2
    continued, _ = run_with_events(recipe, tmp_path / "run")
    # Not in the assertion: pytest's comparison of the two takes minutes.
    is_equal = run_fingerprint(continued.folder) == run_fingerprint(straight.folder)
    assert is_equal
    steps = [event for event in logged_events(continued.folder / "events.jsonl") if event["event"] == "step_end"]
    assert all(0 <= event["stats"]["completions/wasted_ratio"] < 1 for event in steps)
