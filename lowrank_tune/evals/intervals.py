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

LEVEL = 0.95
DRAWS = 4000  # of the bootstrap
AT_ONCE = 1 << 22  # weights of draws that are in memory at once
NORMAL = NormalDist()


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


def wilson(share: float, draws: float, level: float = LEVEL) -> tuple[float, float]:
    """The score interval of a share of so many independent draws."""
    z = NORMAL.inv_cdf((1 + level) / 2)
    centre = (share + z * z / (2 * draws)) / (1 + z * z / draws)
    half = z / (1 + z * z / draws) * math.sqrt(share * (1 - share) / draws + z * z / (4 * draws * draws))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def share_of(values: Sequence[float], at_most: float, level: float = LEVEL) -> Interval:
    """The mean of shares in [0, 1], one a prompt. `at_most`: how many independent draws a prompt's answers are worth if
    they are not alike."""
    prompts = len(values)
    mean = math.fsum(values) / prompts if prompts else math.nan
    if not prompts:
        return Interval(mean, math.nan, math.nan, 0, "none")
    spread = math.fsum((value - mean) ** 2 for value in values) / prompts
    most = prompts * max(1.0, at_most)
    if mean in (0.0, 1.0):
        draws = float(prompts)  # where nothing differs, nothing shows how alike a prompt's answers are
    else:
        draws = min(most, mean * (1 - mean) * prompts / spread) if spread > 0 else most
    low, high = wilson(mean, draws, level)
    return Interval(mean, low, high, prompts, "wilson, clustered by prompt")


def ratio_of(over: Sequence[float], under: Sequence[float], seed: int, level: float = LEVEL) -> Interval:
    """sum(over) / sum(under), one entry of each a prompt: a loss a token. With `under` all 1 it is a mean."""
    top, bottom = np.asarray(over, dtype=np.float64), np.asarray(under, dtype=np.float64)
    value = float(top.sum() / bottom.sum()) if bottom.sum() else math.nan
    return _bootstrapped(value, (top, bottom), None, seed, level)


def mean_of(values: Sequence[float], seed: int, level: float = LEVEL) -> Interval:
    """The mean of one number a prompt."""
    return ratio_of(values, [1.0] * len(values), seed, level)


def difference_of(
    one: tuple[Sequence[float], Sequence[float]],
    other: tuple[Sequence[float], Sequence[float]],
    seed: int,
    level: float = LEVEL,
) -> Interval:
    """The ratio of the first less that of the second (numerators and denominators, the same prompts in the same order):
    paired."""
    mine, theirs = (
        (np.asarray(top, dtype=np.float64), np.asarray(bottom, dtype=np.float64)) for top, bottom in (one, other)
    )
    assert len(mine[0]) == len(theirs[0]), "differences are of the same prompts"
    both = mine[1].sum() and theirs[1].sum()
    value = float(mine[0].sum() / mine[1].sum() - theirs[0].sum() / theirs[1].sum()) if both else math.nan
    return _bootstrapped(value, mine, theirs, seed, level)


Pair = tuple[NDArray[np.float64], NDArray[np.float64]]


def _bootstrapped(value: float, mine: Pair, theirs: Pair | None, seed: int, level: float) -> Interval:
    prompts = len(mine[0])
    if prompts < 2 or not math.isfinite(value):
        return Interval(value, math.nan, math.nan, prompts, "none")
    rng, drawn = np.random.default_rng(seed), list[NDArray[np.float64]]()
    at_once = max(1, AT_ONCE // prompts)
    with np.errstate(invalid="ignore", divide="ignore"):  # a draw without any token of a loss is left out below
        for start in range(0, DRAWS, at_once):
            counts = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=min(at_once, DRAWS - start)).astype(
                np.float64
            )
            found = (counts @ mine[0]) / (counts @ mine[1])
            drawn.append(found if theirs is None else found - (counts @ theirs[0]) / (counts @ theirs[1]))
    all_drawn = np.concatenate(drawn)
    tail = expanded_tail(prompts, level)
    low, high = np.quantile(all_drawn[np.isfinite(all_drawn)], [tail, 1 - tail])
    return Interval(value, float(low), float(high), prompts, "bootstrap over prompts")


def expanded_tail(prompts: int, level: float = LEVEL) -> float:
    """The share of bootstrap draws that is left out on each side: less than (1 - level) / 2, since so few prompts vary
    less than all do."""
    return NORMAL.cdf(-math.sqrt(prompts / (prompts - 1)) * t_quantile((1 + level) / 2, prompts - 1))


def t_quantile(p: float, freedom: int) -> float:
    """Student's t: exact for 1 and 2 degrees of freedom, else by Cornish and Fisher's expansion (Abramowitz and Stegun
    26.7.5), there right to a hundredth."""
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    z = NORMAL.inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / freedom**power for power, term in enumerate(terms, 1))
