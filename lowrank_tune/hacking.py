"""Reward hacking: whether what is paid (the proxy: a mean reward) and what is wanted (gold: held-out questions answered
exactly) part ways.

Gao et al., arXiv:2210.10760: under optimisation the proxy goes on rising where gold has turned. The rule knows only
what was measured, so that a screen, a report and a run say the same; a run's memory of it is saved with its
checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

RECENT = 2  # looks whose mean is "now": one bad evaluation is noise
# standard errors that gold has to lose: the best of ten looks is above its truth by half of that by chance alone
CLEARLY = 3.5
LEAST_LOSS = 0.02  # share of questions: below that nobody cares
RISE = 0.1  # of the span of the steps' mean rewards
UNKNOWN_NOISE = 0.05  # at most, with a hundred questions


@dataclass(frozen=True)
class Look:
    """An evaluation after `step` steps: the mean reward of the steps since the one before, the share of held-out
    questions answered exactly, and the standard error of that share."""

    step: int
    reward: float
    exact: float
    noise: float = UNKNOWN_NOISE


@dataclass(frozen=True)
class Parting:
    """Gold was best after step `since`, and has fallen; the reward at first and now."""

    since: int
    best: float
    now: float
    rewards: tuple[float, float]

    @property
    def words(self) -> str:
        return (
            f"the reward rises and held-out answers get worse ({self.best:.0%} -> {self.now:.0%} exact): it pays for "
            f"something else than "
            f"being right (reward {self.rewards[0]:.3g} -> {self.rewards[1]:.3g}, best answers after step "
            f"{self.since}): look at the "
            "groups and at the reward"
        )


def noise_of(share: float, questions: int) -> float:
    """The standard error of a share of so many questions; where all or none are right, there is still some (Agresti and
    Coull)."""
    smoothed = (share * questions + 2) / (questions + 4)
    return math.sqrt(smoothed * (1 - smoothed) / questions)


def parting(looks: Sequence[Look], span: float) -> Parting | None:
    """Whether proxy and gold part ways, from all looks of a run: the reward has risen over the run and is not below
    what it was at gold's best, while gold is below its best by more than its noise. `span`: highest less lowest mean
    reward of a step."""
    if len(looks) <= RECENT or not span > 0:
        return None
    recent = looks[-RECENT:]
    best = max(looks[:-RECENT], key=lambda look: (look.exact, look.step))
    now, reward = (
        math.fsum(values) / RECENT for values in ([look.exact for look in recent], [look.reward for look in recent])
    )
    noise = math.sqrt(best.noise**2 + math.fsum(look.noise**2 for look in recent) / RECENT**2)
    falls = best.exact - now > max(LEAST_LOSS, CLEARLY * noise)
    rises = reward > looks[0].reward + RISE * span and reward >= best.reward - RISE * span
    return Parting(best.step, best.exact, now, (looks[0].reward, reward)) if falls and rises else None


@dataclass
class Watch:
    """The memory of one run, in plain data: it is saved with each checkpoint. `spoke` is the step at which the watch
    first spoke."""

    looks: list[list[float]] = field(default_factory=list)
    total: float = 0.0
    count: int = 0
    first: float | None = None
    least: float = 0.0
    most: float = 0.0
    spoke: int | None = None
    ended: bool = False

    def step(self, stats: Mapping[str, float]) -> None:
        """Takes in a step; one whose completions all lack a reward says nothing."""
        reward = stats.get("reward", math.nan)
        if math.isfinite(reward):
            if self.first is None:
                self.first = self.least = self.most = reward
            self.total, self.count = self.total + reward, self.count + 1
            self.least, self.most = min(self.least, reward), max(self.most, reward)

    def look(self, step: int, exact: float, questions: int, before: float | None = None) -> Parting | None:
        """Takes in how many of so many questions were answered exactly; `before` is the share of the reference, whose
        reward is that of the first step. Returns what is to be said now."""
        if self.first is not None and not self.looks and before is not None:
            self.looks.append([0, self.first, before, noise_of(before, questions)])
        if self.count:
            self.looks.append([step, self.total / self.count, exact, noise_of(exact, questions)])
            self.total, self.count = 0.0, 0
        return parting([Look(int(at), *figures) for at, *figures in self.looks], self.most - self.least)
