"""One check: the code in a solver, the tests in a tester, and this process between them, which alone says how it
ended."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from lowrank_tune.rewards.sandbox.ipc import MAX_MESSAGE_BYTES, ChannelClosed, ChannelTimeout, MessageTooLong
from lowrank_tune.rewards.sandbox.launch import Confined, Level, UnauthenticatedMessage, Unconfined
from lowrank_tune.rewards.sandbox.values import DeserializationError, decode, encode

# shares of its time that code waited for a processor, and had less of one: then its end says nothing of it
MAX_WAIT_SHARE, MIN_CPU_SHARE = 0.2, 0.5


@dataclass(frozen=True)
class CheckResult:
    """How a check ended. pass, fail: the code is right or wrong. fault: the row's tests are to blame. late: the machine
    is. error: we are. `mistyped`: what failed is equal to what was expected, but for its type."""

    outcome: Literal["pass", "fail", "fault", "late", "error"]
    reason: str = ""
    mistyped: bool = False


class TestFailed(Exception):
    """The code has failed; the message says why."""


class CpuStarved(Exception):
    """The time is over, and for much of it other processes had the processors; the message says how much."""


class SandboxPair:
    """A solver and a tester, confined and waiting: made before they are needed, used once."""

    def __init__(self, level: Level) -> None:
        self.used, self.seconds = False, 0.0
        self._solver, self._tester = Confined("solver", level), Confined("tester", level)

    def check(self, prompt: str, code: str, entry: str, tests: str, seconds: float, strict: bool = True) -> CheckResult:
        """Runs the tests on the code, both together within so many seconds of the wall clock. `prompt` and `entry`: see
        `solver.complete_program`. `strict`: types count. Ends both processes."""
        self.used, self.seconds = True, seconds
        try:
            self._solver.ready()
            self._tester.ready()
            return self._relay(encode({"prompt": prompt, "code": code, "entry": entry}), encode([tests, strict]))
        except TestFailed as wrong:
            return CheckResult("fail", str(wrong))
        except CpuStarved as starved:
            return CheckResult("late", str(starved))
        except Unconfined as fault:
            return CheckResult("error", f"the sandbox did not start: {fault}")
        finally:
            self.end()

    def end(self) -> None:
        """Ends both processes. Once they have ended it does nothing."""
        self._solver.end()
        self._tester.end()

    def _relay(self, code: bytes, tests: bytes) -> CheckResult:
        """Hands requests of the tester to the solver and its answers back, until the tester tells the end."""
        deadline = time.monotonic() + self.seconds
        try:
            reply = decode(self._solver_reply(code, deadline))
        except DeserializationError:
            raise TestFailed("wrote to the stream of its results") from None
        if reply[0] != "loaded":
            raise TestFailed(f"raised {reply[1][0]}: {reply[2]}")
        message, calls = self._tester_reply(tests, deadline, 0), 0
        while message[:1] != b"V":
            calls += 1
            message = self._tester_reply(self._solver_reply(message[1:], deadline), deadline, calls)
        return CheckResult(*decode(message[1:]))

    def _solver_reply(self, request: bytes, deadline: float) -> bytes:
        """What the solver says. Whatever else it does is the code's doing. Raises TestFailed."""
        try:
            self._solver.send(request, deadline)
            return self._solver.receive(deadline)
        except ChannelTimeout:
            raise self._timeout_error(self._solver) from None
        except ChannelClosed:
            raise TestFailed(f"the code {self._solver.end()}") from None
        except MessageTooLong:
            raise TestFailed(f"returned more than {MAX_MESSAGE_BYTES >> 20} MiB") from None
        except UnauthenticatedMessage:
            raise TestFailed("wrote to the stream of its results") from None

    def _tester_reply(self, solver_reply: bytes, deadline: float, calls: int) -> bytes:
        """What the tester says next. It is ours, but what it compares came from the code: late or out of memory, it is
        the code's fault too."""
        try:
            self._tester.send(solver_reply, deadline)
            return self._tester.receive(deadline)
        except ChannelTimeout:
            if calls:
                raise self._timeout_error(self._tester) from None
            raise Unconfined("the tests did not begin in time") from None
        except (ChannelClosed, MessageTooLong, UnauthenticatedMessage):
            raise Unconfined(f"the process of the tests {self._tester.end()}") from None

    def _timeout_error(self, process: Confined) -> Exception:
        """Whose doing it is that the time is over."""
        ran, waited = process.times()
        if waited > MAX_WAIT_SHARE * self.seconds and ran < MIN_CPU_SHARE * self.seconds:
            return CpuStarved(
                f"the machine is too busy: in {self.seconds:g} s the code ran for {ran:.1f} s and waited "
                f"{waited:.1f} s for a processor"
            )
        return TestFailed(f"did not end within {self.seconds:g} s")
