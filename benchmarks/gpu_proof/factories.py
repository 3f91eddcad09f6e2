"""Each algorithm over roles and synthetic rows, with everything else that it needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gpu_proof.synthetic import (
    STEPS,
    AdapterSettings,
    DPOSettings,
    GRPOSettings,
    MeanTokenId,
    PPOSettings,
    Prompt,
    RewardModelSettings,
    Rows,
    Size,
)
from lowrank_tune.algorithms.base import Algorithm, AlgorithmContext
from lowrank_tune.algorithms.dpo import DPO
from lowrank_tune.algorithms.grpo import GRPO
from lowrank_tune.algorithms.ppo import PPO
from lowrank_tune.algorithms.reward_model import RewardModeling
from lowrank_tune.algorithms.rollouts import RolloutCollector
from lowrank_tune.algorithms.sft import SFT
from lowrank_tune.model.activation_checkpointing import Checkpointing
from lowrank_tune.model.adapters import lora_config
from lowrank_tune.model.base import Base
from lowrank_tune.model.roles import Roles


def sft(roles: Roles, rows: Rows, size: Size) -> Algorithm[Any]:
    return SFT(AlgorithmContext(roles, rows))


def reward(roles: Roles, rows: Rows, size: Size) -> Algorithm[Any]:
    return RewardModeling(AlgorithmContext(roles, rows), RewardModelSettings())  # type: ignore[arg-type]


def dpo(roles: Roles, rows: Rows, size: Size) -> Algorithm[Any]:
    """Compute the reference log-probs first, a pair at a time: as a cache contains them, in other shapes than
    training uses."""
    batches = {}
    for step in range(STEPS):
        batch = rows(step)
        sums = []
        with roles.inference_mode():
            for first in range(0, len(batch), 2):
                pair = batch.select_rows(torch.arange(first, first + 2)).to(roles.base.device)
                sums.append(roles.logps("reference", pair).logps.sum(dim=1).cpu())
        batch.reference_sequence_logps = torch.cat(sums)
        batches[step] = batch
    return DPO(AlgorithmContext(roles, batches.__getitem__), DPOSettings())  # type: ignore[arg-type]


def grpo(roles: Roles, rows: Rows, size: Size) -> Algorithm[Any]:
    """Only its length ends a completion."""
    return GRPO(AlgorithmContext(roles), GRPOSettings(), rollouts(roles, rows, size))  # type: ignore[arg-type]


def ppo(roles: Roles, rows: Rows, size: Size) -> Algorithm[Any]:
    """The same completions, a value adapter of its own, and one epoch over each batch of rollouts."""
    return PPO(AlgorithmContext(roles), PPOSettings(), rollouts(roles, rows, size))  # type: ignore[arg-type]


def rollouts(roles: Roles, rows: Rows, size: Size) -> RolloutCollector:
    """Generate completions of the beginnings of rows, one row for each group."""

    def prompts(step: int, draw: int, count: int | None) -> list[Prompt]:
        ids = rows(step).input_ids.roll(step, dims=1).tolist()
        count = size.rows // size.num_generations
        return [Prompt(ids[row][: size.prompt or size.length // 2 - row]) for row in range(count)]

    return RolloutCollector(
        roles=roles,
        prompts=prompts,  # type: ignore[arg-type]
        reward_client=MeanTokenId(),  # type: ignore[arg-type]
        reward_names=["mean token id"],
        reward_weights=[1.0],
        decode=lambda ids: "",
        stop_ids=frozenset(),
        pad_id=0,
        num_generations=size.num_generations,
        max_new_tokens=size.max_new_tokens,
        temperature=1.0,
        max_num_seqs=64,
        micro_tokens=size.rows * size.length,
        seed_of=int,
    )


ALGORITHMS: dict[str, Callable[[Roles, Rows, Size], Algorithm[Any]]] = {
    "sft": sft,
    "reward": reward,
    "dpo": dpo,
    "ppo": ppo,
    "grpo": grpo,
}
TRAINED_ROLES = {"reward": ("reward",), "ppo": ("policy", "value")}
"""The trained roles, where it is not the policy alone."""
HEADS, PAIRED, GENERATIVE = {"reward", "value"}, {"reward", "dpo"}, {"ppo", "grpo"}
"""Roles with a scalar head, algorithms that train on pairs, and algorithms that generate their own rows."""


def make_roles(
    base: Base,
    names: Sequence[str],
    checkpointing: Checkpointing,
    seed: int = 0,
    offload: bool = False,
    torch_compile: bool = False,
) -> Roles:
    adapters = {name: lora_config(AdapterSettings(), base.model) for name in names}  # type: ignore[arg-type]
    stacks = {**{name: [name] for name in names}, "reference": []}
    return Roles(
        base,
        adapters,
        names,
        stacks,
        checkpointing,
        seed,
        HEADS & set(names),
        offload,
        torch_compile=torch_compile,
    )


def randomize_b(roles: Roles, role: str) -> None:
    """Fill every B of a role with small numbers: a new one is zero, and its A then has no gradient."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in roles.named_parameters(role).items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1e-2)
