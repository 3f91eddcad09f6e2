"""One check: the code in a solver, the tests in a tester, and this process between them, which alone says how it
ended."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from lowrank_tune.rewards.sandbox.channel import LONGEST, Closed, Late, TooLong
from lowrank_tune.rewards.sandbox.launch import Confined, Foreign, Level, Unconfined
from lowrank_tune.rewards.sandbox.values import Unreadable, decode, encode

# shares of its time that code waited for a processor, and had less of one: then its end says nothing of it
STARVED, LITTLE = 0.2, 0.5


@dataclass(frozen=True)
class Ended:
    """How a check ended. pass, fail: the code is right or wrong. fault: the row's tests are to blame. late: the machine
    is. error: we are. `mistyped`: what failed is equal to what was expected, but for its type."""

    outcome: Literal["pass", "fail", "fault", "late", "error"]
    reason: str = ""
    mistyped: bool = False


class Wrong(Exception):
    """The code has failed; the message says why."""


class Starved(Exception):
    """The time is over, and for much of it other processes had the processors; the message says how much."""


class Pair:
    """A solver and a tester, confined and waiting: made before they are needed, used once."""

    def __init__(self, level: Level) -> None:
        self.used, self.seconds = False, 0.0
        self._solver, self._tester = Confined("solver", level), Confined("tester", level)

    def check(self, prompt: str, code: str, entry: str, tests: str, seconds: float, strict: bool = True) -> Ended:
        """Runs the tests on the code, both together within so many seconds of the wall clock. `prompt` and `entry`: see
        `solver.whole`. `strict`: types count. Ends both processes."""
        self.used, self.seconds = True, seconds
        try:
            self._solver.ready()
            self._tester.ready()
            return self._converse(encode({"prompt": prompt, "code": code, "entry": entry}), encode([tests, strict]))
        except Wrong as wrong:
            return Ended("fail", str(wrong))
        except Starved as starved:
            return Ended("late", str(starved))
        except Unconfined as fault:
            return Ended("error", f"the sandbox did not start: {fault}")
        finally:
            self.end()

    def end(self) -> None:
        """Ends both processes. Once they have ended it does nothing."""
        self._solver.end()
        self._tester.end()

    def _converse(self, code: bytes, tests: bytes) -> Ended:
        """Hands requests of the tester to the solver and its answers back, until the tester tells the end."""
        deadline = time.monotonic() + self.seconds
        try:
            loaded = decode(self._answer(code, deadline))
        except Unreadable:
            raise Wrong("wrote to the stream of its results") from None
        if loaded[0] != "loaded":
            raise Wrong(f"raised {loaded[1][0]}: {loaded[2]}")
        message, calls = self._told(tests, deadline, 0), 0
        while message[:1] != b"V":
            calls += 1
            message = self._told(self._answer(message[1:], deadline), deadline, calls)
        return Ended(*decode(message[1:]))

    def _answer(self, request: bytes, deadline: float) -> bytes:
        """What the solver says. Whatever else it does is the code's doing. Raises Wrong."""
        try:
            self._solver.send(request, deadline)
            return self._solver.receive(deadline)
        except Late:
            raise self._overdue(self._solver) from None
        except Closed:
            raise Wrong(f"the code {self._solver.end()}") from None
        except TooLong:
            raise Wrong(f"returned more than {LONGEST >> 20} MiB") from None
        except Foreign:
            raise Wrong("wrote to the stream of its results") from None

    def _told(self, answer: bytes, deadline: float, calls: int) -> bytes:
        """What the tester says next. It is ours, but what it compares came from the code: late or out of memory, it is
        the code's fault too."""
        try:
            self._tester.send(answer, deadline)
            return self._tester.receive(deadline)
        except Late:
            if calls:
                raise self._overdue(self._tester) from None
            raise Unconfined("the tests did not begin in time") from None
        except (Closed, TooLong, Foreign):
            raise Unconfined(f"the process of the tests {self._tester.end()}") from None

    def _overdue(self, one: Confined) -> Exception:
        """Whose doing it is that the time is over."""
        ran, waited = one.times()
        if waited > STARVED * self.seconds and ran < LITTLE * self.seconds:
            return Starved(
                f"the machine is too busy: in {self.seconds:g} s the code ran for {ran:.1f} s and waited "
                f"{waited:.1f} s for a processor"
            )
        return Wrong(f"did not end within {self.seconds:g} s")
