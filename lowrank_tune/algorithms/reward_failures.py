"""Completions without a reward: a verifier failed on them, by an error or a timeout. Such a failure is never trained as
a reward of 0.

The completion leaves its group: it has no reward and no advantage, and the step is computed as if it had not been
drawn. Failures are counted and logged. Above a share of the run's completions the run stops, because the rewards of a
broken verifier must not decide what is learned.

An error repeats with the same completion. A timeout depends on the clock: a resumed run equals an uninterrupted one as
long as the same completions time out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lowrank_tune.errors import TrainingError
from lowrank_tune.stats import Stats, WeightedMean

MIN_SAMPLES = 3
"""With fewer failures a run does not stop, however few completions it has drawn."""


@dataclass(frozen=True)
class RewardFailure:
    """Takes the place of the rewards of a completion: which reward failed, and why."""

    reward: str
    verdict: Literal["error", "timeout"]
    reason: str


@dataclass
class RewardFailureTracker:
    """Counts of failures over the whole run."""

    max_failure_rate: float = 0.01
    """Maximum share of completions without a reward."""
    completions: int = 0
    errors: int = 0
    timeouts: int = 0

    @property
    def num_failures(self) -> int:
        return self.errors + self.timeouts

    @property
    def failure_rate(self) -> float:
        return self.num_failures / max(1, self.completions)

    def count(self, outcomes: Sequence[RewardFailure | None]) -> None:
        """Counts new completions. Raises TrainingError if the rewards failed on too many."""
        failures = [failure for failure in outcomes if failure is not None]
        self.completions += len(outcomes)
        self.errors += _count_verdict(failures, "error")
        self.timeouts += _count_verdict(failures, "timeout")
        rate = self.failure_rate
        if failures and self.num_failures >= MIN_SAMPLES and rate > self.max_failure_rate:
            raise TrainingError(
                f"rewards: {self.num_failures} of {self.completions} completions ({rate:.1%}) could not be scored, "
                f"more than rollout.max_reward_failure_rate, {self.max_failure_rate:.3g}; of the last ones "
                f"{summarize_failures(failures)}"
            )

    def stats(self, failures: Sequence[RewardFailure]) -> Stats:
        """Returns the number of failures in a step by verdict, from the first failure of the run on."""
        stats = {}
        if self.errors:
            stats["reward_errors"] = WeightedMean(_count_verdict(failures, "error"), 1)
        if self.timeouts:
            stats["reward_timeouts"] = WeightedMean(_count_verdict(failures, "timeout"), 1)
        return stats

    def state(self) -> dict[str, float]:
        return {
            "completions": self.completions,
            "errors": self.errors,
            "timeouts": self.timeouts,
        }

    def restore(self, state: Mapping[str, float]) -> None:
        """Restores the counts; 0 for those that an older checkpoint does not have."""
        self.completions = int(state.get("completions", 0))
        self.errors = int(state.get("errors", 0))
        self.timeouts = int(state.get("timeouts", 0))


def _count_verdict(failures: Sequence[RewardFailure], verdict: str) -> int:
    return sum(failure.verdict == verdict for failure in failures)


def describe_failures(failures: Sequence[RewardFailure], num_completions: int) -> Iterator[str]:
    """Yields a warning for each reward that failed in a step."""
    reasons_by_reward: dict[str, list[str]] = {}
    for failure in failures:
        reasons_by_reward.setdefault(failure.reward, []).append(failure.reason)
    for name, reasons in reasons_by_reward.items():
        yield (
            f"the reward `{name}` failed on completions, which leave their groups, {len(reasons)} of "
            f"{num_completions} in this step; the first: {reasons[0]}"
        )


def summarize_failures(failures: Sequence[RewardFailure]) -> str:
    """Returns how often each reward failed, and the first reason."""
    counts = Counter(failure.reward for failure in failures)
    by_reward = ", ".join(f"`{name}` failed on {count}" for name, count in counts.most_common())
    return f"{by_reward}, the first: {failures[0].reason}"
