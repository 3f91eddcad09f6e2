"""Detection of reward hacking: the mean reward rises while the accuracy on held-out questions falls.

Gao et al., arXiv:2210.10760: under optimization the proxy reward still rises after the gold score has begun to fall.
The rule reads measurements only, so that run, dashboard and report agree. Each checkpoint stores its state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# number of last evaluations that are averaged: a single bad evaluation is noise
WINDOW = 2
# The accuracy must fall by more than this many standard errors. The best of ten evaluations is above its true value by
# half of that by chance alone.
Z_THRESHOLD = 3.5
# smallest drop of the accuracy that matters
MIN_ACCURACY_DROP = 0.02
# smallest rise of the reward, as a share of the range of the steps' mean rewards
MIN_REWARD_RISE = 0.1
# the largest standard error with a hundred questions
DEFAULT_STDERR = 0.05


@dataclass(frozen=True)
class EvalPoint:
    """One evaluation.

    `reward` is the mean reward of the steps since the evaluation before; `accuracy` is the share of held-out questions
    answered correctly, `stderr` its standard error.
    """

    step: int
    reward: float
    accuracy: float
    stderr: float = DEFAULT_STDERR


@dataclass(frozen=True)
class Divergence:
    """Accuracy `best` after step `best_step` and `now`; `rewards` are the first and the present mean reward."""

    best_step: int
    best: float
    now: float
    rewards: tuple[float, float]

    @property
    def message(self) -> str:
        return (
            f"the reward rises and held-out answers get worse ({self.best:.0%} -> {self.now:.0%} exact): the reward "
            f"does not measure correctness (reward {self.rewards[0]:.3g} -> {self.rewards[1]:.3g}, best answers after "
            f"step {self.best_step}); look at the groups and at the reward"
        )


def accuracy_stderr(accuracy: float, num_questions: int) -> float:
    """Returns the standard error of an accuracy, above 0 also for 0 % and 100 % (Agresti and Coull, 1998)."""
    smoothed = (accuracy * num_questions + 2) / (num_questions + 4)
    return math.sqrt(smoothed * (1 - smoothed) / num_questions)


def find_divergence(points: Sequence[EvalPoint], reward_range: float) -> Divergence | None:
    """Returns a divergence if the reward rose and the accuracy fell, else None.

    The mean reward of the last evaluations must be above the first one and not below that at the best accuracy; their
    mean accuracy must be below the best one by more than its noise. `reward_range` is the difference of the highest and
    the lowest mean reward of a step.
    """
    if len(points) <= WINDOW or not reward_range > 0:
        return None
    recent = points[-WINDOW:]
    best = max(points[:-WINDOW], key=lambda point: (point.accuracy, point.step))
    now = math.fsum(point.accuracy for point in recent) / WINDOW
    reward = math.fsum(point.reward for point in recent) / WINDOW
    stderr = math.sqrt(best.stderr**2 + math.fsum(point.stderr**2 for point in recent) / WINDOW**2)
    accuracy_fell = best.accuracy - now > max(MIN_ACCURACY_DROP, Z_THRESHOLD * stderr)
    tolerance = MIN_REWARD_RISE * reward_range
    reward_rose = reward > points[0].reward + tolerance and reward >= best.reward - tolerance
    if accuracy_fell and reward_rose:
        return Divergence(
            best.step,
            best.accuracy,
            now,
            (points[0].reward, reward),
        )
    return None


@dataclass
class RewardHackingDetector:
    """State of the detection in one run, as plain data that is stored in each checkpoint.

    `points` has one list [step, reward, accuracy, stderr] for each evaluation; `warned_at_step` is the step of the
    first warning.
    """

    points: list[list[float]] = field(default_factory=list)
    reward_sum: float = 0.0
    num_steps: int = 0
    first_reward: float | None = None
    min_reward: float = 0.0
    max_reward: float = 0.0
    warned_at_step: int | None = None
    stopped_run: bool = False

    def step(self, stats: Mapping[str, float]) -> None:
        """Adds the reward of a step; a step without any reward is left out."""
        reward = stats.get("reward", math.nan)
        if not math.isfinite(reward):
            return
        if self.first_reward is None:
            self.first_reward = self.min_reward = self.max_reward = reward
        self.reward_sum += reward
        self.num_steps += 1
        self.min_reward = min(self.min_reward, reward)
        self.max_reward = max(self.max_reward, reward)

    def update(
        self,
        step: int,
        accuracy: float,
        num_questions: int,
        reference_accuracy: float | None = None,
    ) -> Divergence | None:
        """Adds an evaluation and returns a divergence, if there is one now.

        `reference_accuracy` is that of the reference; the reward of the first step counts as its reward.
        """

        def add(
            at_step: int,
            reward: float,
            measured: float,
        ) -> None:
            self.points.append(
                [
                    at_step,
                    reward,
                    measured,
                    accuracy_stderr(measured, num_questions),
                ]
            )

        if self.first_reward is not None and not self.points and reference_accuracy is not None:
            add(0, self.first_reward, reference_accuracy)
        if self.num_steps:
            add(step, self.reward_sum / self.num_steps, accuracy)
            self.reward_sum = 0.0
            self.num_steps = 0
        points = [EvalPoint(int(at_step), *values) for at_step, *values in self.points]
        return find_divergence(points, self.max_reward - self.min_reward)
