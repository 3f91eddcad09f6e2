"""Order: every row once an epoch, weights exact, and any step from nothing but its number."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_tune.batch import Row
from lowrank_tune.config import TrainingConfig
from lowrank_tune.data import BatchSampler, collate
from lowrank_tune.data.load import split_mask
from lowrank_tune.data.sampler import largest_remainder


def order(count: int, seed: int = 0, weights: Any = None, sources: Any = None, **train: Any) -> BatchSampler:
    lengths = np.random.default_rng(9).integers(5, 60, count)
    return BatchSampler(
        lengths,
        np.zeros(count, dtype=int) if sources is None else np.array(sources),
        weights,
        TrainingConfig(**train),
        seed,
    )


@given(
    count=st.integers(1, 120),
    size=st.integers(1, 20),
    window=st.integers(1, 5),
    seed=st.integers(0, 5),
    by_tokens=st.booleans(),
)
def test_every_row_once_an_epoch(count: int, size: int, window: int, seed: int, by_tokens: bool) -> None:
    budget = {"tokens_per_step": size * 10} if by_tokens else {"global_batch_size": size}
    made = order(count, seed, length_window=window, **budget)
    for epoch in range(3):
        steps = [made.rows(step) for step in range(made.steps_of(epoch) if epoch else 0, made.steps_of(epoch + 1))]
        assert sorted(itertools.chain(*steps)) == list(range(count))
        if by_tokens:
            assert all(len(step) == 1 or made._lengths[step].sum() <= size * 10 for step in steps)
        else:
            assert sorted(map(len, steps))[1:] == [size] * (len(steps) - 1)


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=60),
    budget=st.integers(1, 40),
    size=st.one_of(st.none(), st.integers(1, 8)),
)
def test_a_step_takes_all_rows_that_fit(lengths: list[int], budget: int, size: int | None) -> None:
    """The row that begins the next step would have been over the budget, or one row too many."""
    train = TrainingConfig(tokens_per_step=budget, global_batch_size=size)
    made = BatchSampler(np.array(lengths), np.zeros(len(lengths), dtype=int), None, train, 0)
    steps = [step.tolist() for step in made._cut_into_steps(np.arange(len(lengths)))]
    assert sum(steps, []) == list(range(len(lengths)))
    for step, following in itertools.pairwise(steps):
        tokens = sum(lengths[row] for row in step)
        assert tokens + lengths[following[0]] > budget or len(step) == size


def test_a_step_of_exactly_the_budget_is_whole() -> None:
    made = BatchSampler(np.full(12, 10), np.zeros(12, dtype=int), None, TrainingConfig(tokens_per_step=30), 0)
    assert made.steps_per_epoch == 4 and {len(made.rows(step)) for step in range(4)} == {3}


@pytest.mark.parametrize(
    ("count", "train", "epochs", "steps"),
    [
        (10, {"global_batch_size": 4}, 1.5, 5),  # 3 steps an epoch, and half of 3 begins a second one
        (10, {"global_batch_size": 4}, 0.5, 2),
        (10, {"global_batch_size": 4}, 2.0, 6),
        (12, {"global_batch_size": 4}, 1.25, 4),
        (10, {"global_batch_size": 10}, 0.1, 1),
    ],
)
def test_steps_of_fractions_of_an_epoch_by_hand(count: int, train: dict[str, int], epochs: float, steps: int) -> None:
    assert order(count, **train).steps_of(epochs) == steps


def test_half_an_epoch_of_equal_rows_by_tokens() -> None:
    """Five steps an epoch, as all rows have 10 tokens."""
    train = TrainingConfig(tokens_per_step=20)
    made = BatchSampler(np.full(10, 10), np.zeros(10, dtype=int), None, train, 0)
    assert [made.steps_of(epochs) for epochs in (0.5, 1.0, 1.5, 2.5)] == [3, 5, 8, 13]


@pytest.mark.parametrize("train", [{}, {"global_batch_size": 7}, {"tokens_per_step": 300}])
def test_a_fresh_order_gives_the_same_steps_in_any_sequence(train: dict[str, int]) -> None:
    made = order(100, 3, **train)
    straight = [made.rows(step) for step in range(50)]
    for step in (49, 0, 17, 33, 3):
        assert order(100, 3, **train).rows(step) == straight[step] == made.rows(step)
    assert [order(100, 4, **train).rows(step) for step in range(5)] != straight[:5]
    assert straight[: made.steps_per_epoch] != straight[made.steps_per_epoch : 2 * made.steps_per_epoch]


def test_weighted_sources_have_exact_shares_and_draw_all_rows() -> None:
    sources = [0] * 90 + [1] * 10
    made = order(100, weights=[0.25, 0.75], sources=sources, global_batch_size=10)
    counts: Counter[int] = Counter()
    for epoch in range(18):
        rows = [row for step in range(10) for row in made.rows(10 * epoch + step)]
        assert len(rows) == 100 and sum(row < 90 for row in rows) == 25
        counts.update(rows)
    assert {counts[row] for row in range(90)} == {5} and {counts[row] for row in range(90, 100)} == {135}


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(1, 1000))
def test_largest_remainder_sums_to_the_count(weights: list[int], count: int) -> None:
    shares = largest_remainder(weights, count)
    assert sum(shares) == count and all(
        abs(share - weight / sum(weights) * count) < 1 for share, weight in zip(shares, weights, strict=True)
    )


def test_length_windows_reduce_padding() -> None:
    def padded(made: BatchSampler) -> int:
        return sum(len(rows) * int(made._lengths[rows].max()) for rows in map(made.rows, range(made.steps_per_epoch)))

    assert padded(order(800, global_batch_size=8, length_window=10)) < 0.75 * padded(
        order(800, global_batch_size=8, length_window=1)
    )


def test_collate_pads_on_the_right_and_masks_padding() -> None:
    batch = collate([Row([1, 2, 3], [False, True, True]), Row(np.array([4]), np.array([False]))], 0)
    assert batch.input_ids.tolist() == [[1, 2, 3], [4, 0, 0]] and batch.completion_mask.tolist() == [
        [False, True, True],
        [False] * 3,
    ]
    assert (
        batch.attention_mask.tolist() == [[True] * 3, [True, False, False]]
        and str(batch.input_ids.dtype) == "torch.int64"
    )


@given(st.lists(st.integers(0, 30), min_size=1, max_size=200), st.floats(0.01, 0.8), st.integers(0, 3))
def test_the_split_puts_equal_rows_on_one_side(keys: list[int], share: float, seed: int) -> None:
    chosen = split_mask(np.array(keys, dtype=np.uint64), share, seed)
    assert not set(np.array(keys)[chosen]) & set(np.array(keys)[~chosen])
    assert (0 < chosen.sum() < len(keys)) if len(set(keys)) > 1 else not chosen.any()


def test_the_split_share_is_about_the_requested_one() -> None:
    keys = np.arange(1000, dtype=np.uint64)
    assert split_mask(keys, 0.05, 0).sum() == 50 and (split_mask(keys, 0.05, 0) != split_mask(keys, 0.05, 1)).any()
