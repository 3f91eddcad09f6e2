"""The step whose adapter becomes `final/` is the best one by held-out answers of the kind that the summary reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from crash import small_recipe

from lowrank_tune import Recipe, run
from lowrank_tune.evaluation.grading import GradedAnswer
from lowrank_tune.events import StepEnd
from lowrank_tune.training import evaluator

RIGHT = {0.0: [0, 4, 3], 1.0: [0, 1, 3]}
"""Of four questions, by temperature: before the first step and after each. Greedy answers are all right at once, and
one is wrong at the second step; most sampled ones get right only there."""


@pytest.mark.parametrize(("num_samples", "best"), [(1, 1), (8, 2)])
def test_greedy_answers_do_not_decide_where_sampled_ones_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_samples: int, best: int
) -> None:
    steps = [0]

    def answers(roles: Any, role: str, template: Any, questions: Any, count: int, sampling: Any, emit: Any) -> Any:
        number = RIGHT[sampling.temperature][steps[-1]]
        return [[GradedAnswer("12", 2, True, i < number, prompt_index=i)] * count for i in range(len(questions))]

    def follow(event: Any) -> None:
        if isinstance(event, StepEnd):
            steps.append(event.step)

    monkeypatch.setattr(evaluator, "generate_answers", answers)
    recipe = small_recipe(max_steps=2, save_steps=1)
    recipe["evaluate"] |= {
        "eval_steps": 1,
        "num_prompts": 4,
        "num_samples": num_samples,
        "metric_for_best_model": "accuracy",
    }
    summary = run(Recipe.from_dict(recipe), out=tmp_path / "run", ui="none", on_event=follow).summary
    assert summary["best"]["step"] == best
