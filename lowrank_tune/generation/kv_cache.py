"""Where a rollout keeps what its sequences have read: three ways, from the fastest to the one that serves any causal
model.

A sequence lives in a slot, and the slots in use are always the first ones. A prompt is read once and placed in any
number of slots.
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

from lowrank_tune.generation.slot_cache import SlotCache, sliding_windows

_TOKEN_BYTES: WeakKeyDictionary[Any, list[int]] = WeakKeyDictionary()


class KVStore(Protocol):
    """What sequences have read, so that a step reads one token of each."""

    def allocate(self, slots: int, columns: int, limit: int) -> int:
        """Makes room for at most `slots` sequences of `columns` tokens in `limit` bytes, but for one at least; says for
        how many."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Any, Tensor]:
        """Reads prompts from their beginnings: what to place, and the last hidden state of each (N, d)."""

    def insert(self, prompts: Any, rows: Sequence[int], slots: Sequence[int]) -> None:
        """Puts the prompts numbered `rows` of what was read into `slots`."""

    def move(self, source: int, target: int, length: int) -> None:
        """The sequence of `length` tokens in one slot goes to another one."""

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Reads one token at its position for each of the first slots: their last hidden states (N, d)."""


@dataclass(frozen=True)
class _PrefilledPrompts:
    layers: list[tuple[Tensor, Tensor]]
    lengths: Tensor


class StaticSlotCache:
    """One preallocated cache for all: every step is one forward pass over as many rows as speak, and copies nothing.

    Raises ValueError for a model that wants another kind of cache.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.decoder = model.get_decoder()
        self.device = model.device
        self.cache = SlotCache(sliding_windows(model))
        self.slots = self.columns = 0
        # In four dimensions transformers hands a mask on as it is; with windows, it cuts one of two dimensions to each
        # layer's width.
        self.ready_masks = (
            self.device.type == "cpu"
            and model.dtype == torch.float32
            and not any(layer.window for layer in self.cache.layers)
        )

    def allocate(self, slots: int, columns: int, limit: int) -> int:
        # A quarter as much may be held by prompts that were read ahead and wait for their slots.
        self.slots = max(1, min(slots, limit * 4 // 5 // max(1, self.bytes_per_slot(columns))))
        self.columns = columns
        return self.slots

    def bytes_per_slot(self, columns: int) -> int:
        """Bytes of one slot. What a token takes in each layer is learned from a prompt of one token, once for a
        model."""
        if self.model not in _TOKEN_BYTES:
            self.prefill([[0]])
            _TOKEN_BYTES[self.model] = [
                sum(states.nbytes for states in layer.prefill_states) for layer in self.cache.layers
            ]
        token = zip(self.cache.layers, _TOKEN_BYTES[self.model], strict=True)
        return sum(min(columns, layer.window or columns) * size for layer, size in token)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[_PrefilledPrompts, Tensor]:
        ids, lengths = _pad(prompts, self.device)
        self.cache.prefill()
        hidden = self.decoder(input_ids=ids, past_key_values=self.cache, use_cache=True).last_hidden_state
        layers = [layer.prefill_states for layer in self.cache.layers]
        return _PrefilledPrompts(layers, lengths), hidden[torch.arange(len(ids), device=self.device), lengths - 1]

    def insert(self, prompts: _PrefilledPrompts, rows: Sequence[int], slots: Sequence[int]) -> None:
        source = torch.tensor(rows, device=self.device)
        target = torch.tensor(slots, device=self.device)
        for layer, prefill_states in zip(self.cache.layers, prompts.layers, strict=True):
            if not layer.is_initialized:
                layer.allocate(prefill_states, self.slots, self.columns)
            layer.insert(prefill_states, source, prompts.lengths[source], target)

    def move(self, source: int, target: int, length: int) -> None:
        for layer in self.cache.layers:
            layer.move(source, target, length)

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        input_ids, position_ids = torch.tensor((tokens, positions), device=self.device)[:, :, None]
        width = max(positions) + 1
        self.cache.decode(position_ids[:, 0], width)
        mask = torch.arange(width, device=self.device) <= position_ids
        if self.ready_masks:
            mask = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)[:, None, None]
        output = self.decoder(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, 0]  # type: ignore[no-any-return]


@dataclass
class _CacheGroup:
    cache: Any
    size: int


class DynamicCacheStore:
    """For models that keep something else than keys and values: the model's own cache for each prompt's group, as
    `generate` has it.

    A group was of one length from its beginning, so there is no padding that a state could take in. One forward pass a
    group and step.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.decoder = model.get_decoder()
        self.device = model.device
        self.group_of_slot: dict[int, tuple[_CacheGroup, int]] = {}

    def allocate(self, slots: int, columns: int, limit: int) -> int:
        return slots

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[list[Any], Tensor]:
        caches = []
        hidden = []
        for prompt in prompts:
            caches.append(DynamicCache(config=self.model.config))
            ids = torch.tensor([list(prompt)], device=self.device)
            hidden.append(
                self.decoder(input_ids=ids, past_key_values=caches[-1], use_cache=True).last_hidden_state[:, -1]
            )
        return caches, torch.cat(hidden)

    def insert(self, prompts: list[Any], rows: Sequence[int], slots: Sequence[int]) -> None:
        for row in dict.fromkeys(rows):
            group_slots = [slot for slot, other in zip(slots, rows, strict=True) if other == row]
            group = _CacheGroup(copy.deepcopy(prompts[row]), len(group_slots))
            group.cache.reorder_cache(torch.zeros(len(group_slots), dtype=torch.long, device=self.device))
            self.group_of_slot.update({slot: (group, index) for index, slot in enumerate(group_slots)})

    def move(self, source: int, target: int, length: int) -> None:
        self.group_of_slot[target] = self.group_of_slot.pop(source)

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        groups: dict[int, list[int]] = {}
        for slot in range(len(tokens)):
            groups.setdefault(id(self.group_of_slot[slot][0]), []).append(slot)
        hidden: dict[int, Tensor] = {}
        for slots in groups.values():
            cache = self._select_cache_rows(slots)
            input_ids, position_ids = torch.tensor(
                [[row[slot] for slot in slots] for row in (tokens, positions)], device=self.device
            )[:, :, None]
            states = self.decoder(
                input_ids=input_ids,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            hidden.update(zip(slots, states[:, -1], strict=True))
        return torch.stack([hidden[slot] for slot in range(len(tokens))])

    def _select_cache_rows(self, slots: Sequence[int]) -> Any:
        """The cache of the cohort in `slots`, in their order, without the rows that have left."""
        group = self.group_of_slot[slots[0]][0]
        indices = [self.group_of_slot[slot][1] for slot in slots]
        if indices != list(range(group.size)):
            group.cache.reorder_cache(torch.tensor(indices, device=self.device))
            group.size = len(indices)
            self.group_of_slot.update({slot: (group, index) for index, slot in enumerate(slots)})
        return group.cache


class NoCacheStore:
    """For any causal model at all: every step reads the whole sequences again, as the trainer does. Slow, and hard to
    get wrong."""

    def __init__(self, model: Any) -> None:
        self.decoder = model.get_decoder()
        self.device = model.device
        self.sequences: dict[int, list[int]] = {}

    def allocate(self, slots: int, columns: int, limit: int) -> int:
        return slots

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[list[list[int]], Tensor]:
        ids, lengths = _pad(prompts, self.device)
        hidden = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
        return [list(prompt) for prompt in prompts], hidden[torch.arange(len(ids), device=self.device), lengths - 1]

    def insert(self, prompts: list[list[int]], rows: Sequence[int], slots: Sequence[int]) -> None:
        self.sequences.update({slot: prompts[row][:] for row, slot in zip(rows, slots, strict=True)})

    def move(self, source: int, target: int, length: int) -> None:
        self.sequences[target] = self.sequences.pop(source)

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        for slot, token in enumerate(tokens):
            self.sequences[slot].append(token)
        return self.prefill([self.sequences[slot] for slot in range(len(tokens))])[1]


def _pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Padded on the right, which a causal model never looks at, and the lengths."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    return ids, torch.tensor([len(row) for row in rows], device=device)
