"""The content of a run folder, read leniently: a run that was killed, or is still running, has a report too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lowrank_tune.errors import UserError
from lowrank_tune.events import (
    Evaluated,
    Event,
    GroupLogged,
    LogMessage,
    RunEnded,
    RunStarted,
    SampleLogged,
    StepEnd,
)
from lowrank_tune.json_files import as_number, read_json_object
from lowrank_tune.training.run_totals import RunTotals, TotalsCounter
from lowrank_tune.ui.groups import Group, read_group
from lowrank_tune.ui.metrics import (
    DEFAULT_ALGORITHM,
    POLICY,
    WITHOUT_REFERENCE,
    Point,
    phases_of,
)
from lowrank_tune.ui.run_paths import (
    EVENTS,
    read_event_lines,
    read_recipe,
    stage_folders,
)

StepValues = dict[int, float]
"""Values by step."""
MAX_GROUPS = 64
"""Groups that are kept of a run, spread over it."""


def in_order(values: Mapping[int, float]) -> list[Point]:
    """Returns values by step as points, in the order of the steps."""
    return [(float(step), value) for step, value in sorted(values.items())]


@dataclass
class RunLog:
    """One run. `series` contains the statistics of the steps, `checks` those of the validations."""

    folder: Path
    started: RunStarted | None = None
    ended: RunEnded | None = None
    began: float = 0.0
    last: float = 0.0
    step: int = 0
    series: dict[str, StepValues] = field(default_factory=dict)
    checks: dict[str, StepValues] = field(default_factory=dict)
    samples: list[SampleLogged] = field(default_factory=list)
    completion_groups: dict[int, Group] = field(default_factory=dict)
    newest: Group | None = None
    phases: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    summary: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Any] = field(default_factory=dict)
    recipe: str = ""
    _counter: TotalsCounter = field(default_factory=TotalsCounter)
    _every: int = 1

    @property
    def name(self) -> str:
        return self.started.name if self.started else self.folder.name

    @property
    def algorithm(self) -> str:
        return self.started.algorithm if self.started else DEFAULT_ALGORITHM

    @property
    def reference(self) -> str:
        """The reference in words; empty for an algorithm that has none."""
        if self.started is None or self.algorithm in WITHOUT_REFERENCE:
            return ""
        return self.started.reference

    @property
    def status(self) -> str:
        return self.ended.status if self.ended else "not ended"

    @property
    def totals(self) -> RunTotals:
        """Time, sessions and speed of all sessions."""
        return self._counter.totals

    def points(self, name: str) -> list[Point]:
        """Returns the values of a statistic of the steps as points."""
        return in_order(self.series.get(name, {}))

    def finite_values(self, name: str) -> StepValues:
        """Returns the finite values of a statistic of the steps, or else of the validations, in order."""
        values = self.series.get(name) or self.checks.get(name, {})
        return {step: value for step, value in sorted(values.items()) if math.isfinite(value)}

    def apply(self, event: Event) -> None:
        """Takes one event. A run that continues after an interruption has not ended."""
        self.began = self.began or event.time
        self.last = event.time
        self._counter.apply(event)
        if isinstance(event, RunStarted):
            self.started = event
            self.ended = None
        elif isinstance(event, StepEnd):
            self._add_step(event)
        elif isinstance(event, Evaluated):
            self._add_validation(event)
        elif isinstance(event, GroupLogged):
            self._add_group(read_group(event))
        elif isinstance(event, SampleLogged):
            self.samples.append(event)
        elif isinstance(event, LogMessage):
            messages = self.warnings if event.level == "warning" else self.notes
            if event.message not in messages:
                messages.append(event.message)
        elif isinstance(event, RunEnded):
            self.ended = event

    def _add_step(self, event: StepEnd) -> None:
        self.step = event.step
        for name, value in event.stats.items():
            _store(
                self.series,
                name,
                event.step,
                value,
            )
        for name, seconds in phases_of(event.stats, event.seconds).items():
            self.phases[name] = self.phases.get(name, 0.0) + seconds

    def _add_validation(self, event: Evaluated) -> None:
        """Held-out figures of the policy during training are a curve; those of a stage are not."""
        own = f"heldout/{POLICY}/"
        for name, value in event.stats.items():
            if name.startswith(own):
                _store(
                    self.series,
                    name.replace(
                        own,
                        "heldout/",
                        1,
                    ),
                    event.step,
                    value,
                )
            else:
                _store(
                    self.checks,
                    name,
                    event.step,
                    value,
                )

    def _add_group(self, group: Group) -> None:
        """Keeps the newest group, and of a long run every second, fourth, ... one."""
        self.newest = group
        if group.step % self._every == 0 or not self.completion_groups:
            self.completion_groups[group.step] = group
        while len(self.completion_groups) > MAX_GROUPS:
            self._every *= 2
            first, *later = self.completion_groups
            for step in later:
                if step % self._every:
                    del self.completion_groups[step]


@dataclass(frozen=True)
class ChainLog:
    """A chain: its stages by the names of their folders; None for a stage that has not begun."""

    folder: Path
    name: str
    stages: Mapping[str, RunLog | None]
    summary: Mapping[str, Any]

    @property
    def started_stages(self) -> list[RunLog]:
        return [run_log for run_log in self.stages.values() if run_log is not None]

    @property
    def status(self) -> str:
        """The status of the last stage that has begun; `done` only if every stage is."""
        last = self.started_stages[-1].status
        if last != "done" or all(self.stages.values()):
            return last
        return "not ended"


def read_chain(folder: Path) -> ChainLog:
    """Returns the record of a chain. Raises `UserError` if no stage has begun."""
    stages: dict[str, RunLog | None] = {}
    for path in stage_folders(folder):
        events = path / EVENTS
        has_events = events.is_file() and events.stat().st_size > 0
        stages[path.name] = read_run_log(path) if has_events else None
    if not any(stages.values()):
        raise UserError(f"{folder}: no stage of this chain has begun")
    name = str(read_recipe(folder).get("name") or folder.name)
    chain = ChainLog(
        folder,
        name,
        stages,
        read_json_object(folder / "summary.json"),
    )
    if chain.summary.get("status") != chain.status:
        # the summary of an earlier start
        return replace(chain, summary={})
    return chain


def read_run_log(folder: Path) -> RunLog:
    """Returns the record of a run folder. Raises `UserError` if it contains no events."""
    run_log = RunLog(folder)
    try:
        for event in read_event_lines(folder / EVENTS):
            run_log.apply(event)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{folder}: not a run folder, {EVENTS} cannot be read ({reason})") from error
    if not run_log.began:
        raise UserError(f"{folder}: its {EVENTS} contains no events")
    run_log.data = read_json_object(folder / "data.json")
    run_log.base = read_json_object(folder / "base.json")
    run_log.scores = read_json_object(folder / "scores.json")
    summary = read_json_object(folder / "summary.json")
    # otherwise the summary is that of an earlier start
    if summary.get("status") == run_log.status:
        run_log.summary = summary
    run_log.recipe = _read_text(folder / "recipe.yaml")
    return run_log


def _store(
    statistics: dict[str, StepValues],
    name: str,
    step: int,
    value: Any,
) -> None:
    if isinstance(value, (int, float)):
        statistics.setdefault(name, {})[step] = as_number(value)


def _read_text(path: Path) -> str:
    """Returns the text of a file, empty if it cannot be read; invalid UTF-8 is replaced."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
