"""What a run folder tells, read leniently: a run that was killed, or is going on, has a report too."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
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
    from_json,
)
from lowrank_tune.ui.groups import Group, read_group
from lowrank_tune.ui.metrics import POLICY, phases_of
from lowrank_tune.ui.run_paths import EVENTS, stage_folders
from lowrank_tune.ui.wall_time import WallTime

StepValues = dict[int, float]  # step -> value
MAX_GROUPS = 64  # that are kept of a run, spread over it


@dataclass
class RunLog:
    """One run. `series` are statistics of the steps, `checks` those of the validations."""

    folder: Path
    started: RunStarted | None = None
    ended: RunEnded | None = None
    began: float = 0.0
    last: float = 0.0
    tokens: int = 0
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
    _wall_time: WallTime = field(default_factory=WallTime)
    _every: int = 1

    @property
    def status(self) -> str:
        return self.ended.status if self.ended else "not ended"

    @property
    def seconds(self) -> float:
        """Wall time of all sessions."""
        return self._wall_time.seconds

    def apply(self, event: Event) -> None:
        """Takes one event. A run that goes on after an interruption has not ended."""
        self.began = self.began or event.time
        self.last = event.time
        self._wall_time.apply(event)
        if isinstance(event, RunStarted):
            self.started = event
            self.ended = None
        elif isinstance(event, StepEnd):
            self.step = event.step
            self.tokens = self.tokens + event.tokens
            _store(self.series, event.stats, event.step)
            for name, seconds in phases_of(event.stats, event.seconds).items():
                self.phases[name] = self.phases.get(name, 0.0) + seconds
        elif isinstance(event, Evaluated):
            own = f"heldout/{POLICY}/"
            _store(
                self.checks,
                {name: value for name, value in event.stats.items() if not name.startswith(own)},
                event.step,
            )
            now = {
                name.replace(own, "heldout/", 1): value for name, value in event.stats.items() if name.startswith(own)
            }
            _store(self.series, now, event.step)  # a curve, and no stage's figure
        elif isinstance(event, GroupLogged):
            self._grouped(read_group(event))
        elif isinstance(event, SampleLogged):
            self.samples.append(event)
        elif isinstance(event, LogMessage):
            messages = self.warnings if event.level == "warning" else self.notes
            if event.message not in messages:
                messages.append(event.message)
        elif isinstance(event, RunEnded):
            self.ended = event

    def _grouped(self, group: Group) -> None:
        """Of a long run every second, fourth, ... group; the newest always."""
        self.newest = group
        if group.step % self._every == 0 or not self.completion_groups:
            self.completion_groups[group.step] = group
        while len(self.completion_groups) > MAX_GROUPS:
            self._every *= 2
            first = next(iter(self.completion_groups))
            self.completion_groups = {
                step: logged_group
                for step, logged_group in self.completion_groups.items()
                if step == first or step % self._every == 0
            }


@dataclass(frozen=True)
class ChainLog:
    """A chain: its stages by the names of their folders, None for one that has not begun."""

    folder: Path
    name: str
    stages: Mapping[str, RunLog | None]
    summary: Mapping[str, Any]

    @property
    def started_stages(self) -> list[RunLog]:
        return [run_log for run_log in self.stages.values() if run_log is not None]

    @property
    def status(self) -> str:
        """As its last stage stands: done only where every stage is."""
        last = self.started_stages[-1].status
        if last != "done" or all(self.stages.values()):
            return last
        return "not ended"


def read_chain(folder: Path) -> ChainLog:
    """The record of a chain's folder. Raises `UserError` where no stage has begun."""
    stages: dict[str, RunLog | None] = {}
    for path in stage_folders(folder):
        stages[path.name] = read_run_log(path) if (path / EVENTS).is_file() and (path / EVENTS).stat().st_size else None
    if not any(stages.values()):
        raise UserError(f"{folder}: no stage of this chain has begun")
    recipe = _read_json_object(folder / "run.json").get("recipe")
    summary = _read_json_object(folder / "summary.json")
    name = recipe.get("name") if isinstance(recipe, Mapping) else None
    chain = ChainLog(folder, str(name or folder.name), stages, summary)
    # else it is of an earlier start
    if summary.get("status") == chain.status:
        return chain
    return replace(chain, summary={})


def read_run_log(folder: Path) -> RunLog:
    """The record of a folder. Raises `UserError` where there are no events."""
    run_log = RunLog(folder)
    try:
        for event in read_events(folder / "events.jsonl"):
            run_log.apply(event)
    except OSError as error:
        raise UserError(
            f"{folder}: it is no run folder, events.jsonl cannot be read ({error.strerror or error})"
        ) from error
    if not run_log.began:
        raise UserError(f"{folder}: its events.jsonl holds no events")
    run_log.summary, run_log.data, run_log.base, run_log.scores = (
        _read_json_object(folder / f"{name}.json") for name in ("summary", "data", "base", "scores")
    )
    if run_log.summary.get("status") != run_log.status:
        run_log.summary = {}  # it is of an earlier start
    run_log.recipe = _read_text(folder / "recipe.yaml")
    return run_log


def read_events(path: Path) -> Iterator[Event]:
    """Every whole and known event of a file; a half-written or foreign line is passed over."""
    with path.open("rb") as file:
        for line in file:
            try:
                event = from_json(json.loads(line))
            except (ValueError, TypeError, AttributeError, RecursionError):
                continue
            if event is not None and isinstance(event.time, (int, float)):
                yield event


def _store(into: dict[str, StepValues], stats: Mapping[str, Any], step: int) -> None:
    for name, value in stats.items():
        if isinstance(value, (int, float)):
            into.setdefault(name, {})[step] = float(value)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _read_json_object(path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(_read_text(path))
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}
