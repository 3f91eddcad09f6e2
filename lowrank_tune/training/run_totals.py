"""Wall time, sessions and speed of a run over all of its sessions: one source for every screen, page and file.

A session is one start of the program. The time between two sessions does not count; the time of steps that a killed
session did not save, and that the next one repeats, does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lowrank_tune.events import (
    Event,
    LogMessage,
    Progress,
    RunEnded,
    RunStarted,
    StepEnd,
)


def tokens_per_second(tokens: int, seconds: float) -> float:
    """Returns the speed; nan for a time of 0, as between two equal times of a clock that stands still."""
    return tokens / seconds if seconds > 0 else math.nan


@dataclass(frozen=True)
class RunTotals:
    """Wall time of all sessions, their number, and tokens and wall time of all steps.

    `shares_first_session`, of a stage of a chain: whether an earlier stage ran in its first session; None if unknown.
    """

    seconds: float = 0.0
    sessions: int = 0
    tokens: int = 0
    step_seconds: float = 0.0
    shares_first_session: bool | None = None

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all steps by the wall time of these steps; nan without steps."""
        return tokens_per_second(self.tokens, self.step_seconds)

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures for `summary.json`; `shares_first_session` only if it is known."""
        figures = {**vars(self), "tokens_per_second": self.tokens_per_second}
        if self.shares_first_session is None:
            del figures["shares_first_session"]
        return figures


def chain_totals(stages: Sequence[RunTotals]) -> RunTotals:
    """Returns the sums over the stages of a chain. A session in which several stages ran counts once.

    In files of older versions, which do not contain it, each stage but the first shares its first session.
    """
    sessions = 0
    for number, stage in enumerate(stages):
        shares = number > 0 if stage.shares_first_session is None else stage.shares_first_session
        sessions += max(0, stage.sessions - 1) if shares else stage.sessions
    return RunTotals(
        round(sum(stage.seconds for stage in stages), 1),
        max(1, sessions),
        sum(stage.tokens for stage in stages),
        sum(stage.step_seconds for stage in stages),
    )


@dataclass(frozen=True)
class Session:
    """The current session: its beginning on the monotonic clock, and the totals of the earlier ones.

    `shares_first_session` is that of the stage, as in `RunTotals`.
    """

    began: float = field(default_factory=time.monotonic)
    earlier: RunTotals = RunTotals()
    shares_first_session: bool | None = None

    @property
    def seconds(self) -> float:
        """Wall time of this session; a change of the date does not change it."""
        return time.monotonic() - self.began

    def totals(self, steps: RunTotals) -> RunTotals:
        """Returns the totals at this moment, with the steps of `steps`. The seconds are tenths, as every file and
        screen has them."""
        return RunTotals(
            round(self.earlier.seconds + self.seconds, 1),
            self.earlier.sessions + 1,
            steps.tokens,
            steps.step_seconds,
            self.shares_first_session,
        )


class TotalsCounter:
    """Adds up the events of a stage; the next stage of a chain begins again at 0.

    `RunStarted` and `RunEnded` contain the totals up to them. Logs of older versions do not have these: there a session
    ends with `RunEnded`, or, if it was killed, at the longest pause before the next `RunStarted`, since around that
    pause there can be messages of both sessions.
    """

    def __init__(self) -> None:
        self._stage: int | None = None
        self._sessions = 0
        self._tokens = 0
        self._step_seconds = 0.0
        self._shares_first_session: bool | None = None
        self._earlier = 0.0
        self._passed = 0.0
        self._last: float | None = None
        # whether this session had an event other than a message
        self._has_worked = False
        # the longest pause since the last such event: its length, and the time that had passed before it
        self._pause = (0.0, 0.0)

    @property
    def totals(self) -> RunTotals:
        return RunTotals(
            self._earlier + self._passed,
            self._sessions,
            self._tokens,
            self._step_seconds,
            self._shares_first_session,
        )

    def apply(self, event: Event) -> None:
        """Takes the next event."""
        self._pass_time(event.time)
        if isinstance(event, StepEnd):
            self._tokens += event.tokens
            self._step_seconds += event.seconds
        elif isinstance(event, RunStarted):
            self._start(event)
        if isinstance(event, RunEnded):
            self._end(event)
        elif not isinstance(event, (LogMessage, Progress)):
            self._has_worked = True
            self._pause = (0.0, self._passed)

    def _pass_time(self, now: float) -> None:
        """Adds the time since the last event. A clock that was set back adds nothing."""
        if self._last is None:
            self._last = now
            self._passed = 0.0
            self._has_worked = False
            self._pause = (0.0, 0.0)
            self._sessions += 1
        length = max(0.0, now - self._last)
        if length > self._pause[0]:
            self._pause = (length, self._passed)
        self._passed += length
        self._last = now

    def _start(self, event: RunStarted) -> None:
        if self._stage not in (None, event.stage):
            self._begin_stage()
        self._stage = event.stage
        self._shares_first_session = event.shares_first_session
        if event.earlier_sessions is not None:
            self._sessions = event.earlier_sessions + 1
            self._earlier = event.earlier_seconds
            self._passed = event.loading_seconds
        elif self._has_worked:
            length, before = self._pause
            self._sessions += 1
            self._earlier += before
            self._passed -= before + length

    def _begin_stage(self) -> None:
        """Leaves out the earlier stage, which ended before the events of this session."""
        self._sessions = 1
        self._tokens = 0
        self._step_seconds = 0.0
        self._earlier = 0.0
        self._has_worked = False

    def _end(self, event: RunEnded) -> None:
        self._last = None
        self._passed = 0.0
        if event.total_seconds is None:
            self._earlier += event.seconds
        else:
            self._earlier = event.total_seconds
            self._sessions = event.sessions
            self._shares_first_session = event.shares_first_session


def totals_of(events: Iterable[Event]) -> RunTotals:
    """Returns the totals of the events of one stage."""
    counter = TotalsCounter()
    for event in events:
        counter.apply(event)
    return counter.totals
