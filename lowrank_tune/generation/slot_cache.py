"""A preallocated key-value cache whose rows have different lengths, in transformers' own interface.

A slot is a row of the cache. A token at position p is stored in column p, in a layer with a sliding window in column p
modulo the window. The order of keys does not matter to attention, and keys already contain their positions. So the
columns that a row may see are the first ones in every layer, one mask of B rows serves all layers, and rows of any
lengths share a step without padding.
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
    """The forward pass that all layers are in: the positions (B,) of its tokens in slots 0 to B - 1, None in a prefill,
    and a width above all of them."""

    positions: Tensor | None = None
    width: int = 0
    index_cache: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)

    def slot_indices(
        self,
        heads: int,
        columns: int,
        window: int | None,
    ) -> Tensor:
        """Returns (B * heads,): where the tokens are stored in a layer with this window, among its slots * heads *
        columns vectors."""
        key = (heads, columns, window)
        if key not in self.index_cache:
            assert self.positions is not None
            column = self.positions
            if window is not None:
                column = column % window
            first = torch.arange(len(column) * heads, device=column.device).view(-1, heads) * columns
            self.index_cache[key] = (first + column[:, None]).flatten()
        return self.index_cache[key]


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer, (slots, heads, columns, width of a head). In a prefill it returns what it gets and
    stores it in `prefill_states`."""

    def __init__(
        self,
        step: ForwardContext,
        window: int | None,
    ) -> None:
        super().__init__()
        self.step = step
        self.window = window
        self.is_sliding = window is not None
        self.prefill_states: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(
        self,
        key_states: Tensor,
        value_states: Tensor,
    ) -> None:
        """Does nothing: `allocate` creates the slots when their number is known."""

    def allocate(
        self,
        like: tuple[Tensor, Tensor],
        slots: int,
        columns: int,
    ) -> None:
        """Creates slots for keys and values that are shaped as `like`."""
        columns = min(columns, self.window or columns)
        # Zeros, because a masked column has weight 0, and 0 times uninitialized memory could be NaN.
        self.keys, self.values = (states.new_zeros(slots, states.shape[1], columns, states.shape[3]) for states in like)
        self.is_initialized = True

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        if self.step.positions is None:
            self.prefill_states = key_states, value_states
            return key_states, value_states
        rows, heads = key_states.shape[:2]
        slot_indices = self.step.slot_indices(heads, self.keys.shape[2], self.window)
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            vectors = buffer.view(-1, buffer.shape[3])
            vectors.index_copy_(0, slot_indices, states.reshape(rows * heads, -1))
        width = self._width()
        return self.keys[:rows, :, :width], self.values[:rows, :, :width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.step.positions is None:
            return query_length, 0
        return self._width(), 0

    def get_seq_length(self) -> int:
        """Returns a length with which the last column is the query's own: then transformers' causal and window masks
        exclude no column."""
        if self.step.positions is None:
            return 0
        return self._width() - 1

    def get_max_length(self) -> int:
        return -1

    def insert(
        self,
        prompts: tuple[Tensor, Tensor],
        source: Tensor,
        lengths: Tensor,
        slots: Tensor,
    ) -> None:
        """Copies keys and values of prompts (row `source`, `lengths` tokens) into `slots`; all (N,)."""
        for target, prefill_states in zip((self.keys, self.values), prompts, strict=True):
            states = prefill_states[source]
            columns = target.shape[2]
            if states.shape[2] > columns:
                positions = _ring_positions(lengths, columns)[:, None, :, None]
                states = states.gather(
                    2,
                    positions.expand(
                        -1,
                        states.shape[1],
                        -1,
                        states.shape[3],
                    ),
                )
            target[slots, :, : states.shape[2]] = states

    def move(
        self,
        source: int,
        target: int,
        length: int,
    ) -> None:
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
        """Prepares for a forward pass that reads prompts from their first token on."""
        self.step.positions = None

    def decode(
        self,
        positions: Tensor,
        width: int,
    ) -> None:
        """Prepares for a forward pass that reads one token for each of the first slots, at `positions` (B,), all below
        `width`."""
        self.step.positions = positions
        self.step.width = width
        self.step.index_cache.clear()


def sliding_windows(model: Any) -> list[int | None]:
    """Returns each layer's sliding window, or None for full attention. Raises ValueError if the model needs another
    kind of cache."""
    config = model.config
    layers = DynamicCache(config=config).layers
    if not layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        raise ValueError(f"{config.model_type} models cache something other than keys and values")
    # Models outside transformers' attention interface make masks by themselves, and may take a row's length from the
    # cache's.
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(f"{config.model_type} models have their own attention code")
    return layer_windows(config)


def layer_windows(config: Any) -> list[int | None]:
    """Returns each layer's sliding window as in transformers' own cache, or None for full attention. A configuration
    without `layer_types` has one window for all layers."""
    windows = list[int | None]()
    cache = DynamicCache(config=config)
    for layer, is_sliding in zip(cache.layers, cache.is_sliding, strict=True):
        windows.append(int(layer.sliding_window) if is_sliding else None)
    return windows


def _ring_positions(lengths: Tensor, columns: int) -> Tensor:
    """Returns (N, columns): which token of a row is stored in each column of a ring, the last one that belongs there.
    Columns that no token belongs to have any value."""
    last = lengths[:, None] - 1
    column = torch.arange(columns, device=lengths.device)
    return (last - (last - column) % columns).clamp_min(0)
