"""Rules of `base.backend: unsloth`. Like `rules`, of plain data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

from lowrank_tune.recipe import learned
from lowrank_tune.recipe.written import Finding, written
from lowrank_tune.settings import Recipe

TRAINS = ("sft", "dpo", "grpo")
"""The algorithms that unsloth is used for: one trained adapter, right on the base."""
ALGORITHMS = get_args(Recipe.model_fields["algorithm"].annotation)


def findings(data: Any, below: Sequence[str] = (), lent: bool = False) -> Iterator[Finding]:
    """unsloth's kernels know one adapter at a time: no frozen ones below the policy, no reward model, no value.
    `below`: what earlier stages of a chain lay under it. `lent`: one of them trains the reward model."""
    if written(data, "base", "backend") != "unsloth":
        return
    path, algorithm, adapters = ("base", "backend"), written(data, "algorithm"), written(data, "adapters")
    if algorithm in ALGORITHMS and algorithm not in TRAINS:
        yield path, f"`unsloth` trains {', '.join(TRAINS)}, and not {algorithm}; use `plain`, or leave it out"
        return
    others = [str(name) for name in adapters if name != "policy"] if isinstance(adapters, dict) else []
    others += [*below, *([learned.ROLE] if lent and learned.asks(data) and learned.ROLE not in others else [])]
    if others:
        told = (
            "the reference is no longer the base" if others != [learned.ROLE] else "the reward model speaks through it"
        )
        yield (
            path,
            f"`unsloth` bears the policy's adapter alone, and here is `{others[0]}` too ({told}); use `plain`, or "
            f"leave it out",
        )
