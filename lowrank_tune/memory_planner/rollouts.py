"""Decoding at its fullest: all slots taken, every sequence as long as it may become."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from lowrank_tune.generation import Engine
from lowrank_tune.generation.attention import batched_attention
from lowrank_tune.generation.cpu_linears import fast_linears
from lowrank_tune.generation.decode_scheduler import PREFILL_TOKENS
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.generation.select_cache import select_cache_without_values
from lowrank_tune.model.roles import Roles


@dataclass(frozen=True)
class DecodingSpec:
    """A call of the engine: `slots` sequences at once, `samples` of each prompt of so many tokens, and at most
    `max_new_tokens` more."""

    role: str
    slots: int
    prompt_length: int
    max_new_tokens: int
    prompts: int
    samples: int
    cache_bytes: int
    scratch_bytes: int = 0


def decode(
    roles: Roles,
    spec: DecodingSpec,
    allocating_cache: AbstractContextManager[None],
    on_pass: Callable[[str], None],
) -> None:
    """Reads prompts, fills the slots and makes one step at the greatest length, as the engine does. `allocating_cache`
    is entered while room for keys and values is made. `on_pass` is told which pass begins: each has moments of its own,
    as what prompts hold and what a step holds grow by different bytes with each layer."""
    engine = Engine(roles, spec.role, spec.slots, spec.cache_bytes, spec.scratch_bytes)
    model = roles.base.model
    columns = spec.prompt_length + spec.max_new_tokens
    states = [vars(module) for module in model.modules()]
    sampling = SamplingParams(spec.max_new_tokens, frozenset())
    on_pass("reading")
    with engine._generation_mode(states), batched_attention(model):
        store = select_cache_without_values(model)
        store.allocate(spec.slots, columns, 1 << 60)
    ahead = max(
        1,
        min(spec.prompts, max(-(-spec.slots // spec.samples), spec.slots // 4), PREFILL_TOKENS // spec.prompt_length),
    )
    stack = roles.stacks[spec.role]
    with (
        fast_linears(model, stack, spec.scratch_bytes) as linears,
        engine._generation_mode(states),
        linears,
        batched_attention(model),
    ):
        prefilled, hidden = store.prefill([[0] * spec.prompt_length] * ahead)
        on_pass("placing")
        with allocating_cache:
            store.insert(prefilled, [slot % ahead for slot in range(spec.slots)], list(range(spec.slots)))
        engine._sample(hidden, [0.5] * ahead, sampling)
        del hidden
        on_pass("step")
        hidden = store.step([0] * spec.slots, [columns - 1] * spec.slots)
        engine._sample(hidden, [0.5] * spec.slots, sampling)
