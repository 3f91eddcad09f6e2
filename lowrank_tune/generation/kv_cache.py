"""Caches of what the sequences of a rollout have read: three kinds, from the fastest to the one that serves any causal
model.

A sequence has a slot, and the slots in use are always the first ones. A prompt is read once and copied into any number
of slots.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache

from lowrank_tune.batch import copy_to
from lowrank_tune.generation.decode_masks import reads_masks_back, select_mask_function
from lowrank_tune.generation.slot_cache import SlotCache, sliding_windows

_TOKEN_BYTES: WeakKeyDictionary[Any, list[int]] = WeakKeyDictionary()

UNLIMITED = 1 << 30
"""Room for any number of sequences."""


class KVStore(Protocol):
    """What sequences have read, so that a step reads one token of each."""

    def allocate(
        self,
        slots: int,
        columns: int,
        limit: int,
    ) -> int:
        """Reserves room for at most `slots` sequences of `columns` tokens in `limit` bytes, at least for one. Returns
        for how many."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Any, Tensor]:
        """Reads prompts. Returns a cache for `insert`, and the last hidden state of each prompt (N, d)."""

    def room(self, prompts: Any, row: int) -> int:
        """Returns how many sequences of a row of a prefilled cache have room besides those in slots; at least one if
        no slot is in use."""

    def insert(
        self,
        prompts: Any,
        rows: Sequence[int],
        slots: Sequence[int],
    ) -> None:
        """Copies the rows `rows` of a prefilled cache into `slots`."""

    def move(
        self,
        source: int,
        target: int,
        length: int,
    ) -> None:
        """Moves the sequence of `length` tokens in one slot to another slot."""

    def release(self, slots: Sequence[int]) -> None:
        """Frees what the sequences that have ended in these slots take."""

    def step(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
    ) -> Tensor:
        """Reads one token at its position for each of the first slots. Returns their last hidden states (N, d)."""


def slots_that_fit(
    slots: int,
    bytes_per_slot: int,
    limit: int,
) -> int:
    """Returns how many of `slots` slots fit `limit` bytes, at least 1. A fifth of the bytes is left for prompts that
    were read ahead and wait for their slots."""
    return max(1, min(slots, limit * 4 // 5 // max(1, bytes_per_slot)))


def unused_cache_bytes(
    slots: int,
    bytes_per_slot: int,
    limit: int,
) -> int:
    """Returns what these slots leave of `limit` bytes, besides the fifth for prompts that wait."""
    return max(0, limit * 4 // 5 - slots * bytes_per_slot)


@dataclass(frozen=True)
class PrefilledPrompts:
    """Keys and values of prompts in each layer, (N, heads, T, width of a head), and the lengths (N,) of the prompts."""

    layers: list[tuple[Tensor, Tensor]]
    lengths: Tensor


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
        ids, lengths = _pad(prompts, self.device)
        self.cache.prefill()
        hidden = self.decoder(
            input_ids=ids,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        layers = [layer.prefill_states for layer in self.cache.layers]
        return PrefilledPrompts(layers, lengths), _last_states(hidden, lengths)

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
        input_ids, position_ids = _token_columns(tokens, positions, self.device)
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


class _UnreservedStore:
    """A store that reserves nothing, so that any number of slots fits. `slots` contains what each slot in use has."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.decoder = model.get_decoder()
        self.device = model.device
        self.slots: dict[int, Any] = {}

    def allocate(
        self,
        slots: int,
        columns: int,
        limit: int,
    ) -> int:
        return slots

    def room(self, prompts: Any, row: int) -> int:
        return UNLIMITED

    def move(
        self,
        source: int,
        target: int,
        length: int,
    ) -> None:
        self.slots[target] = self.slots.pop(source)

    def release(self, slots: Sequence[int]) -> None:
        """Does nothing: a sequence that takes a slot overwrites it."""


@dataclass
class _CacheGroup:
    cache: Any
    size: int


class DynamicCacheStore(_UnreservedStore):
    """The model's own cache for each prompt's group of samples, as `generate` has it, for models that cache something
    other than keys and values.

    All sequences of a group have the same length, so no state contains padding. Each step is one forward pass for each
    group.
    """

    slots: dict[int, tuple[_CacheGroup, int]]
    """The group of each slot, and the row in its cache."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[list[Any], Tensor]:
        caches = []
        hidden = []
        for prompt in prompts:
            cache = DynamicCache(config=self.model.config)
            ids = torch.tensor([list(prompt)], device=self.device)
            output = self.decoder(
                input_ids=ids,
                past_key_values=cache,
                use_cache=True,
            )
            caches.append(cache)
            hidden.append(output.last_hidden_state[:, -1])
        return caches, torch.cat(hidden)

    def insert(
        self,
        prompts: list[Any],
        rows: Sequence[int],
        slots: Sequence[int],
    ) -> None:
        for row in dict.fromkeys(rows):
            group_slots = [slot for slot, other in zip(slots, rows, strict=True) if other == row]
            group = _CacheGroup(copy.deepcopy(prompts[row]), len(group_slots))
            group.cache.reorder_cache(
                torch.zeros(
                    len(group_slots),
                    dtype=torch.long,
                    device=self.device,
                )
            )
            self._assign(group, group_slots)

    def step(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
    ) -> Tensor:
        num_slots = len(tokens)
        slots_of_group = dict[int, list[int]]()
        for slot in range(num_slots):
            group, _ = self.slots[slot]
            slots_of_group.setdefault(id(group), []).append(slot)
        hidden = dict[int, Tensor]()
        for slots in slots_of_group.values():
            group_tokens = [tokens[slot] for slot in slots]
            group_positions = [positions[slot] for slot in slots]
            input_ids, position_ids = _token_columns(group_tokens, group_positions, self.device)
            output = self.decoder(
                input_ids=input_ids,
                position_ids=position_ids,
                past_key_values=self._select_cache_rows(slots),
                use_cache=True,
            )
            hidden.update(
                zip(
                    slots,
                    output.last_hidden_state[:, -1],
                    strict=True,
                )
            )
        return torch.stack([hidden[slot] for slot in range(num_slots)])

    def _assign(
        self,
        group: _CacheGroup,
        slots: Sequence[int],
    ) -> None:
        """Records that row i of the group's cache belongs to slots[i]."""
        for row, slot in enumerate(slots):
            self.slots[slot] = group, row

    def _select_cache_rows(self, slots: Sequence[int]) -> Any:
        """Returns the cache of the group in `slots`, in their order, without the rows of sequences that ended."""
        group, _ = self.slots[slots[0]]
        rows = [self.slots[slot][1] for slot in slots]
        if rows != list(range(group.size)):
            group.cache.reorder_cache(torch.tensor(rows, device=self.device))
            group.size = len(rows)
            self._assign(group, slots)
        return group.cache


class NoCacheStore(_UnreservedStore):
    """No cache, for any causal model: every step reads the whole sequences again, as the trainer does. Slow."""

    slots: dict[int, list[int]]
    """The token ids in each slot."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[list[list[int]], Tensor]:
        ids, lengths = _pad(prompts, self.device)
        hidden = self.decoder(
            input_ids=ids,
            use_cache=False,
        ).last_hidden_state
        return [list(prompt) for prompt in prompts], _last_states(hidden, lengths)

    def insert(
        self,
        prompts: list[list[int]],
        rows: Sequence[int],
        slots: Sequence[int],
    ) -> None:
        for row, slot in zip(rows, slots, strict=True):
            self.slots[slot] = prompts[row][:]

    def step(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
    ) -> Tensor:
        for slot, token in enumerate(tokens):
            self.slots[slot].append(token)
        _, hidden = self.prefill([self.slots[slot] for slot in range(len(tokens))])
        return hidden


def _pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the rows padded on the right, where a causal model ignores it, and their lengths."""
    lengths = [len(row) for row in rows]
    width = max(lengths)
    padded = [[*row] + [0] * (width - len(row)) for row in rows]
    return copy_to(torch.tensor(padded), device), copy_to(torch.tensor(lengths), device)


def _last_states(hidden: Tensor, lengths: Tensor) -> Tensor:
    """Returns the hidden state (N, d) of the last token of each row."""
    rows = torch.arange(len(hidden), device=hidden.device)
    return hidden[rows, lengths - 1]


def _token_columns(
    tokens: Sequence[int],
    positions: Sequence[int],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Returns input ids and position ids (N, 1), with one transfer to the device."""
    input_ids, position_ids = copy_to(torch.tensor((tokens, positions)), device)[:, :, None]
    return input_ids, position_ids
