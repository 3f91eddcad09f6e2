"""How the adapters of a chain's stages lie on one another, and what that forbids. Plain data in, like `rules`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lowrank_tune.recipe import learned, valued
from lowrank_tune.recipe.rules import adapters_of
from lowrank_tune.recipe.wording import found
from lowrank_tune.recipe.written import Finding, written
from lowrank_tune.settings import Base, trained_by

Stages = Sequence[Mapping[str, Any]]
"""Recipes as plain data, each with its `name`."""


def loaded_below(stages: Stages, index: int) -> dict[str, Any]:
    """The adapters that earlier policies brought from files. A policy was trained over them and means nothing without
    them."""
    return {
        name: adapter
        for stage in _policies(stages, index)
        for name, adapter in adapters_of(stage).items()
        if name not in (*valued.trained(stage), learned.ROLE)
    }


def finished_below(stages: Stages, index: int) -> list[str]:
    """The earlier stages whose policy lies frozen below this stage, the lowest first."""
    return [stage["name"] for stage in _policies(stages, index)]


def lender(stages: Stages, index: int) -> str | None:
    """The earlier stage whose reward model this stage takes, where it asks for one and names none itself: the last that
    trained one."""
    stage = stages[index]
    if not learned.asks(stage) or written(stage, "adapters", learned.ROLE) is not None:
        return None
    return next(
        (each["name"] for each in reversed(stages[:index]) if trained_by(each.get("algorithm")) == learned.ROLE), None
    )


def _policies(stages: Stages, index: int) -> list[Mapping[str, Any]]:
    """The earlier stages that trained a policy. A reward model is none: PPO takes it as a role of its own, beside the
    policy's stack."""
    return [stage for stage in stages[:index] if trained_by(stage.get("algorithm")) == "policy"]


def conflicts(stages: Stages, index: int) -> Iterator[Finding]:
    """What a stage says that the others do not allow: a second base, and two adapters of one name in its stack."""
    stage = stages[index]
    yield from _another_base(stages[0], stage)
    loaded, finished, trained = (
        loaded_below(stages, index),
        finished_below(stages, index),
        trained_by(stage.get("algorithm")),
    )
    own = adapters_of(stage)
    for name in dict.fromkeys([*own, trained]):
        if name in finished and name != learned.ROLE:  # which is told where it is given
            yield (
                ("adapters", name),
                "is also the name of an earlier stage, whose adapter lies below; rename one of them",
            )
        elif name in loaded and (name == trained or written(own[name], "path") != written(loaded[name], "path")):
            yield (
                ("adapters", name),
                "is also the name of another adapter, which lies below as an earlier stage loads it; rename one of "
                "them",
            )
    if stage["name"] == learned.ROLE and trained != learned.ROLE:
        yield ("name",), f"is no name for a stage of {stage.get('algorithm')}: `{learned.ROLE}` is the reward model"
    if stage["name"] in {*own, *loaded} - {trained}:
        yield ("name",), "is also the name of an adapter below this stage; rename one of them"


def _another_base(first: Mapping[str, Any], stage: Mapping[str, Any]) -> Iterator[Finding]:
    one, other = (written(each, "base") or {} for each in (first, stage))
    if not isinstance(one, dict) or not isinstance(other, dict):
        return
    for key, default in Base().model_dump().items():
        value = one.get(key, default)
        if other.get(key, default) != value:
            yield ("base", key), f"is {found(value)} in stage {first['name']}, and a chain has one base in memory"
