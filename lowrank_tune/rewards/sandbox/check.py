"""One check: the code in a solver, the tests in a tester, and this process between them, which alone says how it
ended."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Literal

from lowrank_tune.rewards.sandbox.ipc import MAX_MESSAGE_BYTES, ChannelClosed, ChannelTimeout, MessageTooLong
from lowrank_tune.rewards.sandbox.launch import Confined, Level, UnauthenticatedMessage, Unconfined
from lowrank_tune.rewards.sandbox.values import DeserializationError, decode, encode
from lowrank_tune.rewards.workers.charged_time import (
    MAX_WALL_FACTOR,
    ChargedTime,
    Starved,
    TimeLimitReached,
    computing_share,
)
from lowrank_tune.rewards.workers.process_tree import read_tree

MIN_CODE_SHARE = 0.5  # of the time of a check, used by the code alone: then tests that never began are its fault
PROBE_SECONDS = 0.5


@dataclass(frozen=True)
class CheckResult:
    """How a check ended. pass, fail: the code is right or wrong. The cause of no result is in the row's tests (fault),
    a busy machine (late) or the sandbox (error). `mistyped`: what failed is equal to what was expected, but for its
    type. `slow`: what failed did not end in time."""

    outcome: Literal["pass", "fail", "fault", "late", "error"]
    reason: str = ""
    mistyped: bool = False
    slow: bool = False


class TestFailed(Exception):
    """The code has failed; the message says why."""


class TooSlow(Exception):
    """The code has used up its time."""


class SandboxPair:
    """A solver and a tester, confined and waiting: made before they are needed, used once."""

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
        """Runs the tests on the code, both together within so many seconds of `ChargedTime`. `prompt` and `entry`: see
        `solver.complete_program`. `strict`: types count. Ends both processes."""
        self.used = True
        self.seconds = seconds
        try:
            self._solver.ready()
            self._tester.ready()
            self._time = ChargedTime([self._solver.pid, self._tester.pid], seconds)
            return self._relay(encode({"prompt": prompt, "code": code, "entry": entry}), encode([tests, strict]))
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
        """Ends both processes. Once they have ended it does nothing."""
        self._solver.end()
        self._tester.end()

    def _slow_result(self) -> CheckResult:
        return CheckResult("fail", f"did not end within {self.seconds:g} s", slow=True)

    def _starved_result(self, starved: str) -> CheckResult:
        """The result of code that waited for a processor nearly all the time. A program that only computes would have
        used its time meanwhile, unless the machine is too busy: code that sleeps and wakes up all the time may wait
        any number of times."""
        self.end()
        if computing_share(PROBE_SECONDS) * MAX_WALL_FACTOR >= 1.0:
            return self._slow_result()
        return CheckResult("late", f"the machine is too busy to run the code: {starved}")

    def _relay(self, code: bytes, tests: bytes) -> CheckResult:
        """Hands requests of the tester to the solver and its answers back, until the tester tells the end."""
        try:
            reply = decode(self._solver_reply(code))
        except DeserializationError:
            raise TestFailed("wrote to the stream of its results") from None
        if reply[0] != "loaded":
            raise TestFailed(f"raised {reply[1][0]}: {reply[2]}")
        self._loading_seconds = self._time.charged
        message = self._tester_reply(tests, 0)
        calls = 0
        while message[:1] != b"V":
            calls += 1
            message = self._tester_reply(self._solver_reply(message[1:]), calls)
        return CheckResult(*decode(message[1:]))

    def _solver_reply(self, request: bytes) -> bytes:
        """The solver's reply. Raises TestFailed for anything else that the solver does."""
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
        """The tester's next message. Raises TooSlow where it runs out of time on values of the code, and Unconfined
        where the tests do not begin or their process ends."""
        try:
            return self._exchange(self._tester, solver_reply)
        except TimeLimitReached:
            if calls or self._code_seconds() >= MIN_CODE_SHARE * self.seconds:
                raise TooSlow from None
            raise Unconfined("the tests did not begin in time") from None
        except (ChannelClosed, MessageTooLong, UnauthenticatedMessage):
            raise Unconfined(f"the process of the tests {self._tester.end()}") from None

    def _exchange(self, process: Confined, message: bytes) -> bytes:
        """The answer to a message. Raises TimeLimitReached, Starved, and what `receive` raises beside
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
        """Seconds that the code alone has used: until it was loaded, or on a processor, in threads that go on."""
        tree = read_tree([self._solver.pid])
        return max(self._loading_seconds, tree.cpu_seconds if tree else 0.0)
