"""One preallocated key-value cache for all sequences of a rollout (`slot_cache`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lowrank_tune.batch import copy_to
from lowrank_tune.generation.decode_masks import reads_masks_back, select_mask_function
from lowrank_tune.generation.kv_cache import (
    PrefilledPrompts,
    last_states,
    pad_prompts,
    slots_that_fit,
    token_columns,
    unused_cache_bytes,
)
from lowrank_tune.generation.slot_cache import SlotCache, sliding_windows

_TOKEN_BYTES: WeakKeyDictionary[Any, list[int]] = WeakKeyDictionary()


class StaticSlotCache:
    """One preallocated cache for all sequences: a step is one forward pass and copies nothing.

    Raises ValueError for a model that needs another kind of cache.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.decoder = model.get_decoder()
        self.device = model.device
        self.cache = SlotCache(sliding_windows(model))
        self.slots = self.columns = 0
        windows = [layer.window for layer in self.cache.layers]
        self.mask = select_mask_function(model, windows)
        self.is_capturable = not reads_masks_back(model, windows)
        """Whether a step can be captured as a CUDA graph: it reads no value of a tensor."""

    def allocate(
        self,
        slots: int,
        columns: int,
        limit: int,
    ) -> int:
        self.slots = slots_that_fit(slots, self.bytes_per_slot(columns), limit)
        self.columns = columns
        return self.slots

    @property
    def unshared_slots(self) -> int:
        """Sequences that fit if they share nothing."""
        return self.slots

    def unused_bytes(self, limit: int) -> int:
        """Returns what is left of `limit` bytes (`unused_cache_bytes`)."""
        return unused_cache_bytes(self.slots, self.bytes_per_slot(self.columns), limit)

    def bytes_per_slot(self, columns: int) -> int:
        """Returns the bytes of one slot. The bytes of a token in each layer are measured with a prompt of one token,
        once for each model."""
        layers = self.cache.layers
        if self.model not in _TOKEN_BYTES:
            self.prefill([[0]])
            sizes = []
            for layer in layers:
                keys, values = layer.prefill_states
                sizes.append(keys.nbytes + values.nbytes)
            _TOKEN_BYTES[self.model] = sizes
        total = 0
        for layer, token_bytes in zip(layers, _TOKEN_BYTES[self.model], strict=True):
            total += min(columns, layer.window or columns) * token_bytes
        return total

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[PrefilledPrompts, Tensor]:
        ids, lengths = pad_prompts(prompts, self.device)
        self.cache.prefill()
        hidden = self.decoder(
            input_ids=ids,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        layers = [layer.prefill_states for layer in self.cache.layers]
        return PrefilledPrompts(layers, lengths), last_states(hidden, lengths)

    def room(self, prompts: Any, row: int) -> int:
        return self.slots

    def insert(
        self,
        prompts: PrefilledPrompts,
        rows: Sequence[int],
        slots: Sequence[int],
    ) -> None:
        source = copy_to(torch.tensor(rows), self.device)
        target = copy_to(torch.tensor(slots), self.device)
        lengths = prompts.lengths[source]
        for layer, prefill_states in zip(self.cache.layers, prompts.layers, strict=True):
            if not layer.is_initialized:
                layer.allocate(prefill_states, self.slots, self.columns)
            layer.insert(
                prefill_states,
                source,
                lengths,
                target,
            )

    def move(
        self,
        source: int,
        target: int,
        length: int,
    ) -> None:
        for layer in self.cache.layers:
            layer.move(source, target, length)

    def release(self, slots: Sequence[int]) -> None:
        """Does nothing: a sequence that takes a slot overwrites it."""

    def step(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
    ) -> Tensor:
        input_ids, position_ids = token_columns(tokens, positions, self.device)
        return self.step_on_device(
            input_ids,
            position_ids,
            width=max(positions) + 1,
            is_full=min(positions) == max(positions),
        )

    def step_on_device(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        width: int,
        is_full: bool = False,
    ) -> Tensor:
        """As `step`, for ids and positions (N, 1) on the device, with the first `width` columns of the cache. All
        positions are below `width`; `is_full` states that all are `width - 1`. Reads no value of a tensor."""
        self.cache.decode(position_ids[:, 0], width)
        output = self.decoder(
            input_ids=input_ids,
            attention_mask=self.mask(width, position_ids, is_full),
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, 0]  # type: ignore[no-any-return]
