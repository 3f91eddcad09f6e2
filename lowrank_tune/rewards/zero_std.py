"""How many groups of completions will carry no signal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def zero_std_fraction(pass_rates: Sequence[float], num_generations: int, samples: int | None = None) -> float:
    """The expected share of groups of `num_generations` completions that all pass or all fail, given the pass rate of
    each prompt.

    Where a rate was estimated from `samples` completions, none passing does not mean that none ever will: the share is
    then the mean over what the rate may be (Jeffreys' prior, Beta(1/2, 1/2)).
    """
    if not pass_rates:
        return float("nan")
    if samples is None:
        return statistics.fmean(rate**num_generations + (1 - rate) ** num_generations for rate in pass_rates)
    return statistics.fmean(
        _expected_power(rate * samples, samples, num_generations)
        + _expected_power((1 - rate) * samples, samples, num_generations)
        for rate in pass_rates
    )


def _expected_power(passed: float, samples: int, num_generations: int) -> float:
    """The mean of rate ** n under Beta(passed + 1/2, samples - passed + 1/2)."""
    return math.prod((passed + 0.5 + i) / (samples + 1.0 + i) for i in range(num_generations))
