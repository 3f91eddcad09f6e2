"""Groups: the completions of one prompt side by side, with what each earned. Read leniently, for anyone may have edited
the file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowrank_tune.events import GroupLogged


@dataclass(frozen=True)
class LoggedCompletion:
    """A completion, and how often it was written word for word with the same outcome."""

    text: str
    reward: float
    advantage: float
    finish_reason: str
    parts: tuple[tuple[str, float], ...]
    times: int = 1
    unscored: str = ""
    """Which reward failed on it, and why: it is no part of its group."""


@dataclass(frozen=True)
class Group:
    """The completions of a prompt, the best paid first."""

    step: int
    prompt: str
    ground_truth: str | None
    completions: tuple[LoggedCompletion, ...]

    @property
    def count(self) -> int:
        return sum(one.times for one in self.completions)

    @property
    def is_zero_std(self) -> bool:
        """All earned the same, so that there is nothing to learn."""
        return all(one.advantage == 0 for one in self.completions if not one.unscored)


def read_group(event: GroupLogged) -> Group:
    """What an event tells, equal completions once."""
    counted: dict[LoggedCompletion, int] = {}
    for each in event.completions if isinstance(event.completions, list) else ():
        if isinstance(each, Mapping):
            one = _parse_completion(each)
            counted[one] = counted.get(one, 0) + 1
    several = [
        LoggedCompletion(one.text, one.reward, one.advantage, one.finish_reason, one.parts, times, one.unscored)
        for one, times in counted.items()
    ]
    several.sort(key=lambda one: (-one.reward if math.isfinite(one.reward) else math.inf, -one.times))
    return Group(
        event.step, str(event.prompt), None if event.ground_truth is None else str(event.ground_truth), tuple(several)
    )


def _parse_completion(each: Mapping[str, Any]) -> LoggedCompletion:
    parts = each.get("parts")
    values = (
        tuple((str(name), _parse_float(value)) for name, value in parts.items()) if isinstance(parts, Mapping) else ()
    )
    return LoggedCompletion(
        str(each.get("text", "")),
        _parse_float(each.get("reward")),
        _parse_float(each.get("advantage")),
        str(each.get("finish_reason", "")),
        values,
        unscored=str(each.get("unscored", "")),
    )


def _parse_float(value: Any) -> float:
    """Not a number is one and the same here, so that equal completions stay equal."""
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e300 else math.nan
