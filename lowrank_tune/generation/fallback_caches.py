"""Caches for models that a key-value cache in slots cannot serve: the model's own cache, or none."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from lowrank_tune.generation.kv_cache import last_states, pad_prompts, token_columns

UNLIMITED = 1 << 30
"""Room for any number of sequences."""


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
            input_ids, position_ids = token_columns(group_tokens, group_positions, self.device)
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
        ids, lengths = pad_prompts(prompts, self.device)
        hidden = self.decoder(
            input_ids=ids,
            use_cache=False,
        ).last_hidden_state
        return [list(prompt) for prompt in prompts], last_states(hidden, lengths)

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
