"""Figures and their intervals against numbers by hand, against enumeration, and against how often they hold the
truth."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_tune.evaluation.intervals import (
    bootstrap_tail,
    mean_ci,
    paired_difference_ci,
    pass_at_k,
    proportion_ci,
    ratio_ci,
    t_quantile,
    wilson_interval,
)


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_mean_over_all_subsets(case: tuple[int, int, int]) -> None:
    n, right, k = case
    answers = [True] * right + [False] * (n - right)
    subsets = list(itertools.combinations(answers, k))
    assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_is_unbiased_where_the_plug_in_is_not() -> None:
    """Expected values by enumeration over all outcomes of n answers that are right with chance p."""
    n, k, p = 6, 3, 0.3
    outcomes = [(right, math.comb(n, right) * p**right * (1 - p) ** (n - right)) for right in range(n + 1)]
    truth = 1 - (1 - p) ** k
    assert sum(chance * pass_at_k(n, right, k) for right, chance in outcomes) == pytest.approx(truth, abs=1e-12)
    plug_in = sum(chance * (1 - (1 - right / n) ** k) for right, chance in outcomes)
    assert abs(plug_in - truth) > 0.02


# from Newcombe 1998, table I, method 3 (score), and by hand for 5 of 10
@pytest.mark.parametrize(
    ("share", "draws", "low", "high"),
    [
        (81 / 263, 263, 0.2553, 0.3662),
        (15 / 148, 148, 0.0624, 0.1605),
        (0.0, 20, 0.0, 0.1611),
        (1 / 29, 29, 0.0061, 0.1718),
        (0.5, 10, 0.2366, 0.7634),
    ],
)
def test_wilson_interval_equals_published_values(share: float, draws: int, low: float, high: float) -> None:
    assert wilson_interval(share, draws) == pytest.approx((low, high), abs=5e-5)


def test_a_share_of_single_answers_is_plain_wilson() -> None:
    found = proportion_ci([1.0] * 15 + [0.0] * 133, 1)
    assert (found.low, found.high) == pytest.approx((0.0624, 0.1605), abs=5e-5) and found.prompts == 148


def test_equal_answers_of_a_prompt_count_as_one_answer() -> None:
    """Eight equal answers a prompt give the interval of one; eight independent ones give that of eight times as many,
    and not a narrower one."""
    alike = proportion_ci([1.0] * 20 + [0.0] * 20, 8)
    assert (alike.low, alike.high) == pytest.approx(wilson_interval(0.5, 40))
    same_everywhere = proportion_ci([0.5] * 40, 8)
    assert (same_everywhere.low, same_everywhere.high) == pytest.approx(wilson_interval(0.5, 320))
    assert (
        proportion_ci([1.0] * 40, 8).low == pytest.approx(wilson_interval(1.0, 40)[0])
        and proportion_ci([1.0] * 40, 8).high == 1.0
    )


def test_one_prompt_gives_no_interval() -> None:
    for found in (
        mean_ci([3.0], 0),
        ratio_ci([6.0], [2.0], 0),
        paired_difference_ci(([1.0], [1.0]), ([0.5], [1.0]), 0),
    ):
        assert math.isfinite(found.value) and math.isnan(found.low) and math.isnan(found.high)
    assert math.isnan(proportion_ci([], 1).value) and math.isnan(mean_ci([], 0).value)


@pytest.mark.parametrize(
    ("freedom", "value"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (19, 2.093), (120, 1.980)]
)
def test_t_quantile_equals_published_values(freedom: int, value: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(value, abs=1e-3)


def test_the_bootstrap_is_wider_for_few_prompts_and_the_same_for_a_seed() -> None:
    assert bootstrap_tail(5) < bootstrap_tail(50) < 0.025 and bootstrap_tail(100_000) == pytest.approx(0.025, abs=1e-4)
    stream = random.Random(3)
    values = [stream.gauss(0, 1) for _ in range(30)]
    assert mean_ci(values, 7) == mean_ci(values, 7) != mean_ci(values, 8)


@pytest.mark.parametrize(
    ("prompts", "tail"),
    [
        (5, 9.541e-4),  # t is 2.776445, and sqrt(5 / 4) times that is 3.1042 standard deviations
        (10, 8.551e-3),  # 2.262157 and sqrt(10 / 9): 2.3845
    ],
)
def test_bootstrap_tail_equals_hand_computed_values(prompts: int, tail: float) -> None:
    assert bootstrap_tail(prompts) == pytest.approx(tail, rel=0.005)


def test_the_interval_of_the_negated_values_is_mirrored() -> None:
    stream = random.Random(11)
    values = [stream.expovariate(1.0) for _ in range(12)]
    found, mirrored = mean_ci(values, 5), mean_ci([-value for value in values], 5)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low), abs=1e-12)


def test_the_bootstrap_of_many_prompts_is_the_normal_interval() -> None:
    """Evenly spaced values: n of them have the variance (n^2 - 1) / 12, and their mean is all but normal. Each end,
    within the noise of a quantile of 4000 draws."""
    n = 400
    found = mean_ci([i - (n - 1) / 2 for i in range(n)], 3)
    half = 1.96 * math.sqrt((n * n - 1) / 12 / n)
    assert -found.low == pytest.approx(half, rel=0.06) and found.high == pytest.approx(half, rel=0.06)


def test_the_bootstrap_against_all_resamples() -> None:
    """Three prompts have 27 resamples: their quantiles, at the same tail, are what drawing must come to."""
    over, under = [1.0, 8.0, 3.0], [2.0, 4.0, 1.0]
    every = [
        sum(over[i] for i in drawn) / sum(under[i] for i in drawn) for drawn in itertools.product(range(3), repeat=3)
    ]
    found = ratio_ci(over, under, 0)
    assert found.value == pytest.approx(12 / 7)
    tail = bootstrap_tail(3)
    assert (found.low, found.high) == pytest.approx(
        (np.quantile(every, tail, method="inverted_cdf"), np.quantile(every, 1 - tail, method="inverted_cdf"))
    )


def test_a_difference_is_paired() -> None:
    """What both sides share cancels: a constant gap has no width, though each side by itself has a wide interval."""
    stream = random.Random(0)
    theirs = [stream.gauss(2, 1) for _ in range(40)]
    mine = [value - 0.5 for value in theirs]
    ones = [1.0] * 40
    found = paired_difference_ci((mine, ones), (theirs, ones), 0)
    assert (found.value, found.low, found.high) == pytest.approx((-0.5, -0.5, -0.5))
    assert mean_ci(mine, 0).high - mean_ci(mine, 0).low > 0.4


def covered(trials: int, prompts: int, samples: int, alike: float, seed: int) -> tuple[float, float]:
    """How often two intervals hold the true share: clustered by prompt, and as if all answers were draws of their
    own."""
    rng = np.random.default_rng(seed)
    share, hits, naive = 0.7, 0, 0
    a, b = share * alike, (1 - share) * alike
    for _ in range(trials):
        right = rng.binomial(samples, rng.beta(a, b, size=prompts)) / samples
        found = proportion_ci(right.tolist(), samples)
        low, high = wilson_interval(float(right.mean()), prompts * samples)
        hits, naive = hits + (found.low <= share <= found.high), naive + (low <= share <= high)
    return hits / trials, naive / trials


@pytest.mark.parametrize(("prompts", "samples"), [(30, 8), (100, 4), (200, 1)])
def test_clustered_intervals_have_their_nominal_coverage(prompts: int, samples: int) -> None:
    hits, naive = covered(1500, prompts, samples, alike=0.8, seed=5)
    assert 0.925 <= hits <= 0.975, "95 % but for the noise of 1500 trials"
    if samples > 1:
        assert naive < 0.85, "answers to one prompt are no draws of their own"


def test_bootstrapped_intervals_of_losses_have_their_nominal_coverage() -> None:
    rng, hits, trials = np.random.default_rng(1), 0, 200
    for trial in range(trials):
        tokens = rng.integers(5, 40, size=25).astype(float)
        totals = tokens * rng.gamma(4.0, 0.25, size=25)  # a loss of 1 nat a token
        found = ratio_ci(totals.tolist(), tokens.tolist(), trial)
        hits += found.low <= 1.0 <= found.high
    assert 0.90 <= hits / trials <= 0.99
