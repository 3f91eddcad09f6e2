"""A check before training: do the rewards separate reference answers from wrong ones?

The weighted sum is what trains, so it has to separate them. A built-in verifier, and a user's function with `kind:
verifier`, has to separate them by itself too; shaping rewards do not. If there is no verifier, or a reward model is
among the rewards, a weighted sum that does not separate them is only a warning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lowrank_tune.rewards.base import BatchedReward, RewardInput, Score
from lowrank_tune.rewards.verdicts import (
    VerdictSummary,
    exceeds_failure_limit,
    mean_or_nan,
    score_all,
    summarize_verdicts,
)
from lowrank_tune.rewards.weighted import WeightedReward, weighted_sum
from lowrank_tune.rewards.workers.pool import WorkerPool

CHANCE_AUC = 0.5
REQUIRED_AUC = 0.9
Z_THRESHOLD = 4.0
MIN_AUC_MARGIN = 0.1  # smallest margin above chance, also with many rows
MAX_CONSTANT_RANGE = 1e-6  # values that differ by no more than this are one value
CURE = "Set `rewards_check: warn` to train anyway"
SHAPING_CURE = (
    "Set `kind: shaping` for it if it does not check whether an answer is right, "
    "or set `rewards_check: warn` to train anyway"
)


@dataclass(frozen=True)
class Separation:
    """How one reward, or the weighted sum, scored reference answers and wrong ones.

    `auc`: the share of (reference, wrong) pairs in which the reference answer has the higher score, where a tie counts
    a half; chance is 0.5. `is_constant`: whether all answers have the same score. The means are NaN without scores.
    """

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
    """The result of the check.

    `failed`: the reasons of the scores without a value. `misjudged`: the reference answers that a verifier fails.
    `stop_reason`: why a run would stop at the failed scores. `has_learned_reward`: whether a reward model is among the
    rewards; it follows preferences, and a reference answer is not always preferred.
    """

    rewards: list[Separation]
    sum: Separation
    required_auc: float
    failed: list[str]
    misjudged: list[str]
    stop_reason: str | None = None
    has_learned_reward: bool = False

    def fault(self) -> str | None:
        """Returns why training must not start, and what to do; None if it may."""
        if self.stop_reason:
            others = f" (and {len(self.failed) - 1} more)" if len(self.failed) > 1 else ""
            return f"rewards: {self.stop_reason}{others}"
        for separation in self.rewards:
            problem = self._problem(separation, f"`{separation.name}`")
            if separation.must_separate and problem is not None:
                return f"{problem}. {SHAPING_CURE}"
        problem = self._problem(self.sum, self._sum_label())
        if problem is None or not self._sum_must_separate():
            return None
        return f"{problem}. {CURE if len(self.rewards) > 1 else SHAPING_CURE}"

    def warning(self) -> str | None:
        """Returns what to look at before training; None if there is nothing."""
        problem = self._problem(self.sum, self._sum_label())
        if problem is None or self._sum_must_separate():
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
        """Returns how a reward fails to separate the two kinds of answers; None if it separates them."""
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
        """Yields the lines that a run prints at its start."""
        for separation in self.rewards:
            yield _reward_line(separation)
        if len(self.rewards) > 1:
            yield _reward_line(self.sum)
        if self.failed:
            yield (
                f"{len(self.failed)} scores failed, and in a run such completions leave their groups; the first: "
                f"{self.failed[0]}"
            )
        if self.misjudged:
            yield f"{len(self.misjudged)} reference answers are wrong by the rewards; the first: {self.misjudged[0]}"


def _reward_line(separation: Separation) -> str:
    kind = "" if separation.is_verifier else " (shaping)"
    line = (
        f"reward {separation.name}: reference answers {separation.reference_mean:.3g}, "
        f"wrong answers {separation.negative_mean:.3g}{kind}"
    )
    if separation.verdict_counts:
        counts = [f"{count} {verdict}" for verdict, count in sorted(separation.verdict_counts.items())]
        line += f"; {', '.join(counts)}"
    if separation.summary:
        median_ms = 1e3 * separation.summary.median_seconds
        max_ms = 1e3 * separation.summary.max_seconds
        line += f"; {median_ms:.2g} ms, at most {max_ms:.2g}"
    return line


def sanity_check_rewards(
    weighted: Sequence[WeightedReward],
    references: Sequence[RewardInput],
    negatives: Sequence[RewardInput],
    pool: WorkerPool[int] | None = None,
    max_failure_rate: float = 0.01,
) -> SanityReport:
    """Scores reference answers and wrong ones with every reward, and returns how well each separates them.

    `pool`: the running workers of a run; without it a pool is started for the check. `max_failure_rate`: the share of
    completions for which rewards may fail.
    """
    assert references and negatives, "the check needs reference answers and wrong ones"
    if pool is None:
        with WorkerPool[int]([weighted_reward.reward for weighted_reward in weighted]) as own_pool:
            return sanity_check_rewards(
                weighted,
                references,
                negatives,
                own_pool,
                max_failure_rate,
            )
    rows = list(score_all(pool, [*references, *negatives]))
    separations = []
    for index, weighted_reward in enumerate(weighted):
        scores = [row[index] for row in rows]
        separation = _separation(
            weighted_reward.name,
            weighted_reward.is_verifier,
            weighted_reward.must_separate,
            [score.value for score in scores],
            len(references),
        )
        summary = summarize_verdicts(
            weighted_reward.name,
            weighted_reward.is_verifier,
            scores,
        )
        separations.append(replace(separation, summary=summary))
    weights = [weighted_reward.weight for weighted_reward in weighted]
    sums = [weighted_sum([score.value for score in row], weights) for row in rows]
    return SanityReport(
        separations,
        _separation("sum", True, True, sums, len(references)),
        required_auc(len(references), len(negatives)),
        [score.reason for row in rows for score in row if score.value is None],
        list(_misjudged(weighted, references, rows)),
        exceeds_failure_limit(
            weighted,
            rows,
            max_failure_rate,
            min_failures=1,
        ),
        any(isinstance(weighted_reward.reward, BatchedReward) for weighted_reward in weighted),
    )


def _misjudged(
    weighted: Sequence[WeightedReward],
    references: Sequence[RewardInput],
    rows: Sequence[Sequence[Score]],
) -> Iterator[str]:
    """Yields the reference answers that a verifier fails, with the reason."""
    for item, scores in zip(references, rows, strict=False):
        for weighted_reward, score in zip(weighted, scores, strict=True):
            if weighted_reward.is_verifier and score.verdict == "fail":
                yield f"`{weighted_reward.name}` on {item}: {score.reason}"


def _separation(
    name: str,
    is_verifier: bool,
    must_separate: bool,
    values: Sequence[float | None],
    num_references: int,
) -> Separation:
    """Returns the separation of the first `num_references` values from the others; None is not counted."""
    reference_values = [value for value in values[:num_references] if value is not None]
    negative_values = [value for value in values[num_references:] if value is not None]
    all_values = [*reference_values, *negative_values]
    value_range = max(all_values, default=0.0) - min(all_values, default=0.0)
    return Separation(
        name,
        is_verifier,
        must_separate,
        mean_or_nan(reference_values),
        mean_or_nan(negative_values),
        auc(reference_values, negative_values),
        is_constant=value_range <= MAX_CONSTANT_RANGE,
    )


def auc(references: Sequence[float], negatives: Sequence[float]) -> float:
    """Returns the area under the ROC curve: the share of pairs in which the reference is larger, where a tie counts a
    half. 0.5 without pairs."""
    pairs = len(references) * len(negatives)
    if not pairs:
        return CHANCE_AUC
    return sum((a > b) + 0.5 * (a == b) for a in references for b in negatives) / pairs


def required_auc(num_references: int, num_negatives: int) -> float:
    """Returns the share that a reward must reach: 4 standard deviations of the Mann-Whitney statistic above chance, so
    that a reward of random numbers almost never reaches it with so few rows; at most REQUIRED_AUC."""
    sigma = math.sqrt((num_references + num_negatives + 1) / (12 * num_references * num_negatives))
    return min(REQUIRED_AUC, CHANCE_AUC + max(MIN_AUC_MARGIN, Z_THRESHOLD * sigma))
