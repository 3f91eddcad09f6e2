"""Rules of `algorithm: ppo` alone: its value, its KL, and which of its settings do nothing beside others. Like `rules`,
of plain data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lowrank_tune.recipe.written import Finding, number, written
from lowrank_tune.settings import aside, trained_by


def is_ppo(data: Any) -> bool:
    return bool(written(data, "algorithm") == "ppo")


def trained(data: Any) -> tuple[str, ...]:
    """The adapters that are trained: the policy's or the reward model's first, and PPO's value."""
    algorithm = written(data, "algorithm")
    return trained_by(algorithm), *aside(algorithm)


def idle(data: Any) -> Iterator[Finding]:
    """Settings that were written and do nothing beside others."""
    if not is_ppo(data):
        return
    if written(data, "ppo", "penalty") is not None and written(data, "ppo", "truncated") in ("bootstrap", "keep"):
        yield ("ppo", "penalty"), "does nothing without `ppo.truncated`: penalise"
    if written(data, "ppo", "kl_gain") is not None and written(data, "ppo", "kl_target") is None:
        yield ("ppo", "kl_gain"), "does nothing without `ppo.kl_target`: the weight of the KL stays what it is"
    value, path = written(data, "adapters", "value"), written(data, "adapters", "value", "path")
    if written(data, "ppo", "value") == "trunk":
        if written(data, "ppo", "value_from") is not None:
            yield ("ppo", "value_from"), "does nothing with `ppo.value`: trunk, a fresh head on the policy's trunk"
        if value is not None:
            yield (
                ("adapters", "value"),
                "does nothing with `ppo.value`: trunk, a head on the policy's trunk; leave it out",
            )
        return
    if written(data, "ppo", "value_weight") is not None:
        yield (
            ("ppo", "value_weight"),
            "does nothing with `ppo.value`: adapter, which shares nothing; there is `ppo.value_learning_rate`",
        )
    if path is not None and written(data, "ppo", "value_from") is not None:
        yield ("ppo", "value_from"), "does nothing beside `adapters.value.path`, where the value goes on from"
    elif written(data, "ppo", "value_from") == "reward" and isinstance(value, dict):
        for key in ("r", "alpha", "target_modules", "rslora"):
            if value.get(key) is not None:
                yield (
                    ("adapters", "value", key),
                    "comes from the reward model, with `ppo.value_from`: reward; leave it out",
                )


def findings(data: Any, lent: bool = False) -> Iterator[Finding]:
    """A weight of 0 cannot be steered, a copy needs its original, values must be steady, and a group has two. `lent`:
    an earlier stage of a chain trains the reward model."""
    if written(data, "algorithm") == "grpo" and written(data, "rollout", "num_generations") == 1:
        yield (
            ("rollout", "num_generations"),
            "must be at least 2, found 1: a completion is compared with others of its prompt",
        )
    if not is_ppo(data):
        return
    if number(written(data, "ppo", "kl")) == 0.0 and written(data, "ppo", "kl_target") is not None:
        yield ("ppo", "kl_target"), "cannot be reached from `ppo.kl`: 0, which no factor moves; begin with 0.05"
    if written(data, "ppo", "value_from") == "reward" and written(data, "adapters", "reward") is None and not lent:
        yield ("ppo", "value_from"), "needs the adapter of a reward model: `adapters.reward` with its `path`"
    dropout = number(written(data, "adapters", "value", "dropout"))
    if dropout is not None and dropout > 0:
        yield (
            ("adapters", "value", "dropout"),
            "must be 0: values are compared with what they were when the completions came",
        )
