"""`python_tests`: the code of a completion passes the unit tests of its row (like HumanEval or MBPP), in a sandbox.

Runs in the main process; the other side is `python_tests_worker.py`. One confined process runs the code and another the
tests, with the worker between them: what the tests expect is never in the process of the code, values arrive as exact
plain types, and only the tests compare them. Types count, unless the row's own solution fails by a type (MBPP has one
that returns 0 for False).

If the tests pass the score is 1. A wrong or missing value, an exception, a crash, or code that does not end in time is
0. Only the time of the code is counted (`charged_time.py`), not that of other programs. If the tests of the row are at
fault, the sandbox does not start, or the machine is too busy to run the code, there is no score.

The code is the last fence of the completion that is marked as Python, else its last fence, else the whole completion.
If the prompt of the row begins a function, the code may be its body. A completion that did not stop by itself gets 0.
Only the standard library can be imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from lowrank_tune.config import UNSAFE_CODE
from lowrank_tune.errors import UserError
from lowrank_tune.rewards.base import Reply, RewardInput, Score, WorkerVerifier, to_printable
from lowrank_tune.rewards.code.python_tests_worker import InvalidTests, reference_solution, row_tests
from lowrank_tune.rewards.sandbox.isolation import best_available, unavailable_reason
from lowrank_tune.rewards.sandbox.launch import Level

MAX_REASON_CHARS = 240


@dataclass(frozen=True)
class PythonTestsReward(WorkerVerifier):
    """pass (1) or fail (0). `accept_unsafe_code`: whether the recipe allows code to run without a sandbox on a machine
    that has none."""

    name: str = "python_tests"
    accept_unsafe_code: bool = False
    worker_module: ClassVar[str] = "lowrank_tune.rewards.code.python_tests_worker"
    worker_time_factor: ClassVar[float] = 3.0  # the code may run twice, and the row's own solution once

    def isolation(self) -> Level:
        """Returns the strongest level of the sandbox on this machine. Raises UserError if there is none and the recipe
        does not allow that."""
        available = best_available()
        if available is not None:
            return available.level
        if self.accept_unsafe_code:
            return "none"
        raise UserError(
            f"`{self.name}` runs code that a model wrote, and this machine has no sandbox for it "
            f"({unavailable_reason()}). Linux 5.13 or newer with Landlock, or bubblewrap, or user namespaces give "
            f"one; or set `accept_unsafe_code: {UNSAFE_CODE}`"
        )

    def status(self) -> str:
        """Returns the level of the sandbox, for the start of a run."""
        available = best_available()
        if available:
            return f"{self.name}: code runs in a sandbox ({available})"
        return f"{self.name}: code that a model wrote runs WITHOUT a sandbox"

    def worker_spec(self) -> Mapping[str, Any]:
        return {**super().worker_spec(), "level": self.isolation()}

    def row_rejection_reason(self, item: RewardInput) -> str | None:
        try:
            row_tests(item.row)
        except InvalidTests as error:
            return str(error)
        return None

    def reference_request(self, item: RewardInput) -> Mapping[str, Any] | None:
        """Returns the request for the row's own solution, if it has one."""
        solution = reference_solution(item.row)
        if not solution:
            return None
        return self.build_request(replace(item, completion=solution))

    def parse_reply(self, item: RewardInput, reply: Reply) -> Score:
        outcome = reply["value"]["outcome"]
        reason = to_printable(reply["value"]["reason"], MAX_REASON_CHARS)
        if outcome in ("pass", "fail"):
            return Score(float(outcome == "pass"), outcome, reason)
        return self.no_score(item, reason, "timeout" if outcome == "late" else "error")
