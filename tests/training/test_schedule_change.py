"""A continued run with another end reports what happens to its learning rate."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from crash import small_recipe
from report_pages import check_page

from lowrank_tune import Recipe, run
from lowrank_tune.config import TrainingConfig
from lowrank_tune.events import Event, StepEnd
from lowrank_tune.training.schedule_change import schedule_change, schedule_length


def settings(**train: Any) -> TrainingConfig:
    return TrainingConfig(**{"learning_rate": 2e-3, "lr_scheduler_type": "linear", "warmup_steps": 0} | train)


def change(before: tuple[TrainingConfig, int], after: tuple[TrainingConfig, int], done: int) -> str:
    return schedule_change(schedule_length(*before), *after, done)


def test_learning_rates_of_a_linear_schedule_by_hand() -> None:
    """18 of 180 steps are done: 0.9 of 2e-3 before, half of it with 36 steps."""
    before = settings(num_train_epochs=20), 180
    assert change(before, (settings(num_train_epochs=4), 36), 18) == (
        "train.num_train_epochs: was 20, is 4: the schedule ends at step 36 instead of 180; "
        "the learning rate at step 19 is 1.0e-03 instead of 1.8e-03"
    )


def test_a_constant_rate_stays() -> None:
    before = settings(max_steps=10, lr_scheduler_type="constant"), 10
    assert change(before, (settings(max_steps=20, lr_scheduler_type="constant"), 20), 5) == (
        "train.max_steps: was 10, is 20: the schedule ends at step 20 instead of 10; "
        "the learning rate at step 6 stays 2.0e-03"
    )


def test_steps_instead_of_epochs() -> None:
    message = change((settings(num_train_epochs=2.5), 10), (settings(max_steps=20), 20), 10)
    assert message == (
        "train.max_steps: was not set, is 20, train.num_train_epochs: was 2.5, is not set: the schedule ends at "
        "step 20 instead of 10; the learning rate at step 11 is 1.0e-03"
    )


def test_an_end_that_is_already_passed() -> None:
    message = change((settings(max_steps=10), 10), (settings(max_steps=4), 4), 6)
    assert message.endswith("the schedule ends at step 4 instead of 10, and 6 steps are done: no step is left")


def test_nothing_is_reported_without_a_change_or_without_the_earlier_length() -> None:
    same = settings(max_steps=10), 10
    assert change(same, same, 5) == "" and schedule_change({}, *same, 5) == ""


@pytest.mark.slow
def test_a_run_reports_it_once_in_log_summary_and_report(tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, StepEnd) and event.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    out = tmp_path / "run"
    run(Recipe.from_dict(small_recipe(max_steps=8)), out=out, ui="none", on_event=stop)
    events: list[Event] = []
    found = run(Recipe.from_dict(small_recipe(max_steps=4)), out=out, ui="none", on_event=events.append)
    (message,) = [text for text in found.summary["warnings"] if "the schedule" in text]
    assert message.startswith("train.max_steps: was 8, is 4: the schedule ends at step 4 instead of 8;")
    rate = next(event for event in events if isinstance(event, StepEnd)).stats["learning_rate"]
    assert f"at step 3 is {rate:.1e} instead of" in message
    assert message in check_page((out / "report.html").read_text(encoding="utf-8")).text
    assert message in (out / "events.jsonl").read_text(encoding="utf-8")
