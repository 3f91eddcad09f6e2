"""The plain log: a line for each event. It is the same in a terminal, in a pipe and in a log file."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from lowrank_tune.events import (
    CheckpointSaved,
    Evaluated,
    Event,
    LogMessage,
    Progress,
    RunEnded,
    RunStarted,
    SampleLogged,
    StepEnd,
)
from lowrank_tune.training.run_totals import tokens_per_second
from lowrank_tune.ui import encodable, escape_control_chars, is_ascii, mark_line_breaks
from lowrank_tune.ui.cell_output import in_cell
from lowrank_tune.ui.formatting import (
    EtaEstimator,
    clock,
    ended_time,
    format_stats,
    number,
    plural,
    rate,
    signed,
    stage_of,
    validation_line,
)
from lowrank_tune.ui.metrics import PAIR_SIDES, WITHOUT_REFERENCE
from lowrank_tune.ui.terminal.text_layout import with_code

_COLORS = {"": "", "warning": "33", "good": "32", "quiet": "2"}  # yellow, green, dim
MIN_SHARE_STEP = 0.1
MIN_LINE_SECONDS = 5
MAX_LINE_SECONDS = 60
"""A job has a line for each tenth of it, but at most every 5 s; if a tenth takes longer, every minute."""
BAR_SECONDS = 0.1
"""Minimum time between two drawings of a bar."""
PROMPT_LENGTH = 60
COMPLETION_LENGTH = 120


@dataclass(frozen=True)
class ProgressLine:
    """The last line of a job."""

    share: float
    time: float


@dataclass
class JobBar:
    """The bar of the current job."""

    description: str
    bar: Bar
    task: TaskID
    drawn_time: float = 0.0


class LineLogger:
    """A sink that writes lines to `file`. Colors and bars are written to a terminal only, and no escape codes
    elsewhere. NO_COLOR is respected."""

    def __init__(self, file: TextIO | None = None, environ: Mapping[str, str] = os.environ) -> None:
        self.file = sys.stdout if file is None else file
        self.terminal = self.file.isatty() and environ.get("TERM", "dumb") != "dumb" and not in_cell(environ)
        self._color = self.terminal and not environ.get("NO_COLOR")
        self._eta = EtaEstimator()
        self._last_start: RunStarted | None = None
        # of the steps since the last line of a step
        self._tokens = 0
        self._seconds = 0.0
        self._job_bar: JobBar | None = None
        self._progress_lines: dict[str, ProgressLine] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, Progress):
            if self.terminal:
                self._draw_bar(event)
            else:
                self._print_progress(event)
        elif isinstance(event, StepEnd):
            self._print_step(event)
        elif isinstance(event, RunStarted):
            self._print_start(event)
        elif isinstance(event, Evaluated):
            self._print(validation_line(event))
        elif isinstance(event, SampleLogged):
            self._print_sample(event)
        elif isinstance(event, CheckpointSaved):
            self._print(f"saved {Path(event.path).name} ({event.seconds:.1f} s)", "quiet")
        elif isinstance(event, LogMessage):
            self._print_message(event)
        elif isinstance(event, RunEnded):
            self._print_end(event)

    def close(self) -> None:
        """Removes the bar and shows the cursor."""
        if self._job_bar is not None:
            self._job_bar.bar.stop()
        self._job_bar = None

    def _print(self, text: str, style: str = "") -> None:
        self.close()
        text = encodable(escape_control_chars(text), self.file)
        if self._color:
            text = with_code(text, _COLORS[style])
        self.file.write(f"{text}\n")
        self.file.flush()

    def _print_start(self, event: RunStarted) -> None:
        self._eta = EtaEstimator()
        self._tokens = 0
        self._seconds = 0.0
        self._last_start = event
        name = "run"
        # a recipe made in Python may have no name
        if event.name:
            name = f"run {event.name}"
        if event.stages > 1:
            name = f"{name}, stage {event.stage} of {event.stages}"
        model = event.model
        if event.device:
            model = f"{model} on {event.device}"
        trained = plural(event.trainable, "trained parameter")
        self._print(f"{name}: {event.algorithm} of {model}, {plural(event.steps, 'step')}, {trained}")
        for role, stack in event.roles.items():
            if role != "reference":
                self._print(f"  {role}: {' + '.join(stack) or 'the base'}")
        if event.algorithm not in WITHOUT_REFERENCE:
            self._print(f"  reference: {event.reference}")
        if event.resumed_from:
            self._print(f"  continued after step {event.resumed_from}")

    def _print_message(self, event: LogMessage) -> None:
        is_warning = event.level == "warning"
        prefix = "warning: " if is_warning else ""
        style = "warning" if is_warning else ""
        for line in event.message.splitlines() or [""]:
            self._print(f"{prefix}{line}", style)
            # further lines of the same message are indented
            prefix = "  "

    def _print_end(self, event: RunEnded) -> None:
        """Prints the status. The reason of a failure is the exception of the run, which the command line prints."""
        index, count = stage_of(event, self._last_start)
        text = f"{event.status} after step {event.step} in {ended_time(event)}"
        if event.total_tokens:
            speed = tokens_per_second(event.total_tokens, event.total_step_seconds)
            text = f"{text}, {rate(speed)} tokens/s"
        if count > 1:
            text = f"stage {index} of {count} {text}"
        self._print(text, "good" if event.status == "done" else "warning")

    def _print_step(self, event: StepEnd) -> None:
        left = self._eta.seconds_left(event)
        self._tokens += event.tokens
        self._seconds += event.seconds
        if not event.logged:
            return
        stats = dict(event.stats)
        if self._seconds:
            stats.setdefault("tokens_per_second", self._tokens / self._seconds)
        self._tokens = 0
        self._seconds = 0.0
        width = len(str(event.steps))
        self._print(f"step {event.step:{width}d}/{event.steps}  {format_stats(stats)}  ETA {clock(left)}")

    def _print_sample(self, event: SampleLogged) -> None:
        ascii_only = is_ascii(self.file)
        prompt = escape_control_chars(mark_line_breaks(event.prompt, ascii_only), PROMPT_LENGTH)
        completion = escape_control_chars(mark_line_breaks(event.completion, ascii_only), COMPLETION_LENGTH)
        if event.role in PAIR_SIDES:
            # the data contain this answer, so its finish reason has no meaning
            score = ""
            if event.reward is not None:
                score = f"  [score {signed(event.reward)}]"
            self._print(f"  {event.role:8} {prompt} -> {completion}{score}")
            return
        facts = [event.finish_reason]
        if event.ground_truth is not None:
            facts.append(f"gold {escape_control_chars(event.ground_truth, 24)}")
        if event.reward is not None:
            facts.append(f"reward {number(event.reward)}")
        self._print(f"  {prompt} -> {completion}  [{', '.join(facts)}]")

    def _print_progress(self, event: Progress) -> None:
        """Prints a line at the end of a job, and before it as often as `MIN_SHARE_STEP` allows."""
        share = event.done / event.total if event.total else 1.0
        text = f"{event.description}: {event.done:,}/{event.total:,} ({100 * share:.0f} %)"
        last = self._progress_lines.setdefault(event.description, ProgressLine(0.0, event.time))
        if event.done >= event.total:
            del self._progress_lines[event.description]
            self._print(text)
            return
        waited = event.time - last.time
        grown = share - last.share
        is_due = grown >= MIN_SHARE_STEP and waited >= MIN_LINE_SECONDS
        is_overdue = grown > 0 and waited >= MAX_LINE_SECONDS
        if is_due or is_overdue:
            self._progress_lines[event.description] = ProgressLine(share, event.time)
            self._print(f"{text}  ETA {clock((1 - share) * waited / grown)}")

    def _draw_bar(self, event: Progress) -> None:
        description = escape_control_chars(event.description, 40)
        job = self._job_bar
        if job is None or job.description != description:
            self.close()
            job = self._start_bar(description, event.total)
            self._job_bar = job
        is_finished = event.done >= event.total
        job.bar.update(
            job.task,
            completed=event.done,
            total=event.total,
        )
        if is_finished or event.time - job.drawn_time >= BAR_SECONDS:
            job.drawn_time = event.time
            job.bar.refresh()
        if is_finished:
            self.close()

    def _start_bar(self, description: str, total: int) -> JobBar:
        # all options are given, because rich would otherwise read the environment of the process
        console = Console(
            file=self.file,
            force_terminal=True,
            no_color=not self._color,
            highlight=False,
        )
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        # drawn by `refresh` only, not by a thread of rich
        bar = Bar(
            *columns,
            console=console,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        bar.start()
        return JobBar(description, bar, bar.add_task(description, total=total))
