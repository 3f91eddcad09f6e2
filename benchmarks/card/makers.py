"""Each algorithm over roles and rows, with what it needs beside them made up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from card.made import STEPS, Adapter, Asked, MeanId, Rows, Size
from lowrank_tune.algorithms.dpo import DPO
from lowrank_tune.algorithms.grpo import GRPO
from lowrank_tune.algorithms.harvest import Harvester
from lowrank_tune.algorithms.kit import Kit
from lowrank_tune.algorithms.ppo import PPO
from lowrank_tune.algorithms.reward import Reward
from lowrank_tune.algorithms.sft import SFT
from lowrank_tune.model.adapters import lora_config
from lowrank_tune.model.base import Base
from lowrank_tune.model.memory import Checkpointing
from lowrank_tune.model.roles import Roles
from lowrank_tune.types import Algorithm


def sft(roles: Roles, rows: Rows, size: Size) -> Algorithm:
    return SFT(Kit(roles, rows))


def reward(roles: Roles, rows: Rows, size: Size) -> Algorithm:
    return Reward(Kit(roles, rows), centering=0.01)


def dpo(roles: Roles, rows: Rows, size: Size) -> Algorithm:
    """With the log-probs of the reference computed before, a pair at a time: as a cache has them, in other shapes than training runs."""
    known = {}
    for step in range(STEPS):
        batch = rows(step)
        with roles.quiet():
            parts = [roles.logps("reference", batch.take(torch.arange(at, at + 2)).to(roles.base.device)).logps.sum(dim=1).cpu()
                     for at in range(0, len(batch), 2)]  # fmt: skip
        batch.extra["reference"] = torch.cat(parts)
        known[step] = batch
    return DPO(Kit(roles, known.__getitem__))


def grpo(roles: Roles, rows: Rows, size: Size) -> Algorithm:
    """Nothing ends a completion but its length."""
    return GRPO(Kit(roles, rows), drawing(roles, rows, size), dead_groups="keep")


def ppo(roles: Roles, rows: Rows, size: Size) -> Algorithm:
    """The same completions; a value of its own, and one pass over each harvest."""
    return PPO(Kit(roles, rows), drawing(roles, rows, size))


def drawing(roles: Roles, rows: Rows, size: Size) -> Harvester:
    """Completions of the beginnings of rows, one row for each group."""

    def prompts(step: int, draw: int, count: int | None) -> list[Asked]:
        ids = rows(step).ids.roll(step, dims=1).tolist()
        return [Asked(ids[row][: size.prompt or size.length // 2 - row]) for row in range(size.rows // size.completions)]

    return Harvester(roles, prompts, MeanId(), ["mean id"], [1.0], lambda ids: "", frozenset(), 0, size.completions,  # type: ignore[arg-type]
                     size.new, 1.0, 64, size.rows * size.length, lambda number: number)  # fmt: skip


ALGORITHMS: dict[str, Callable[[Roles, Rows, Size], Algorithm]] = {"sft": sft, "reward": reward, "dpo": dpo, "ppo": ppo, "grpo": grpo}
"""Name -> maker. An algorithm that lands adds its line here; what it needs beside rows it makes up in its maker."""
TRAINED = {"reward": ("reward",), "ppo": ("policy", "value")}
"""The trained roles, where it is not the policy alone."""
HEADS, PAIRED, ONLINE = {"reward", "value"}, {"reward", "dpo"}, {"ppo", "grpo"}
"""Roles with a scalar head, algorithms that learn from pairs, and those that write their own rows."""


def make_roles(base: Base, names: Sequence[str], checkpointing: Checkpointing, seed: int = 0, offload: bool = False) -> Roles:
    adapters = {name: lora_config(Adapter(), base.model) for name in names}  # type: ignore[arg-type]
    stacks = {**{name: [name] for name in names}, "reference": []}
    return Roles(base, adapters, names, stacks, checkpointing, seed, HEADS & set(names), offload)
