"""One run in a list of runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path


class RunState(StrEnum):
    """How a run ended, or that it has not. `killed`: no process writes it, and its events have no end. `damaged`: its
    `run.json`, its `summary.json` or its events cannot be used."""

    RUNNING = "running"
    DONE = "done"
    INTERRUPTED = "interrupted"
    FAILED = "failed"
    KILLED = "killed"
    NOT_STARTED = "not started"
    DAMAGED = "damaged"


@dataclass(frozen=True)
class BestMetric:
    """The metric by which the best step of a run was selected; of a run without validation, the last value."""

    name: str
    label: str
    value: float
    step: int | None = None


@dataclass(frozen=True)
class ListedRun:
    """A run, or a chain with its stages that have started. `updated` is the time of its last event, `problem` is what
    is damaged or why it failed."""

    folder: Path
    state: RunState = RunState.NOT_STARTED
    algorithm: str = ""
    base: str = ""
    best: BestMetric | None = None
    step: int = 0
    steps: int = 0
    updated: float = 0.0
    seconds: float = 0.0
    num_bytes: int = 0
    problem: str = ""
    stages: tuple[ListedRun, ...] = ()

    @property
    def name(self) -> str:
        return self.folder.name

    def damaged(self, problem: str) -> ListedRun:
        """Returns the run with the state `damaged`."""
        return replace(
            self,
            state=RunState.DAMAGED,
            problem=problem,
        )
