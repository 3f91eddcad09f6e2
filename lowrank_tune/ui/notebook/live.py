"""The live output of a run: its state from the events, and the HTML of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lowrank_tune.events import Event, RunStarted, SampleLogged, StepEnd
from lowrank_tune.ui import escape_control_chars
from lowrank_tune.ui.formatting import clock, format_stats, percent, rate, wall_time
from lowrank_tune.ui.html import render, style_of
from lowrank_tune.ui.metrics import PAIR_SIDES
from lowrank_tune.ui.notebook.charts import leading_charts
from lowrank_tune.ui.notebook.kernel import Output
from lowrank_tune.ui.report.run_log import RunLog
from lowrank_tune.ui.state import State

MAX_WARNINGS = 5
MAX_LOG_LINES = 30
MAX_PROMPT = 300
MAX_COMPLETION = 600


@dataclass
class LiveRun:
    """A run as its events describe it so far. `log` contains the curves of the current stage, `finished` a line for
    each earlier one, and `sample` the newest answer of the model; the sides of a pair are answers of the data."""

    state: State = field(default_factory=State)
    log: RunLog = field(default_factory=lambda: RunLog(Path()))
    finished: list[str] = field(default_factory=list)
    stats: dict[str, float] = field(default_factory=dict)
    sample: SampleLogged | None = None

    def apply(self, event: Event) -> None:
        """Takes the next event."""
        started = self.state.started
        if isinstance(event, RunStarted) and started is not None and started.stage != event.stage:
            self.finished.append(_stage_line(started, self.log))
            self.log = RunLog(Path())
            self.stats = {}
            self.sample = None
        self.state.apply(event)
        self.log.apply(event)
        if isinstance(event, StepEnd):
            self.stats = dict(event.stats)
        elif isinstance(event, SampleLogged) and event.role not in PAIR_SIDES:
            self.sample = event

    @property
    def status(self) -> str:
        if self.state.ended is not None:
            return self.state.ended.status
        return "running" if self.state.started is not None else "starting"

    @property
    def title(self) -> str:
        started = self.state.started
        if started is None:
            return "run"
        return started.name or "run"

    @property
    def subtitle(self) -> str:
        """What is trained, and the stage of a chain."""
        started = self.state.started
        if started is None:
            return ""
        words = f"{started.algorithm.upper()} of {started.model}"
        if started.device:
            words += f" on {started.device}"
        if started.stages > 1:
            words += f", stage {started.stage} of {started.stages}"
        return words

    @property
    def share(self) -> float:
        """The share of the steps that are done."""
        return min(1.0, self.state.step / self.state.steps) if self.state.steps else 0.0

    @property
    def facts(self) -> str:
        """Step, time and speed in one line."""
        state = self.state
        totals = state.totals
        parts = []
        if state.steps:
            parts.append(f"step {state.step:,} of {state.steps:,} ({percent(self.share)})")
        parts.append(f"{wall_time(totals.seconds, totals.sessions)} so far")
        if state.seconds_left is not None and state.ended is None:
            parts.append(f"ETA {clock(state.seconds_left)}")
        if totals.tokens:
            parts.append(f"{rate(totals.tokens_per_second)} tokens/s")
        return "  \u00b7  ".join(parts)

    @property
    def job(self) -> str:
        """The current job other than training, with the share that is done."""
        job = self.state.job
        if job is None or self.state.ended is not None:
            return ""
        share = job.done / job.total if job.total else 0.0
        return f"{job.description}: {percent(share)}" if job.total > 1 else job.description

    def output(self) -> Output:
        """Returns the run as an output of a notebook."""
        state = self.state
        html = render(
            "notebook_live",
            style=style_of("notebook.css"),
            run=self,
            values=format_stats(self.stats),
            charts=leading_charts(self.log),
            warnings=[line.text for line in state.warnings][-MAX_WARNINGS:],
            failure=state.ended.message if state.ended is not None and state.ended.status == "failed" else "",
            log=[line.text for line in state.log][-MAX_LOG_LINES:],
            max_prompt=MAX_PROMPT,
            max_completion=MAX_COMPLETION,
        )
        return Output(str(html), f"{escape_control_chars(self.title)}: {self.status}, {self.facts}")


def _stage_line(started: RunStarted, log: RunLog) -> str:
    """Returns a finished stage in one line."""
    words = f"stage {started.stage} of {started.stages}: {started.algorithm.upper()}, {log.step:,} steps"
    last = {name: values[max(values)] for name, values in log.series.items() if name in ("reward", "loss")}
    if last:
        words += f", {format_stats(last)}"
    return f"{words} in {clock(log.totals.seconds)}"
