"""What rewards said of many completions: counts, times, where they disagree, and whether a run would stop. For
preflight and for `score`."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from lowrank_tune.rewards.base import RewardInput, Score
from lowrank_tune.rewards.failures import first_failure
from lowrank_tune.rewards.registry import WeightedReward
from lowrank_tune.rewards.workers.pool import WorkerPool

CHUNK_SIZE = 16  # completions between two reports of progress
CORRECT_THRESHOLD = 0.5
MIN_FAILURES = 3
"""As in a run: one or two failures say nothing of a verifier."""


@dataclass(frozen=True)
class VerdictSummary:
    """How one reward judged. `mean` and `std` are of its values; seconds are of one completion."""

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
    """Two rewards that judge, and the completions (their numbers) that the first alone calls right, and the second
    alone."""

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
    """The scores of each completion, in order, a few at once; `on_progress` is given how many are done."""
    for start in range(0, len(items), CHUNK_SIZE):
        for number, item in enumerate(items[start : start + CHUNK_SIZE]):
            pool.submit(number, item)
        scores = pool.collect()
        yield from scores.values()
        on_progress(start + len(scores))


def summarize_verdicts(name: str, is_verifier: bool, scores: Sequence[Score]) -> VerdictSummary:
    """Of one reward's scores."""
    values = [score.value for score in scores if score.value is not None]
    seconds = sorted(score.seconds for score in scores)
    median, p95, maximum = (
        seconds[math.ceil(share * len(seconds)) - 1] if seconds else 0.0 for share in (0.5, 0.95, 1.0)
    )
    return VerdictSummary(
        name,
        is_verifier,
        dict(Counter(score.verdict for score in scores)),
        statistics.fmean(values) if values else math.nan,
        statistics.pstdev(values) if values else math.nan,
        median,
        p95,
        maximum,
    )


def is_correct(score: Score) -> bool | None:
    """Whether a reward calls a completion right: pass, or a graded value of at least a half; None where it could not
    tell."""
    if score.value is None:
        return None
    return score.value >= CORRECT_THRESHOLD


def find_disagreements(weighted: Sequence[WeightedReward], rows: Sequence[Sequence[Score]]) -> list[Disagreement]:
    """Every pair of rewards that judge."""
    verifiers = [index for index, weighted_reward in enumerate(weighted) if weighted_reward.is_verifier]
    return [_disagreement(weighted, rows, first, second) for first, second in combinations(verifiers, 2)]


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
        sum(None not in pair for pair in verdict_pairs),
        [number for number, pair in enumerate(verdict_pairs) if pair == (True, False)],
        [number for number, pair in enumerate(verdict_pairs) if pair == (False, True)],
    )


def exceeds_failure_limit(
    weighted: Sequence[WeightedReward],
    rows: Sequence[Sequence[Score]],
    max_failure_rate: float,
    min_failures: int = MIN_FAILURES,
) -> str | None:
    """Why a run would not bear these failures, or None: one by a reward that stops the run, or more than the share
    `max_failure_rate`."""
    failures = [failure for scores in rows if (failure := first_failure(weighted, scores)) is not None]
    for weighted_reward, score in failures:
        if weighted_reward.on_error == "stop":
            return f"`{weighted_reward.name}` stops a run at its first failure: {score.reason or score.verdict}"
    if len(failures) >= min_failures and len(failures) > max_failure_rate * len(rows):
        weighted_reward, score = failures[0]
        message = (
            f"{len(failures)} of {len(rows)} completions could not be scored, more than "
            f"rollout.max_reward_failure_rate, {max_failure_rate:.3g}"
        )
        return f"{message}; the first: {score.reason or f'`{weighted_reward.name}`: {score.verdict}'}"
    return None
