"""How long the sessions of a run took together, from its events; the time between two sessions does not count."""

from __future__ import annotations

from lowrank_tune.events import Event, LogMessage, Progress, RunEnded, RunStarted


class WallTime:
    """`seconds` of all sessions. A session ends with `RunEnded`, or where it was killed with its last event before the
    messages that the next session begins with."""

    def __init__(self) -> None:
        self._earlier = self._last = 0.0
        self._began: float | None = None
        self._worked_until: float | None = None  # of this session: its last event that is no message
        self._waiting_since: float | None = None  # the first message after it

    @property
    def seconds(self) -> float:
        return self._earlier + (0.0 if self._began is None else self._last - self._began)

    def apply(self, event: Event) -> None:
        """Takes the next event."""
        if self._began is None:
            self._began, self._worked_until, self._waiting_since = event.time, None, None
        if isinstance(event, RunStarted) and self._worked_until is not None:
            self._earlier += self._worked_until - self._began
            self._began = event.time if self._waiting_since is None else self._waiting_since
        self._last = event.time
        if isinstance(event, RunEnded):
            self._earlier, self._began = self._earlier + event.seconds, None
        elif not isinstance(event, (LogMessage, Progress)):
            self._worked_until, self._waiting_since = event.time, None
        elif self._waiting_since is None:
            self._waiting_since = event.time
