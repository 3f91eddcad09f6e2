"""How long the sessions of a run took together, from its events; the time between two sessions does not count."""

from __future__ import annotations

from lowrank_tune.events import Event, LogMessage, Progress, RunEnded, RunStarted


class WallTime:
    """`seconds` of all sessions. A session ends with `RunEnded`, or where it was killed at the longest pause before the
    next `RunStarted`: before and after it there can be messages, of the killed session and of the next one."""

    def __init__(self) -> None:
        self._earlier = self._last = 0.0
        self._began: float | None = None
        self._has_worked = False  # in this session: an event that is no message
        self._pause = (0.0, 0.0)  # the longest one since the last of them

    @property
    def seconds(self) -> float:
        return self._earlier + (0.0 if self._began is None else max(0.0, self._last - self._began))

    def apply(self, event: Event) -> None:
        """Takes the next event."""
        if self._began is None:
            self._began = event.time
            self._last = event.time
            self._has_worked = False
        self._pause = max(self._pause, (self._last, event.time), key=lambda pause: pause[1] - pause[0])
        if isinstance(event, RunStarted) and self._has_worked:
            self._earlier += max(0.0, self._pause[0] - self._began)
            self._began = self._pause[1]
        self._last = event.time
        if isinstance(event, RunEnded):
            self._earlier = self._earlier + event.seconds
            self._began = None
        elif not isinstance(event, (LogMessage, Progress)):
            self._has_worked = True
            self._pause = (event.time, event.time)
