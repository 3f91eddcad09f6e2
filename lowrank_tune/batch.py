"""Tokenized rows, and batches of padded rows. Entry t of every (B, T) tensor is about token t; the name of a mask
states what True means."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One tokenized conversation: ids, and for each whether the assistant says it. Lists of one length."""

    input_ids: Sequence[int]
    completion_mask: Sequence[bool]


@dataclass
class Batch:
    """Rows padded to one length T, on the right.

    input_ids (B, T) long; attention_mask (B, T) bool: a real token; completion_mask (B, T) bool: a token that the loss
    is about (SFT: a token of the assistant; RL: a token of the policy); token_weights (B, T) fp32, or (B,) where whole
    rows have a weight: set by an algorithm's `token_weights`, once for the whole optimizer step, before any split;
    extra: further tensors with B rows, (B,) or (B, T): of pairs `margin`, `row` (its number in the data); of pairs and
    groups `shared` (leading tokens that a row has in common with the first row of its pair or group; 0 starts one);
    and those that an algorithm adds.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    token_weights: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens of each row up to the last attended one."""
        positions = torch.arange(1, self.input_ids.shape[1] + 1, device=self.input_ids.device)
        return (self.attention_mask * positions).amax(dim=1)

    @property
    def loss_mask(self) -> Tensor:
        """(B, T) bool: `completion_mask`, but never a padding slot and never a row's first token, before which there is
        nothing."""
        loss_mask = self.completion_mask & self.attention_mask
        loss_mask[:, 0] = False
        loss_mask[:, 1:] &= self.attention_mask[:, :-1]
        return loss_mask

    def select_rows(self, rows: Tensor, width: int | None = None) -> Batch:
        """These rows, cut to `width` columns, by default to the columns that they need, at least one."""
        width = max(1, int(self.lengths[rows].max()) if width is None else width)

        def take_rows(tensor: Tensor) -> Tensor:
            picked = tensor[rows]
            if picked.ndim > 1 and picked.shape[1] == self.input_ids.shape[1]:
                return picked[:, :width]
            return picked

        return Batch(
            take_rows(self.input_ids),
            take_rows(self.attention_mask),
            take_rows(self.completion_mask),
            None if self.token_weights is None else take_rows(self.token_weights),
            {name: take_rows(tensor) for name, tensor in self.extra.items()},
        )

    def split(self, rows: int | None = None, tokens: int | None = None, rows_per_unit: int = 1) -> Iterator[Batch]:
        """Micro-batches of at most `rows` rows, or of at most `tokens` tokens with padding, of rows of similar length,
        longest first.

        `rows_per_unit` adjacent rows stay in one micro-batch (2 for pairs). A unit larger than the budget comes alone.
        Units that share a beginning with their neighbors (`shared`) stay next to them, so that a micro-batch reads it
        once for many.
        """
        lengths: list[int] = self.lengths.view(-1, rows_per_unit).amax(dim=1).tolist()
        units: list[int] = []
        width = 0
        for unit in self._units_by_length(lengths, rows_per_unit):
            count = (len(units) + 1) * rows_per_unit
            wider = max(width, lengths[unit])
            if units and ((rows is not None and count > rows) or (tokens is not None and count * wider > tokens)):
                yield self._select_units(units, rows_per_unit, width)
                units = []
                wider = lengths[unit]
            units.append(unit)
            width = wider
        if units:
            yield self._select_units(units, rows_per_unit, width)

    def _units_by_length(self, lengths: Sequence[int], rows_per_unit: int) -> list[int]:
        """Units by falling length of the longest one of their family: those that share a beginning; without such, of
        their own."""
        family = list(range(len(lengths)))
        if "shared" in self.extra:
            family = (self.extra["shared"][::rows_per_unit] == 0).cumsum(0).tolist()
        longest: dict[int, int] = {}
        for unit, length in enumerate(lengths):
            longest[family[unit]] = max(length, longest.get(family[unit], 0))
        return sorted(range(len(lengths)), key=lambda unit: (-longest[family[unit]], family[unit], -lengths[unit]))

    def _select_units(self, units: Sequence[int], rows_per_unit: int, width: int) -> Batch:
        return self.select_rows(
            torch.tensor(
                [unit * rows_per_unit + i for unit in units for i in range(rows_per_unit)], device=self.input_ids.device
            ),
            width,
        )

    def to(self, device: torch.device | str) -> Batch:
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            completion_mask=self.completion_mask.to(device),
            token_weights=None if self.token_weights is None else self.token_weights.to(device),
            extra={name: tensor.to(device) for name, tensor in self.extra.items()},
        )
