"""The sink that draws a run below the cell of a notebook that runs it."""

from __future__ import annotations

import time
from collections.abc import Iterable

from lowrank_tune.events import Event, Progress, RunEnded, RunStarted
from lowrank_tune.ui.notebook.kernel import OutputSlot
from lowrank_tune.ui.notebook.live import LiveRun

MIN_SECONDS = 1.0
"""Minimum time between two drawings."""
MAX_SHARE = 0.05
"""Share of the time that drawing may take: if one drawing takes long, the next one is later."""


class NotebookView:
    """Applies each event, and draws the run at most once a second. The start and the end of a run, and the start of a
    job, are drawn at once, because the next event may come minutes later."""

    def __init__(self, slot: OutputSlot | None = None) -> None:
        self.run = LiveRun()
        self._slot = slot or OutputSlot()
        self._is_drawn = True
        self._next_time = 0.0
        self._last_job = ""

    def replay(self, events: Iterable[Event]) -> None:
        """Begins again with the events of the log, which contains those of earlier sessions too."""
        self.run = LiveRun()
        for event in events:
            self.run.apply(event)
        self._draw()

    def __call__(self, event: Event) -> None:
        self.run.apply(event)
        self._is_drawn = False
        if self._is_urgent(event) or time.monotonic() >= self._next_time:
            self._draw()

    def close(self) -> None:
        """Draws what was not drawn yet."""
        if not self._is_drawn:
            self._draw()

    def _is_urgent(self, event: Event) -> bool:
        if not isinstance(event, Progress):
            return isinstance(event, (RunStarted, RunEnded))
        is_new = event.done == 0 and event.description != self._last_job
        self._last_job = event.description
        return is_new

    def _draw(self) -> None:
        start = time.monotonic()
        self._slot.show(self.run.output())
        now = time.monotonic()
        self._next_time = now + max(MIN_SECONDS, (now - start) / MAX_SHARE)
        self._is_drawn = True
