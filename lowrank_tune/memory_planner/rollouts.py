"""Decoding at its largest: all slots in use, every sequence as long as it may become."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_tune.generation import Engine
from lowrank_tune.generation.decode_scheduler import PREFILL_TOKENS, max_prefill_prompts
from lowrank_tune.generation.kv_cache import unused_cache_bytes
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.generation.select_cache import select_cache_without_values
from lowrank_tune.model.roles import Roles


@dataclass(frozen=True)
class DecodingSpec:
    """A call of the engine: `slots` sequences at once, `samples` of each of `prompts` prompts."""

    role: str
    slots: int
    prompt_length: int
    max_new_tokens: int
    prompts: int
    samples: int
    cache_bytes: int
    scratch_bytes: int = 0
    cuda_graphs: bool = False
    sync_every: int = 1
    """Steps between two reads of the host."""
    sequence_bytes: int = 0
    """Keys and values of one sequence in all layers; 0 if they are not known."""
    layers: int = 1
    copies: bool = True
    """Whether the engine may copy weights, which it does not after an out-of-memory error."""
    cache_columns: int = 0
    """Columns of keys and values of each slot, if they are more than its tokens."""

    @property
    def columns(self) -> int:
        """Tokens of a sequence at its end."""
        return self.prompt_length + self.max_new_tokens

    @property
    def prefill_prompts(self) -> int:
        """Prompts that the scheduler reads at once for empty slots, at least 1."""
        limit = max_prefill_prompts(self.slots, self.samples, self.slots)
        return max(1, min(self.prompts, limit, PREFILL_TOKENS // self.prompt_length))

    @property
    def later_prompts(self) -> int:
        """Prompts that are read at once after the first ones, when the keys and values of all slots exist."""
        return min(self.prefill_prompts, self.prompts - self.prefill_prompts)

    def copy_limit(self, layers: int) -> int:
        """Returns the bytes for copies of weights on a model of some of the layers: their part of those on all."""
        if not self.copies or not self.sequence_bytes:
            return 0
        return unused_cache_bytes(self.slots, self.sequence_bytes, self.cache_bytes) * layers // self.layers


Decoding = Callable[
    [Roles, DecodingSpec, AbstractContextManager[None], Callable[[str], None]],
    None,
]
"""A simulation of decoding: `decode` or `decode_typical_steps`."""
STEP = "step"
TYPICAL_STEPS = ("average step", "longest step")


def decode(
    roles: Roles,
    spec: DecodingSpec,
    allocating_cache: AbstractContextManager[None],
    on_pass: Callable[[str], None],
) -> None:
    """Reads prompts, fills the slots, reads more prompts beside them, and makes one step at the greatest length, as the
    engine does. `allocating_cache` is entered while keys and values are allocated.
    `on_pass` is called with the name of each pass before it begins: each has its own program points, because the bytes
    of prompts and of a step grow differently with each layer."""
    engine = Engine(
        roles,
        spec.role,
        spec.slots,
        spec.cache_bytes,
        spec.scratch_bytes,
    )
    mode = engine.generation_mode()
    columns = spec.columns
    sampling = SamplingParams(spec.max_new_tokens, frozenset())
    on_pass("reading")
    with mode.enter():
        store = select_cache_without_values(roles.base.model)
        store.allocate(spec.slots, max(columns, spec.cache_columns), 1 << 60)
    with _prepared_weights(engine, spec) as weights, mode.enter(), weights:
        prompts = spec.prefill_prompts
        prefilled, hidden = store.prefill([[0] * spec.prompt_length] * prompts)
        on_pass("placing")
        slots = range(spec.slots)
        with allocating_cache:
            store.insert(prefilled, [slot % prompts for slot in slots], slots)
        engine.sample(sampling, hidden, _uniforms(prompts, roles))
        del hidden
        if spec.later_prompts:
            on_pass("reading")
            del prefilled
            prefilled, hidden = store.prefill([[0] * spec.prompt_length] * spec.later_prompts)
            engine.sample(sampling, hidden, _uniforms(spec.later_prompts, roles))
            del hidden
        on_pass(STEP)
        hidden = store.step([0] * spec.slots, [columns - 1] * spec.slots)
        engine.sample(sampling, hidden, _uniforms(spec.slots, roles))


def decode_typical_steps(
    roles: Roles,
    spec: DecodingSpec,
    allocating_cache: AbstractContextManager[None],
    on_pass: Callable[[str], None],
) -> None:
    """Reads prompts once for all slots, and makes a step at half of the new tokens and one at the greatest length. The
    sequences differ in length, as they do in a run: only then is an attention mask made."""
    engine = Engine(
        roles,
        spec.role,
        spec.slots,
        spec.cache_bytes,
        spec.scratch_bytes,
    )
    columns = spec.columns
    sampling = SamplingParams(spec.max_new_tokens, frozenset())
    with _prepared_weights(engine, spec) as weights, engine.generation_mode().enter(), weights:
        store = select_cache_without_values(roles.base.model)
        store.allocate(spec.slots, max(columns, spec.cache_columns), 1 << 60)
        on_pass("reading")
        prompts = spec.prefill_prompts
        prefilled, hidden = store.prefill([[0] * spec.prompt_length] * prompts)
        engine.sample(sampling, hidden, _uniforms(prompts, roles))
        del hidden
        on_pass("placing")
        slots = range(spec.slots)
        with allocating_cache:
            store.insert(prefilled, [slot % prompts for slot in slots], slots)
        for name, position in zip(TYPICAL_STEPS, (columns - spec.max_new_tokens // 2, columns - 1), strict=True):
            on_pass(name)
            hidden = store.step([0] * spec.slots, [position - slot % 2 for slot in slots])
            engine.sample(sampling, hidden, _uniforms(spec.slots, roles))
            del hidden


def _prepared_weights(engine: Engine, spec: DecodingSpec) -> AbstractContextManager[AbstractContextManager[None]]:
    layers = engine.roles.base.model.config.get_text_config().num_hidden_layers
    return engine.prepared_weights(spec.slots, spec.copy_limit(layers))


def _uniforms(count: int, roles: Roles) -> Tensor:
    return torch.full((count,), 0.5, dtype=torch.float64, device=roles.base.device)
