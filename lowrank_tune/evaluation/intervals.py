"""What a figure of some prompts says of all prompts: unbiased pass@k, and intervals in which a prompt, with all its
answers, is one draw.

Answers to one prompt are alike, so a thousand answers to a hundred prompts are nearer to a hundred draws than to a
thousand. Shares have a Wilson score interval for as many draws as the spread between prompts leaves them worth (Korn
and Graubard 1998); it has a width at 0 % and 100 % too. Means, ratios and differences are bootstrapped over prompts:
the percentiles are taken a little further out for few prompts (Hesterberg, arXiv:1411.5279, section 3.4), and both
sides of a difference are drawn together. Pure: numbers in, numbers out.
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
BOOTSTRAP_SAMPLES = 4000  # of the bootstrap
BOOTSTRAP_CHUNK = 1 << 22  # weights of draws that are in memory at once
STANDARD_NORMAL = NormalDist()


@dataclass(frozen=True)
class Interval:
    """A figure, the ends of its interval (nan where one prompt cannot tell), how many prompts it is of, and how the
    interval was made."""

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


def pass_at_k(answers: int, right: int, k: int) -> float:
    """The chance that one of k answers is right, drawn without replacement from `answers` of which so many are `right`:
    the mean over all subsets, and so unbiased (Chen et al., arXiv:2107.03374)."""
    assert 0 <= right <= answers and 1 <= k <= answers, "k answers are drawn from those that there are"
    return 1.0 - math.comb(answers - right, k) / math.comb(answers, k)


def wilson_interval(proportion: float, num_trials: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The score interval of a share of so many independent draws."""
    z = STANDARD_NORMAL.inv_cdf((1 + confidence) / 2)
    center = (proportion + z * z / (2 * num_trials)) / (1 + z * z / num_trials)
    half = (
        z
        / (1 + z * z / num_trials)
        * math.sqrt(proportion * (1 - proportion) / num_trials + z * z / (4 * num_trials * num_trials))
    )
    return max(0.0, min(proportion, center - half)), min(1.0, max(proportion, center + half))


def proportion_ci(values: Sequence[float], trials_per_prompt: float, confidence: float = CONFIDENCE) -> Interval:
    """The mean of shares in [0, 1], one a prompt. `trials_per_prompt`: how many independent draws a prompt's answers
    are worth if they are not alike."""
    prompts = len(values)
    mean = math.fsum(values) / prompts if prompts else math.nan
    if not prompts:
        return Interval(mean, math.nan, math.nan, 0, "none")
    variance = math.fsum((value - mean) ** 2 for value in values) / prompts
    max_trials = prompts * max(1.0, trials_per_prompt)
    if mean in (0.0, 1.0):
        num_trials = float(prompts)  # where nothing differs, nothing shows how alike a prompt's answers are
    else:
        if variance > 0:
            num_trials = min(max_trials, mean * (1 - mean) * prompts / variance)
        else:
            num_trials = max_trials
    low, high = wilson_interval(mean, num_trials, confidence)
    return Interval(mean, low, high, prompts, "wilson, clustered by prompt")


def ratio_ci(
    numerators: Sequence[float],
    denominators: Sequence[float],
    seed: int,
    confidence: float = CONFIDENCE,
) -> Interval:
    """sum(numerators) / sum(denominators), one entry of each a prompt: a loss a token. With `denominators` all 1 it is
    a mean."""
    top = np.asarray(numerators, dtype=np.float64)
    bottom = np.asarray(denominators, dtype=np.float64)
    value = float(top.sum() / bottom.sum()) if bottom.sum() else math.nan
    return _bootstrap_ci(value, (top, bottom), None, seed, confidence)


def mean_ci(values: Sequence[float], seed: int, confidence: float = CONFIDENCE) -> Interval:
    """The mean of one number a prompt."""
    return ratio_ci(values, [1.0] * len(values), seed, confidence)


def paired_difference_ci(
    first: tuple[Sequence[float], Sequence[float]],
    second: tuple[Sequence[float], Sequence[float]],
    seed: int,
    confidence: float = CONFIDENCE,
) -> Interval:
    """The ratio of the first less that of the second (numerators and denominators, the same prompts in the same order):
    paired."""
    first_arrays, second_arrays = (
        (np.asarray(top, dtype=np.float64), np.asarray(bottom, dtype=np.float64)) for top, bottom in (first, second)
    )
    assert len(first_arrays[0]) == len(second_arrays[0]), "differences are of the same prompts"
    both = first_arrays[1].sum() and second_arrays[1].sum()
    if both:
        value = float(first_arrays[0].sum() / first_arrays[1].sum() - second_arrays[0].sum() / second_arrays[1].sum())
    else:
        value = math.nan
    return _bootstrap_ci(value, first_arrays, second_arrays, seed, confidence)


RatioArrays = tuple[NDArray[np.float64], NDArray[np.float64]]


def _bootstrap_ci(
    value: float,
    first: RatioArrays,
    second: RatioArrays | None,
    seed: int,
    confidence: float,
) -> Interval:
    prompts = len(first[0])
    if prompts < 2 or not math.isfinite(value):
        return Interval(value, math.nan, math.nan, prompts, "none")
    rng = np.random.default_rng(seed)
    samples = list[NDArray[np.float64]]()
    chunk_size = max(1, BOOTSTRAP_CHUNK // prompts)
    with np.errstate(invalid="ignore", divide="ignore"):  # a draw without any token of a loss is left out below
        for start in range(0, BOOTSTRAP_SAMPLES, chunk_size):
            counts = rng.multinomial(
                prompts,
                np.full(prompts, 1 / prompts),
                size=min(chunk_size, BOOTSTRAP_SAMPLES - start),
            ).astype(np.float64)
            estimates = (counts @ first[0]) / (counts @ first[1])
            samples.append(estimates if second is None else estimates - (counts @ second[0]) / (counts @ second[1]))
    all_samples = np.concatenate(samples)
    tail = bootstrap_tail(prompts, confidence)
    low, high = np.quantile(all_samples[np.isfinite(all_samples)], [tail, 1 - tail])
    return Interval(value, float(low), float(high), prompts, "bootstrap over prompts")


def bootstrap_tail(prompts: int, confidence: float = CONFIDENCE) -> float:
    """The share of bootstrap draws that is left out on each side: less than (1 - level) / 2, since so few prompts vary
    less than all do."""
    return STANDARD_NORMAL.cdf(-math.sqrt(prompts / (prompts - 1)) * t_quantile((1 + confidence) / 2, prompts - 1))


def t_quantile(p: float, df: int) -> float:
    """Student's t: exact for 1 and 2 degrees of freedom, else by Cornish and Fisher's expansion (Abramowitz and Stegun
    26.7.5), there right to a hundredth."""
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
    return z + math.fsum(term / df**power for power, term in enumerate(terms, 1))
