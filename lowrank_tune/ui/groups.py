"""Groups: the completions of one prompt side by side with their rewards. Events are read leniently, because anyone may
have edited the file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lowrank_tune.events import GroupLogged
from lowrank_tune.json_files import as_number, get_mapping


@dataclass(frozen=True)
class LoggedCompletion:
    """A completion; `times` it was sampled word for word with the same outcome."""

    text: str
    reward: float
    advantage: float
    finish_reason: str
    parts: tuple[tuple[str, float], ...]
    times: int = 1
    unscored: str = ""
    """Which reward failed on it, and why; such a completion is not part of its group."""


@dataclass(frozen=True)
class Group:
    """The completions of a prompt, those with the highest reward first."""

    step: int
    prompt: str
    ground_truth: str | None
    completions: tuple[LoggedCompletion, ...]

    @property
    def count(self) -> int:
        return sum(completion.times for completion in self.completions)

    @property
    def is_zero_std(self) -> bool:
        """Whether all rewards are equal, so that there is nothing to learn."""
        return all(completion.advantage == 0 for completion in self.completions if not completion.unscored)


def read_group(event: GroupLogged) -> Group:
    """Returns the group of an event, equal completions once."""
    logged: Any = event.completions
    counts: Counter[LoggedCompletion] = Counter()
    for raw_completion in logged if isinstance(logged, list) else ():
        if isinstance(raw_completion, Mapping):
            counts[_parse_completion(raw_completion)] += 1
    completions = [replace(completion, times=times) for completion, times in counts.items()]
    completions.sort(key=_rank)
    ground_truth = None if event.ground_truth is None else str(event.ground_truth)
    return Group(
        event.step,
        str(event.prompt),
        ground_truth,
        tuple(completions),
    )


def _rank(completion: LoggedCompletion) -> tuple[float, int]:
    """Orders completions: high rewards first, then frequent ones; without a reward last."""
    reward = completion.reward
    return -reward if math.isfinite(reward) else math.inf, -completion.times


def _parse_completion(raw_completion: Mapping[str, Any]) -> LoggedCompletion:
    # nan of `as_number` is always the same object, so that equal completions without a reward are equal
    parts = get_mapping(raw_completion, "parts")
    return LoggedCompletion(
        str(raw_completion.get("text", "")),
        as_number(raw_completion.get("reward")),
        as_number(raw_completion.get("advantage")),
        str(raw_completion.get("finish_reason", "")),
        tuple((str(name), as_number(value)) for name, value in parts.items()),
        unscored=str(raw_completion.get("unscored", "")),
    )
