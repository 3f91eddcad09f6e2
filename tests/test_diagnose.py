"""Each sentence of the diagnoses: said where it is true, and not where it is not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest

from lowrank_tune.events import Note, RunEnded, RunStarted, StepDone, Validated
from lowrank_tune.ui.diagnose import diagnose
from lowrank_tune.ui.state import State

HEALTHY = {"loss": lambda s: 1 / (1 + s / 10), "grad_norm": lambda s: 0.5 + 0.1 * math.sin(s), "kl": lambda s: s / 100,
           "learning_rate": lambda s: 1e-3, "moved_share": lambda s: 1.0, "update_ratio": lambda s: 1e-3}  # fmt: skip
Values = Mapping[str, Callable[[int], float]]


def after(steps: int, algorithm: str = "sft", validation: tuple[float, ...] = (), **changed: Callable[[int], float]) -> State:
    """A state after so many steps of a healthy run, but for what is changed."""
    state = State()
    state.apply(RunStarted(name="x", algorithm=algorithm, model="m", roles={}, reference="r", steps=steps))
    values: Values = {**HEALTHY, **changed}
    for step in range(1, steps + 1):
        state.apply(StepDone(step=step, steps=steps, stats={name: of(step) for name, of in values.items()}, seconds=1.0, tokens=10))
    for index, value in enumerate(validation):
        state.apply(Validated(step=10 * (index + 1), stats={"validation_loss": value}))
    return state


def said(state: State) -> str:
    return " / ".join(f"{diagnosis.level}: {diagnosis.text}" for diagnosis in diagnose(state))


def test_all_good_and_too_early() -> None:
    assert said(State()).startswith(": no step yet")
    assert said(after(5)) == ": too early to judge: 5 of the first 20 steps"
    assert said(after(40)).startswith("good: all good: loss 0.") and "validation 0.9 -> 0.5" in said(after(40, validation=(0.9, 0.6, 0.5)))
    failed = after(5)
    failed.apply(RunEnded(status="failed", step=5, seconds=1.0))
    assert "the run failed" in said(failed)


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        (after(40, loss=lambda s: 1.0), "warning: the loss does not fall: 1 at first, 1 now"),
        (after(40, loss=lambda s: 1 + s / 10), "bad: the loss rises"),
        (after(40, loss=lambda s: float("nan") if s == 40 else 1 / s), "bad: loss is not a number"),
        (after(40, grad_norm=lambda s: 0.5 if s < 38 else 50.0), "bad: the gradient norm explodes: 50, 100 times the usual"),
        (after(40, kl=lambda s: 9.0), "warning: KL to the reference is 9 nats a token, above 5"),
        (after(40, "grpo", kl=lambda s: 0.8), "warning: KL to the reference is 0.8 nats a token, above 0.5"),
        (after(40, moved_share=lambda s: 0.0), "bad: nothing is learned: the last step moved 0.0% of the adapter"),
        (after(40, update_ratio=lambda s: 1e-12), "bad: nothing is learned"),
        (after(40, bad_steps=lambda s: 3.0), "warning: 3 of 40 steps had no finite loss or gradient and were skipped"),
        (after(40, validation=(0.9, 0.5, 0.6, 0.6, 0.6)), "warning: validation loss rises since step 20 (0.500 -> 0.600): overfitting"),
    ],
)
def test_each_sentence(state: State, sentence: str) -> None:
    assert sentence in said(state) and "all good" not in said(state)


@pytest.mark.parametrize(
    "state",
    [
        after(40, grad_norm=lambda s: 50.0 if s == 39 else 0.5),  # one high step is noise
        after(40, "grpo", loss=lambda s: 1.0),  # a policy gradient's loss means nothing
        after(40, loss=lambda s: 1e-4),  # nowhere to fall
        after(40, moved_share=lambda s: 0.1 if s == 40 else 1.0),
        after(40, moved_share=lambda s: 0.0 if s > 35 else 1.0, learning_rate=lambda s: 0.0 if s > 35 else 1e-3),  # the schedule's end
        after(40, validation=(0.9, 0.5, 0.6, 0.6)),  # two worse ones may be chance
        after(40, validation=(0.9, 0.5, 0.501, 0.502, 0.501)),
        after(40, bad_steps=lambda s: 0.0),
    ],
)
def test_no_false_alarm(state: State) -> None:
    assert said(state).startswith("good: all good")


def test_dropped_rows_are_told() -> None:
    state = after(40)
    state.apply(Note(level="warning", message="a.jsonl (alpaca): 8 of 10 rows; dropped 2: no answer (lines 3, 4)"))
    assert "warning: rows were dropped: a.jsonl (alpaca): 8 of 10 rows; dropped 2: no answer (lines 3, 4)" in said(state)


def test_the_worst_comes_first() -> None:
    state = after(40, kl=lambda s: 9.0, grad_norm=lambda s: 0.5 if s < 38 else 50.0)
    assert [diagnosis.level for diagnosis in diagnose(state)] == ["bad", "warning"]
