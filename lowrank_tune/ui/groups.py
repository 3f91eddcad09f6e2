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
        return sum(completion.times for completion in self.completions)

    @property
    def is_zero_std(self) -> bool:
        """All earned the same, so that there is nothing to learn."""
        return all(completion.advantage == 0 for completion in self.completions if not completion.unscored)


def read_group(event: GroupLogged) -> Group:
    """What an event tells, equal completions once."""
    counted: dict[LoggedCompletion, int] = {}
    for raw_completion in event.completions if isinstance(event.completions, list) else ():
        if isinstance(raw_completion, Mapping):
            completion = _parse_completion(raw_completion)
            counted[completion] = counted.get(completion, 0) + 1
    completions = [
        LoggedCompletion(
            completion.text,
            completion.reward,
            completion.advantage,
            completion.finish_reason,
            completion.parts,
            times,
            completion.unscored,
        )
        for completion, times in counted.items()
    ]
    completions.sort(
        key=lambda completion: (-completion.reward if math.isfinite(completion.reward) else math.inf, -completion.times)
    )
    return Group(
        event.step,
        str(event.prompt),
        None if event.ground_truth is None else str(event.ground_truth),
        tuple(completions),
    )


def _parse_completion(raw_completion: Mapping[str, Any]) -> LoggedCompletion:
    parts = raw_completion.get("parts")
    if isinstance(parts, Mapping):
        values = tuple((str(name), _parse_float(value)) for name, value in parts.items())
    else:
        values = ()
    return LoggedCompletion(
        str(raw_completion.get("text", "")),
        _parse_float(raw_completion.get("reward")),
        _parse_float(raw_completion.get("advantage")),
        str(raw_completion.get("finish_reason", "")),
        values,
        unscored=str(raw_completion.get("unscored", "")),
    )


def _parse_float(value: Any) -> float:
    """Not a number is one and the same here, so that equal completions stay equal."""
    if isinstance(value, (int, float)) and abs(value) < 1e300:
        return float(value)
    return math.nan
