"""The step whose adapter becomes `final/`: the best one by held-out answers of the kind that the summary reports, or by
validation loss; of pairs, an earlier one only if it is better than the last by more than noise."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from crash import run_fingerprint, small_recipe

from lowrank_tune import Recipe, run
from lowrank_tune.evaluation.grading import GradedAnswer
from lowrank_tune.evaluation.pair_losses import PairedDifference, ValidationResult, paired_difference
from lowrank_tune.events import Event, LogMessage, StepEnd
from lowrank_tune.training import evaluator
from lowrank_tune.training.best_step import Measured, choose_final, update_best
from lowrank_tune.training.checkpointer import BestCheckpoint

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


# --- the statistics ---------------------------------------------------------------------------------------------------


def test_standard_error_by_hand() -> None:
    """Differences 1, 2, 3, 6: mean 3, squares 4 + 1 + 0 + 9, variance 14 / 3, by 4 pairs. Lower losses are better."""
    difference = paired_difference([1.0, 2.0, 3.0, 3.0], [2.0, 4.0, 6.0, 9.0])
    assert difference == PairedDifference(3.0, pytest.approx(math.sqrt(14 / 3 / 4)), 4)  # type: ignore[arg-type]
    assert difference.is_positive
    assert not paired_difference([2.0, 4.0, 6.0, 9.0], [1.0, 2.0, 3.0, 3.0]).is_positive


def test_one_pair_decides_nothing() -> None:
    assert not paired_difference([0.0], [5.0]).is_positive


def decide(*steps: Sequence[float]) -> tuple[int | None, str, BestCheckpoint]:
    """Returns the final step of evaluations with these losses of pairs after steps 1, 2, ..., and the sentence about
    it.

    Between the steps the state is written to a checkpoint and read, as in a resumed run.
    """
    best = BestCheckpoint()
    for step, losses in enumerate(steps, 1):
        best = BestCheckpoint(**json.loads(json.dumps(vars(best))))
        result = ValidationResult({"loss": statistics.fmean(losses)}, list(losses))
        update_best(best, Measured.by_loss(step, result))
    message = choose_final(best, len(steps), "loss")
    return best.best_step, message, best


def test_a_step_that_is_better_by_noise_is_not_kept() -> None:
    """Differences of the first to the second: 3, -1, -1, -1, mean 0, then 4, -1, -1, -1: mean 0.25, error 1.25."""
    step, message, best = decide([-3.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0])
    assert step == 2 and best.best_metrics == {"loss": 0.25}
    assert message == (
        "validation loss differs by 0.25 ± 1.2 over 4 pairs between steps 1 and 2: final/ is the last step"
    )


def test_a_step_that_is_better_than_the_last_is_kept() -> None:
    step, message, _ = decide([1.0, 2.0, 1.0, 2.0], [3.0, 3.0, 3.0, 3.0])
    assert step == 1
    assert message == (
        "final/ is the adapter of step 1: its validation loss is lower by 1.5 ± 0.29 over 4 pairs than that of the "
        "last step"
    )


def test_progress_is_kept_also_if_no_step_alone_is_better_than_the_one_before() -> None:
    noise = [0.0, 3.0, -3.0, 1.0, -1.0, 2.0]
    steps = [[noise[(step + unit) % 6] - 0.7 * step for unit in range(6)] for step in range(6)]
    step, message, _ = decide(*steps, [0.0] * 6)
    assert step is not None and 4 <= step <= 6 and f"adapter of step {step}" in message


def test_of_one_pair_the_last_step_is_kept() -> None:
    step, message, _ = decide([1.0], [2.0])
    assert step == 2
    assert message == "too few pairs to compare the validation loss of steps 1 and 2: final/ is the last step"


def test_a_last_step_without_a_finite_loss_is_not_kept() -> None:
    step, message, _ = decide([2.0, 2.0], [math.nan, 3.0])
    assert step == 1 and message == "final/ is the adapter of step 1, which had the lowest validation loss"
    assert decide([math.nan, 1.0], [2.0, 2.0])[:2] == (2, "")


def test_without_pairs_the_lowest_loss_decides_however_small_the_difference() -> None:
    best = BestCheckpoint()
    for step, loss in enumerate((1.0, 0.5, 0.5, 0.500001), 1):
        update_best(best, Measured.by_loss(step, ValidationResult({"loss": loss})))
    assert choose_final(best, 4, "loss") == "final/ is the adapter of step 2, which had the lowest validation loss"
    assert best.best_step == 2


def test_by_accuracy_the_highest_decides_and_of_equal_ones_the_later() -> None:
    best = BestCheckpoint()
    for step, accuracy in enumerate((0.0, 0.5, 0.5, 0.495), 1):
        update_best(best, Measured.by_accuracy(step, {"accuracy": accuracy}))
    message = choose_final(best, 4, "accuracy")
    assert message == "final/ is the adapter of step 3, which answered most held-out questions"
    assert best.best_step == 3


def test_of_noise_the_last_step_is_kept_in_most_draws_and_of_progress_the_best() -> None:
    """Six pairs, five evaluations. Pure noise: no earlier step may be kept in most runs. A loss that rises by ten
    standard errors after the third evaluation: the third is always kept."""
    stream = random.Random(5)

    def draw(level: float) -> list[float]:
        return [level + stream.gauss(0.0, 1.0) for _ in range(6)]

    noise = [decide(*[draw(0.0) for _ in range(5)])[0] for _ in range(400)]
    assert statistics.fmean(step == 5 for step in noise) > 0.6
    overfitted = [decide(*[draw(level) for level in (6.0, 3.0, 0.0, 6.0, 6.0)])[0] for _ in range(200)]
    assert statistics.fmean(step == 3 for step in overfitted) > 0.99


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["sft", "dpo", "kto", "reward"])
def test_a_resumed_run_decides_as_the_straight_one(tmp_path: Path, algorithm: str) -> None:
    recipe = small_recipe(algorithm, max_steps=6, save_steps=1, learning_rate=2e-2)
    recipe["evaluate"]["eval_steps"] = 1
    messages: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, LogMessage):
            messages.append(event.message)

    def stop(event: Event) -> None:
        if isinstance(event, StepEnd) and event.step in (2, 4):
            os.kill(os.getpid(), signal.SIGINT)

    straight = run(Recipe.from_dict(recipe), out=tmp_path / "straight", ui="none", on_event=listen)
    decisions = [message for message in messages if "final/ is" in message]
    for _ in range(3):
        resumed = run(Recipe.from_dict(recipe), out=tmp_path / "resumed", ui="none", on_event=stop)
    assert resumed.status == "done" and resumed.summary["best"] == straight.summary["best"]
    assert run_fingerprint(resumed.folder) == run_fingerprint(straight.folder)
    again = [json.loads(line) for line in (resumed.folder / "events.jsonl").read_text().splitlines()]
    assert [event["message"] for event in again if "final/ is" in event.get("message", "")] == decisions
    assert len(decisions) <= 1
