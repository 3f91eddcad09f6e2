"""Rules about memory, of plain data like `rules`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lowrank_tune.recipe.written import Finding, written

SIZES = ("train.micro_batch_size", "train.micro_batch_tokens", "train.gradient_checkpointing", "train.activation_offloading",
         "train.memory_budget_gib", "rollout.slots")  # fmt: skip
"""What changes memory and speed and never the gradient, so that a run that ran short can go on with less."""


def idle(data: Any) -> Iterator[Finding]:
    """What is offloaded belongs to recomputed layers."""
    wanted = written(data, "train", "gradient_checkpointing")
    if written(data, "train", "activation_offloading") is True and (wanted == "none" or (wanted == 0 and isinstance(wanted, int))):
        yield ("train", "activation_offloading"), "does nothing without `train.gradient_checkpointing`: it moves what recomputed layers keep"
