"""Before any training: can the rewards tell reference answers from garbage?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lowrank_tune.rewards.base import BatchedReward, RewardInput, Score
from lowrank_tune.rewards.pool import WorkerPool
from lowrank_tune.rewards.registry import WeightedReward
from lowrank_tune.rewards.verdicts import VerdictSummary, exceeds_failure_limit, score_all, summarize_verdicts

CHANCE_AUC, REQUIRED_AUC, Z_THRESHOLD = 0.5, 0.9, 4.0
MIN_AUC_MARGIN = 0.1  # how far above chance even a great many rows must be


@dataclass(frozen=True)
class Separation:
    """How one reward, or the weighted sum, scored reference answers and garbage. `auc`: the share of (reference,
    garbage) pairs in which the reference answer earns more, ties half; chance is 0.5. `missed`: a reference answer that
    earned the least."""

    name: str
    is_verifier: bool
    reference_mean: float
    negative_mean: float
    auc: float
    is_constant: bool
    summary: VerdictSummary | None = None

    @property
    def verdict_counts(self) -> dict[str, int]:
        return self.summary.counts if self.summary else {}


@dataclass(frozen=True)
class SanityReport:
    """What the preflight found. `failed` are sentences of scores that are none, `misjudged` of reference answers that a
    judge calls wrong; `stop_reason` says why a run would not bear what is broken."""

    rewards: list[Separation]
    sum: Separation | None
    required_auc: float
    failed: list[str]
    misjudged: list[str]
    stop_reason: str | None = None
    has_learned_reward: bool = False
    """A learned reward is among them: it follows what is liked, which references need not be."""

    def fault(self) -> str | None:
        """Why training must not begin."""
        if self.stop_reason:
            more = f" (and {len(self.failed) - 1} more)" if len(self.failed) > 1 else ""
            return f"rewards: {self.stop_reason}{more}"
        for separation in self.rewards:
            if separation.is_verifier and (fault := self._cannot_distinguish(separation, f"`{separation.name}`")):
                return fault
        return None if self.has_learned_reward else self._sum_cannot_distinguish()

    def warning(self) -> str | None:
        """What a person should look at before going on."""
        message = self._sum_cannot_distinguish() if self.has_learned_reward else None
        return f"{message}: a learned reward that does not care is no guide" if message else None

    def _sum_cannot_distinguish(self) -> str | None:
        return self._cannot_distinguish(self.sum, "the weighted sum of all") if self.sum else None

    def _cannot_distinguish(self, separation: Separation, label: str) -> str | None:
        if separation.auc >= self.required_auc:
            return None
        if separation.is_constant:
            description = f"everything earns {separation.reference_mean:.3g}"
        else:
            description = (
                f"reference answers earn {separation.reference_mean:.3g} on average and garbage "
                f"{separation.negative_mean:.3g}, and a reference answer is ahead in "
                f"{100 * separation.auc:.0f} % of the pairs (chance 50 %, needed {100 * self.required_auc:.0f} %)"
            )
        example = f"; {self.misjudged[0]}" if self.misjudged else ""
        return f"rewards: {label} cannot tell reference answers from garbage: {description}{example}"

    def lines(self) -> Iterator[str]:
        """For the start-up."""
        for separation in [*self.rewards, *([self.sum] if self.sum and len(self.rewards) > 1 else [])]:
            verdicts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(separation.verdict_counts.items()))
            timing = (
                f"; {1e3 * separation.summary.median_seconds:.2g} ms, "
                f"at most {1e3 * separation.summary.max_seconds:.2g}"
                if separation.summary
                else ""
            )
            yield (
                f"reward {separation.name}: reference answers {separation.reference_mean:.3g}, "
                f"garbage {separation.negative_mean:.3g}"
                f"{'' if separation.is_verifier else ' (shapes, does not judge)'}"
                f"{f'; {verdicts}' if verdicts else ''}{timing}"
            )
        if self.failed:
            yield (
                f"{len(self.failed)} scores failed, and in a run such completions leave their groups; the first: "
                f"{self.failed[0]}"
            )
        if self.misjudged:
            yield (
                f"{len(self.misjudged)} reference answers are not right by the rewards; the first: {self.misjudged[0]}"
            )


def sanity_check_rewards(
    weighted: Sequence[WeightedReward],
    references: Sequence[RewardInput],
    negatives: Sequence[RewardInput],
    pool: WorkerPool[int] | None = None,
    max_failure_rate: float = 0.01,
) -> SanityReport:
    """Scores reference answers and garbage with every reward; with the `pool` of the run where one is warm.
    `max_failure_rate`: the share of completions on which rewards may fail."""
    if not references or not negatives:
        raise ValueError("a preflight of rewards needs reference answers and garbage")
    if pool is None:
        with WorkerPool[int]([weighted_reward.reward for weighted_reward in weighted]) as own_pool:
            return sanity_check_rewards(weighted, references, negatives, own_pool, max_failure_rate)
    rows = list(score_all(pool, [*references, *negatives]))
    rewards = [
        _separation(
            weighted_reward.name,
            weighted_reward.reward.is_verifier,
            [scores[index] for scores in rows],
            len(references),
        )
        for index, weighted_reward in enumerate(weighted)
    ]
    failed = [score.reason for scores in rows for score in scores if score.value is None]
    totals = [_weighted_sum(weighted, scores) for scores in rows]
    total_separation = _separation(
        "sum", True, [Score(value, "graded" if value is not None else "error") for value in totals], len(references)
    )
    misjudged = [
        f"`{weighted_reward.name}` says of {item}: {score.reason}"
        for item, scores in zip(references, rows, strict=False)
        for weighted_reward, score in zip(weighted, scores, strict=True)
        if weighted_reward.reward.is_verifier and score.verdict == "fail"
    ]
    return SanityReport(
        rewards,
        replace(total_separation, summary=None),
        required_auc(len(references), len(negatives)),
        failed,
        misjudged,
        exceeds_failure_limit(weighted, rows, max_failure_rate, min_failures=1),
        any(isinstance(weighted_reward.reward, BatchedReward) for weighted_reward in weighted),
    )


def _weighted_sum(weighted: Sequence[WeightedReward], scores: Sequence[Score]) -> float | None:
    """None where a reward could not tell."""
    values = [
        weighted_reward.weight * score.value
        for weighted_reward, score in zip(weighted, scores, strict=True)
        if score.value is not None
    ]
    return sum(values) if len(values) == len(weighted) else None


def _separation(name: str, is_verifier: bool, scores: Sequence[Score], count: int) -> Separation:
    values = [score.value for score in scores]
    reference_values = [value for value in values[:count] if value is not None]
    negative_values = [value for value in values[count:] if value is not None]
    value_range = max(reference_values + negative_values, default=0.0) - min(
        reference_values + negative_values, default=0.0
    )
    return Separation(
        name,
        is_verifier,
        _mean(reference_values),
        _mean(negative_values),
        auc(reference_values, negative_values),
        value_range <= 1e-6,
        summarize_verdicts(name, is_verifier, scores),
    )


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else float("nan")


def auc(references: Sequence[float], negatives: Sequence[float]) -> float:
    """The share of pairs in which the first is larger, ties half (the area under the ROC curve)."""
    pairs = len(references) * len(negatives)
    return sum((a > b) + 0.5 * (a == b) for a in references for b in negatives) / pairs if pairs else CHANCE_AUC


def required_auc(num_references: int, num_negatives: int) -> float:
    """The share that a reward must reach: one that draws its figures by lot gets there, with so few rows, hardly ever
    (4 sigma)."""
    sigma = math.sqrt((num_references + num_negatives + 1) / (12 * num_references * num_negatives))
    return min(REQUIRED_AUC, CHANCE_AUC + max(MIN_AUC_MARGIN, Z_THRESHOLD * sigma))
