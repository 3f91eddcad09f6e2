"""What a reward is: items in, scores out. A score is a value with its verdict, or it says why there is none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

MAX_DISPLAY_CHARS = 80  # characters of a text that a sentence quotes


@dataclass(frozen=True)
class RewardInput:
    """One completion to score. `row` is the whole row of the data, `stopped`: it ended by itself, `tokens`: its length.
    `ids`: prompt and completion as the base reads them, where they are known: a learned reward reads them too."""

    prompt: str
    completion: str
    ground_truth: str | None
    row: Mapping[str, Any]
    stopped: bool
    tokens: int
    ids: Sequence[int] = ()

    def __str__(self) -> str:
        return (
            f"the completion {truncate_for_display(self.completion)} of the prompt {truncate_for_display(self.prompt)}"
        )


@dataclass(frozen=True)
class Score:
    """What one reward gives one completion.

    pass, fail: right or wrong; graded: a figure in between. error, timeout: the reward itself failed. That a
    completion alone exceeds the limits of a verifier is a fail. `value` None never becomes a number: by the reward's
    `on_error` the completion leaves its group, or the run stops, with `reason`.
    """

    value: float | None
    verdict: Literal["pass", "fail", "graded", "error", "timeout"]
    reason: str = ""
    seconds: float = 0.0


class Reward(Protocol):
    """One Score for each item, in their order. `is_verifier`: it tells right from wrong; the others shape how a
    completion looks."""

    @property
    def name(self) -> str: ...
    @property
    def is_verifier(self) -> bool: ...
    def score(self, items: Sequence[RewardInput]) -> list[Score]: ...


@runtime_checkable
class ValidatesRows(Protocol):
    """A reward that can say of a row, before anything is drawn, that nothing could be judged by it: a gold answer that
    cannot be read."""

    def row_rejection_reason(self, item: RewardInput) -> str | None:
        """Why, in a few words that are the same for all such rows; None where it is of use. Cheap, and never raises:
        every row is asked. The completion of `item` is empty."""


@runtime_checkable
class HasStatus(Protocol):
    """A reward that has something to tell at the start of a run."""

    def status(self) -> str: ...


class BatchedReward(ABC):
    """A reward that scores all completions of a rollout batch together, in this process, once the last has come: a
    learned one."""

    @abstractmethod
    def score(self, items: Sequence[RewardInput]) -> list[Score]: ...


Reply = Mapping[str, Any]
"""What a worker says about one completion: `value` or `fault`, and `seconds`."""


@dataclass(frozen=True)
class WorkerReward(ABC):
    """A reward that may hang, and is therefore computed in a worker process with a limit on time. `WorkerPool` calls
    these methods."""

    name: str
    is_verifier: ClassVar[bool]
    max_seconds: ClassVar[float] = float("inf")
    """Seconds after which this reward gives up on a completion, where that is less than the pool's own limit."""
    worker_time_factor: ClassVar[float] = 1.0
    """Times the limit after which the worker is killed; more where the worker itself ends what it runs for a
    completion."""

    @abstractmethod
    def worker_spec(self) -> Mapping[str, Any]:
        """What a worker loads once, at its start, as plain data."""

    def score_without_worker(self, item: RewardInput) -> Score | None:
        """The score where no worker is needed for it."""
        return None

    def build_request(self, item: RewardInput) -> Mapping[str, Any]:
        """What the worker is told of a completion, as plain data."""
        return {"prompt": item.prompt, "completion": item.completion, "row": dict(item.row)}

    def reference_request(self, item: RewardInput) -> Mapping[str, Any] | None:
        """The request that grades the row's own answer, the same for all completions of a row. Where it keeps the
        limits that a completion exceeds, the completion is at fault, and else the row or the verifier.

        The ground truth in a box, unless a reward reads something else; None where no request shows it. Only for
        verifiers of the kit.
        """
        if item.ground_truth is None:
            return None
        return self.build_request(replace(item, completion=f"\\boxed{{{item.ground_truth}}}"))

    @abstractmethod
    def parse_reply(self, item: RewardInput, reply: Reply) -> Score:
        """The score from a worker's reply."""

    def on_exceeded_limit(self, limit: str) -> Score:
        """The score of a completion that takes more than a limit to grade, while the row's own answer does not."""
        return Score(0.0, "fail", f"grading it takes more than {limit}")

    @abstractmethod
    def on_timeout(self, item: RewardInput, seconds: float) -> Score:
        """The score of a completion that was not graded within so many seconds, where it need not be at fault."""

    @abstractmethod
    def on_worker_crash(self, item: RewardInput, reason: str) -> Score:
        """The score of a completion on which the worker died by itself."""


def truncate_for_display(text: str, max_chars: int = MAX_DISPLAY_CHARS) -> str:
    """The beginning of a text in quotes, with nothing in it that could move a cursor."""
    return repr(text[:max_chars]) + ("..." if len(text) > max_chars else "")
