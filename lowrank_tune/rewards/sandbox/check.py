"""One check: the code in a solver process, the tests in a tester process, and this process between them, which alone
decides the result. Runs in the worker process."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Literal

from lowrank_tune.processes.charged_time import (
    MAX_WALL_FACTOR,
    ChargedTime,
    Starved,
    TimeLimitReached,
    computing_share,
)
from lowrank_tune.processes.process_tree import read_tree
from lowrank_tune.rewards.sandbox.ipc import MAX_MESSAGE_BYTES, ChannelClosed, ChannelTimeout, MessageTooLong
from lowrank_tune.rewards.sandbox.launch import Confined, Level, UnauthenticatedMessage, Unconfined
from lowrank_tune.rewards.sandbox.values import DeserializationError, decode, encode

MIN_CODE_SHARE = (
    0.5  # share of the time of a check; if the code alone used it, the code is the cause of tests that did not begin
)
PROBE_SECONDS = 0.5


@dataclass(frozen=True)
class CheckResult:
    """The result of a check.

    pass, fail: the code is right or wrong. There is no result because of the row's tests (fault), a busy machine (late)
    or the sandbox (error). `mistyped`: the wrong value differs from the expected one only in its type. `slow`: the code
    did not end in time.
    """

    outcome: Literal["pass", "fail", "fault", "late", "error"]
    reason: str = ""
    mistyped: bool = False
    slow: bool = False


class TestFailed(Exception):
    """The code has failed; the message is the reason."""


class TooSlow(Exception):
    """The code has used up its time."""


class SandboxPair:
    """A solver and a tester, confined and waiting. Created before they are needed, and used once."""

    def __init__(self, level: Level) -> None:
        self.used = False
        self.seconds = 0.0
        self._loading_seconds = 0.0
        self._solver = Confined("solver", level)
        self._tester = Confined("tester", level)

    def check(
        self,
        prompt: str,
        code: str,
        entry: str,
        tests: str,
        seconds: float,
        strict: bool = True,
    ) -> CheckResult:
        """Runs the tests on the code, both together within `seconds` of `ChargedTime`, and ends both processes.

        `prompt` and `entry`: see `solver.complete_program`. `strict`: whether the types of values count.
        """
        self.used = True
        self.seconds = seconds
        try:
            self._solver.ready()
            self._tester.ready()
            self._time = ChargedTime([self._solver.pid, self._tester.pid], seconds)
            program = encode(
                {
                    "prompt": prompt,
                    "code": code,
                    "entry": entry,
                }
            )
            return self._relay(program, encode([tests, strict]))
        except TestFailed as wrong:
            return CheckResult("fail", str(wrong))
        except TooSlow:
            return self._slow_result()
        except Starved as starved:
            return self._starved_result(str(starved))
        except Unconfined as fault:
            return CheckResult("error", f"the sandbox did not start: {fault}")
        finally:
            self.end()

    def end(self) -> None:
        """Ends both processes, if they have not ended."""
        self._solver.end()
        self._tester.end()

    def _slow_result(self) -> CheckResult:
        return CheckResult(
            "fail",
            f"did not end within {self.seconds:g} s",
            slow=True,
        )

    def _starved_result(self, starved: str) -> CheckResult:
        """Returns the result for code that could run nearly all the time but did not use its time. If a program that
        only computes gets enough of a processor now, the machine is not too busy: code that sleeps and wakes up again
        and again is the cause itself."""
        self.end()
        if computing_share(PROBE_SECONDS) * MAX_WALL_FACTOR >= 1.0:
            return self._slow_result()
        return CheckResult("late", f"the machine is too busy to run the code: {starved}")

    def _relay(self, code: bytes, tests: bytes) -> CheckResult:
        """Passes requests of the tester to the solver and the replies back, until the tester sends the result."""
        try:
            reply = decode(self._solver_reply(code))
        except DeserializationError:
            raise TestFailed("wrote to the stream of its results") from None
        if reply[0] != "loaded":
            raise TestFailed(f"raised {reply[1][0]}: {reply[2]}")
        self._loading_seconds = self._time.charged
        message = self._tester_reply(tests, 0)
        calls = 0
        # a message is a call (C) of the solution, or the verdict (V)
        while message[:1] != b"V":
            calls += 1
            message = self._tester_reply(self._solver_reply(message[1:]), calls)
        return CheckResult(*decode(message[1:]))

    def _solver_reply(self, request: bytes) -> bytes:
        """Returns the solver's reply. Raises TooSlow, or TestFailed for anything else than a reply."""
        try:
            return self._exchange(self._solver, request)
        except TimeLimitReached:
            raise TooSlow from None
        except ChannelClosed:
            raise TestFailed(f"the code {self._solver.end()}") from None
        except MessageTooLong:
            raise TestFailed(f"returned more than {MAX_MESSAGE_BYTES >> 20} MiB") from None
        except UnauthenticatedMessage:
            raise TestFailed("wrote to the stream of its results") from None

    def _tester_reply(self, solver_reply: bytes, calls: int) -> bytes:
        """Returns the tester's next message. Raises TooSlow if the time is over because of the code, and Unconfined if
        the tests do not begin or their process ends."""
        try:
            return self._exchange(self._tester, solver_reply)
        except TimeLimitReached:
            if calls or self._code_seconds() >= MIN_CODE_SHARE * self.seconds:
                raise TooSlow from None
            raise Unconfined("the tests did not begin in time") from None
        except (ChannelClosed, MessageTooLong, UnauthenticatedMessage):
            raise Unconfined(f"the process of the tests {self._tester.end()}") from None

    def _exchange(self, process: Confined, message: bytes) -> bytes:
        """Returns the reply to a message. Raises TimeLimitReached, Starved, and what `receive` raises except
        ChannelTimeout."""
        with contextlib.suppress(ChannelTimeout):
            process.send(message, self._time.next_sample)
        while True:
            try:
                process.flush(self._time.next_sample)
                reply = process.receive(self._time.next_sample)
            except ChannelTimeout:
                self._time.check()
            else:
                self._time.check(replied=True)
                return reply

    def _code_seconds(self) -> float:
        """Returns the seconds that the code alone has used: until it was loaded, or on a processor in its threads."""
        tree = read_tree([self._solver.pid])
        return max(self._loading_seconds, tree.cpu_seconds if tree else 0.0)
