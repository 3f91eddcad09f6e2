"""A check before training: do the rewards separate reference answers from wrong ones?

The weighted sum decides, because it is what trains. A verifier of the kit, and a function that the recipe calls one,
has to separate them by itself as well. Rewards that only shape how a completion is written need not, and where there
are no others, or a learned one, a sum that does not separate them is a warning."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lowrank_tune.rewards.base import BatchedReward, RewardInput, Score
from lowrank_tune.rewards.registry import WeightedReward
from lowrank_tune.rewards.verdicts import VerdictSummary, exceeds_failure_limit, score_all, summarize_verdicts
from lowrank_tune.rewards.workers.pool import WorkerPool

CHANCE_AUC = 0.5
REQUIRED_AUC = 0.9
Z_THRESHOLD = 4.0
MIN_AUC_MARGIN = 0.1  # how far above chance even a great many rows must be
CURE = "Set `rewards_check: warn` to train anyway"
SHAPING_CURE = (
    "Set `kind: shaping` for it if it does not check whether an answer is right, "
    "or set `rewards_check: warn` to train anyway"
)


@dataclass(frozen=True)
class Separation:
    """How one reward, or the weighted sum, scored reference answers and wrong ones. `auc`: the share of (reference,
    wrong) pairs in which the reference answer has the higher score, ties half; chance is 0.5."""

    name: str
    is_verifier: bool
    must_separate: bool
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
    """The result of the check. `failed`: why scores have no value; `misjudged`: reference answers that a verifier
    fails; `stop_reason`: why a run would end because of failed scores."""

    rewards: list[Separation]
    sum: Separation
    required_auc: float
    failed: list[str]
    misjudged: list[str]
    stop_reason: str | None = None
    has_learned_reward: bool = False
    """A learned reward is among them: it follows preferences, and a reference answer need not be preferred."""

    def fault(self) -> str | None:
        """Why training must not begin, with the cure."""
        if self.stop_reason:
            if len(self.failed) > 1:
                more = f" (and {len(self.failed) - 1} more)"
            else:
                more = ""
            return f"rewards: {self.stop_reason}{more}"
        for separation in self.rewards:
            if separation.must_separate and (problem := self._problem(separation, f"`{separation.name}`")):
                return f"{problem}. {SHAPING_CURE}"
        problem = self._problem(self.sum, self._sum_label())
        if problem is None or not self._sum_must_separate():
            return None
        return f"{problem}. {CURE if len(self.rewards) > 1 else SHAPING_CURE}"

    def warning(self) -> str | None:
        """What a person should look at before going on."""
        if self._sum_must_separate() or (problem := self._problem(self.sum, self._sum_label())) is None:
            return None
        if self.has_learned_reward:
            return f"{problem}. The learned reward may prefer other answers"
        return f"{problem}. No reward checks whether an answer is right"

    def _sum_must_separate(self) -> bool:
        return not self.has_learned_reward and any(separation.is_verifier for separation in self.rewards)

    def _sum_label(self) -> str:
        if len(self.rewards) > 1:
            return "the weighted sum"
        return f"`{self.rewards[0].name}`"

    def _problem(self, separation: Separation, label: str) -> str | None:
        if separation.auc >= self.required_auc:
            return None
        if math.isnan(separation.reference_mean) or math.isnan(separation.negative_mean):
            return f"rewards: {label} has no score for any reference answer or for any wrong one: {self.failed[0]}"
        if separation.is_constant:
            description = f"every answer gets {separation.reference_mean:.3g}"
        else:
            description = (
                f"reference answers get {separation.reference_mean:.3g} on average and wrong answers "
                f"{separation.negative_mean:.3g}, and the reference answer is ahead in "
                f"{100 * separation.auc:.0f} % of the pairs (chance 50 %, needed {100 * self.required_auc:.0f} %)"
            )
        example = f"; {self.misjudged[0]}" if self.misjudged else ""
        return f"rewards: {label} does not separate reference answers from wrong ones: {description}{example}"

    def lines(self) -> Iterator[str]:
        """For the start-up."""
        for separation in [*self.rewards, *([self.sum] if len(self.rewards) > 1 else [])]:
            verdicts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(separation.verdict_counts.items()))
            if separation.summary:
                timing = (
                    f"; {1e3 * separation.summary.median_seconds:.2g} ms, "
                    f"at most {1e3 * separation.summary.max_seconds:.2g}"
                )
            else:
                timing = ""
            yield (
                f"reward {separation.name}: reference answers {separation.reference_mean:.3g}, "
                f"wrong answers {separation.negative_mean:.3g}"
                f"{'' if separation.is_verifier else ' (shaping)'}"
                f"{f'; {verdicts}' if verdicts else ''}{timing}"
            )
        if self.failed:
            yield (
                f"{len(self.failed)} scores failed, and in a run such completions leave their groups; the first: "
                f"{self.failed[0]}"
            )
        if self.misjudged:
            yield (f"{len(self.misjudged)} reference answers are wrong by the rewards; the first: {self.misjudged[0]}")


def sanity_check_rewards(
    weighted: Sequence[WeightedReward],
    references: Sequence[RewardInput],
    negatives: Sequence[RewardInput],
    pool: WorkerPool[int] | None = None,
    max_failure_rate: float = 0.01,
) -> SanityReport:
    """Scores reference answers and wrong ones with every reward; with the `pool` of the run where one is warm.
    `max_failure_rate`: the share of completions on which rewards may fail."""
    assert references and negatives, "the check needs reference answers and wrong ones"
    if pool is None:
        with WorkerPool[int]([weighted_reward.reward for weighted_reward in weighted]) as own_pool:
            return sanity_check_rewards(weighted, references, negatives, own_pool, max_failure_rate)
    rows = list(score_all(pool, [*references, *negatives]))
    rewards = [
        _separation(
            weighted_reward.name,
            weighted_reward.is_verifier,
            weighted_reward.must_separate,
            [scores[index] for scores in rows],
            len(references),
        )
        for index, weighted_reward in enumerate(weighted)
    ]
    failed = [score.reason for scores in rows for score in scores if score.value is None]
    totals = [_weighted_sum(weighted, scores) for scores in rows]
    total_separation = _separation(
        "sum",
        True,
        True,
        [Score(value, "graded" if value is not None else "error") for value in totals],
        len(references),
    )
    misjudged = [
        f"`{weighted_reward.name}` on {item}: {score.reason}"
        for item, scores in zip(references, rows, strict=False)
        for weighted_reward, score in zip(weighted, scores, strict=True)
        if weighted_reward.is_verifier and score.verdict == "fail"
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
    """None where a reward has no value."""
    values = [
        weighted_reward.weight * score.value
        for weighted_reward, score in zip(weighted, scores, strict=True)
        if score.value is not None
    ]
    return sum(values) if len(values) == len(weighted) else None


def _separation(
    name: str,
    is_verifier: bool,
    must_separate: bool,
    scores: Sequence[Score],
    count: int,
) -> Separation:
    values = [score.value for score in scores]
    reference_values = [value for value in values[:count] if value is not None]
    negative_values = [value for value in values[count:] if value is not None]
    value_range = max(reference_values + negative_values, default=0.0) - min(
        reference_values + negative_values, default=0.0
    )
    return Separation(
        name,
        is_verifier,
        must_separate,
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
    if pairs:
        return sum((a > b) + 0.5 * (a == b) for a in references for b in negatives) / pairs
    return CHANCE_AUC


def required_auc(num_references: int, num_negatives: int) -> float:
    """The share that a reward must reach: one that draws its figures by lot gets there, with so few rows, hardly ever
    (4 sigma)."""
    sigma = math.sqrt((num_references + num_negatives + 1) / (12 * num_references * num_negatives))
    return min(REQUIRED_AUC, CHANCE_AUC + max(MIN_AUC_MARGIN, Z_THRESHOLD * sigma))
