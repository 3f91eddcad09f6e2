"""`python_tests`: the code of a completion passes the unit tests of its row (HumanEval- or MBPP-shaped), in a sandbox.

The code runs in one confined process and the tests in another, with the worker between them: what the tests expect is
never where the code is, values arrive as exact plain types, and the tester alone compares, types too, unless the row's
own reference fails by a type (MBPP has one that returns 0 for False). Tests that pass earn 1; a wrong value, a missing
one, an exception, a crash, or no end in time scores 0. The time is that of the code alone (`charged_time.py`): while
other programs have the processors its clock stands still. A row whose tests are at fault, a sandbox that does not
start, or a machine too busy to have let the code run is an error or a timeout, and never a 0.

The code is the last fence of the completion that is marked as Python, else its last fence, else all of it. Where the
row's prompt begins a function, the code may be its body. A completion that did not stop by itself has not answered.
Only the standard library can be imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from lowrank_tune.config import UNSAFE_CODE
from lowrank_tune.errors import UserError
from lowrank_tune.rewards.base import Reply, RewardInput, Score, WorkerReward
from lowrank_tune.rewards.code.python_tests_worker import InvalidTests, reference_solution, row_tests
from lowrank_tune.rewards.sandbox.isolation import best_available, unavailable_reason
from lowrank_tune.rewards.sandbox.launch import Level
from lowrank_tune.rewards.workers.pool import score_serially

MAX_REASON_CHARS = 240


@dataclass(frozen=True)
class PythonTestsReward(WorkerReward):
    """pass (1) or fail (0). `accept_unsafe_code`: the recipe says in words that code may run without a sandbox where
    there is none."""

    name: str = "python_tests"
    accept_unsafe_code: bool = False
    is_verifier: ClassVar[bool] = True
    worker_time_factor: ClassVar[float] = 3.0  # the code may run twice, and the reference once

    def score(self, items: Sequence[RewardInput]) -> list[Score]:
        return score_serially(self, items)

    def isolation(self) -> Level:
        """The strongest sandbox that this machine offers, tried once. Raises UserError where there is none and none was
        not accepted."""
        if (available := best_available()) is not None:
            return available.level
        if self.accept_unsafe_code:
            return "none"
        raise UserError(
            f"`{self.name}` runs code that a model wrote, and this machine has no sandbox for it "
            f"({unavailable_reason()}). Linux 5.13 or newer with Landlock, or bubblewrap, or user namespaces give "
            f"one; or say `accept_unsafe_code: {UNSAFE_CODE}`"
        )

    def status(self) -> str:
        """The level in words, for the start-up."""
        available = best_available()
        if available:
            return f"{self.name}: code runs in a sandbox ({available})"
        return f"{self.name}: code that a model wrote runs WITHOUT a sandbox"

    def worker_spec(self) -> Mapping[str, Any]:
        return {
            "kind": "verifier",
            "module": "lowrank_tune.rewards.code.python_tests_worker",
            "use": self.name,
            "level": self.isolation(),
        }

    def row_rejection_reason(self, item: RewardInput) -> str | None:
        """Why the row's tests are none."""
        try:
            row_tests(item.row)
        except InvalidTests as error:
            return str(error)
        return None

    def score_without_worker(self, item: RewardInput) -> Score | None:
        if reason := self.row_rejection_reason(item):
            return Score(None, "error", f"`{self.name}`: {reason}, for {item}")
        if item.stopped:
            return None
        return Score(0.0, "fail", "did not stop")

    def reference_request(self, item: RewardInput) -> Mapping[str, Any] | None:
        """The row's own solution, where it has one."""
        solution = reference_solution(item.row)
        if solution:
            return self.build_request(replace(item, completion=solution))
        return None

    def parse_reply(self, item: RewardInput, reply: Reply) -> Score:
        if "fault" in reply:
            return self.on_worker_crash(item, reply["fault"])
        outcome = reply["value"]["outcome"]
        reason = strip_control_chars(reply["value"]["reason"])
        if outcome in ("pass", "fail"):
            return Score(float(outcome == "pass"), outcome, reason)
        if outcome == "late":
            return Score(None, "timeout", f"`{self.name}`: {reason}, on {item}")
        return self.on_worker_crash(item, reason)

    def on_timeout(self, item: RewardInput, seconds: float) -> Score:
        return Score(None, "timeout", f"`{self.name}`: the check was not over within {seconds:g} s on {item}")

    def on_worker_crash(self, item: RewardInput, reason: str) -> Score:
        return Score(None, "error", f"`{self.name}`: {strip_control_chars(reason)}, on {item}")


def strip_control_chars(text: str) -> str:
    """A text of the code's making, with nothing in it that could move a cursor."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text[:MAX_REASON_CHARS])
