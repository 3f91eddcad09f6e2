"""Decoding at its fullest: all slots taken, every sequence as long as it may become."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from lowrank_tune.model.roles import Roles
from lowrank_tune.rollout import Engine
from lowrank_tune.rollout.attention import batched_attention
from lowrank_tune.rollout.choice import store_for
from lowrank_tune.rollout.linears import fast_linears
from lowrank_tune.rollout.schedule import PREFILL_TOKENS
from lowrank_tune.types import Sampling


@dataclass(frozen=True)
class Decoding:
    """A call of the engine: `slots` sequences at once, `samples` of each prompt of so many tokens, and at most
    `max_new_tokens` more."""

    role: str
    slots: int
    prompt: int
    max_new_tokens: int
    prompts: int
    samples: int
    cache_bytes: int
    scratch_bytes: int = 0


def decode(roles: Roles, wanted: Decoding, keeping: AbstractContextManager[None], at: Callable[[str], None]) -> None:
    """Reads prompts, fills the slots and makes one step at the greatest length, as the engine does. `keeping` is
    entered while room for keys and values is made. `at` is told which pass begins: each has moments of its own, as what
    prompts hold and what a step holds grow by different bytes with each layer."""
    engine = Engine(roles, wanted.role, wanted.slots, wanted.cache_bytes, wanted.scratch_bytes)
    model, columns = roles.base.model, wanted.prompt + wanted.max_new_tokens
    states = [vars(module) for module in model.modules()]
    sampling = Sampling(wanted.max_new_tokens, frozenset())
    at("reading")
    with engine._speaking(states), batched_attention(model):
        store = store_for(model)
        store.open(wanted.slots, columns, 1 << 60)
    ahead = max(
        1,
        min(
            wanted.prompts, max(-(-wanted.slots // wanted.samples), wanted.slots // 4), PREFILL_TOKENS // wanted.prompt
        ),
    )
    stack = roles.stacks[wanted.role]
    with (
        fast_linears(model, stack, wanted.scratch_bytes) as linears,
        engine._speaking(states),
        linears,
        batched_attention(model),
    ):
        kept, hidden = store.read([[0] * wanted.prompt] * ahead)
        at("placing")
        with keeping:
            store.place(kept, [slot % ahead for slot in range(wanted.slots)], list(range(wanted.slots)))
        engine._say(hidden, [0.5] * ahead, sampling)
        del hidden
        at("step")
        hidden = store.step([0] * wanted.slots, [columns - 1] * wanted.slots)
        engine._say(hidden, [0.5] * wanted.slots, sampling)
