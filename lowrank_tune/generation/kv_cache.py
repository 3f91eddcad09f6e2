"""What caches of a rollout have in common: `KVStore`, the protocol, and the sizes and inputs that they share.

A sequence has a slot, and the slots in use are always the first ones. A prompt is read once and copied into any number
of slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lowrank_tune.batch import copy_to


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


def pad_prompts(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the rows padded on the right, where a causal model ignores it, and their lengths."""
    lengths = [len(row) for row in rows]
    width = max(lengths)
    padded = [[*row] + [0] * (width - len(row)) for row in rows]
    return copy_to(torch.tensor(padded), device), copy_to(torch.tensor(lengths), device)


def last_states(hidden: Tensor, lengths: Tensor) -> Tensor:
    """Returns the hidden state (N, d) of the last token of each row."""
    rows = torch.arange(len(hidden), device=hidden.device)
    return hidden[rows, lengths - 1]


def token_columns(
    tokens: Sequence[int],
    positions: Sequence[int],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Returns input ids and position ids (N, 1), with one transfer to the device."""
    input_ids, position_ids = copy_to(torch.tensor((tokens, positions)), device)[:, :, None]
    return input_ids, position_ids
