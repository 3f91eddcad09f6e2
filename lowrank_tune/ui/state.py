"""The state of a run as a screen shows it.

Only events change it, so that a live run, a followed file and a recorded one look the same. The exception is
`ended_process`, which the events of a killed run do not contain.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from lowrank_tune.events import (
    CheckpointSaved,
    Evaluated,
    Event,
    GroupLogged,
    LogMessage,
    Progress,
    RunEnded,
    RunStarted,
    SampleLogged,
    StepEnd,
)
from lowrank_tune.training.run_totals import RunTotals, TotalsCounter
from lowrank_tune.ui.formatting import EtaEstimator, validation_line
from lowrank_tune.ui.groups import Group, read_group
from lowrank_tune.ui.metrics import (
    DEFAULT_ALGORITHM,
    PAIR_SIDES,
    POLICY,
    Point,
    Points,
    heldout_parts,
    phases_of,
    reference_name,
)

MAX_POINTS = 256
"""Points of a curve on a screen: more than a chart of a wide terminal has columns of dots."""
LOG_LINES = 5000
"""Newest lines of the log that are kept."""
MAX_SAMPLES = 2000
"""Newest answers that are kept."""
WARNING_LINES = 50
MAX_ANSWERS = 20
"""Latest answers to a prompt that are kept, beside the first."""

TRAINING = "training"
EVALUATING = "evaluating"
SAVING = "saving"
LOADING = "loading"
OTHER = "other"


@dataclass
class Series:
    """The values of one statistic by step, at most `MAX_POINTS`: from then on, each new point replaces two neighbors by
    their mean, from the left to the right, so that memory and drawing time of a long run are constant."""

    points: list[Point] = field(default_factory=list)
    per_point: int = 1
    last: float = math.nan
    _num_merged: int = 0
    """Points at the left, each the mean of `2 * per_point` values; the others are the mean of `per_point`."""
    _open: list[Point] = field(default_factory=list)

    def add(self, step: int, value: float) -> None:
        self.last = value
        self._open.append((step, value))
        if len(self._open) >= self.per_point:
            self.points.append(_mean(self._open))
            self._open.clear()
        if len(self.points) > MAX_POINTS:
            self._merge_next_pair()

    def _merge_next_pair(self) -> None:
        place = self._num_merged
        self.points[place : place + 2] = [_mean(self.points[place : place + 2])]
        self._num_merged += 1
        if self._num_merged == len(self.points):
            self.per_point *= 2
            self._num_merged = 0

    def cut(self, step: int) -> None:
        """Removes what came after a step, because a resumed run repeats it."""
        self.points = [point for point in self.points if point[0] <= step]
        self._num_merged = min(self._num_merged, len(self.points))
        self._open = [point for point in self._open if point[0] <= step]


def _mean(points: Points) -> Point:
    """Returns the last step and the mean of the values that are not nan."""
    last_step, _ = points[-1]
    values = [value for _, value in points if not math.isnan(value)]
    if not values:
        return last_step, math.nan
    return last_step, sum(values) / len(values)


@dataclass(frozen=True)
class LogLine:
    """A line of the log, `time` seconds after the start and `at` seconds since the epoch; it came `times` times in a
    row."""

    time: float
    text: str
    times: int = 1
    at: float = 0.0
    is_warning: bool = False


@dataclass(frozen=True)
class ScoredPair:
    """Both answers of a held-out pair with their current scores."""

    chosen: SampleLogged
    rejected: SampleLogged

    @property
    def margin(self) -> float:
        """Score of the chosen answer minus that of the rejected one; nan if one is missing."""
        chosen = self.chosen.reward
        rejected = self.rejected.reward
        if chosen is None or rejected is None:
            return math.nan
        return chosen - rejected


@dataclass
class State:
    """Everything that the screen shows of one run, or of a chain. A new stage has curves of its own; the answers of
    earlier stages are kept beside its answers."""

    started: RunStarted | None = None
    ended: RunEnded | None = None
    ended_process: int | None = None
    """Of a followed run: the process that wrote it, if that process has ended."""
    job: Progress | None = None
    step: int = 0
    steps: int = 0
    start_time: float | None = None
    last_time: float = 0.0
    seconds_left: float | None = None
    best_step: int | None = None
    series: dict[str, Series] = field(default_factory=dict)
    heldout: dict[str, dict[str, float]] = field(default_factory=dict)
    answers: dict[str, list[SampleLogged]] = field(default_factory=dict)
    earlier: dict[str, list[tuple[str, SampleLogged]]] = field(default_factory=dict)
    """By prompt: the models of earlier stages and their answers."""
    pairs: dict[tuple[str, str, str], ScoredPair] = field(default_factory=dict)
    scored: dict[str, dict[str, float]] = field(default_factory=dict)
    """By algorithm: the figures of all held-out pairs."""
    now: dict[str, float] = field(default_factory=dict)
    """Held-out figures of the policy while it is trained."""
    group: Group | None = None
    reward_range: tuple[float, float] | None = None
    """The lowest and the highest reward of a completion so far."""
    loading: bool = True
    phases: dict[str, float] = field(default_factory=dict)
    step_phases: dict[str, float] = field(default_factory=dict)
    """Seconds of the phases within the steps since the start."""
    warnings: deque[LogLine] = field(default_factory=lambda: deque(maxlen=WARNING_LINES))
    log: deque[LogLine] = field(default_factory=lambda: deque(maxlen=LOG_LINES))
    """Warnings and other lines, the newest last."""
    log_count: int = 0
    """Lines since the start, kept or not."""
    samples: deque[SampleLogged] = field(default_factory=lambda: deque(maxlen=MAX_SAMPLES))
    """Answers and sides of pairs, the newest last."""
    sample_count: int = 0
    finished_stages: list[State] = field(default_factory=list)
    """The state at the end of each earlier stage of a chain."""
    _ended_stage: State | None = None
    _pending_chosen: SampleLogged | None = None
    _unspent: float = 0.0
    _eta: EtaEstimator = field(default_factory=EtaEstimator)
    _counter: TotalsCounter = field(default_factory=TotalsCounter)

    def apply(self, event: Event) -> None:
        """Updates the state by one event."""
        if self.ended is not None:
            self._ended_stage = self._snapshot()
        if self.start_time is None or self.ended is not None:
            self._restart_clock(event.time)
        self._counter.apply(event)
        self._spend(event)
        self.last_time = max(self.last_time, event.time)
        if not isinstance(event, (Progress, LogMessage)):
            self.job = None
        if isinstance(event, RunStarted):
            self._start(event)
        elif isinstance(event, Progress):
            self.job = event if event.done < event.total else None
        elif isinstance(event, StepEnd):
            self._step(event)
        elif isinstance(event, Evaluated):
            self._validated(event)
        elif isinstance(event, SampleLogged):
            self._sampled(event)
        elif isinstance(event, GroupLogged):
            self._on_group_logged(event)
        elif isinstance(event, CheckpointSaved):
            self._log(event, f"saved step {event.step}")
        elif isinstance(event, LogMessage):
            self._note(event)
        elif isinstance(event, RunEnded):
            self.ended = event
            self.seconds_left = None

    def _snapshot(self) -> State:
        """Returns a copy that later events do not change."""
        stage = copy.copy(self)
        stage.log = self.log.copy()
        stage.warnings = self.warnings.copy()
        stage.samples = self.samples.copy()
        stage.heldout = {model: dict(figures) for model, figures in self.heldout.items()}
        stage.scored = {algorithm: dict(figures) for algorithm, figures in self.scored.items()}
        stage.earlier = {prompt: list(answers) for prompt, answers in self.earlier.items()}
        stage._counter = copy.copy(self._counter)
        stage.finished_stages = []
        stage._ended_stage = None
        return stage

    def _restart_clock(self, time: float) -> None:
        """Begins the first start, or another one after an end; the time between them counts for neither."""
        self.start_time = time
        self.last_time = time
        self.ended = None
        self.loading = True
        self.phases = {}
        self.step_phases = {}
        self._unspent = 0.0

    @property
    def algorithm(self) -> str:
        return self.started.algorithm if self.started is not None else DEFAULT_ALGORITHM

    @property
    def totals(self) -> RunTotals:
        """Time, sessions and speed of all sessions of the stage."""
        return self._counter.totals

    def last(self, name: str) -> float | None:
        """Returns the last value of a statistic, None if it was not measured."""
        return self.series[name].last if name in self.series else None

    def phase_shares(self) -> dict[str, float]:
        """Returns the share of each phase in the time since the start, the largest first."""
        shares = _shares(self.phases)
        return dict(sorted(shares.items(), key=lambda item: -item[1]))

    def step_phase_shares(self) -> dict[str, float]:
        """Returns the share of each phase in the time of the steps, in their order."""
        return _shares(self.step_phases)

    def reference_name(self) -> str:
        """Returns the name of the reference: the last frozen adapter below the policy, or the base."""
        return reference_name(self.started)

    def _start(self, event: RunStarted) -> None:
        if self.started is not None and self.started.stage != event.stage:
            self.finished_stages.append(self._ended_stage or self._snapshot())
            self._finish_stage(self.started)
        self._ended_stage = None
        self.loading = False
        self.started = event
        self.steps = event.steps
        self.step = event.resumed_from
        self._eta = EtaEstimator()
        self.seconds_left = None
        if event.resumed_from:
            # the length of the pause before a resumed run is unknown
            self.start_time = event.time
            self.phases = {}
            self.step_phases = {}
            self._log(event, f"continued after step {event.resumed_from}")
        for series in self.series.values():
            series.cut(event.resumed_from)

    def _finish_stage(self, stage: RunStarted) -> None:
        """Clears the curves for a new stage of a chain and keeps the answers of the finished one to compare with."""
        reference = self.reference_name()
        for prompt, answers in self.answers.items():
            earlier = self.earlier.setdefault(prompt, [])
            models = {model for model, _ in earlier}
            first, last = answers[0], answers[-1]
            if first.role == "reference" and reference not in models:
                earlier.append((reference, first))
            if last.role != "reference":
                earlier.append((stage.algorithm, last))
        self.answers = {}
        self.pairs = {}
        self.series = {}
        self._pending_chosen = None
        self.now = {}
        self.group = None
        self.reward_range = None
        self.best_step = None

    def _sampled(self, event: SampleLogged) -> None:
        """Stores an answer. The event of the chosen side of a pair comes directly before that of the rejected one."""
        self.samples.append(event)
        self.sample_count += 1
        chosen = self._pending_chosen
        if event.role not in PAIR_SIDES:
            self.answers.setdefault(event.prompt, []).append(event)
            # the first, to compare with, and the latest
            del self.answers[event.prompt][1:-MAX_ANSWERS]
        elif event.role == "chosen":
            self._pending_chosen = event
        elif chosen is not None and chosen.prompt == event.prompt:
            self.pairs[event.prompt, chosen.completion, event.completion] = ScoredPair(chosen, event)
            self._pending_chosen = None

    def _on_group_logged(self, event: GroupLogged) -> None:
        self.group = read_group(event)
        rewards = [completion.reward for completion in self.group.completions if math.isfinite(completion.reward)]
        if rewards:
            lowest, highest = self.reward_range or (rewards[0], rewards[0])
            self.reward_range = (
                min(lowest, *rewards),
                max(highest, *rewards),
            )

    def _step(self, event: StepEnd) -> None:
        for name, seconds in phases_of(event.stats, event.seconds).items():
            self.step_phases[name] = self.step_phases.get(name, 0.0) + seconds
        self.step = event.step
        self.steps = event.steps
        self.seconds_left = self._eta.seconds_left(event)
        self._measured(event.step, event.stats)

    def _validated(self, event: Evaluated) -> None:
        heldout_now = {}
        pairs = {}
        curves = {}
        is_heldout = False
        for name, value in event.stats.items():
            if not name.startswith("heldout/"):
                curves[name] = value
                if name.startswith("pairs/"):
                    pairs[name.removeprefix("pairs/")] = value
                continue
            is_heldout = True
            who, metric = heldout_parts(name)
            if who == POLICY:
                heldout_now[metric] = value
            else:
                self.heldout.setdefault(who, {})[metric] = value
        if is_heldout:
            # figures of the trained stage replace those of the policy during training
            self.now = heldout_now
        self._measured(
            event.step,
            {f"heldout/{metric}": value for metric, value in heldout_now.items()},
        )
        self._measured(event.step, curves)
        if event.best:
            self.best_step = event.step
        if pairs:
            algorithm = self.started.algorithm if self.started else ""
            self.scored.setdefault(algorithm, {}).update(pairs)
        if heldout_now or curves:
            self._log(event, validation_line(event, ": "))

    def _measured(self, step: int, stats: Mapping[str, float]) -> None:
        for name, value in stats.items():
            self.series.setdefault(name, Series()).add(step, value)

    def _note(self, event: LogMessage) -> None:
        is_warning = event.level == "warning"
        self._log(event, event.message, is_warning)
        if is_warning:
            if self.warnings and self.log[-1].times > 1:
                self.warnings.pop()
            self.warnings.append(self.log[-1])

    def _log(
        self,
        event: Event,
        text: str,
        is_warning: bool = False,
    ) -> None:
        """Appends a line; one that repeats the last line replaces it."""
        times = 1
        if self.log and (self.log[-1].text, self.log[-1].is_warning) == (text, is_warning):
            times += self.log.pop().times
        else:
            self.log_count += 1
        self.log.append(
            LogLine(
                self._since(event.time),
                text,
                times,
                event.time,
                is_warning,
            )
        )

    def _since(self, time: float) -> float:
        """Returns the seconds since the start; they are stored, because each stage and each start begins at 0."""
        return time - (self.start_time or 0.0)

    def _spend(self, event: Event) -> None:
        """Adds the time since the last event to the phase that this event ends.

        The event of a step, or of a checkpoint, contains its own seconds; the rest of the time belongs to no phase.
        """
        is_within_step = self._unspent > 0
        spent = max(0.0, event.time - self.last_time) + self._unspent
        self._unspent = 0.0
        if isinstance(event, GroupLogged) or (isinstance(event, LogMessage) and is_within_step):
            # it comes within a step, whose event contains the time
            self._unspent = spent
        elif isinstance(event, StepEnd):
            self._spend_at_most(TRAINING, event.seconds, spent)
        elif isinstance(event, CheckpointSaved):
            self._spend_at_most(SAVING, event.seconds, spent)
        elif isinstance(event, (Evaluated, SampleLogged)) or (isinstance(event, Progress) and not self.loading):
            self._add(EVALUATING, spent)
        else:
            self._add(
                LOADING if self.loading or isinstance(event, RunStarted) else OTHER,
                spent,
            )

    def _spend_at_most(
        self,
        phase: str,
        limit: float,
        spent: float,
    ) -> None:
        self._add(phase, min(spent, limit))
        self._add(OTHER, spent - min(spent, limit))

    def _add(self, phase: str, seconds: float) -> None:
        if seconds > 0:
            self.phases[phase] = self.phases.get(phase, 0.0) + seconds


def _shares(phases: Mapping[str, float]) -> dict[str, float]:
    total = sum(phases.values())
    return {name: seconds / total for name, seconds in phases.items()} if total else {}
