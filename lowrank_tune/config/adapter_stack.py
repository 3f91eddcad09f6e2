"""How the adapters of a chain's stages lie on one another, and what that forbids. Plain data in, like `rules`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lowrank_tune.config import ppo_rules, reward_model_rules
from lowrank_tune.config.messages import describe_value
from lowrank_tune.config.model import BaseConfig, default_adapter_name
from lowrank_tune.config.raw_settings import Finding, get_raw
from lowrank_tune.config.rules import adapters_of

Stages = Sequence[Mapping[str, Any]]
"""Recipes as plain data, each with its `name`."""


def frozen_adapters_of(stages: Stages, index: int) -> dict[str, Any]:
    """The adapters that earlier policies brought from files. A policy was trained over them and means nothing without
    them."""
    return {
        name: adapter
        for stage in _earlier_policy_stages(stages, index)
        for name, adapter in adapters_of(stage).items()
        if name not in (*ppo_rules.trained_adapters(stage), reward_model_rules.REWARD_ADAPTER)
    }


def frozen_stage_names(stages: Stages, index: int) -> list[str]:
    """The earlier stages whose policy lies frozen below this stage, the lowest first."""
    return [stage["name"] for stage in _earlier_policy_stages(stages, index)]


def reward_source_stage(stages: Stages, index: int) -> str | None:
    """The earlier stage whose reward model this stage takes, where it asks for one and names none itself: the last that
    trained one."""
    stage = stages[index]
    if (
        not reward_model_rules.uses_reward_model(stage)
        or get_raw(stage, "adapters", reward_model_rules.REWARD_ADAPTER) is not None
    ):
        return None
    return next(
        (
            earlier_stage["name"]
            for earlier_stage in reversed(stages[:index])
            if default_adapter_name(earlier_stage.get("algorithm")) == reward_model_rules.REWARD_ADAPTER
        ),
        None,
    )


def _earlier_policy_stages(stages: Stages, index: int) -> list[Mapping[str, Any]]:
    """The earlier stages that trained a policy. A reward model is none: PPO takes it as a role of its own, beside the
    policy's stack."""
    return [stage for stage in stages[:index] if default_adapter_name(stage.get("algorithm")) == "policy"]


def conflicts(stages: Stages, index: int) -> Iterator[Finding]:
    """What a stage says that the others do not allow: a second base, and two adapters of one name in its stack."""
    stage = stages[index]
    yield from _base_conflicts(stages[0], stage)
    yield from _template_date_conflicts(stages[0], stage)
    loaded = frozen_adapters_of(stages, index)
    finished = frozen_stage_names(stages, index)
    trained = default_adapter_name(stage.get("algorithm"))
    own = adapters_of(stage)
    for name in dict.fromkeys([*own, trained]):
        if name in finished and name != reward_model_rules.REWARD_ADAPTER:  # which is told where it is given
            yield (
                ("adapters", name),
                "is also the name of an earlier stage, whose adapter lies below; rename one of them",
            )
        elif name in loaded and (name == trained or get_raw(own[name], "path") != get_raw(loaded[name], "path")):
            yield (
                ("adapters", name),
                "is also the name of another adapter, which lies below as an earlier stage loads it; rename one of "
                "them",
            )
    if stage["name"] == reward_model_rules.REWARD_ADAPTER and trained != reward_model_rules.REWARD_ADAPTER:
        yield (
            ("name",),
            f"is no name for a stage of {stage.get('algorithm')}: `{reward_model_rules.REWARD_ADAPTER}` is the reward "
            "model",
        )
    if stage["name"] in {*own, *loaded} - {trained}:
        yield ("name",), "is also the name of an adapter below this stage; rename one of them"


def _base_conflicts(first: Mapping[str, Any], stage: Mapping[str, Any]) -> Iterator[Finding]:
    first_base, stage_base = (get_raw(recipe, "base") or {} for recipe in (first, stage))
    if not isinstance(first_base, dict) or not isinstance(stage_base, dict):
        return
    for key, default in BaseConfig().model_dump().items():
        value = first_base.get(key, default)
        if stage_base.get(key, default) != value:
            yield (
                ("base", key),
                f"is {describe_value(value)} in stage {first['name']}, and a chain has one base in memory",
            )


def _template_date_conflicts(first: Mapping[str, Any], stage: Mapping[str, Any]) -> Iterator[Finding]:
    """Yields a fault for a stage whose chat template would write another date than the first stage's: its adapter is
    trained over adapters that were trained with that date in their prompts."""
    first_date, stage_date = (get_raw(recipe, "data", "template_date") for recipe in (first, stage))
    if stage_date != first_date:
        yield (
            ("data", "template_date"),
            f"is {_date_or_none(first_date)} in stage {first['name']}, and all stages of a chain have one date; write "
            "it above `stages`",
        )


def _date_or_none(value: Any) -> str:
    return "not set" if value is None else describe_value(value)
