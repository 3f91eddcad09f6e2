"""What rewards said of many completions: counts, times, where they disagree, and whether a run would stop. For
preflight and for `verify`."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from lowrank_tune.rewards.failures import failed
from lowrank_tune.rewards.pool import Scorer
from lowrank_tune.rewards.protocol import Item, Score
from lowrank_tune.rewards.uses import Weighted

AT_ONCE = 16  # completions between two reports of progress
RIGHT = 0.5
FEW = 3
"""As in a run: one or two failures say nothing of a verifier."""


@dataclass(frozen=True)
class Verdicts:
    """How one reward judged. `mean` and `spread` are of its values; seconds are of one completion."""

    name: str
    judges: bool
    counts: dict[str, int]
    mean: float
    spread: float
    median_seconds: float
    p95_seconds: float
    longest_seconds: float


@dataclass(frozen=True)
class Clash:
    """Two rewards that judge, and the completions (their numbers) that the first alone calls right, and the second
    alone."""

    one: str
    other: str
    both_told: int
    only_one: list[int] = field(default_factory=list)
    only_other: list[int] = field(default_factory=list)


def scored(
    scorer: Scorer[int], items: Sequence[Item], tell: Callable[[int], None] = lambda done: None
) -> Iterator[list[Score]]:
    """The scores of each completion, in order, a few at once; `tell` hears how many are done."""
    for start in range(0, len(items), AT_ONCE):
        for number, item in enumerate(items[start : start + AT_ONCE]):
            scorer.submit(number, item)
        found = scorer.collect()
        yield from found.values()
        tell(start + len(found))


def verdicts(name: str, judges: bool, scores: Sequence[Score]) -> Verdicts:
    """Of one reward's scores."""
    values = [score.value for score in scores if score.value is not None]
    seconds = sorted(score.seconds for score in scores)
    middle, p95, longest = (
        seconds[math.ceil(share * len(seconds)) - 1] if seconds else 0.0 for share in (0.5, 0.95, 1.0)
    )
    return Verdicts(
        name,
        judges,
        dict(Counter(score.verdict for score in scores)),
        statistics.fmean(values) if values else math.nan,
        statistics.pstdev(values) if values else math.nan,
        middle,
        p95,
        longest,
    )


def is_right(score: Score) -> bool | None:
    """Whether a reward calls a completion right: pass, or a graded value of at least a half; None where it could not
    tell."""
    return None if score.value is None else score.value >= RIGHT


def clashes(weighted: Sequence[Weighted], rows: Sequence[Sequence[Score]]) -> list[Clash]:
    """Every pair of rewards that judge."""
    judges = [place for place, each in enumerate(weighted) if each.reward.judges]
    return [_clash(weighted, rows, one, other) for one, other in combinations(judges, 2)]


def _clash(weighted: Sequence[Weighted], rows: Sequence[Sequence[Score]], one: int, other: int) -> Clash:
    said = [(is_right(scores[one]), is_right(scores[other])) for scores in rows]
    return Clash(
        weighted[one].name,
        weighted[other].name,
        sum(None not in pair for pair in said),
        [number for number, pair in enumerate(said) if pair == (True, False)],
        [number for number, pair in enumerate(said) if pair == (False, True)],
    )


def would_stop(
    weighted: Sequence[Weighted], rows: Sequence[Sequence[Score]], most: float, few: int = FEW
) -> str | None:
    """Why a run would not bear these failures, or None: one by a reward that stops the run, or more than the share
    `most`."""
    lost = [found for scores in rows if (found := failed(weighted, scores)) is not None]
    for each, score in lost:
        if each.on_error == "stop":
            return f"`{each.name}` stops a run at its first failure: {score.reason or score.verdict}"
    if len(lost) >= few and len(lost) > most * len(rows):
        each, score = lost[0]
        told = (
            f"{len(lost)} of {len(rows)} completions could not be scored, more than rollout.max_unscored_share, "
            f"{most:.3g}"
        )
        return f"{told}; the first: {score.reason or f'`{each.name}`: {score.verdict}'}"
    return None
