"""Rules of `base.backend: unsloth`. Like `rules`, of plain data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

from lowrank_tune.config import reward_model_rules
from lowrank_tune.config.raw_settings import Finding, get_raw
from lowrank_tune.config.schema import RecipeConfig

SUPPORTED_ALGORITHMS = ("sft", "dpo", "grpo")
"""The algorithms that unsloth is used for: one trained adapter, right on the base."""
ALGORITHMS = get_args(RecipeConfig.model_fields["algorithm"].annotation)


def findings(data: Any, frozen_adapters: Sequence[str] = (), has_reward_stage: bool = False) -> Iterator[Finding]:
    """unsloth's kernels know one adapter at a time: no frozen ones below the policy, no reward model, no value.
    `frozen_adapters`: what earlier stages of a chain lay under it. `has_reward_stage`: one of them trains the reward
    model."""
    if get_raw(data, "base", "backend") != "unsloth":
        return
    path = ("base", "backend")
    algorithm = get_raw(data, "algorithm")
    adapters = get_raw(data, "adapters")
    if algorithm in ALGORITHMS and algorithm not in SUPPORTED_ALGORITHMS:
        yield (
            path,
            f"`unsloth` trains {', '.join(SUPPORTED_ALGORITHMS)}, and not {algorithm}; use `transformers`, or leave it "
            "out",
        )
        return
    if isinstance(adapters, dict):
        others = [str(name) for name in adapters if name != "policy"]
    else:
        others = []
    others += [
        *frozen_adapters,
        *(
            [reward_model_rules.REWARD_ADAPTER]
            if has_reward_stage
            and reward_model_rules.uses_reward_model(data)
            and reward_model_rules.REWARD_ADAPTER not in others
            else []
        ),
    ]
    if others:
        if others != [reward_model_rules.REWARD_ADAPTER]:
            reason = "the reference is no longer the base"
        else:
            reason = "the reward model speaks through it"
        yield (
            path,
            f"`unsloth` bears the policy's adapter alone, and here is `{others[0]}` too ({reason}); use "
            f"`transformers`, or leave it out",
        )
