"""Which rows make up each optimizer step: a pure function of the seed and the step, so that there is no position to
save."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowrank_tune.config import TrainingConfig

RowIndices = NDArray[np.int64]
ROWS_PER_STEP = 16
# tags that keep the random streams apart
SHUFFLE_SEED_TAG = 1
DRAW_SEED_TAG = 2


class BatchSampler:
    """The rows of every step.

    Without weights an epoch is every row once. With weights it keeps its number of rows; each source gets its share of
    them (largest remainder) and is walked through in permutations, from epoch to epoch without a break, so that its
    rows come up equally often.
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
        self._max_rows = train.global_batch_size or (ROWS_PER_STEP if self._tokens is None else len(lengths))
        self._window = train.length_window
        given = [weight for weight in weights or () if weight is not None]
        if given:
            self._pools = [np.flatnonzero(source_of == source) for source in range(len(given))]
        else:
            self._pools = []
        self._quotas = largest_remainder(given, len(lengths)) if given else []
        assert not given or all(len(pool) for pool in self._pools), "a weighted source without rows"
        self._epoch, self._plan = 0, self._make_plan(0)
        self._first_steps = [0, len(self._plan)]
        self.steps_per_epoch = len(self._plan)
        """Steps of the first epoch. With `tokens_per_step` a later epoch may have a few more or less: `steps_of` adds
        them up."""

    def rows(self, step: int) -> list[int]:
        """The rows of a step, counted from 0 over all epochs."""
        epoch = self._epoch_of(step)
        if epoch != self._epoch:
            self._epoch, self._plan = epoch, self._make_plan(epoch)
        return [int(row) for row in self._plan[step - self._first_step(epoch)]]

    def steps_of(self, epochs: float) -> int:
        """How many steps this many epochs have."""
        whole = int(epochs)
        part = epochs - whole
        start = self._first_step(whole)
        return max(1, start + (int(np.ceil(part * (self._first_step(whole + 1) - start))) if part else 0))

    def _epoch_of(self, step: int) -> int:
        if self._tokens is None:
            return step // self.steps_per_epoch
        epoch = int(np.searchsorted(self._first_steps, step, side="right")) - 1
        while self._first_step(epoch + 1) <= step:
            epoch += 1
        return epoch

    def _first_step(self, epoch: int) -> int:
        if self._tokens is None:
            return epoch * self.steps_per_epoch  # every epoch has the same number of rows, so the same number of steps
        while len(self._first_steps) <= epoch:
            self._epoch, self._plan = len(self._first_steps) - 1, self._make_plan(len(self._first_steps) - 1)
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
        return np.concatenate(
            [self._sample_source(source, epoch * quota, quota) for source, quota in enumerate(self._quotas)]
        )

    def _sample_source(self, source: int, start: int, count: int) -> RowIndices:
        """`count` rows of an endless walk through a source, one permutation after the other."""
        pool = self._pools[source]
        out = []
        while count:
            lap, offset = divmod(start, len(pool))
            piece = self._random(DRAW_SEED_TAG, source, lap).permutation(pool)[offset : offset + count]
            out.append(piece)
            start = start + len(piece)
            count = count - len(piece)
        return np.concatenate(out) if out else pool[:0]

    def _window_end(self, rows: RowIndices) -> int:
        """How many of these rows the next window takes."""
        if self._tokens is None:
            return self._max_rows * self._window
        ends = np.cumsum(self._lengths[rows])
        end = 0
        for _ in range(self._window):
            end = self._step_end(ends, end)
        return end

    def _step_end(self, ends: RowIndices, start: int) -> int:
        """Behind the last row of the step that begins at `start`; `ends` are running sums of lengths."""
        before = int(ends[start - 1]) if start else 0
        end = start + self._max_rows
        if self._tokens is not None:
            end = min(end, int(np.searchsorted(ends, before + self._tokens, side="right")))
        return min(max(end, start + 1), len(ends))  # a row longer than the budget comes alone

    def _cut_into_steps(self, rows: RowIndices) -> list[RowIndices]:
        ends = np.cumsum(self._lengths[rows])
        steps = []
        start = 0
        while start < len(rows):
            end = self._step_end(ends, start)
            steps.append(rows[start:end])
            start = end
        return steps


def largest_remainder(weights: Sequence[float], count: int) -> list[int]:
    """Whole numbers that add up to `count`, in proportion to the weights."""
    exact = np.array(weights) / sum(weights) * count
    shares = np.floor(exact + 1e-9).astype(int)
    for index in np.argsort(shares - exact, kind="stable")[: count - int(shares.sum())]:
        shares[index] += 1
    return [int(share) for share in shares]
