"""Unbiased pass@k and confidence intervals in which one prompt, with all its answers, is one draw.

Answers to the same prompt are correlated, so a thousand answers to a hundred prompts carry the information of about a
hundred independent draws. Proportions have a Wilson score interval for the effective number of draws, from the variance
between prompts (Korn and Graubard 1998); it has a width at 0 % and 100 % too. Means, ratios and differences are
bootstrapped over prompts. Their percentiles are wider for few prompts (Hesterberg, arXiv:1411.5279, section 3.4), and
both sides of a difference are resampled together. Pure functions of numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
BOOTSTRAP_SAMPLES = 4000
BOOTSTRAP_CHUNK = 1 << 22
"""Weights of bootstrap draws in memory at once."""
STANDARD_NORMAL = NormalDist()

Ratio = tuple[Sequence[float], Sequence[float]]
"""Numerators and denominators, one of each per prompt."""
RatioArrays = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True)
class Interval:
    """A metric with the ends of its interval (nan if one prompt is too few), its number of prompts, and the method."""

    value: float
    low: float
    high: float
    prompts: int
    method: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "prompts": self.prompts,
            "interval": self.method,
        }


def no_interval(value: float, prompts: int) -> Interval:
    """Returns a metric without an interval."""
    return Interval(
        value,
        math.nan,
        math.nan,
        prompts,
        "none",
    )


def pass_at_k(
    answers: int,
    right: int,
    k: int,
) -> float:
    """Returns the probability that one of k answers is right, drawn without replacement from `answers`, of which
    `right` are. It is the mean over all subsets, and so unbiased (Chen et al., arXiv:2107.03374)."""
    assert 0 <= right <= answers and 1 <= k <= answers, "k must be at most the number of answers"
    return 1.0 - math.comb(answers - right, k) / math.comb(answers, k)


def wilson_interval(
    proportion: float,
    num_trials: float,
    confidence: float = CONFIDENCE,
) -> tuple[float, float]:
    """Returns the score interval of a proportion of independent draws."""
    z = STANDARD_NORMAL.inv_cdf((1 + confidence) / 2)
    scale = 1 + z * z / num_trials
    center = (proportion + z * z / (2 * num_trials)) / scale
    variance = proportion * (1 - proportion) / num_trials + z * z / (4 * num_trials * num_trials)
    half_width = z / scale * math.sqrt(variance)
    # the ends contain the proportion in spite of rounding
    low = min(proportion, center - half_width)
    high = max(proportion, center + half_width)
    return max(0.0, low), min(1.0, high)


def proportion_ci(
    values: Sequence[float],
    trials_per_prompt: float,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Returns the mean of proportions in [0, 1], one per prompt. `trials_per_prompt`: the number of independent draws
    that the answers to one prompt are, if they are not correlated."""
    prompts = len(values)
    if not prompts:
        return no_interval(math.nan, 0)
    mean = math.fsum(values) / prompts
    low, high = wilson_interval(mean, _effective_trials(values, mean, trials_per_prompt), confidence)
    return Interval(
        mean,
        low,
        high,
        prompts,
        "wilson, clustered by prompt",
    )


def _effective_trials(
    values: Sequence[float],
    mean: float,
    trials_per_prompt: float,
) -> float:
    """Returns the number of independent draws with the same variance of the mean."""
    prompts = len(values)
    if mean in (0.0, 1.0):
        # equal values do not show how correlated the answers to a prompt are
        return float(prompts)
    max_trials = prompts * max(1.0, trials_per_prompt)
    variance = math.fsum((value - mean) ** 2 for value in values) / prompts
    if variance == 0:
        return max_trials
    return min(max_trials, mean * (1 - mean) * prompts / variance)


def ratio_ci(
    numerators: Sequence[float],
    denominators: Sequence[float],
    seed: int,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Returns sum(numerators) / sum(denominators), one of each per prompt, for example a loss per token. With
    `denominators` of 1 it is a mean."""
    ratio = _arrays((numerators, denominators))
    return _bootstrap_ci(
        _value_of(ratio),
        ratio,
        None,
        seed,
        confidence,
    )


def mean_ci(
    values: Sequence[float],
    seed: int,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Returns the mean of one number per prompt."""
    return ratio_ci(
        values,
        [1.0] * len(values),
        seed,
        confidence,
    )


def paired_difference_ci(
    first: Ratio,
    second: Ratio,
    seed: int,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Returns the first ratio minus the second, of the same prompts in the same order, resampled in pairs."""
    first_arrays = _arrays(first)
    second_arrays = _arrays(second)
    assert len(first_arrays[0]) == len(second_arrays[0]), "differences need the same prompts"
    value = _value_of(first_arrays) - _value_of(second_arrays)
    return _bootstrap_ci(
        value,
        first_arrays,
        second_arrays,
        seed,
        confidence,
    )


def _arrays(ratio: Ratio) -> RatioArrays:
    numerators, denominators = ratio
    return np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)


def _value_of(ratio: RatioArrays) -> float:
    """Returns the ratio of the sums, nan if the denominators sum to 0."""
    numerators, denominators = ratio
    total = denominators.sum()
    if total == 0:
        return math.nan
    return float(numerators.sum() / total)


def _bootstrap_ci(
    value: float,
    first: RatioArrays,
    second: RatioArrays | None,
    seed: int,
    confidence: float,
) -> Interval:
    """Returns the percentiles of the ratio, or of the difference of both ratios, over resampled prompts."""
    prompts = len(first[0])
    if prompts < 2 or not math.isfinite(value):
        return no_interval(value, prompts)
    rng = np.random.default_rng(seed)
    probabilities = np.full(prompts, 1 / prompts)
    chunk_size = max(1, BOOTSTRAP_CHUNK // prompts)
    samples: list[NDArray[np.float64]] = []
    # a draw of prompts without any token of a loss gives nan, and is removed below
    with np.errstate(invalid="ignore", divide="ignore"):
        for start in range(0, BOOTSTRAP_SAMPLES, chunk_size):
            size = min(chunk_size, BOOTSTRAP_SAMPLES - start)
            counts = rng.multinomial(
                prompts,
                probabilities,
                size=size,
            ).astype(np.float64)
            estimates = _resampled(counts, first)
            if second is not None:
                estimates = estimates - _resampled(counts, second)
            samples.append(estimates)
    all_samples = np.concatenate(samples)
    finite_samples = all_samples[np.isfinite(all_samples)]
    tail = bootstrap_tail(prompts, confidence)
    low, high = np.quantile(finite_samples, [tail, 1 - tail])
    return Interval(
        value,
        float(low),
        float(high),
        prompts,
        "bootstrap over prompts",
    )


def _resampled(counts: NDArray[np.float64], ratio: RatioArrays) -> NDArray[np.float64]:
    """Returns the ratio for each draw, from how often it contains each prompt: `counts` (draws, prompts)."""
    numerators, denominators = ratio
    estimates: NDArray[np.float64] = (counts @ numerators) / (counts @ denominators)
    return estimates


def bootstrap_tail(prompts: int, confidence: float = CONFIDENCE) -> float:
    """Returns the fraction of bootstrap draws outside of the interval on each side. It is less than (1 - confidence) /
    2, since a bootstrap of few prompts varies less than the mean of new prompts does."""
    quantile = t_quantile((1 + confidence) / 2, prompts - 1)
    return STANDARD_NORMAL.cdf(-math.sqrt(prompts / (prompts - 1)) * quantile)


def t_quantile(p: float, df: int) -> float:
    """Returns the quantile of Student's t: exact for 1 and 2 degrees of freedom, else by the expansion of Cornish and
    Fisher (Abramowitz and Stegun 26.7.5), with an error below 0.01."""
    if df == 1:
        return math.tan(math.pi * (p - 0.5))
    if df == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    z = STANDARD_NORMAL.inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    corrections = [term / df**power for power, term in enumerate(terms, 1)]
    return z + math.fsum(corrections)
