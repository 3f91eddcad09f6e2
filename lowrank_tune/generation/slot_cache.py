"""A preallocated key-value cache whose rows have lengths of their own, in transformers' own interface.

A slot is a row of the cache. A token at position p lies in column p, in a layer with a sliding window in column p
modulo the window. Attention does not ask in which order it finds its keys, and positions are in the keys already: the
columns that a row may look at are always the first ones, whatever the layer. So one mask of B rows serves all layers,
and rows of any lengths share a step without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer


@dataclass
class ForwardContext:
    """What all layers know of the forward pass that runs: the positions (B,) of its tokens in slots 0 to B - 1, or None
    in a prefill."""

    positions: Tensor | None = None
    width: int = 0
    index_cache: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)

    def slot_indices(self, heads: int, columns: int, window: int | None) -> Tensor:
        """(B * heads,) where the tokens lie in a layer with this window, among its slots * heads * columns vectors."""
        if (heads, columns, window) not in self.index_cache:
            assert self.positions is not None
            if window is None:
                column = self.positions
            else:
                column = self.positions % window
            first = torch.arange(len(column) * heads, device=column.device).view(-1, heads) * columns
            self.index_cache[heads, columns, window] = (first + column[:, None]).flatten()
        return self.index_cache[heads, columns, window]


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer, (slots, heads, columns, width of a head). In a prefill it hands on what it gets and
    remembers it."""

    def __init__(self, step: ForwardContext, window: int | None) -> None:
        super().__init__()
        self.step = step
        self.window = window
        self.is_sliding = window is not None
        self.prefill_states: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The slots are made by `allocate`, when their number is known."""

    def allocate(self, like: tuple[Tensor, Tensor], slots: int, columns: int) -> None:
        """Zeros: a masked column weighs nothing, but nothing times what lies about in memory could be NaN."""
        columns = min(columns, self.window or columns)
        self.keys, self.values = (states.new_zeros(slots, states.shape[1], columns, states.shape[3]) for states in like)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        step = self.step
        if step.positions is None:
            self.prefill_states = key_states, value_states
            return key_states, value_states
        rows = len(key_states)
        heads = key_states.shape[1]
        width = self._width()
        slot_indices = step.slot_indices(heads, self.keys.shape[2], self.window)
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            buffer.view(-1, buffer.shape[3]).index_copy_(0, slot_indices, states.reshape(rows * heads, -1))
        return self.keys[:rows, :, :width], self.values[:rows, :, :width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length if self.step.positions is None else self._width()), 0

    def get_seq_length(self) -> int:
        """So that the last column is the query's own: then transformers' causal and window masks let every column
        pass."""
        if self.step.positions is None:
            return 0
        return self._width() - 1

    def get_max_length(self) -> int:
        return -1

    def insert(self, prompts: tuple[Tensor, Tensor], source: Tensor, lengths: Tensor, slots: Tensor) -> None:
        """Copies keys and values of prompts (row `source`, `lengths` tokens) into `slots`; all (N,)."""
        for target, prefill_states in zip((self.keys, self.values), prompts, strict=True):
            taken = prefill_states[source]
            columns = target.shape[2]
            if taken.shape[2] > columns:
                taken = taken.gather(
                    2,
                    _ring_positions(lengths, columns)[:, None, :, None].expand(-1, taken.shape[1], -1, taken.shape[3]),
                )
            target[slots, :, : taken.shape[2]] = taken

    def move(self, source: int, target: int, length: int) -> None:
        length = min(length, self.window or length)
        for buffer in (self.keys, self.values):
            buffer[target, :, :length] = buffer[source, :, :length]

    def _width(self) -> int:
        return min(self.step.width, self.window or self.step.width)


class SlotCache(Cache):  # type: ignore[misc]
    """All layers of a decoder."""

    def __init__(self, windows: Sequence[int | None]) -> None:
        self.step = ForwardContext()
        super().__init__(layers=[SlotLayer(self.step, window) for window in windows])

    def prefill(self) -> None:
        """The next forward pass reads prompts from their first token on."""
        self.step.positions = None

    def decode(self, positions: Tensor, width: int) -> None:
        """The next forward pass reads one token for each of the first slots, at these positions (B,), all below
        `width`."""
        self.step.positions = positions
        self.step.width = width
        self.step.index_cache.clear()


def sliding_windows(model: Any) -> list[int | None]:
    """Each layer's sliding window, None for none. Raises ValueError where the model wants another kind of cache."""
    layers = DynamicCache(config=model.config).layers
    if not layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        raise ValueError(f"{model.config.model_type} models keep something else than keys and values")
    # Models outside transformers' attention interface make masks by themselves, and may take a row's length from the
    # cache's.
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(f"{model.config.model_type} models have an attention of their own")
    return layer_windows(model.config)


def layer_windows(config: Any) -> list[int | None]:
    """Each layer's sliding window as in transformers' own cache, None for none. A configuration without
    `layer_types` has one window for all layers."""
    cache = DynamicCache(config=config)
    return [
        int(layer.sliding_window) if is_sliding else None
        for layer, is_sliding in zip(cache.layers, cache.is_sliding, strict=True)
    ]


def _ring_positions(lengths: Tensor, columns: int) -> Tensor:
    """(N, columns): which of a row's tokens lies in each column of a ring: the last one that belongs there. Anything
    where none does."""
    last = lengths[:, None] - 1
    return (last - (last - torch.arange(columns, device=lengths.device)) % columns).clamp_min(0)
