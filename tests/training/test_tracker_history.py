"""What a continued run sends to its trackers again: exactly what a killed session may have lost."""

from __future__ import annotations

import pytest

from lowrank_tune.events import CheckpointSaved, Evaluated, Event, RunEnded, RunStarted, StepEnd
from lowrank_tune.training.tracker_history import SentBefore, sent_before


def started(at: float) -> RunStarted:
    return RunStarted(name="r", algorithm="sft", model="m", roles={}, reference="base", steps=9, time=at)


def step(number: int, at: float) -> StepEnd:
    return StepEnd(step=number, steps=9, stats={"loss": 1.0}, seconds=1.0, tokens=1, time=at)


def ended(at: float) -> RunEnded:
    return RunEnded(status="interrupted", step=9, seconds=1.0, time=at)


KILLED: list[Event] = [
    started(0.0),
    step(1, 10.0),
    step(2, 100.0),
    Evaluated(step=2, stats={"eval_loss": 2.0}, time=150.0),
    CheckpointSaved(step=2, path="x", seconds=0.1, time=151.0),
    step(3, 155.0),
]


def steps_of(found: SentBefore) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    logged = sorted(each for each in found.logged if each[0] != "train/seconds")
    return logged, [(event.kind, event.step) for event in found.lost if isinstance(event, (StepEnd, Evaluated))]


def test_killed_wandb_gets_the_last_minute_again() -> None:
    logged, lost = steps_of(sent_before("wandb", KILLED, 2))
    # step 3 comes again by itself, because it follows the checkpoint
    assert logged == [("train/loss", 1)] and lost == [("step_end", 2), ("evaluated", 2)]


def test_what_the_server_has_is_not_sent_again() -> None:
    logged, lost = steps_of(sent_before("wandb", KILLED, 2, first_step=3))
    assert logged == [("eval/loss", 2), ("train/loss", 1), ("train/loss", 2)] and lost == []


@pytest.mark.parametrize("events", [[*KILLED, ended(160.0)], []], ids=["ended", "nothing yet"])
def test_nothing_is_lost_by_a_session_that_has_ended(events: list[Event]) -> None:
    found = sent_before("wandb", events, 2)
    assert not found.lost and len(found.logged) == (7 if events else 0)


@pytest.mark.parametrize("tracker", ["mlflow", "trackio"])
def test_trackers_that_store_at_once_get_nothing_again(tracker: str) -> None:
    found = sent_before(tracker, KILLED, 2)
    assert not found.lost and ("train/loss", 3) in found.logged


def test_tensorboard_gets_again_what_follows_the_checkpoint() -> None:
    found = sent_before("tensorboard", KILLED, 2)
    assert ("train/loss", 2) in found.logged and ("train/loss", 3) not in found.logged and not found.lost


def test_session_killed_at_its_begin_may_have_lost_what_it_sent_again() -> None:
    """The second session begins much later, sends steps 1 and 2 again, and is killed after 5 s."""
    first = [started(0.0), step(1, 10.0), step(2, 20.0)]
    again = [started(1000.0), step(3, 1005.0)]
    assert steps_of(sent_before("wandb", [*first, *again], 3))[1] == [("step_end", 1), ("step_end", 2), ("step_end", 3)]
    between = [*first, ended(21.0), *again]
    assert steps_of(sent_before("wandb", between, 3))[1] == [("step_end", 3)]
    later = [*first, *again, step(4, 2000.0)]
    assert steps_of(sent_before("wandb", later, 4))[1] == [("step_end", 4)]
