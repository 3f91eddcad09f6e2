"""Rules of `algorithm: ppo` alone: its value, its KL, and which of its settings do nothing beside others. Like `rules`,
of plain data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lowrank_tune.config.model import default_adapter_name, extra_adapters
from lowrank_tune.config.raw_settings import Finding, get_raw, number


def is_ppo(data: Any) -> bool:
    return bool(get_raw(data, "algorithm") == "ppo")


def trained_adapters(data: Any) -> tuple[str, ...]:
    """The adapters that are trained: the policy's or the reward model's first, and PPO's value."""
    algorithm = get_raw(data, "algorithm")
    return default_adapter_name(algorithm), *extra_adapters(algorithm)


def unused_settings(data: Any) -> Iterator[Finding]:
    """Settings that were written and do nothing beside others."""
    if not is_ppo(data):
        return
    if get_raw(data, "ppo", "missing_eos_penalty") is not None and get_raw(data, "ppo", "truncated_completions") in (
        "bootstrap",
        "keep",
    ):
        yield ("ppo", "missing_eos_penalty"), "does nothing without `ppo.truncated_completions`: penalize"
    if get_raw(data, "ppo", "kl_gain") is not None and get_raw(data, "ppo", "kl_target") is None:
        yield ("ppo", "kl_gain"), "does nothing without `ppo.kl_target`: the weight of the KL stays what it is"
    value = get_raw(data, "adapters", "value")
    path = get_raw(data, "adapters", "value", "path")
    if get_raw(data, "ppo", "critic") == "shared":
        if get_raw(data, "ppo", "critic_init") is not None:
            yield ("ppo", "critic_init"), "does nothing with `ppo.critic`: shared, a fresh head on the policy's trunk"
        if value is not None:
            yield (
                ("adapters", "value"),
                "does nothing with `ppo.critic`: shared, a head on the policy's trunk; leave it out",
            )
        return
    if get_raw(data, "ppo", "vf_coef") is not None:
        yield (
            ("ppo", "vf_coef"),
            "does nothing with `ppo.critic`: separate, which shares nothing; there is `ppo.value_learning_rate`",
        )
    if path is not None and get_raw(data, "ppo", "critic_init") is not None:
        yield ("ppo", "critic_init"), "does nothing beside `adapters.value.path`, where the value goes on from"
    elif get_raw(data, "ppo", "critic_init") == "reward" and isinstance(value, dict):
        for key in ("r", "lora_alpha", "target_modules", "use_rslora"):
            if value.get(key) is not None:
                yield (
                    ("adapters", "value", key),
                    "comes from the reward model, with `ppo.critic_init`: reward; leave it out",
                )


def findings(data: Any, has_reward_stage: bool = False) -> Iterator[Finding]:
    """A weight of 0 cannot be steered, a copy needs its original, values must be steady, and a group has two.
    `has_reward_stage`: an earlier stage of a chain trains the reward model."""
    if get_raw(data, "algorithm") == "grpo" and get_raw(data, "rollout", "num_generations") == 1:
        yield (
            ("rollout", "num_generations"),
            "must be at least 2, found 1: a completion is compared with others of its prompt",
        )
    if not is_ppo(data):
        return
    if number(get_raw(data, "ppo", "kl_coef")) == 0.0 and get_raw(data, "ppo", "kl_target") is not None:
        yield ("ppo", "kl_target"), "cannot be reached from `ppo.kl_coef`: 0, which no factor moves; begin with 0.05"
    if (
        get_raw(data, "ppo", "critic_init") == "reward"
        and get_raw(data, "adapters", "reward") is None
        and not has_reward_stage
    ):
        yield ("ppo", "critic_init"), "needs the adapter of a reward model: `adapters.reward` with its `path`"
    dropout = number(get_raw(data, "adapters", "value", "lora_dropout"))
    if dropout is not None and dropout > 0:
        yield (
            ("adapters", "value", "lora_dropout"),
            "must be 0: values are compared with what they were when the completions came",
        )
