"""Steps of decoding: the next tokens of all sequences that have slots.

With `PlainSteps` the host reads every token. `BufferedSteps` draws several tokens of each sequence before the host
reads any: ids, positions, uniform numbers and drawn tokens are in buffers on the device, whose addresses and sizes
never change, so that a step can be captured as a CUDA graph (`generation/cuda_graphs.py`). A sequence that ends within
a block continues to its end, and the tokens after its own end are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lowrank_tune.batch import copy_to
from lowrank_tune.generation.decode_scheduler import SequenceState
from lowrank_tune.generation.kv_cache import KVStore
from lowrank_tune.generation.static_slot_cache import StaticSlotCache

Sample = Callable[[Tensor, Tensor], Tensor]
"""Hidden states (N, d) and uniform numbers (N,) float64 -> tokens and their log-probs (N, 2) float64."""
Drawn = list[list[float]]
"""A token and its log-prob for each sequence."""
COLUMNS_PER_BUCKET = 256
"""The columns of the cache that a step reads are a multiple of this number."""


class Stepper(Protocol):
    """Another way to run `BufferedSteps.step`."""

    def step(
        self,
        steps: BufferedSteps,
        rows: int,
        width: int,
    ) -> None: ...


class DecodeSteps(Protocol):
    """Draws the next tokens of sequences."""

    def run(self, sequences: Sequence[SequenceState]) -> list[Drawn]:
        """Returns what is drawn for the sequences, which have the first slots, for one step or several."""


class PlainSteps:
    """One step at a time, over exactly the slots and columns that are in use, with any kind of cache."""

    def __init__(
        self,
        store: KVStore,
        sample: Sample,
        device: torch.device,
    ) -> None:
        self.store = store
        self.sample = sample
        self.device = device

    def run(self, sequences: Sequence[SequenceState]) -> list[Drawn]:
        tokens = [sequence.token_ids[-1] for sequence in sequences]
        positions = [sequence.length for sequence in sequences]
        hidden = self.store.step(tokens, positions)
        uniforms = [next(sequence.uniforms) for sequence in sequences]
        uniform = copy_to(torch.tensor(uniforms, dtype=torch.float64), self.device)
        return [self.sample(hidden, uniform).tolist()]


class BufferedSteps:
    """Up to `num_steps` steps between two transfers, over the first slots of `store`.

    Numbers of slots and columns are rounded up (`row_bucket`, `column_bucket`), so that there are few kinds of steps.
    A slot beyond the sequences reads and writes its first columns, which a sequence that takes the slot overwrites.
    """

    def __init__(
        self,
        store: StaticSlotCache,
        sample: Sample,
        max_new_tokens: int,
        num_steps: int,
        graphs: Stepper | None = None,
    ) -> None:
        self.store = store
        self.sample = sample
        self.max_new_tokens = max_new_tokens
        self.num_steps = min(num_steps, max_new_tokens)
        self.graphs = graphs
        device = store.device
        self.token_ids = torch.zeros((store.slots, 1), dtype=torch.long, device=device)
        self.position_ids = torch.zeros_like(self.token_ids)
        self.uniforms = torch.zeros((self.num_steps, store.slots), dtype=torch.float64, device=device)
        self.drawn = torch.zeros((self.num_steps, store.slots, 2), dtype=torch.float64, device=device)
        self.step_index = torch.zeros(1, dtype=torch.long, device=device)

    def run(self, sequences: Sequence[SequenceState]) -> list[Drawn]:
        num_steps = min(
            self.num_steps,
            max(self.max_new_tokens - len(sequence.token_ids) for sequence in sequences),
        )
        rows = row_bucket(len(sequences), self.store.slots)
        last_position = max(sequence.length for sequence in sequences) + num_steps - 1
        width = column_bucket(last_position + 1, self.store.columns)
        self._load(sequences, num_steps)
        for _ in range(num_steps):
            if self.graphs is None:
                self.step(rows, width)
            else:
                self.graphs.step(self, rows, width)
        return self.drawn[:num_steps, : len(sequences)].tolist()

    def step(
        self,
        rows: int,
        width: int,
    ) -> None:
        """Draws one token in each of the first `rows` slots. Reads and writes only buffers."""
        position_ids = self.position_ids[:rows]
        token_ids = self.token_ids[:rows]
        hidden = self.store.step_on_device(token_ids, position_ids, width)
        uniform = self.uniforms.index_select(0, self.step_index)[0, :rows]
        pairs = self.sample(hidden, uniform)
        self.drawn[:, :rows].index_copy_(0, self.step_index, pairs[None])
        token_ids.copy_(pairs[:, :1])
        position_ids.add_(1).clamp_(max=width - 1)
        self.step_index.add_(1)

    def _load(
        self,
        sequences: Sequence[SequenceState],
        num_steps: int,
    ) -> None:
        """Copies the state of the sequences to the buffers, with one transfer."""
        unused = self.store.slots - len(sequences)
        rows = [
            [float(sequence.token_ids[-1]) for sequence in sequences],
            [float(sequence.length) for sequence in sequences],
        ]
        for _ in range(num_steps):
            rows.append([next(sequence.uniforms) for sequence in sequences])
        host = torch.tensor(rows, dtype=torch.float64)
        values = copy_to(torch.nn.functional.pad(host, (0, unused)), self.store.device)
        self.token_ids.copy_(values[0, :, None])
        self.position_ids.copy_(values[1, :, None])
        self.uniforms[:num_steps].copy_(values[2:])
        self.step_index.zero_()


def row_bucket(rows: int, slots: int) -> int:
    """Returns the next power of two, at most `slots`."""
    return min(1 << (rows - 1).bit_length(), slots)


def column_bucket(columns: int, limit: int) -> int:
    """Returns the next multiple of `COLUMNS_PER_BUCKET`, at most `limit`."""
    return min(-(-columns // COLUMNS_PER_BUCKET) * COLUMNS_PER_BUCKET, limit)
