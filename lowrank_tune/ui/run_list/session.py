"""The figures in the events of a run, for runs whose `summary.json` does not describe their end."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lowrank_tune.events import Evaluated, Event, RunEnded, RunStarted, StepEnd
from lowrank_tune.regular_files import check_regular_file
from lowrank_tune.training.run_totals import TotalsCounter
from lowrank_tune.ui.run_list.best import best_of_evaluation, last_of
from lowrank_tune.ui.run_list.entry import BestMetric
from lowrank_tune.ui.run_paths import parse_event, read_event_lines

TAIL_BYTES = 65_536


@dataclass
class EventsOfRun:
    """The figures of all sessions of a run. `ended` is None if the last session has no end."""

    started: RunStarted | None = None
    ended: RunEnded | None = None
    best: BestMetric | None = None
    last: BestMetric | None = None
    step: int = 0
    time: float = 0.0
    counter: TotalsCounter = field(default_factory=TotalsCounter)

    def apply(self, event: Event) -> None:
        """Takes the next event."""
        self.time = event.time
        self.counter.apply(event)
        if isinstance(event, RunStarted):
            self.started = event
            self.ended = None
        elif isinstance(event, StepEnd):
            self.step = event.step
            self.last = last_of({**event.stats, "step": event.step}) or self.last
        elif isinstance(event, Evaluated) and event.best:
            self.best = best_of_evaluation(event.step, event.stats) or self.best
        elif isinstance(event, RunEnded):
            self.ended = event


def read_events_of_run(path: Path) -> EventsOfRun:
    """Returns the figures in a file of events. Raises OSError if it cannot be read."""
    events = EventsOfRun()
    for event in read_event_lines(path):
        events.apply(event)
    return events


def last_event_time(path: Path) -> float:
    """Returns the time of the last event of a file, 0 if there is none in its last part. Raises OSError if it cannot be
    read or is not regular."""
    check_regular_file(path)
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL_BYTES))
        lines = file.read().split(b"\n")
    for line in reversed(lines):
        event = parse_event(line) if line else None
        if event is not None:
            return event.time
    return 0.0
