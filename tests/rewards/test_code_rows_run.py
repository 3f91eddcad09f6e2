"""The published rows of HumanEval and MBPP, from the file to a run: no setting names their columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from code_rows import HUMANEVAL, MBPP, MBPP_SANITIZED
from models import CPU
from test_python_tests import needs_sandbox

from lowrank_tune import Recipe, run
from lowrank_tune.events import LogMessage, StepEnd

ROLLOUT = {"num_generations": 2, "max_new_tokens": 8}


@needs_sandbox
@pytest.mark.slow
def test_a_run_reads_published_rows_with_unit_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWRANK_TUNE_CACHE", str(tmp_path / "cache"))
    for name, row in {"humaneval": HUMANEVAL, "mbpp": MBPP, "sanitized": MBPP_SANITIZED}.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    recipe = {
        "algorithm": "grpo",
        "base": {"model": "tiny-tutor"},
        "data": {"train": [{"dataset": str(path)} for path in sorted(tmp_path.glob("*.jsonl"))]},
        "rewards": [{"name": "python_tests"}],
        "rollout": ROLLOUT,
        "train": {"max_steps": 2, "prompts_per_step": 2},
    }
    events: list[Any] = []
    run(Recipe.from_dict(recipe), out=tmp_path / "run", ui="none", device=CPU, on_event=events.append)
    assert sum(isinstance(event, StepEnd) for event in events) == 2
    messages = " ".join(event.message for event in events if isinstance(event, LogMessage))
    assert "reward python_tests: reference answers 1" in messages
