"""Tokenized rows, and batches of padded rows. Entry t of every (B, T) tensor is about token t; the name of a mask
states what True means."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

BatchT = TypeVar("BatchT", bound="Batch")


@dataclass(frozen=True)
class Row:
    """One tokenized conversation. Both lists have one entry for each token."""

    input_ids: Sequence[int]
    completion_mask: Sequence[bool]
    """True for the tokens of the assistant."""


@dataclass
class Batch:
    """B rows, padded on the right to one length T. Every field is a tensor with B rows, (B,) or (B, T), or None.

    Subclasses add fields; selecting, splitting and moving rows applies to all fields.
    """

    input_ids: Tensor
    """(B, T) long."""
    attention_mask: Tensor
    """(B, T) bool: a real token, not padding."""
    completion_mask: Tensor
    """(B, T) bool: a token of the loss. SFT: a token of the assistant; RL: a token that the policy drew."""
    token_weights: Tensor | None = None
    """(B, T) fp32, or (B,) if whole rows have a weight: weight of the loss, from the algorithm's `token_weights`, once
    for the whole optimizer step and before any split."""
    shared_prefix: Tensor | None = None
    """(B,) long, for units of several rows and groups: number of leading tokens that a row has in common with the first
    row of its unit or group. 0 for a first row."""
    _cpu_rows: Batch | None = field(
        default=None,
        init=False,
        repr=False,
        compare=False,
    )
    """These rows on the CPU, if `to` copied them to another device."""

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def on_cpu(self) -> Batch:
        """The rows on the CPU, where reading a value does not wait for the GPU."""
        if self.input_ids.is_cpu:
            return self
        if self._cpu_rows is None:
            return self.to("cpu")
        return self._cpu_rows

    @property
    def is_right_padded(self) -> bool:
        """Whether all padding is on the right."""
        mask = self.on_cpu.attention_mask
        return bool((mask[:, :-1] >= mask[:, 1:]).all())

    def indices_of(self, mask: Callable[[Batch], Tensor]) -> tuple[Tensor, Tensor]:
        """Returns rows (N,) and columns (N,) of the True values of a (B, T) mask of the batch. Makes no host sync,
        because the mask is computed from the rows on the CPU."""
        rows, columns = mask(self.on_cpu).nonzero(as_tuple=True)
        device = self.input_ids.device
        return copy_to(rows, device), copy_to(columns, device)

    @property
    def lengths(self) -> Tensor:
        """(B,) number of tokens of each row up to the last attended one."""
        positions = torch.arange(
            1,
            self.input_ids.shape[1] + 1,
            device=self.input_ids.device,
        )
        return (self.attention_mask * positions).amax(dim=1)

    @property
    def loss_mask(self) -> Tensor:
        """(B, T) bool: `completion_mask` without padding and without the first token of a row, which nothing
        predicts."""
        loss_mask = self.completion_mask & self.attention_mask
        loss_mask[:, 0] = False
        loss_mask[:, 1:] &= self.attention_mask[:, :-1]
        return loss_mask

    def tensors(self) -> dict[str, Tensor]:
        """Returns the fields that are set, by name."""
        found = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Tensor):
                found[each.name] = value
        return found

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Returns a batch of the same class, with `function` applied to each field that is set."""
        changed: dict[str, Any] = {name: function(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **changed)

    def to(self, device: torch.device | str) -> Self:
        """Returns the batch on a device. A copy on a GPU keeps a reference to the rows on the CPU, so the fields of
        neither may be changed afterwards."""
        moved = self.map_tensors(lambda tensor: copy_to(tensor, device))
        if self.input_ids.is_cpu:
            moved._cpu_rows = self
        return moved

    def select_rows(self, rows: Tensor, width: int | None = None) -> Self:
        """Returns these rows, cut to `width` columns; by default to the columns that they need, at least one."""
        if width is None:
            width = int(self.lengths[rows].max())
        width = max(1, width)

        def take(tensor: Tensor) -> Tensor:
            selected = tensor[rows]
            if selected.ndim == 1:
                return selected
            return selected[:, :width]

        return self.map_tensors(take)

    def pad_columns(self, width: int, pad_id: int) -> Self:
        """Returns the rows padded on the right to `width` columns, `input_ids` with `pad_id`, all else with 0."""
        num_columns = width - self.input_ids.shape[1]

        def pad(tensor: Tensor, value: int = 0) -> Tensor:
            if tensor.ndim == 1:
                return tensor
            return torch.nn.functional.pad(
                tensor,
                (0, num_columns),
                value=value,
            )

        padded = self.map_tensors(pad)
        padded.input_ids = pad(self.input_ids, pad_id)
        return padded

    def split(
        self,
        rows: int | None = None,
        tokens: int | None = None,
        rows_per_unit: int = 1,
    ) -> Iterator[Self]:
        """Yields micro-batches of rows of similar length, longest first, with at most `rows` rows, or with at most
        `tokens` tokens including padding.

        `rows_per_unit` adjacent rows (2 for pairs) are a unit and stay in one micro-batch. A unit above the limit is a
        micro-batch of its own. Units with a common prefix stay adjacent, so that a micro-batch computes it once.
        """
        lengths: list[int] = self.lengths.view(-1, rows_per_unit).amax(dim=1).tolist()
        batches = cut_into_batches(
            self._units_by_length(lengths, rows_per_unit),
            [length * rows_per_unit for length in lengths],
            math.inf if tokens is None else tokens,
            math.inf if rows is None else rows // rows_per_unit,
        )
        for units in batches:
            width = max(lengths[unit] for unit in units)
            row_numbers = rows_of_units(units, rows_per_unit).to(self.input_ids.device)
            yield self.select_rows(row_numbers, width)

    def _units_by_length(self, lengths: Sequence[int], rows_per_unit: int) -> list[int]:
        """Returns the units, longest first. Units with a common prefix are one family."""
        families: Sequence[int] = range(len(lengths))
        if self.shared_prefix is not None:
            families = (self.shared_prefix[::rows_per_unit] == 0).cumsum(0).tolist()
        return longest_first(lengths, families)


@dataclass
class PairBatch(Batch):
    """Preference pairs: the rows are chosen, rejected, chosen, rejected, ..."""

    margin: Tensor | None = None
    """(B,) fp32: margin of the pair of a row, 0 without one."""
    row_indices: Tensor | None = None
    """(B,) long: number of a row in the whole dataset."""
    reference_sequence_logps: Tensor | None = None
    """(B,) fp32, of DPO: log-prob of the whole answer under the reference."""
    sft_weights: Tensor | None = None
    """(B, T) fp32, of DPO with an SFT term: weight of a token in that term, 0 on rejected rows."""


@dataclass
class LabeledBatch(Batch):
    """Answers that are each desirable or not."""

    labels: Tensor | None = None
    """(B,) bool: the answer is desirable."""
    row_indices: Tensor | None = None
    """(B,) long: number of a row in the whole dataset."""
    reference_sequence_logps: Tensor | None = None
    """(B,) fp32: log-prob of the whole answer under the reference."""
    kl_estimate: Tensor | None = None
    """(B,) fp32: KL estimate of the optimizer step, the same for all rows."""


@dataclass
class RolloutBatch(Batch):
    """Prompts with completions that the policy drew; the completions of a prompt (a group) are adjacent."""

    sampler_logps: Tensor | None = None
    """(B, T) fp32: log-probs with which the tokens were drawn."""
    old_logps: Tensor | None = None
    """(B, T) fp32: log-probs of the policy before the update."""
    reference_logps: Tensor | None = None
    """(B, T) fp32: log-probs of the reference."""
    sequence_advantages: Tensor | None = None
    """(B,) fp32, of GRPO: advantage of a completion, the same for all of its tokens."""
    token_advantages: Tensor | None = None
    """(B, T) fp32, of PPO: whitened advantage of each token, by GAE."""
    values: Tensor | None = None
    """(B, T) fp32, of PPO: value before each token, from before the update."""
    returns: Tensor | None = None
    """(B, T) fp32, of PPO: advantage before whitening plus value, the target of the value."""


def collate(rows: Sequence[Row], pad_id: int) -> Batch:
    """Returns the rows padded on the right, (B, T). `attention_mask` marks the padding, so that any id may pad."""
    shape = (len(rows), max(len(row.input_ids) for row in rows))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=bool)
    completion_mask = np.zeros(shape, dtype=bool)
    for index, row in enumerate(rows):
        length = len(row.input_ids)
        input_ids[index, :length] = row.input_ids
        completion_mask[index, :length] = row.completion_mask
        attention_mask[index, :length] = True
    return Batch(torch.from_numpy(input_ids), torch.from_numpy(attention_mask), torch.from_numpy(completion_mask))


def copy_to(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Returns the tensor on a device. A copy to a GPU does not wait for the work that the GPU still has."""
    return tensor.to(device, non_blocking=torch.device(device).type == "cuda")


def required(tensor: Tensor | None) -> Tensor:
    """Returns the tensor of a field. Raises AssertionError if the field is not set."""
    assert tensor is not None, "this field of the batch must be set first"
    return tensor


def cut_into_batches(
    order: Iterable[int],
    num_tokens: Sequence[int],
    max_tokens: float,
    max_units: float = math.inf,
) -> Iterator[list[int]]:
    """Yields the units of `order` in consecutive batches, each of at most `max_units` units and at most `max_tokens`
    tokens with padding, or of one unit. `num_tokens` has the tokens of each unit by its index."""
    units: list[int] = []
    widest = 0
    for unit in order:
        widest = max(widest, num_tokens[unit])
        count = len(units) + 1
        if units and (count > max_units or count * widest > max_tokens):
            yield units
            units = []
            widest = num_tokens[unit]
        units.append(unit)
    if units:
        yield units


def longest_first(lengths: Sequence[int], families: Sequence[int]) -> list[int]:
    """Returns the indices of units, longest first. Those of a family are adjacent, and the longest one decides the
    place of the family."""
    longest: dict[int, int] = {}
    for family, length in zip(families, lengths, strict=True):
        longest[family] = max(length, longest.get(family, 0))

    def sort_key(unit: int) -> tuple[int, int, int]:
        family = families[unit]
        return -longest[family], family, -lengths[unit]

    return sorted(range(len(lengths)), key=sort_key)


def rows_of_units(units: Sequence[int], rows_per_unit: int) -> Tensor:
    """Returns the row numbers of these units, (len(units) * rows_per_unit,) long."""
    first_rows = torch.tensor(list(units), dtype=torch.long) * rows_per_unit
    return (first_rows[:, None] + torch.arange(rows_per_unit)).flatten()


def concat_batches(batches: Sequence[BatchT], pad_id: int) -> BatchT:
    """Returns the rows of all batches as one batch, padded to one width. All batches have the same fields set."""
    width = max(batch.input_ids.shape[1] for batch in batches)
    padded = [batch.pad_columns(width, pad_id).tensors() for batch in batches]
    joined: dict[str, Any] = {name: torch.cat([tensors[name] for tensors in padded]) for name in padded[0]}
    return replace(batches[0], **joined)
