"""The rows of each optimizer step: a pure function of the seed and the step, so that no position must be saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowrank_tune.config import DataConfig, TrainingConfig
from lowrank_tune.data.token_store import TokenizedDataset

RowIndices = NDArray[np.int64]
ROWS_PER_STEP = 16
# These tags separate the random streams.
SHUFFLE_SEED_TAG = 1
DRAW_SEED_TAG = 2


class BatchSampler:
    """The rows of every step.

    Without weights an epoch is every row once. With weights it has the same number of rows; each source gets its share
    of them (largest remainder). Its rows are drawn in one permutation after the other, which continue from epoch to
    epoch, so that all of them are drawn equally often.
    """

    def __init__(
        self,
        lengths: NDArray[Any],
        source_of: NDArray[Any],
        weights: Sequence[float | None] | None,
        train: TrainingConfig,
        seed: int,
    ) -> None:
        assert len(lengths), "an order of no rows"
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._seed = seed
        self._tokens = train.tokens_per_step
        self._window = train.length_window
        default_rows = ROWS_PER_STEP if self._tokens is None else len(lengths)
        self._max_rows = train.global_batch_size or default_rows
        self._pools: list[RowIndices] = []
        self._quotas: list[int] = []
        given = [weight for weight in weights or () if weight is not None]
        if given:
            self._pools = [np.flatnonzero(source_of == source) for source in range(len(given))]
            self._quotas = largest_remainder(given, len(lengths))
        assert all(len(pool) for pool in self._pools), "a weighted source without rows"
        self._set_epoch(0)
        self._first_steps = [0, len(self._plan)]
        self.steps_per_epoch = len(self._plan)
        """Steps of the first epoch. With `tokens_per_step` a later epoch may have a few more or less: `steps_of` sums
        them."""

    def _set_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._plan = self._make_plan(epoch)

    def rows(self, step: int) -> list[int]:
        """Returns the rows of a step, counted from 0 over all epochs."""
        epoch = self._epoch_of(step)
        if epoch != self._epoch:
            self._set_epoch(epoch)
        return [int(row) for row in self._plan[step - self._first_step(epoch)]]

    def steps_of(self, epochs: float) -> int:
        """Returns how many steps this many epochs have, at least 1."""
        whole = int(epochs)
        part = epochs - whole
        steps = self._first_step(whole)
        if part:
            steps_of_next = self._first_step(whole + 1) - steps
            steps += int(np.ceil(part * steps_of_next))
        return max(1, steps)

    def _epoch_of(self, step: int) -> int:
        if self._tokens is None:
            return step // self.steps_per_epoch
        epoch = int(np.searchsorted(self._first_steps, step, side="right")) - 1
        while self._first_step(epoch + 1) <= step:
            epoch += 1
        return epoch

    def _first_step(self, epoch: int) -> int:
        if self._tokens is None:
            # Every epoch has the same number of rows, so the same number of steps.
            return epoch * self.steps_per_epoch
        while len(self._first_steps) <= epoch:
            self._set_epoch(len(self._first_steps) - 1)
            self._first_steps.append(self._first_steps[-1] + len(self._plan))
        return self._first_steps[epoch]

    def _random(self, *tags: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *tags])

    def _make_plan(self, epoch: int) -> list[RowIndices]:
        rng = self._random(SHUFFLE_SEED_TAG, epoch)
        rows = rng.permutation(self._sample_rows(epoch))
        plan: list[RowIndices] = []
        while len(rows):
            window = rows[: self._window_end(rows)]
            rows = rows[len(window) :]
            window = window[np.argsort(self._lengths[window], kind="stable")]
            steps = self._cut_into_steps(window)
            plan += [steps[index] for index in rng.permutation(len(steps))]
        return plan

    def _sample_rows(self, epoch: int) -> RowIndices:
        if not self._pools:
            return np.arange(len(self._lengths))
        drawn = [
            self._sample_source(
                source,
                epoch * quota,
                quota,
            )
            for source, quota in enumerate(self._quotas)
        ]
        return np.concatenate(drawn)

    def _sample_source(
        self,
        source: int,
        start: int,
        count: int,
    ) -> RowIndices:
        """Returns `count` rows from `start` on of an endless sequence: one permutation of a source after the other."""
        pool = self._pools[source]
        pieces = [pool[:0]]
        while count:
            lap, offset = divmod(start, len(pool))
            permutation = self._random(
                DRAW_SEED_TAG,
                source,
                lap,
            ).permutation(pool)
            piece = permutation[offset : offset + count]
            pieces.append(piece)
            start += len(piece)
            count -= len(piece)
        return np.concatenate(pieces)

    def _window_end(self, rows: RowIndices) -> int:
        """Returns how many of these rows are in the next window."""
        if self._tokens is None:
            return self._max_rows * self._window
        ends = np.cumsum(self._lengths[rows])
        end = 0
        for _ in range(self._window):
            end = self._step_end(ends, end)
        return end

    def _step_end(
        self,
        ends: RowIndices,
        start: int,
    ) -> int:
        """Returns the end of the step that begins at `start`; `ends` are cumulative sums of lengths."""
        before = int(ends[start - 1]) if start else 0
        end = start + self._max_rows
        if self._tokens is not None:
            end = min(
                end,
                int(
                    np.searchsorted(
                        ends,
                        before + self._tokens,
                        side="right",
                    )
                ),
            )
        # A row longer than the budget makes a step of its own.
        return min(max(end, start + 1), len(ends))

    def _cut_into_steps(self, rows: RowIndices) -> list[RowIndices]:
        ends = np.cumsum(self._lengths[rows])
        steps = []
        start = 0
        while start < len(rows):
            end = self._step_end(ends, start)
            steps.append(rows[start:end])
            start = end
        return steps


def row_sampler(
    rows: TokenizedDataset,
    data: DataConfig,
    train: TrainingConfig,
    seed: int,
) -> BatchSampler:
    """Returns the sampler of the units of a store, by the weights of the sources in `data.train`."""
    return BatchSampler(
        rows.unit_lengths,
        rows.unit_source_of,
        [source.weight for source in data.train],
        train,
        seed,
    )


def largest_remainder(weights: Sequence[float], count: int) -> list[int]:
    """Returns integers with the sum `count`, in proportion to the weights."""
    exact = np.array(weights) / sum(weights) * count
    shares = np.floor(exact + 1e-9).astype(int)
    remaining = count - int(shares.sum())
    largest_first = np.argsort(shares - exact, kind="stable")
    shares[largest_first[:remaining]] += 1
    return [int(share) for share in shares]
