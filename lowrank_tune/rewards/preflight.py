"""Before any training: can the rewards tell reference answers from garbage?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lowrank_tune.rewards.pool import Scorer
from lowrank_tune.rewards.protocol import Item, Score, Whole
from lowrank_tune.rewards.uses import Weighted
from lowrank_tune.rewards.verdicts import Verdicts, scored, verdicts, would_stop

CHANCE, SURE, SURPRISES = 0.5, 0.9, 4.0
LEAST = 0.1  # how far above chance even a great many rows must be


@dataclass(frozen=True)
class Figures:
    """How one reward, or the weighted sum, scored reference answers and garbage. `ahead`: the share of (reference,
    garbage) pairs in which the reference answer earns more, ties half; chance is 0.5. `missed`: a reference answer that
    earned the least."""

    name: str
    judges: bool
    right: float
    garbage: float
    ahead: float
    constant: bool
    told: Verdicts | None = None

    @property
    def verdicts(self) -> dict[str, int]:
        return self.told.counts if self.told else {}


@dataclass(frozen=True)
class Report:
    """What the preflight found. `broken` are sentences of scores that are none, `missed` of reference answers that a
    judge calls wrong; `stops` says why a run would not bear what is broken."""

    rewards: list[Figures]
    sum: Figures | None
    needed: float
    broken: list[str]
    missed: list[str]
    stops: str | None = None
    learned: bool = False
    """A learned reward is among them: it follows what is liked, which references need not be."""

    def fault(self) -> str | None:
        """Why training must not begin."""
        if self.stops:
            more = f" (and {len(self.broken) - 1} more)" if len(self.broken) > 1 else ""
            return f"rewards: {self.stops}{more}"
        for figures in self.rewards:
            if figures.judges and (fault := self._blind(figures, f"`{figures.name}`")):
                return fault
        return None if self.learned else self._blinded()

    def doubt(self) -> str | None:
        """What a person should look at before going on."""
        told = self._blinded() if self.learned else None
        return f"{told}: a learned reward that does not care is no guide" if told else None

    def _blinded(self) -> str | None:
        return self._blind(self.sum, "the weighted sum of all") if self.sum else None

    def _blind(self, figures: Figures, who: str) -> str | None:
        if figures.ahead >= self.needed:
            return None
        if figures.constant:
            how = f"everything earns {figures.right:.3g}"
        else:
            how = (
                f"reference answers earn {figures.right:.3g} on average and garbage {figures.garbage:.3g}, and a "
                f"reference answer is ahead "
                f"in {100 * figures.ahead:.0f} % of the pairs (chance 50 %, needed {100 * self.needed:.0f} %)"
            )
        miss = f"; {self.missed[0]}" if self.missed else ""
        return f"rewards: {who} cannot tell reference answers from garbage: {how}{miss}"

    def lines(self) -> Iterator[str]:
        """For the start-up."""
        for figures in [*self.rewards, *([self.sum] if self.sum and len(self.rewards) > 1 else [])]:
            verdicts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(figures.verdicts.items()))
            clock = (
                f"; {1e3 * figures.told.median_seconds:.2g} ms, at most {1e3 * figures.told.longest_seconds:.2g}"
                if figures.told
                else ""
            )
            yield (
                f"reward {figures.name}: reference answers {figures.right:.3g}, garbage {figures.garbage:.3g}"
                f"{'' if figures.judges else ' (shapes, does not judge)'}{f'; {verdicts}' if verdicts else ''}{clock}"
            )
        if self.broken:
            yield (
                f"{len(self.broken)} scores failed, and in a run such completions leave their groups; the first: "
                f"{self.broken[0]}"
            )
        if self.missed:
            yield f"{len(self.missed)} reference answers are not right by the rewards; the first: {self.missed[0]}"


def examine(
    weighted: Sequence[Weighted],
    right: Sequence[Item],
    wrong: Sequence[Item],
    scorer: Scorer[int] | None = None,
    most: float = 0.01,
) -> Report:
    """Scores reference answers and garbage with every reward; with the `scorer` of the run where one is warm. `most`:
    the share of completions on which rewards may fail."""
    if not right or not wrong:
        raise ValueError("a preflight of rewards needs reference answers and garbage")
    if scorer is None:
        with Scorer[int]([each.reward for each in weighted]) as own:
            return examine(weighted, right, wrong, own, most)
    rows = list(scored(scorer, [*right, *wrong]))
    rewards = [
        _figures(each.name, each.reward.judges, [scores[place] for scores in rows], len(right))
        for place, each in enumerate(weighted)
    ]
    broken = [score.reason for scores in rows for score in scores if score.value is None]
    sums = [_sum(weighted, scores) for scores in rows]
    both = _figures(
        "sum", True, [Score(value, "graded" if value is not None else "error") for value in sums], len(right)
    )
    missed = [
        f"`{each.name}` says of {item}: {score.reason}"
        for item, scores in zip(right, rows, strict=False)
        for each, score in zip(weighted, scores, strict=True)
        if each.reward.judges and score.verdict == "fail"
    ]
    return Report(
        rewards,
        replace(both, told=None),
        needed(len(right), len(wrong)),
        broken,
        missed,
        would_stop(weighted, rows, most, few=1),
        any(isinstance(each.reward, Whole) for each in weighted),
    )


def _sum(weighted: Sequence[Weighted], scores: Sequence[Score]) -> float | None:
    """None where a reward could not tell."""
    values = [
        each.weight * score.value for each, score in zip(weighted, scores, strict=True) if score.value is not None
    ]
    return sum(values) if len(values) == len(weighted) else None


def _figures(name: str, judges: bool, scores: Sequence[Score], count: int) -> Figures:
    values = [score.value for score in scores]
    right = [value for value in values[:count] if value is not None]
    wrong = [value for value in values[count:] if value is not None]
    spread = max(right + wrong, default=0.0) - min(right + wrong, default=0.0)
    return Figures(
        name,
        judges,
        _mean(right),
        _mean(wrong),
        share_ahead(right, wrong),
        spread <= 1e-6,
        verdicts(name, judges, scores),
    )


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else float("nan")


def share_ahead(right: Sequence[float], wrong: Sequence[float]) -> float:
    """The share of pairs in which the first is larger, ties half (the area under the ROC curve)."""
    pairs = len(right) * len(wrong)
    return sum((a > b) + 0.5 * (a == b) for a in right for b in wrong) / pairs if pairs else CHANCE


def needed(right: int, wrong: int) -> float:
    """The share that a reward must reach: one that draws its figures by lot gets there, with so few rows, hardly ever
    (4 sigma)."""
    sigma = math.sqrt((right + wrong + 1) / (12 * right * wrong))
    return min(SURE, CHANCE + max(LEAST, SURPRISES * sigma))
