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

from lowrank_tune.rollout.cache import SlotCache, windows_of

_TOKEN_BYTES: WeakKeyDictionary[Any, list[int]] = WeakKeyDictionary()


class Store(Protocol):
    """What sequences have read, so that a step reads one token of each."""

    def open(self, slots: int, columns: int, limit: int) -> int:
        """Makes room for at most `slots` sequences of `columns` tokens in `limit` bytes, but for one at least; says for
        how many."""

    def read(self, prompts: Sequence[Sequence[int]]) -> tuple[Any, Tensor]:
        """Reads prompts from their beginnings: what to place, and the last hidden state of each (N, d)."""

    def place(self, prompts: Any, rows: Sequence[int], slots: Sequence[int]) -> None:
        """Puts the prompts numbered `rows` of what was read into `slots`."""

    def move(self, source: int, target: int, length: int) -> None:
        """The sequence of `length` tokens in one slot goes to another one."""

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Reads one token at its position for each of the first slots: their last hidden states (N, d)."""


@dataclass(frozen=True)
class _Prompts:
    layers: list[tuple[Tensor, Tensor]]
    lengths: Tensor


class SlotStore:
    """One preallocated cache for all: every step is one forward pass over as many rows as speak, and copies nothing.

    Raises ValueError for a model that wants another kind of cache.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.decoder = model, model.get_decoder()
        self.device, self.cache = model.device, SlotCache(windows_of(model))
        self.slots = self.columns = 0
        # In four dimensions transformers hands a mask on as it is; with windows, it cuts one of two dimensions to each
        # layer's width.
        self.ready_masks = (
            self.device.type == "cpu"
            and model.dtype == torch.float32
            and not any(one.window for one in self.cache.layers)
        )

    def open(self, slots: int, columns: int, limit: int) -> int:
        # A quarter as much may be held by prompts that were read ahead and wait for their slots.
        self.slots, self.columns = max(1, min(slots, limit * 4 // 5 // max(1, self.bytes_of(columns)))), columns
        return self.slots

    def bytes_of(self, columns: int) -> int:
        """Bytes of one slot. What a token takes in each layer is learned from a prompt of one token, once for a
        model."""
        if self.model not in _TOKEN_BYTES:
            self.read([[0]])
            _TOKEN_BYTES[self.model] = [sum(one.nbytes for one in layer.fresh) for layer in self.cache.layers]
        token = zip(self.cache.layers, _TOKEN_BYTES[self.model], strict=True)
        return sum(min(columns, layer.window or columns) * size for layer, size in token)

    def read(self, prompts: Sequence[Sequence[int]]) -> tuple[_Prompts, Tensor]:
        ids, lengths = _pad(prompts, self.device)
        self.cache.prefill()
        hidden = self.decoder(input_ids=ids, past_key_values=self.cache, use_cache=True).last_hidden_state
        layers = [layer.fresh for layer in self.cache.layers]
        return _Prompts(layers, lengths), hidden[torch.arange(len(ids), device=self.device), lengths - 1]

    def place(self, prompts: _Prompts, rows: Sequence[int], slots: Sequence[int]) -> None:
        source, target = torch.tensor(rows, device=self.device), torch.tensor(slots, device=self.device)
        for layer, kept in zip(self.cache.layers, prompts.layers, strict=True):
            if not layer.is_initialized:
                layer.allocate(kept, self.slots, self.columns)
            layer.place(kept, source, prompts.lengths[source], target)

    def move(self, source: int, target: int, length: int) -> None:
        for layer in self.cache.layers:
            layer.move(source, target, length)

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        ids, places = torch.tensor((tokens, positions), device=self.device)[:, :, None]
        width = max(positions) + 1
        self.cache.decode(places[:, 0], width)
        mask = torch.arange(width, device=self.device) <= places
        if self.ready_masks:
            mask = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)[:, None, None]
        output = self.decoder(
            input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=self.cache, use_cache=True
        )
        return output.last_hidden_state[:, 0]  # type: ignore[no-any-return]


@dataclass
class _Cohort:
    cache: Any
    size: int


class CohortStore:
    """For models that keep something else than keys and values: the model's own cache for each prompt's group, as
    `generate` has it.

    A group was of one length from its beginning, so there is no padding that a state could take in. One forward pass a
    group and step.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.decoder, self.device = model, model.get_decoder(), model.device
        self.owners: dict[int, tuple[_Cohort, int]] = {}

    def open(self, slots: int, columns: int, limit: int) -> int:
        return slots

    def read(self, prompts: Sequence[Sequence[int]]) -> tuple[list[Any], Tensor]:
        caches, hidden = [], []
        for prompt in prompts:
            caches.append(DynamicCache(config=self.model.config))
            ids = torch.tensor([list(prompt)], device=self.device)
            hidden.append(
                self.decoder(input_ids=ids, past_key_values=caches[-1], use_cache=True).last_hidden_state[:, -1]
            )
        return caches, torch.cat(hidden)

    def place(self, prompts: list[Any], rows: Sequence[int], slots: Sequence[int]) -> None:
        for row in dict.fromkeys(rows):
            mine = [slot for slot, other in zip(slots, rows, strict=True) if other == row]
            cohort = _Cohort(copy.deepcopy(prompts[row]), len(mine))
            cohort.cache.reorder_cache(torch.zeros(len(mine), dtype=torch.long, device=self.device))
            self.owners.update({slot: (cohort, index) for index, slot in enumerate(mine)})

    def move(self, source: int, target: int, length: int) -> None:
        self.owners[target] = self.owners.pop(source)

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        cohorts: dict[int, list[int]] = {}
        for slot in range(len(tokens)):
            cohorts.setdefault(id(self.owners[slot][0]), []).append(slot)
        hidden: dict[int, Tensor] = {}
        for slots in cohorts.values():
            cache = self._kept(slots)
            ids, places = torch.tensor(
                [[row[slot] for slot in slots] for row in (tokens, positions)], device=self.device
            )[:, :, None]
            states = self.decoder(
                input_ids=ids, position_ids=places, past_key_values=cache, use_cache=True
            ).last_hidden_state
            hidden.update(zip(slots, states[:, -1], strict=True))
        return torch.stack([hidden[slot] for slot in range(len(tokens))])

    def _kept(self, slots: Sequence[int]) -> Any:
        """The cache of the cohort in `slots`, in their order, without the rows that have left."""
        cohort, indices = self.owners[slots[0]][0], [self.owners[slot][1] for slot in slots]
        if indices != list(range(cohort.size)):
            cohort.cache.reorder_cache(torch.tensor(indices, device=self.device))
            cohort.size = len(indices)
            self.owners.update({slot: (cohort, index) for index, slot in enumerate(slots)})
        return cohort.cache


class RecomputeStore:
    """For any causal model at all: every step reads the whole sequences again, as the trainer does. Slow, and hard to
    get wrong."""

    def __init__(self, model: Any) -> None:
        self.decoder, self.device = model.get_decoder(), model.device
        self.read_so_far: dict[int, list[int]] = {}

    def open(self, slots: int, columns: int, limit: int) -> int:
        return slots

    def read(self, prompts: Sequence[Sequence[int]]) -> tuple[list[list[int]], Tensor]:
        ids, lengths = _pad(prompts, self.device)
        hidden = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
        return [list(prompt) for prompt in prompts], hidden[torch.arange(len(ids), device=self.device), lengths - 1]

    def place(self, prompts: list[list[int]], rows: Sequence[int], slots: Sequence[int]) -> None:
        self.read_so_far.update({slot: prompts[row][:] for row, slot in zip(rows, slots, strict=True)})

    def move(self, source: int, target: int, length: int) -> None:
        self.read_so_far[target] = self.read_so_far.pop(source)

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        for slot, token in enumerate(tokens):
            self.read_so_far[slot].append(token)
        return self.read([self.read_so_far[slot] for slot in range(len(tokens))])[1]


def _pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Padded on the right, which a causal model never looks at, and the lengths."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    return ids, torch.tensor([len(row) for row in rows], device=device)
