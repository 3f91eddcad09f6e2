"""Completions that no reward can be told for: a verifier's own error or timeout, which never trains as a 0.

Such a completion leaves its group: it has no reward and no advantage, and the step is as if it had never been drawn. It
is counted, told, and above a share of the run's completions the run stops: a broken verifier must not go on choosing
what is learned from.

An error comes again with the same completion. A timeout depends on the clock: a run that was stopped and continued
equals the straight one as long as the same completions time out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from lowrank_tune.errors import TrainingError
from lowrank_tune.stats import Stats, WeightedMean

MIN_SAMPLES = 3
"""Failures that a run bears however few completions it has drawn, less one."""


@dataclass(frozen=True)
class RewardFailure:
    """What stands in place of a completion's values: which reward could not tell, and why."""

    reward: str
    verdict: Literal["error", "timeout"]
    reason: str


@dataclass
class RewardFailureTracker:
    """Counted over the whole run. `max_failure_rate`: the share of its completions that may be without a reward."""

    max_failure_rate: float = 0.01
    completions: int = 0
    errors: int = 0
    timeouts: int = 0

    def count(self, outcomes: Sequence[RewardFailure | None]) -> None:
        """Counts a draw's completions. Raises TrainingError where too many could not be scored."""
        failures = [failure for failure in outcomes if failure is not None]
        self.completions += len(outcomes)
        self.errors += sum(failure.verdict == "error" for failure in failures)
        self.timeouts += sum(failure.verdict == "timeout" for failure in failures)
        rate = self.failure_rate
        if failures and self.errors + self.timeouts >= MIN_SAMPLES and rate > self.max_failure_rate:
            message = (
                f"{self.errors + self.timeouts} of {self.completions} completions ({rate:.1%}) could not be "
                f"scored, more than"
            )
            raise TrainingError(
                f"rewards: {message} rollout.max_reward_failure_rate, {self.max_failure_rate:.3g}; of the last ones "
                f"{summarize_failures(failures)}"
            )

    @property
    def failure_rate(self) -> float:
        return (self.errors + self.timeouts) / max(1, self.completions)

    def stats(self, failures: Sequence[RewardFailure]) -> Stats:
        """Of a step, from the run's first failure on."""
        kinds = {"error": self.errors, "timeout": self.timeouts}
        return {
            f"reward_{kind}s": WeightedMean(sum(failure.verdict == kind for failure in failures), 1)
            for kind, total in kinds.items()
            if total
        }

    def iter_warnings(self, failures: Sequence[RewardFailure], completions: int) -> Iterator[str]:
        """One a reward; the loop tells each once."""
        for name in dict.fromkeys(failure.reward for failure in failures):
            own_failures = [failure for failure in failures if failure.reward == name]
            yield (
                f"the reward `{name}` failed on completions, which leave their groups, {len(own_failures)} of "
                f"{completions} in this step; the first: {own_failures[0].reason}"
            )

    def state(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if name != "max_failure_rate"}

    def restore(self, state: Mapping[str, float]) -> None:
        self.completions, self.errors, self.timeouts = (
            int(state.get(name, 0)) for name in ("completions", "errors", "timeouts")
        )


def summarize_failures(failures: Sequence[RewardFailure]) -> str:
    """Which rewards failed how often, and the first reason."""
    counts = Counter(failure.reward for failure in failures)
    return (
        f"{', '.join(f'`{name}` failed on {count}' for name, count in counts.most_common())}, the first: "
        f"{failures[0].reason}"
    )
