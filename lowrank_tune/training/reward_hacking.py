"""Reward hacking: whether what is paid (the proxy: a mean reward) and what is wanted (gold: held-out questions answered
exactly) part ways.

Gao et al., arXiv:2210.10760: under optimization the proxy goes on rising where gold has turned. The rule knows only
what was measured, so that a screen, a report and a run say the same; a run's memory of it is saved with its
checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

WINDOW = 2  # looks whose mean is "now": one bad evaluation is noise
# standard errors that gold has to lose: the best of ten looks is above its truth by half of that by chance alone
Z_THRESHOLD = 3.5
MIN_ACCURACY_DROP = 0.02  # share of questions: below that nobody cares
MIN_REWARD_RISE = 0.1  # of the span of the steps' mean rewards
DEFAULT_STDERR = 0.05  # at most, with a hundred questions


@dataclass(frozen=True)
class EvalPoint:
    """An evaluation after `step` steps: the mean reward of the steps since the one before, the share of held-out
    questions answered exactly, and the standard error of that share."""

    step: int
    reward: float
    accuracy: float
    stderr: float = DEFAULT_STDERR


@dataclass(frozen=True)
class Divergence:
    """Held-out accuracy was best after step `best_step`, and has fallen; the reward at first and now."""

    best_step: int
    best: float
    now: float
    rewards: tuple[float, float]

    @property
    def message(self) -> str:
        return (
            f"the reward rises and held-out answers get worse ({self.best:.0%} -> {self.now:.0%} exact): it pays for "
            f"something else than "
            f"being right (reward {self.rewards[0]:.3g} -> {self.rewards[1]:.3g}, best answers after step "
            f"{self.best_step}): look at the "
            "groups and at the reward"
        )


def accuracy_stderr(accuracy: float, num_questions: int) -> float:
    """The standard error of a share of so many questions; where all or none are right, there is still some (Agresti and
    Coull)."""
    smoothed = (accuracy * num_questions + 2) / (num_questions + 4)
    return math.sqrt(smoothed * (1 - smoothed) / num_questions)


def find_divergence(points: Sequence[EvalPoint], reward_range: float) -> Divergence | None:
    """Whether proxy and gold part ways, from all looks of a run: the reward has risen over the run and is not below
    what it was at gold's best, while gold is below its best by more than its noise. `reward_range`: highest less lowest
    mean reward of a step."""
    if len(points) <= WINDOW or not reward_range > 0:
        return None
    recent = points[-WINDOW:]
    best = max(points[:-WINDOW], key=lambda point: (point.accuracy, point.step))
    now, reward = (
        math.fsum(values) / WINDOW
        for values in ([point.accuracy for point in recent], [point.reward for point in recent])
    )
    stderr = math.sqrt(best.stderr**2 + math.fsum(point.stderr**2 for point in recent) / WINDOW**2)
    accuracy_fell = best.accuracy - now > max(MIN_ACCURACY_DROP, Z_THRESHOLD * stderr)
    reward_rose = (
        reward > points[0].reward + MIN_REWARD_RISE * reward_range
        and reward >= best.reward - MIN_REWARD_RISE * reward_range
    )
    if accuracy_fell and reward_rose:
        return Divergence(best.step, best.accuracy, now, (points[0].reward, reward))
    return None


@dataclass
class RewardHackingDetector:
    """The memory of one run, in plain data: it is saved with each checkpoint. `warned_at_step` is the step of the
    first warning."""

    points: list[list[float]] = field(default_factory=list)
    reward_sum: float = 0.0
    num_steps: int = 0
    first_reward: float | None = None
    min_reward: float = 0.0
    max_reward: float = 0.0
    warned_at_step: int | None = None
    stopped_run: bool = False

    def step(self, stats: Mapping[str, float]) -> None:
        """Takes in a step; one whose completions all lack a reward says nothing."""
        reward = stats.get("reward", math.nan)
        if math.isfinite(reward):
            if self.first_reward is None:
                self.first_reward = self.min_reward = self.max_reward = reward
            self.reward_sum = self.reward_sum + reward
            self.num_steps = self.num_steps + 1
            self.min_reward, self.max_reward = min(self.min_reward, reward), max(self.max_reward, reward)

    def update(
        self,
        step: int,
        accuracy: float,
        num_questions: int,
        reference_accuracy: float | None = None,
    ) -> Divergence | None:
        """Takes in how many of so many questions were answered exactly; `reference_accuracy` is the share of the
        reference, whose reward is that of the first step. Returns what is to be said now."""
        if self.first_reward is not None and not self.points and reference_accuracy is not None:
            self.points.append(
                [0, self.first_reward, reference_accuracy, accuracy_stderr(reference_accuracy, num_questions)]
            )
        if self.num_steps:
            self.points.append(
                [step, self.reward_sum / self.num_steps, accuracy, accuracy_stderr(accuracy, num_questions)]
            )
            self.reward_sum = 0.0
            self.num_steps = 0
        return find_divergence(
            [EvalPoint(int(at_step), *values) for at_step, *values in self.points], self.max_reward - self.min_reward
        )
