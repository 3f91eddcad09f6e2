"""Statistics of the scores of many completions: verdicts, disagreements, failures, and groups with zero reward std."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from lowrank_tune.rewards.base import RewardInput, Score
from lowrank_tune.rewards.weighted import WeightedReward, first_failure
from lowrank_tune.rewards.workers.pool import WorkerPool

CHUNK_SIZE = 16  # completions between two reports of progress
CORRECT_THRESHOLD = 0.5
MIN_FAILURES = 3
"""As in a run: one or two failures do not show that a verifier is faulty."""


@dataclass(frozen=True)
class VerdictSummary:
    """The scores of one reward: number of each verdict, mean and std of the values, seconds of one completion."""

    name: str
    is_verifier: bool
    counts: dict[str, int]
    mean: float
    std: float
    median_seconds: float
    p95_seconds: float
    max_seconds: float


@dataclass(frozen=True)
class Disagreement:
    """Two verifiers, and the indices of the completions that only the first or only the second grades as correct."""

    first: str
    second: str
    num_both_scored: int
    only_first: list[int] = field(default_factory=list)
    only_second: list[int] = field(default_factory=list)


def score_all(
    pool: WorkerPool[int],
    items: Sequence[RewardInput],
    on_progress: Callable[[int], None] = lambda done: None,
) -> Iterator[list[Score]]:
    """Yields the scores of each completion, in order, CHUNK_SIZE at once; `on_progress` gets the number done."""
    for start in range(0, len(items), CHUNK_SIZE):
        for number, item in enumerate(items[start : start + CHUNK_SIZE]):
            pool.submit(number, item)
        scores = pool.collect()
        yield from scores.values()
        on_progress(start + len(scores))


def summarize_verdicts(
    name: str,
    is_verifier: bool,
    scores: Sequence[Score],
) -> VerdictSummary:
    """Returns the summary of one reward's scores; mean and std are NaN if no score has a value."""
    values = [score.value for score in scores if score.value is not None]
    seconds = sorted(score.seconds for score in scores)
    counts: Counter[str] = Counter(score.verdict for score in scores)
    return VerdictSummary(
        name,
        is_verifier,
        dict(counts),
        mean_or_nan(values),
        statistics.pstdev(values) if values else math.nan,
        median_seconds=_quantile(seconds, 0.5),
        p95_seconds=_quantile(seconds, 0.95),
        max_seconds=_quantile(seconds, 1.0),
    )


def mean_or_nan(values: Sequence[float]) -> float:
    """Returns the mean; NaN without values."""
    return statistics.fmean(values) if values else math.nan


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Returns the smallest value that at least `share` of the values do not exceed; 0 without values."""
    if not ordered:
        return 0.0
    return ordered[math.ceil(share * len(ordered)) - 1]


def is_correct(score: Score) -> bool | None:
    """Returns whether a score is that of a correct completion: pass, or a graded value of at least a half. None if it
    has no value."""
    if score.value is None:
        return None
    return score.value >= CORRECT_THRESHOLD


def find_disagreements(weighted: Sequence[WeightedReward], rows: Sequence[Sequence[Score]]) -> list[Disagreement]:
    """Returns one entry for each pair of verifiers."""
    verifiers = [index for index, weighted_reward in enumerate(weighted) if weighted_reward.is_verifier]
    return [
        _disagreement(
            weighted,
            rows,
            first,
            second,
        )
        for first, second in combinations(verifiers, 2)
    ]


def _disagreement(
    weighted: Sequence[WeightedReward],
    rows: Sequence[Sequence[Score]],
    first: int,
    second: int,
) -> Disagreement:
    verdict_pairs = [(is_correct(scores[first]), is_correct(scores[second])) for scores in rows]
    return Disagreement(
        weighted[first].name,
        weighted[second].name,
        num_both_scored=sum(None not in pair for pair in verdict_pairs),
        only_first=[number for number, pair in enumerate(verdict_pairs) if pair == (True, False)],
        only_second=[number for number, pair in enumerate(verdict_pairs) if pair == (False, True)],
    )


def exceeds_failure_limit(
    weighted: Sequence[WeightedReward],
    rows: Sequence[Sequence[Score]],
    max_failure_rate: float,
    min_failures: int = MIN_FAILURES,
) -> str | None:
    """Returns why a run would stop at these failures, or None.

    It stops at one failure of a reward with `on_error: stop`, or at more than the share `max_failure_rate`.
    """
    failures = []
    for scores in rows:
        failure = first_failure(weighted, scores)
        if failure is not None:
            failures.append(failure)
    for weighted_reward, score in failures:
        if weighted_reward.on_error == "stop":
            return f"`{weighted_reward.name}` stops a run at its first failure: {score.reason or score.verdict}"
    if len(failures) < min_failures or len(failures) <= max_failure_rate * len(rows):
        return None
    weighted_reward, score = failures[0]
    reason = score.reason or f"`{weighted_reward.name}`: {score.verdict}"
    return (
        f"{len(failures)} of {len(rows)} completions could not be scored, more than "
        f"rollout.max_reward_failure_rate, {max_failure_rate:.3g}; the first: {reason}"
    )


def zero_std_fraction(
    pass_rates: Sequence[float],
    num_generations: int,
    samples: int | None = None,
) -> float:
    """Returns the expected share of groups of `num_generations` completions that all pass or all fail, given the pass
    rate of each prompt. Such groups give no gradient. NaN without prompts.

    If each rate was estimated from `samples` completions, a rate of 0 does not mean that no completion ever passes: the
    share is then the mean over the posterior of the rate under Jeffreys' prior, Beta(1/2, 1/2).
    """
    if not pass_rates:
        return math.nan
    if samples is None:
        return statistics.fmean(rate**num_generations + (1 - rate) ** num_generations for rate in pass_rates)
    shares = []
    for rate in pass_rates:
        all_pass = _expected_power(rate * samples, samples, num_generations)
        all_fail = _expected_power((1 - rate) * samples, samples, num_generations)
        shares.append(all_pass + all_fail)
    return statistics.fmean(shares)


def _expected_power(
    passed: float,
    samples: int,
    num_generations: int,
) -> float:
    """Returns the mean of rate ** num_generations under Beta(passed + 1/2, samples - passed + 1/2)."""
    return math.prod((passed + 0.5 + i) / (samples + 1.0 + i) for i in range(num_generations))
