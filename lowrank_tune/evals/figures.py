"""From what was measured to figures with intervals: of each voice, and of each tuned one against the base. Pure: marks
in, figures out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import product
from statistics import fmean
from typing import Any

from lowrank_tune.evals.intervals import LEVEL, Interval, difference_of, mean_of, pass_at_k, ratio_of, share_of
from lowrank_tune.evals.marking import Mark
from lowrank_tune.evals.measure import Measured
from lowrank_tune.evals.subject import BASE

Figures = dict[str, Interval]
OfPrompt = Callable[[Sequence[Mark]], float | None]
"""A prompt's own figure, from the marks of all its answers; None where it has none."""


def passed(k: int) -> OfPrompt:
    """pass@k of one prompt, of the answers that could be judged; None where these are fewer than k."""

    def told(marks: Sequence[Mark]) -> float | None:
        known = [mark.right for mark in marks if mark.right is not None]
        return pass_at_k(len(known), sum(known), k) if len(known) >= k else None

    return told


def averaged(value: Callable[[Mark], float | None]) -> OfPrompt:
    """The mean over a prompt's answers that have such a value."""

    def told(marks: Sequence[Mark]) -> float | None:
        known = [number for mark in marks if (number := value(mark)) is not None]
        return fmean(known) if known else None

    return told


def figures_of(found: Measured, voice: str, ks: Sequence[int], seed: int, level: float = LEVEL) -> Figures:
    """All that can be said of one voice: `loss`, `pass_at_K`, `reward` (and `reward_NAME` of several), `judge_score`,
    `stopped`, `length`."""
    made: Figures = {}
    losses = [found.losses[voice][number] for number in found.done if number in found.losses[voice]]
    if losses:
        made["loss"] = ratio_of([loss.total for loss in losses], [loss.tokens for loss in losses], seed, level)
    marks = found.marks[voice]
    samples = max(map(len, marks.values()), default=0)
    for name, of_prompt in _of_prompts(marks.values(), ks).items():
        values = [value for several in marks.values() if (value := of_prompt(several)) is not None]
        if not values:
            continue
        k = int(name.removeprefix("pass_at_")) if name.startswith("pass_at_") else 1
        share = k > 1 or name in ("pass_at_1", "stopped")
        made[name] = share_of(values, samples // k, level) if share else mean_of(values, seed, level)
    return made


def _of_prompts(marks: Iterable[Sequence[Mark]], ks: Sequence[int]) -> dict[str, OfPrompt]:
    """What there is to say of one prompt, by name."""
    graded = {name: averaged(value) for name, value in _graded(marks).items()}
    return {
        **{f"pass_at_{k}": passed(k) for k in ks},
        **graded,
        "stopped": averaged(lambda mark: float(mark.stopped)),
        "length": averaged(lambda mark: float(mark.tokens)),
    }


def _graded(marks: Iterable[Sequence[Mark]]) -> dict[str, Callable[[Mark], float | None]]:
    """Figures that are no shares: the weighted reward, of several each one, and the judge's score."""
    parts = list(dict.fromkeys(name for several in marks for mark in several for name in mark.parts))
    graded: dict[str, Callable[[Mark], float | None]] = {"reward": lambda mark: mark.reward}
    graded |= {f"reward_{name}": partial(_part, name) for name in parts if len(parts) > 1}
    return graded | {"judge_score": lambda mark: mark.score}


def _part(name: str, mark: Mark) -> float | None:
    return mark.parts.get(name)


def changes_of(found: Measured, voice: str, ks: Sequence[int], seed: int, level: float = LEVEL) -> Figures:
    """A tuned voice less the base, on the prompts where both have the figure; the draws of the bootstrap are of both
    together."""
    made: Figures = {}
    both = [number for number in found.done if number in found.losses[voice] and number in found.losses[BASE]]
    if both:
        sides = [[found.losses[who][number] for number in both] for who in (voice, BASE)]
        mine, theirs = (([loss.total for loss in side], [float(loss.tokens) for loss in side]) for side in sides)
        made["loss"] = difference_of(mine, theirs, seed, level)
    for name, of_prompt in _of_prompts(found.marks[voice].values(), ks).items():
        paired = [
            (mine, theirs)
            for mine, theirs in _paired(found, voice, of_prompt)
            if mine is not None and theirs is not None
        ]
        if paired:
            ones = [1.0] * len(paired)
            made[name] = difference_of(
                ([mine for mine, _ in paired], ones), ([theirs for _, theirs in paired], ones), seed, level
            )
    return made


def _paired(found: Measured, voice: str, of_prompt: OfPrompt) -> list[tuple[float | None, float | None]]:
    return [
        (of_prompt(found.marks[voice][number]), of_prompt(found.marks[BASE][number]))
        for number in found.done
        if number in found.marks[voice] and number in found.marks[BASE]
    ]


def wins_of(
    found: Measured, voice: str, value: Callable[[Mark], float | None], level: float = LEVEL
) -> dict[str, Any] | None:
    """How often the tuned voice's answer is worth more than the base's to the same prompt: over all pairs of a prompt's
    answers, a tie half a win; the interval is clustered by prompt. None where no pair could be compared."""
    rates, wins, ties, pairs = list[float](), 0.0, 0.0, 0
    for number in found.done:
        mine, theirs = (
            [known for mark in found.marks[who].get(number, ()) if (known := value(mark)) is not None]
            for who in (voice, BASE)
        )
        if not mine or not theirs:
            continue
        better = sum(one > other for one, other in product(mine, theirs))
        equal = sum(one == other for one, other in product(mine, theirs))
        count = len(mine) * len(theirs)
        rates.append((better + equal / 2) / count)
        wins, ties, pairs = wins + better / count, ties + equal / count, max(pairs, min(len(mine), len(theirs)))
    if not rates:
        return None
    interval = share_of(rates, pairs, level)
    return {
        **interval.to_dict(),
        "wins": wins / len(rates),
        "ties": ties / len(rates),
        "losses": 1 - (wins + ties) / len(rates),
    }


def lost(found: Measured) -> dict[str, int]:
    """How many answers could not be judged, by the reason that was told first."""
    counts: dict[str, int] = {}
    for several in found.marks.values():
        for marks in several.values():
            for mark in marks:
                if mark.failed:
                    counts[mark.failed] = counts.get(mark.failed, 0) + 1
    return counts
