"""The interfaces of rewards: `RewardInput` in, `Score` out.

A reward is one of three kinds:

- `InProcessReward` cannot hang and is computed in the main process (`answer`, `format`, `length`, ...).
- `BatchedReward` scores all completions of a rollout batch together in the main process (`reward_model`).
- `WorkerReward` may hang and is computed in a worker process with limits on time and memory (`math_answer`, `lean`,
  ...). The module of the reward runs in the main process, and its `worker_module` in the worker process.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from lowrank_tune.errors import UserError

MAX_DISPLAY_CHARS = 80  # characters of a text that a message quotes
MAX_REASON_CHARS = 400  # characters of a reason that a worker returned
PACKAGE_NAMES = {"z3": "z3-solver"}  # of modules whose package has another name

Verdict = Literal["pass", "fail", "graded", "error", "timeout"]


class ScoredPrompt(Protocol):
    """A prompt whose completions are scored, as text, with its gold answer and its row."""

    @property
    def text(self) -> str: ...
    @property
    def ground_truth(self) -> str | None: ...
    @property
    def row(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class RewardInput:
    """One completion to score.

    `row`: the whole row of the data. `stopped`: whether the completion ended by itself. `tokens`: its length.
    `ids`: the token ids of prompt and completion, if known; only a reward model reads them.
    """

    prompt: str
    completion: str
    ground_truth: str | None
    row: Mapping[str, Any]
    stopped: bool
    tokens: int
    ids: Sequence[int] = ()

    @classmethod
    def of(
        cls,
        prompt: ScoredPrompt,
        completion: str,
        stopped: bool,
        tokens: int,
        ids: Sequence[int] = (),
    ) -> RewardInput:
        """Returns a completion of a prompt."""
        return cls(
            prompt.text,
            completion,
            prompt.ground_truth,
            prompt.row,
            stopped,
            tokens,
            ids,
        )

    def __str__(self) -> str:
        completion = truncate_for_display(self.completion)
        return f"the completion {completion} of the prompt {truncate_for_display(self.prompt)}"


@dataclass(frozen=True)
class Score:
    """The result of one reward for one completion.

    Verdicts: pass (1) or fail (0) of a verifier; graded: another number; error or timeout: the reward itself failed.
    A completion that alone exceeds the limits of a verifier is a fail.

    After an error or a timeout `value` is None, which is never counted as 0: depending on the reward's `on_error` the
    completion leaves its group, or the run stops with `reason`. `seconds`: the time that the score took.
    """

    value: float | None
    verdict: Verdict
    reason: str = ""
    seconds: float = 0.0


DID_NOT_STOP = Score(0.0, "fail", "did not stop")
"""The score by a verifier of a completion that was cut off: it has no final answer."""


def pass_or_fail(correct: bool, reason: str = "") -> Score:
    """Returns 1 (pass), or 0 (fail) with the reason."""
    if correct:
        return Score(1.0, "pass")
    return Score(0.0, "fail", reason)


@dataclass(frozen=True)
class InProcessReward(ABC):
    """A reward that is computed in the main process. `is_verifier`: whether it decides if an answer is correct; other
    rewards rate how a completion is written."""

    name: str
    is_verifier: ClassVar[bool] = False

    def score(self, items: Sequence[RewardInput]) -> list[Score]:
        """Returns one score for each item, in the order of the items."""
        return [self.score_one(item) for item in items]

    @abstractmethod
    def score_one(self, item: RewardInput) -> Score:
        """Returns the score of one completion."""


class BatchedReward(ABC):
    """A reward that scores all completions of a rollout batch together, after the last one has arrived."""

    name: str
    is_verifier: ClassVar[bool]

    @abstractmethod
    def score(self, items: Sequence[RewardInput]) -> list[Score]:
        """Returns one score for each item, in the order of the items."""


Reply = Mapping[str, Any]
"""The reply of a worker for one completion: `value`, the result of the grader; `seconds`; and for a verifier `steep`,
whether the call came close to its memory limit."""


@dataclass(frozen=True)
class WorkerReward(ABC):
    """A reward that may hang and is therefore computed in a worker process with a time limit.

    For each completion `WorkerPool` calls `score_without_worker` and, if that returns None, sends `build_request` to
    the worker and passes the reply to `parse_reply`. If there is no reply, the score is `worker_failure`.
    """

    name: str
    is_verifier: ClassVar[bool]
    worker_module: ClassVar[str] = ""
    """The module that the worker loads: its `load(worker_spec)` returns the grader, a function of one request."""
    max_seconds: ClassVar[float] = float("inf")
    """Time limit of one completion, if it is below the limit of the pool."""
    worker_time_factor: ClassVar[float] = 1.0
    """The worker is killed after this many times the limit; above 1 if the worker itself limits what it runs."""

    def worker_spec(self) -> Mapping[str, Any]:
        """Returns what a worker loads once at its start, as plain data."""
        return {
            "kind": "verifier",
            "module": self.worker_module,
            "use": self.name,
        }

    def score_without_worker(self, item: RewardInput) -> Score | None:
        """Returns the score if the main process can decide it, else None."""
        return None

    def build_request(self, item: RewardInput) -> Mapping[str, Any]:
        """Returns the input of the grader for one completion, as plain data."""
        return {
            "prompt": item.prompt,
            "completion": item.completion,
            "row": dict(item.row),
        }

    def reference_request(self, item: RewardInput) -> Mapping[str, Any] | None:
        """Returns the request that grades the row's own answer, the same for all completions of a row; None if there
        is none. Only for built-in verifiers.

        If a completion exceeds a limit and this request does not, the completion is the cause and gets 0; else there
        is no score. The default is the gold answer in a box.
        """
        if item.ground_truth is None:
            return None
        return self.build_request(replace(item, completion=f"\\boxed{{{item.ground_truth}}}"))

    @abstractmethod
    def parse_reply(self, item: RewardInput, reply: Reply) -> Score:
        """Returns the score for a reply of the worker."""

    def worker_failure(
        self,
        item: RewardInput,
        verdict: Literal["error", "timeout"],
        reason: str,
    ) -> Score:
        """Returns the score of a completion for which the worker has no result. `reason`: a predicate, as "was killed
        by SIGSEGV"."""
        return self.no_score(item, f"the verifier {reason}", verdict)

    def no_score(
        self,
        item: RewardInput,
        reason: str,
        verdict: Literal["error", "timeout"] = "error",
    ) -> Score:
        """Returns a score without a value, with the reason and the completion."""
        return Score(
            None,
            verdict,
            f"`{self.name}`: {to_printable(reason, MAX_REASON_CHARS)}, on {item}",
        )


@dataclass(frozen=True)
class WorkerVerifier(WorkerReward):
    """A verifier that grades a completion only if the row can be used and the completion stopped by itself."""

    is_verifier: ClassVar[bool] = True

    @abstractmethod
    def row_rejection_reason(self, item: RewardInput) -> str | None:
        """As in `ValidatesRows`."""

    def score_without_worker(self, item: RewardInput) -> Score | None:
        if reason := self.row_rejection_reason(item):
            return self.unusable_row(item, reason)
        if not item.stopped:
            return DID_NOT_STOP
        return self.score_completion(item)

    def unusable_row(self, item: RewardInput, reason: str) -> Score:
        """Returns the score of every completion of a row that cannot be used."""
        return self.no_score(item, reason)

    def score_completion(self, item: RewardInput) -> Score | None:
        """Returns the score of a completion that stopped, if the main process can decide it, else None."""
        return None


Reward = InProcessReward | BatchedReward | WorkerReward


@runtime_checkable
class ValidatesRows(Protocol):
    """A reward that can check a row of the data before anything is generated, as whether its gold answer can be
    read."""

    def row_rejection_reason(self, item: RewardInput) -> str | None:
        """Returns why the reward cannot use the row, in a few words that are equal for all such rows; None if it can.
        Is fast and never raises, because every row is checked. The completion of `item` is empty."""


@runtime_checkable
class HasStatus(Protocol):
    """A reward with a status line for the start of a run."""

    def status(self) -> str: ...


def truncate_for_display(text: str, max_chars: int = MAX_DISPLAY_CHARS) -> str:
    """Returns the beginning of a text in quotes, without control characters."""
    shown = repr(text[:max_chars])
    return f"{shown}..." if len(text) > max_chars else shown


def to_printable(text: str, max_chars: int | None = None) -> str:
    """Returns a text, or its beginning, with escapes for its control characters."""
    characters = [character if character.isprintable() else ascii(character)[1:-1] for character in text[:max_chars]]
    return "".join(characters)


def require_packages(name: str, *modules: str) -> None:
    """Raises UserError if a module of the extra `verifiers` is not installed."""
    missing = [PACKAGE_NAMES.get(module, module) for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        packages = " and ".join(missing)
        raise UserError(f"`{name}` needs {packages}; install it with `pip install 'lowrank-tune[verifiers]'`")
