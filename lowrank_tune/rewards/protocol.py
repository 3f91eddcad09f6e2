"""What a reward is: items in, scores out. A score is a value with its verdict, or it says why there is none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

SHOWN = 80  # characters of a text that a sentence quotes


@dataclass(frozen=True)
class Item:
    """One completion to score. `row` is the whole row of the data, `stopped`: it ended by itself, `tokens`: its length.
    `ids`: prompt and completion as the base reads them, where they are known: a learned reward reads them too."""

    prompt: str
    completion: str
    gold: str | None
    row: Mapping[str, Any]
    stopped: bool
    tokens: int
    ids: Sequence[int] = ()

    def __str__(self) -> str:
        return f"the completion {shown(self.completion)} of the prompt {shown(self.prompt)}"


@dataclass(frozen=True)
class Score:
    """What one reward gives one completion.

    pass, fail: right or wrong; graded: a figure in between. error, timeout: the reward itself could not tell. `value`
    None never becomes a number: by the reward's `on_error` the completion leaves its group, or the run stops, with
    `reason`.
    """

    value: float | None
    verdict: Literal["pass", "fail", "graded", "error", "timeout"]
    reason: str = ""
    seconds: float = 0.0


class Reward(Protocol):
    """One Score for each item, in their order. `judges`: it tells right from wrong; the others shape how a completion
    looks."""

    @property
    def name(self) -> str: ...
    @property
    def judges(self) -> bool: ...
    def score(self, items: Sequence[Item]) -> list[Score]: ...


@runtime_checkable
class Choosy(Protocol):
    """A reward that can say of a row, before anything is drawn, that nothing could be judged by it: a gold answer that
    cannot be read."""

    def unusable(self, item: Item) -> str | None:
        """Why, in a few words that are the same for all such rows; None where it is of use. Cheap, and never raises:
        every row is asked. The completion of `item` is empty."""


@runtime_checkable
class Noted(Protocol):
    """A reward that has something to tell at the start of a run."""

    def note(self) -> str: ...


class Whole(ABC):
    """A reward that scores all completions of a harvest together, in this process, once the last has come: a learned
    one."""

    @abstractmethod
    def score(self, items: Sequence[Item]) -> list[Score]: ...


Reply = Mapping[str, Any]
"""What a worker says about one completion: `value` or `fault`, and `seconds`."""


@dataclass(frozen=True)
class Worked(ABC):
    """A reward that may hang, and is therefore computed in a worker process with a wall clock. `Scorer` calls these
    methods."""

    judges: ClassVar[bool]
    limit: ClassVar[float] = float("inf")
    """Seconds after which this reward gives up on a completion, where that is less than the Scorer's own limit."""

    @abstractmethod
    def job(self) -> Mapping[str, Any]:
        """What a worker loads once, at its start, as plain data."""

    def early(self, item: Item) -> Score | None:
        """The score where no worker is needed for it."""
        return None

    def ask(self, item: Item) -> Mapping[str, Any]:
        """What the worker is told of a completion, as plain data."""
        return {"prompt": item.prompt, "completion": item.completion, "row": dict(item.row)}

    @abstractmethod
    def judge(self, item: Item, reply: Reply) -> Score:
        """The score from a worker's reply."""

    @abstractmethod
    def overdue(self, item: Item, seconds: float) -> Score:
        """The score of a completion on which the worker was killed after so many seconds."""

    @abstractmethod
    def lost(self, item: Item, how: str) -> Score:
        """The score of a completion on which the worker died by itself."""


def shown(text: str, most: int = SHOWN) -> str:
    """The beginning of a text in quotes, with nothing in it that could move a cursor."""
    return repr(text[:most]) + ("..." if len(text) > most else "")
