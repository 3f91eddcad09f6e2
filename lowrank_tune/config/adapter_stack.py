"""Checks of adapters: their names, the stack of the policy, and the stacks of a chain's stages on each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lowrank_tune.config.base import Finding, until_invalid
from lowrank_tune.config.messages import describe_value
from lowrank_tune.config.model import (
    NAME_PATTERN,
    NAME_RULE,
    REWARD_ADAPTER,
    SHAPE_KEYS,
    AdapterConfig,
    BaseConfig,
)
from lowrank_tune.config.rewards import REWARD_MODEL
from lowrank_tune.config.schema import ALGORITHMS, RecipeConfig

UNSLOTH_ALGORITHMS = ("sft", "dpo", "grpo")
"""The algorithms that unsloth is used for: one trained adapter, directly on the base."""


@dataclass(frozen=True)
class EarlierStages:
    """What the earlier stages of a chain add to a stage."""

    frozen_adapters: tuple[str, ...] = ()
    """The stages whose policy is frozen below this stage, the lowest first."""
    reward_stage: str | None = None
    """The stage whose reward model this stage uses."""


NO_EARLIER_STAGES = EarlierStages()
Stages = Sequence[RecipeConfig]
"""The stages of a chain, each with its `name`."""


def frozen_adapters(recipe: RecipeConfig) -> dict[str, AdapterConfig]:
    """Returns the adapters of files that a recipe stacks below the one it trains."""
    others = (*recipe.trained_adapters, REWARD_ADAPTER)
    return {name: adapter for name, adapter in recipe.adapters.items() if name not in others}


def unused_dropout(recipe: RecipeConfig) -> Iterator[Finding]:
    """Yields the dropout of frozen adapters."""
    for name, adapter in recipe.adapters.items():
        if name not in recipe.trained_adapters and adapter.is_set("path") and adapter.is_set("lora_dropout"):
            yield (
                ("adapters", name, "lora_dropout"),
                "does nothing for a frozen adapter; leave it out",
            )


def unused_value_adapter(recipe: RecipeConfig) -> Iterator[Finding]:
    """Yields settings of PPO's value adapter that `ppo.critic` or `ppo.critic_init` make unused, and the reverse."""
    value = recipe.adapters.get("value")
    if recipe.algorithm != "ppo" or value is None:
        return
    if recipe.ppo.critic == "shared":
        yield (
            ("adapters", "value"),
            "does nothing with `ppo.critic`: shared, a head on the policy's trunk; leave it out",
        )
    elif value.is_set("path") and recipe.ppo.is_set("critic_init"):
        yield (
            ("ppo", "critic_init"),
            "does nothing beside `adapters.value.path`, which is the initial value",
        )
    elif recipe.ppo.critic_init == "reward":
        for key in SHAPE_KEYS:
            if value.is_set(key):
                yield (
                    ("adapters", "value", key),
                    "comes from the reward model, with `ppo.critic_init`: reward; leave it out",
                )


def adapter_names(recipe: RecipeConfig, earlier: EarlierStages) -> Iterator[Finding]:
    """Yields adapters whose name is not valid, and adapters without a path that are not trained."""
    for name, adapter in recipe.adapters.items():
        if not NAME_PATTERN.fullmatch(name):
            yield (
                ("adapters", name),
                f"is not a name for an adapter: {NAME_RULE}",
            )
        elif name == "base":
            yield (
                ("adapters", name),
                "is not a name for an adapter: `base` is the base itself",
            )
        elif name not in recipe.trained_adapters and not adapter.is_set("path"):
            yield (
                ("adapters", name, "path"),
                _missing_path_message(recipe, name),
            )


def _missing_path_message(recipe: RecipeConfig, name: str) -> str:
    trained = recipe.trained_adapter
    message = f"is missing: only `{trained}` is trained"
    if name in ("policy", "reward"):
        return f"{message} by {recipe.algorithm}, every other adapter is loaded; did you mean `adapters.{trained}`?"
    if trained != "policy":
        message = f"{message} by {recipe.algorithm}"
    return f"{message}, every other adapter is loaded"


def dropout_beside_logps(recipe: RecipeConfig, earlier: EarlierStages) -> Iterator[Finding]:
    """Yields dropout of adapters whose outputs are compared: the same row must give the same value twice."""
    policy = recipe.adapters.get("policy")
    value = recipe.adapters.get("value")
    compares_logps = recipe.algorithm in ("dpo", "kto") or recipe.is_online
    if compares_logps and policy is not None and policy.lora_dropout > 0:
        yield (
            ("adapters", "policy", "lora_dropout"),
            f"must be 0 with {recipe.algorithm}: dropout is off wherever log-probs are compared",
        )
    if recipe.algorithm == "ppo" and value is not None and value.lora_dropout > 0:
        yield (
            ("adapters", "value", "lora_dropout"),
            "must be 0: values are compared with the values at the rollout",
        )


def reward_model_findings(recipe: RecipeConfig, earlier: EarlierStages) -> Iterator[Finding]:
    """Yields a reward model that is missing, and one that no reward uses."""
    if recipe.trained_adapter == REWARD_ADAPTER:
        return
    adapter = recipe.adapters.get(REWARD_ADAPTER)
    if adapter is not None:
        # `adapter_names` reports an adapter without a path
        if recipe.algorithm in ALGORITHMS and adapter.is_set("path") and not recipe.uses_reward_model:
            yield (
                ("adapters", REWARD_ADAPTER),
                f"does nothing without the reward `{REWARD_MODEL}`; the adapter of a reward model is in no other stack",
            )
    elif earlier.reward_stage is None:
        yield from _missing_reward_model(recipe)


def _missing_reward_model(recipe: RecipeConfig) -> Iterator[Finding]:
    for index, reward in enumerate(recipe.rewards):
        if reward.name == REWARD_MODEL:
            yield (
                ("rewards", index, "name"),
                f"needs a reward model: `adapters: {{{REWARD_ADAPTER}: {{path: runs/NAME}}}}`, a run of "
                "`algorithm: reward`",
            )
    if recipe.algorithm == "ppo" and recipe.ppo.critic_init == "reward":
        yield (
            ("ppo", "critic_init"),
            "needs the adapter of a reward model: `adapters.reward` with its `path`",
        )


def unsloth_findings(recipe: RecipeConfig, earlier: EarlierStages) -> Iterator[Finding]:
    """Yields the backend `unsloth` if it cannot be used: it supports one adapter, without frozen ones below it, a
    reward model or a value."""
    if recipe.base.backend != "unsloth":
        return
    path = ("base", "backend")
    if recipe.train.mlp_chunks > 1:
        yield (
            ("train", "mlp_chunks"),
            "does nothing with `base.backend: unsloth`, which computes the MLPs by itself",
        )
    if recipe.train.router_aux_loss_coef:
        yield (
            ("train", "router_aux_loss_coef"),
            "does not work with `base.backend: unsloth`, which computes the experts by itself; use `transformers`",
        )
    if recipe.train.torch_compile is True:
        yield (
            ("train", "torch_compile"),
            "does nothing with `base.backend: unsloth`, which has its own kernels; use `transformers`, or leave it out",
        )
    if recipe.algorithm in ALGORITHMS and recipe.algorithm not in UNSLOTH_ALGORITHMS:
        yield (
            path,
            f"`unsloth` trains {', '.join(UNSLOTH_ALGORITHMS)}, and not {recipe.algorithm}; use `transformers`, or "
            "leave it out",
        )
        return
    others = [name for name in recipe.adapters if name != "policy"]
    others += earlier.frozen_adapters
    if earlier.reward_stage is not None and REWARD_ADAPTER not in others:
        others.append(REWARD_ADAPTER)
    if not others:
        return
    reason = "the reference is no longer the base"
    if others == [REWARD_ADAPTER]:
        reason = "the reward model uses it"
    yield (
        path,
        f"`unsloth` supports only the policy's adapter, and there is also `{others[0]}` ({reason}); use "
        "`transformers`, or leave it out",
    )


def reference_findings(recipe: RecipeConfig, earlier: EarlierStages) -> Iterator[Finding]:
    """Yields a `reference` that is not the policy's stack without its top."""
    if recipe.trained_adapter != "policy" or not recipe.is_set("reference"):
        return
    frozen = [*frozen_adapters(recipe), *earlier.frozen_adapters]
    reference = "base"
    description = "`base`, as no adapter is below it"
    if frozen:
        reference = frozen[-1]
        description = f"`{reference}`, the adapter directly below it"
    if recipe.reference != reference:
        yield (
            ("reference",),
            f"will be {description}: it is always the policy's stack without its top; write that, or leave it out",
        )


def separate_final_adapters(recipe: RecipeConfig, earlier: EarlierStages) -> Iterator[Finding]:
    """Yields `train.final_adapters: separate` for a stack of one adapter."""
    if recipe.train.final_adapters != "separate":
        return
    if not frozen_adapters(recipe) and not earlier.frozen_adapters:
        yield (
            ("train", "final_adapters"),
            "`separate` does nothing here: there is no frozen adapter below the trained one",
        )


CHECKS: tuple[Callable[[RecipeConfig, EarlierStages], Iterator[Finding]], ...] = (
    adapter_names,
    dropout_beside_logps,
    reward_model_findings,
    unsloth_findings,
    reference_findings,
    separate_final_adapters,
)


def earlier_stages(stages: Stages, index: int) -> EarlierStages:
    """Returns what the stages before `stages[index]` add to it."""
    return EarlierStages(tuple(frozen_stage_names(stages, index)), reward_source_stage(stages, index))


def frozen_adapters_of(stages: Stages, index: int) -> dict[str, AdapterConfig]:
    """Returns the adapters of files that earlier policies were trained over. Those policies need them."""
    adapters: dict[str, AdapterConfig] = {}
    for stage in _earlier_policy_stages(stages, index):
        adapters |= frozen_adapters(stage)
    return adapters


def frozen_stage_names(stages: Stages, index: int) -> list[str]:
    """Returns the earlier stages whose policy is frozen below this stage, the lowest first."""
    return [stage.name for stage in _earlier_policy_stages(stages, index)]


def reward_source_stage(stages: Stages, index: int) -> str | None:
    """Returns the last earlier stage that trains a reward model, if this stage uses one and has no path to one."""
    stage = stages[index]
    if REWARD_ADAPTER in stage.adapters or not stage.uses_reward_model:
        return None
    for earlier in reversed(stages[:index]):
        if earlier.trained_adapter == REWARD_ADAPTER:
            return earlier.name
    return None


def _earlier_policy_stages(stages: Stages, index: int) -> list[RecipeConfig]:
    """Returns the earlier stages that train a policy. A reward model is not in the policy's stack."""
    return [stage for stage in stages[:index] if stage.trained_adapter == "policy"]


def conflicts(stages: Stages, index: int) -> Iterator[Finding]:
    """Yields the settings of a stage that the other stages of its chain exclude."""
    for key in BaseConfig.model_fields:
        yield from until_invalid(_different_base(stages[0], stages[index], key))
    yield from until_invalid(_different_template_date(stages[0], stages[index]))
    yield from until_invalid(_different_template_kwargs(stages[0], stages[index]))
    yield from until_invalid(_adapter_name_conflicts(stages, index))
    yield from _stage_name_conflicts(stages, index)


def _different_base(
    first: RecipeConfig,
    stage: RecipeConfig,
    key: str,
) -> Iterator[Finding]:
    value = getattr(first.base, key)
    if getattr(stage.base, key) != value:
        yield (
            ("base", key),
            f"is {describe_value(value)} in stage {first.name}, and a chain has one base in memory",
        )


def _different_template_date(first: RecipeConfig, stage: RecipeConfig) -> Iterator[Finding]:
    """Yields a date of the chat template that is not the first stage's: the adapter is trained over adapters that were
    trained with that date in their prompts."""
    date = first.data.template_date
    if stage.data.template_date != date:
        value = "not set" if date is None else describe_value(date)
        yield (
            ("data", "template_date"),
            f"is {value} in stage {first.name}, and all stages of a chain have one date; write it above `stages`",
        )


def _different_template_kwargs(first: RecipeConfig, stage: RecipeConfig) -> Iterator[Finding]:
    """Yields variables of the chat template that are not the first stage's."""
    kwargs = first.data.chat_template_kwargs
    if stage.data.chat_template_kwargs != kwargs:
        value = ", ".join(f"{name}: {describe_value(value)}" for name, value in kwargs.items()) or "not set"
        yield (
            ("data", "chat_template_kwargs"),
            f"is {value} in stage {first.name}, and all stages of a chain have the same; write it above `stages`",
        )


def _adapter_name_conflicts(stages: Stages, index: int) -> Iterator[Finding]:
    stage = stages[index]
    trained = stage.trained_adapter
    loaded = frozen_adapters_of(stages, index)
    finished = frozen_stage_names(stages, index)
    for name in dict.fromkeys([*stage.adapters, trained]):
        # the stage that is called `reward` is reported itself
        if name in finished and name != REWARD_ADAPTER:
            yield (
                ("adapters", name),
                "is also the name of an earlier stage, whose adapter is below this one; rename one of them",
            )
        elif name in loaded and (name == trained or stage.adapters[name].path != loaded[name].path):
            yield (
                ("adapters", name),
                "is also the name of another adapter, which an earlier stage loads below this one; rename one of them",
            )


def _stage_name_conflicts(stages: Stages, index: int) -> Iterator[Finding]:
    stage = stages[index]
    trained = stage.trained_adapter
    if stage.name == REWARD_ADAPTER and trained != REWARD_ADAPTER:
        yield (
            ("name",),
            f"is not a name for a stage of {stage.algorithm}: `{REWARD_ADAPTER}` is the reward model",
        )
    if stage.name in {*stage.adapters, *frozen_adapters_of(stages, index)} - {trained}:
        yield (
            ("name",),
            "is also the name of an adapter below this stage; rename one of them",
        )
