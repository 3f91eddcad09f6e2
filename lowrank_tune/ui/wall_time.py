"""The wall time of the sessions of a run together, from its events; the time between two sessions does not count."""

from __future__ import annotations

from lowrank_tune.events import (
    Event,
    LogMessage,
    Progress,
    RunEnded,
    RunStarted,
)


class WallTime:
    """Adds up the `seconds` of all sessions.

    A session ends with `RunEnded`. If it was killed, it ends at the longest pause before the next `RunStarted`: around
    that pause there can be messages of the killed session and of the next one.
    """

    def __init__(self) -> None:
        self._earlier = 0.0
        self._last = 0.0
        self._began: float | None = None
        # whether this session had an event other than a message
        self._has_worked = False
        # the longest pause since the last such event: its beginning and its end
        self._pause = (0.0, 0.0)

    @property
    def seconds(self) -> float:
        if self._began is None:
            return self._earlier
        return self._earlier + max(0.0, self._last - self._began)

    def apply(self, event: Event) -> None:
        """Takes the next event."""
        if self._began is None:
            self._began = event.time
            self._last = event.time
            self._has_worked = False
        if event.time - self._last > self._pause[1] - self._pause[0]:
            self._pause = (self._last, event.time)
        if isinstance(event, RunStarted) and self._has_worked:
            ended, began = self._pause
            self._earlier += max(0.0, ended - self._began)
            self._began = began
        self._last = event.time
        if isinstance(event, RunEnded):
            self._earlier += event.seconds
            self._began = None
        elif not isinstance(event, (LogMessage, Progress)):
            self._has_worked = True
            self._pause = (event.time, event.time)
