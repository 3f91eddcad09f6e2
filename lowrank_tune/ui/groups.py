"""Groups: the completions of one prompt side by side, with what each earned. Read leniently, for anyone may have edited
the file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowrank_tune.events import Grouped


@dataclass(frozen=True)
class Written:
    """A completion, and how often it was written word for word with the same outcome."""

    text: str
    reward: float
    advantage: float
    finish: str
    parts: tuple[tuple[str, float], ...]
    times: int = 1
    unscored: str = ""
    """Which reward failed on it, and why: it is no part of its group."""


@dataclass(frozen=True)
class Group:
    """The completions of a prompt, the best paid first."""

    step: int
    prompt: str
    gold: str | None
    completions: tuple[Written, ...]

    @property
    def count(self) -> int:
        return sum(one.times for one in self.completions)

    @property
    def is_dead(self) -> bool:
        """All earned the same, so that there is nothing to learn."""
        return all(one.advantage == 0 for one in self.completions if not one.unscored)


def read_group(event: Grouped) -> Group:
    """What an event tells, equal completions once."""
    counted: dict[Written, int] = {}
    for each in event.completions if isinstance(event.completions, list) else ():
        if isinstance(each, Mapping):
            one = _written(each)
            counted[one] = counted.get(one, 0) + 1
    several = [
        Written(one.text, one.reward, one.advantage, one.finish, one.parts, times, one.unscored)
        for one, times in counted.items()
    ]
    several.sort(key=lambda one: (-one.reward if math.isfinite(one.reward) else math.inf, -one.times))
    return Group(event.step, str(event.prompt), None if event.gold is None else str(event.gold), tuple(several))


def _written(each: Mapping[str, Any]) -> Written:
    parts = each.get("parts")
    told = tuple((str(name), _number(value)) for name, value in parts.items()) if isinstance(parts, Mapping) else ()
    return Written(
        str(each.get("text", "")),
        _number(each.get("reward")),
        _number(each.get("advantage")),
        str(each.get("finish", "")),
        told,
        unscored=str(each.get("unscored", "")),
    )


def _number(value: Any) -> float:
    """Not a number is one and the same here, so that equal completions stay equal."""
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e300 else math.nan
