"""What a screen knows of a run. Only events change it, so that a live run, a followed file and a recorded one look the
same, except `ended_process`: the events of a killed run do not contain it."""

from __future__ import annotations

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
from lowrank_tune.ui.formatting import EtaEstimator, validation_line
from lowrank_tune.ui.groups import Group, read_group
from lowrank_tune.ui.metrics import PAIR_SIDES, POLICY, heldout_parts, phases_of, reference_name

MAX_POINTS = 1000
LOG_LINES = 200
SPEED_STEPS = 20
WARNING_LINES = 50
TRAINING = "training"
EVALUATING = "evaluating"
SAVING = "saving"
LOADING = "loading"
OTHER = "other"


@dataclass
class Series:
    """The values of one statistic by step. Of more than `MAX_POINTS`, neighbors become their mean, so that drawing
    stays cheap."""

    points: list[tuple[float, float]] = field(default_factory=list)
    per_point: int = 1
    _open: list[tuple[float, float]] = field(default_factory=list)
    last: float = float("nan")

    def add(self, step: int, value: float) -> None:
        self.last = value
        self._open.append((step, value))
        if len(self._open) >= self.per_point:
            self.points.append(_mean(self._open))
            self._open.clear()
        if len(self.points) > MAX_POINTS:
            self.points = [_mean(self.points[at : at + 2]) for at in range(0, len(self.points), 2)]
            self.per_point *= 2

    def cut(self, step: int) -> None:
        """Forgets what came after a step: a resumed run does it again."""
        self.points = [point for point in self.points if point[0] <= step]
        self._open = [point for point in self._open if point[0] <= step]


def _mean(points: list[tuple[float, float]]) -> tuple[float, float]:
    finite = [value for _, value in points if value == value]
    return points[-1][0], sum(finite) / len(finite) if finite else float("nan")


@dataclass(frozen=True)
class LogLine:
    """A line of the log, `time` seconds after the start; `times` it came in a row."""

    time: float
    text: str
    times: int = 1


@dataclass(frozen=True)
class ScoredPair:
    """Both answers of a held-out pair, with what they score now."""

    chosen: SampleLogged
    rejected: SampleLogged

    @property
    def margin(self) -> float:
        """Score of the chosen above the rejected."""
        chosen = self.chosen.reward
        rejected = self.rejected.reward
        if chosen is None or rejected is None:
            return float("nan")
        return chosen - rejected


@dataclass
class State:
    """Everything that the screen shows of one run, or of a chain: a new stage has curves of its own, and what earlier
    stages answered stays beside what it answers."""

    started: RunStarted | None = None
    ended: RunEnded | None = None
    ended_process: int | None = None  # of a followed run: the process that wrote it, if it has ended
    job: Progress | None = None
    step: int = 0
    steps: int = 0
    start_time: float | None = None
    last_time: float = 0.0
    seconds_left: float | None = None
    saved_step: int | None = None
    best_step: int | None = None
    series: dict[str, Series] = field(default_factory=dict)
    heldout: dict[str, dict[str, float]] = field(default_factory=dict)
    answers: dict[str, list[SampleLogged]] = field(default_factory=dict)
    # by question: who answered in the stages before
    earlier: dict[str, list[tuple[str, SampleLogged]]] = field(default_factory=dict)
    pairs: dict[tuple[str, str, str], ScoredPair] = field(default_factory=dict)
    scored: dict[str, dict[str, float]] = field(default_factory=dict)  # by algorithm: figures of all held-out pairs
    now: dict[str, float] = field(default_factory=dict)  # held-out figures of the policy while it is trained
    group: Group | None = None
    reward_range: tuple[float, float] | None = None  # the least and the most that a completion of a group has earned
    loading: bool = True
    phases: dict[str, float] = field(default_factory=dict)
    step_phases: dict[str, float] = field(default_factory=dict)  # seconds of the phases within the steps, of this start
    warnings: deque[LogLine] = field(default_factory=lambda: deque(maxlen=WARNING_LINES))
    log: deque[LogLine] = field(default_factory=lambda: deque(maxlen=LOG_LINES))
    _pending_chosen: SampleLogged | None = None
    _unspent: float = 0.0
    _eta: EtaEstimator = field(default_factory=EtaEstimator)
    _speed: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=SPEED_STEPS))

    def apply(self, event: Event) -> None:
        """Takes an event in."""
        # after an end a new start follows: the pause between was no work
        if self.start_time is None or self.ended is not None:
            self.start_time = event.time
            self.last_time = event.time
            self.ended = None
            self.loading = True
            self.phases = {}
            self.step_phases = {}
            self._unspent = 0.0
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
            self.saved_step = event.step
            self._log(event.time, f"saved step {event.step}")
        elif isinstance(event, LogMessage):
            self._note(event)
        elif isinstance(event, RunEnded):
            self.ended = event
            self.seconds_left = None

    @property
    def tokens_per_second(self) -> float | None:
        """Over the last steps, without the pauses between them."""
        if self._speed:
            tokens, seconds = (sum(column) for column in zip(*self._speed, strict=True))
        else:
            tokens, seconds = (0, 0.0)
        return tokens / seconds if seconds else None

    @property
    def memory_gib(self) -> float | None:
        return self.last("memory_gib")

    def last(self, name: str) -> float | None:
        if name in self.series:
            return self.series[name].last
        return None

    def phase_shares(self) -> dict[str, float]:
        """The share of each phase in the time of this start, the largest first."""
        total = sum(self.phases.values())
        if total:
            return {name: spent / total for name, spent in sorted(self.phases.items(), key=lambda item: -item[1])}
        return {}

    def step_phase_shares(self) -> dict[str, float]:
        """The share of each phase in the time of the steps, in their order."""
        total = sum(self.step_phases.values())
        if total:
            return {name: spent / total for name, spent in self.step_phases.items()}
        return {}

    def reference_name(self) -> str:
        """Who the reference is, by name."""
        if self.started is not None:
            return reference_name(self.started.roles)
        return "base"

    def _start(self, event: RunStarted) -> None:
        if self.started is not None and self.started.stage != event.stage:
            self._finish_stage(self.started)
        self.loading = False
        self.started = event
        self.steps = event.steps
        self.step = event.resumed_from
        self._eta = EtaEstimator()
        self.seconds_left = None
        self._speed.clear()
        if event.resumed_from:
            # how long the run lay still is not known
            self.start_time = event.time
            self.phases = {}
            self.step_phases = {}
            self._log(event.time, f"continued after step {event.resumed_from}")
        for series in self.series.values():
            series.cut(event.resumed_from)

    def _finish_stage(self, stage: RunStarted) -> None:
        """A new stage of a chain begins: its curves are its own, and what the last one answered is kept to compare
        with."""
        for prompt, answers in self.answers.items():
            earlier_answers = self.earlier.setdefault(prompt, [])
            earlier_labels = {who for who, _ in earlier_answers}
            earlier_answers += [
                (self.reference_name(), answer)
                for answer in answers[:1]
                if answer.role == "reference" and self.reference_name() not in earlier_labels
            ]
            earlier_answers += [(stage.algorithm, answer) for answer in answers[-1:] if answer.role != "reference"]
        self.answers = {}
        self.pairs = {}
        self.series = {}
        self._pending_chosen = None
        self.now = {}
        self.group = None
        self.reward_range = None
        self.saved_step = self.best_step = None

    def _sampled(self, event: SampleLogged) -> None:
        """An answer; of a pair the chosen side comes right before the rejected."""
        if event.role not in PAIR_SIDES:
            self.answers.setdefault(event.prompt, []).append(event)
            del self.answers[event.prompt][1:-20]  # the first, to compare with, and the latest
        elif event.role == "chosen":
            self._pending_chosen = event
        elif self._pending_chosen is not None and self._pending_chosen.prompt == event.prompt:
            self.pairs[event.prompt, self._pending_chosen.completion, event.completion] = ScoredPair(
                self._pending_chosen, event
            )
            self._pending_chosen = None

    def _on_group_logged(self, event: GroupLogged) -> None:
        self.group = read_group(event)
        rewards = [completion.reward for completion in self.group.completions if math.isfinite(completion.reward)]
        if rewards:
            lowest, highest = self.reward_range or (rewards[0], rewards[0])
            self.reward_range = min(lowest, *rewards), max(highest, *rewards)

    def _step(self, event: StepEnd) -> None:
        for name, seconds in phases_of(event.stats, event.seconds).items():
            self.step_phases[name] = self.step_phases.get(name, 0.0) + seconds
        self.step = event.step
        self.steps = event.steps
        self.seconds_left = self._eta.seconds_left(event)
        self._speed.append((event.tokens, event.seconds))
        self._measured(event.step, event.stats)

    def _validated(self, event: Evaluated) -> None:
        heldout = {name: value for name, value in event.stats.items() if name.startswith("heldout/")}
        parts = {heldout_parts(name): value for name, value in heldout.items()}
        now = {metric: value for (who, metric), value in parts.items() if who == POLICY}
        for (who, metric), value in parts.items():
            if who != POLICY:
                self.heldout.setdefault(who, {})[metric] = value
        if heldout:
            self.now = now  # what is measured at the end takes its place
        self._measured(event.step, {f"heldout/{metric}": value for metric, value in now.items()})
        if event.best:
            self.best_step = event.step
        if pairs := {
            name.removeprefix("pairs/"): value for name, value in event.stats.items() if name.startswith("pairs/")
        }:
            self.scored.setdefault(self.started.algorithm if self.started else "", {}).update(pairs)
        self._measured(event.step, {name: value for name, value in event.stats.items() if name not in heldout})
        if now or len(heldout) < len(event.stats):
            self._log(event.time, validation_line(event, ": "))

    def _measured(self, step: int, stats: Mapping[str, float]) -> None:
        for name, value in stats.items():
            self.series.setdefault(name, Series()).add(step, value)

    def _note(self, event: LogMessage) -> None:
        lines = self.warnings if event.level == "warning" else self.log
        if lines and lines[-1].text == event.message:
            lines[-1] = LogLine(self._since(event.time), event.message, lines[-1].times + 1)
        else:
            lines.append(LogLine(self._since(event.time), event.message))

    def _log(self, time: float, text: str) -> None:
        self.log.append(LogLine(self._since(time), text))

    def _since(self, time: float) -> float:
        """Reckoned at once: each stage of a chain, and each start, has a beginning of its own."""
        return time - (self.start_time or 0.0)

    def _spend(self, event: Event) -> None:
        """The time since the last event belongs to what this one tells of; a step says itself how long it took."""
        was_amid = self._unspent > 0
        spent = max(0.0, event.time - self.last_time) + self._unspent
        self._unspent = 0.0
        if isinstance(event, GroupLogged) or (isinstance(event, LogMessage) and was_amid):
            self._unspent = spent  # it comes amid a step, which tells of its time when it is done
        elif isinstance(event, StepEnd):
            self._add(TRAINING, min(spent, event.seconds))
            self._add(OTHER, spent - min(spent, event.seconds))
        elif isinstance(event, CheckpointSaved):
            self._add(SAVING, min(spent, event.seconds))
            self._add(OTHER, spent - min(spent, event.seconds))
        elif isinstance(event, (Evaluated, SampleLogged)) or (isinstance(event, Progress) and not self.loading):
            self._add(EVALUATING, spent)
        else:
            self._add(LOADING if self.loading or isinstance(event, RunStarted) else OTHER, spent)

    def _add(self, phase: str, seconds: float) -> None:
        if seconds > 0:
            self.phases[phase] = self.phases.get(phase, 0.0) + seconds
