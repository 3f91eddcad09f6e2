"""What another end of a continued run does to its learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowrank_tune.config import TrainingConfig
from lowrank_tune.training.trainer import lr_at_step

LENGTH_SETTINGS = ("max_steps", "num_train_epochs")


def schedule_length(train: TrainingConfig, steps: int) -> dict[str, Any]:
    """Returns the number of steps and the settings that determine it, for a checkpoint."""
    settings = {name: getattr(train, name) for name in LENGTH_SETTINGS}
    return {"steps": steps, **settings}


def schedule_change(
    before: Mapping[str, Any],
    train: TrainingConfig,
    steps: int,
    done: int,
) -> str:
    """Returns the sentence about a run of `steps` steps that is continued after `done` of them.

    `before` is the length in its checkpoint. Empty if that is the same, or if a checkpoint of an older version does not
    contain it.
    """
    now = schedule_length(train, steps)
    if before.get("steps", steps) == steps:
        return ""
    changed = ", ".join(_change(name, before, now) for name in LENGTH_SETTINGS if before.get(name) != now[name])
    ends = f"the schedule ends at step {steps} instead of {before['steps']}"
    if changed:
        ends = f"{changed}: {ends}"
    if done >= steps:
        return f"{ends}, and {done} steps are done: no step is left"
    return f"{ends}; the learning rate at step {done + 1} {_learning_rates(before['steps'], train, steps, done)}"


def _change(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    old, new = (_format_setting(settings.get(name)) for settings in (before, now))
    return f"train.{name}: was {old}, is {new}"


def _format_setting(value: float | None) -> str:
    return "not set" if value is None else f"{value:g}"


def _learning_rates(
    old_steps: int,
    train: TrainingConfig,
    steps: int,
    done: int,
) -> str:
    rates = []
    for length in (old_steps, steps):
        share = lr_at_step(
            done,
            length,
            train.warmup_steps,
            train.lr_scheduler_type,
        )
        rates.append(f"{train.learning_rate * share:.1e}")
    old, new = rates
    if done >= old_steps:
        # the old schedule has no such step
        return f"is {new}"
    return f"stays {new}" if old == new else f"is {new} instead of {old}"
