"""The plain console: a line for each thing that happened. It reads the same in a terminal, in a pipe and in a log
file."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
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
from lowrank_tune.ui import escape_control_chars
from lowrank_tune.ui.formatting import EtaEstimator, clock, format_stats, number, signed, stage_of, validation_line
from lowrank_tune.ui.metrics import PAIR_SIDES, WITHOUT_REFERENCE

_STYLES = {"warning": "33", "good": "32", "quiet": "2"}  # yellow, green, dim


class LineLogger:
    """A sink that writes lines to `file`. Colors and bars only on a terminal; not one escape byte elsewhere; NO_COLOR
    is honored."""

    def __init__(self, file: TextIO | None = None, environ: Mapping[str, str] = os.environ) -> None:
        self.file = sys.stdout if file is None else file
        self.terminal = self.file.isatty() and environ.get("TERM", "dumb") != "dumb"
        self._color = self.terminal and not environ.get("NO_COLOR")
        self._eta = EtaEstimator()
        self._last_start: RunStarted | None = None
        self._tokens = 0
        self._seconds = 0.0
        self._bar: Bar | None = None
        self._task: tuple[str, TaskID] | None = None
        self._last_progress: dict[str, tuple[float, float]] = {}  # of each job: the share and the time of its last line

    def __call__(self, event: Event) -> None:
        if isinstance(event, Progress):
            if self.terminal:
                self._draw_bar(event)
            else:
                self._print_progress(event)
        elif isinstance(event, StepEnd):
            self._step(event)
        elif isinstance(event, RunStarted):
            self._eta = EtaEstimator()
            self._tokens = 0
            self._seconds = 0.0
            self._started(event)
        elif isinstance(event, Evaluated):
            self._print(validation_line(event))
        elif isinstance(event, SampleLogged):
            self._sample(event)
        elif isinstance(event, CheckpointSaved):
            self._print(f"saved {Path(event.path).name} ({event.seconds:.1f} s)", "quiet")
        elif isinstance(event, LogMessage):
            prefix = "warning: " if event.level == "warning" else ""
            for i, line in enumerate(event.message.splitlines() or [""]):  # an indent shows that a line goes on
                self._print((prefix if i == 0 else "  ") + line, "warning" if prefix else "")
        elif isinstance(event, RunEnded):
            # Why it failed is what the run raises, and what the command line then prints.
            style = "good" if event.status == "done" else "warning"
            index, count = stage_of(event, self._last_start)
            stage = f"stage {index} of {count} " if count > 1 else ""
            self._print(f"{stage}{event.status} after step {event.step} in {clock(event.seconds)}", style)

    def close(self) -> None:
        """Takes a bar off the screen, and gives the cursor back."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None

    def _print(self, text: str, style: str = "") -> None:
        self.close()
        encoding = getattr(self.file, "encoding", None) or "utf-8"
        # a console in ASCII is no reason to stop a run
        text = escape_control_chars(text).encode(encoding, "backslashreplace").decode(encoding)
        if self._color and style:
            text = f"\x1b[{_STYLES[style]}m{text}\x1b[0m"
        self.file.write(text + "\n")
        self.file.flush()

    def _started(self, event: RunStarted) -> None:
        where = f" on {event.device}" if event.device else ""
        trained = f"{event.trainable:,} trained parameters"
        self._last_start = event
        if event.stages > 1:
            stage = f", stage {event.stage} of {event.stages}"
        else:
            stage = ""
        name = f" {event.name}" if event.name else ""  # a recipe made in Python can be without one
        self._print(f"run{name}{stage}: {event.algorithm} of {event.model}{where}, {event.steps} steps, {trained}")
        for role, stack in event.roles.items():
            if role == "reference":
                continue  # said in words below
            self._print(f"  {role}: {' + '.join(stack) or 'the base'}")
        if event.algorithm not in WITHOUT_REFERENCE:
            self._print(f"  reference: {event.reference}")
        if event.resumed_from:
            self._print(f"  continued after step {event.resumed_from}")

    def _step(self, event: StepEnd) -> None:
        left = self._eta.seconds_left(event)
        self._tokens = self._tokens + event.tokens
        self._seconds = self._seconds + event.seconds
        if not event.logged:
            return
        if self._seconds:
            speed = {"tokens_per_second": self._tokens / self._seconds}
        else:
            speed = {}
        self._tokens = 0
        self._seconds = 0.0
        width = len(str(event.steps))
        self._print(
            f"step {event.step:{width}d}/{event.steps}  {format_stats({**speed, **event.stats})}  ETA {clock(left)}"
        )

    def _sample(self, event: SampleLogged) -> None:
        if event.role in PAIR_SIDES:  # one side of a pair and its score: how it was written is not the model's doing
            if event.reward is None:
                score = ""
            else:
                score = f"  [score {signed(event.reward)}]"
            self._print(
                f"  {event.role:8} {escape_control_chars(event.prompt, 60)} -> "
                f"{escape_control_chars(event.completion, 120)}{score}"
            )
            return
        facts = [event.finish_reason]
        if event.ground_truth is not None:
            facts.append(f"gold {escape_control_chars(event.ground_truth, 24)}")
        if event.reward is not None:
            facts.append(f"reward {number(event.reward)}")
        self._print(
            f"  {escape_control_chars(event.prompt, 60)} -> {escape_control_chars(event.completion, 120)}  "
            f"[{', '.join(facts)}]"
        )

    def _print_progress(self, event: Progress) -> None:
        """At the end of a job; before it a line for each tenth, but at most every 5 s; and where a tenth takes long,
        every minute."""
        total = max(event.done, event.total)  # more is read than was asked for where rows are dropped
        share = event.done / total if total else 1.0
        last_share, when = self._last_progress.setdefault(event.description, (0.0, event.time))
        waited = event.time - when
        left = ""
        if event.done >= event.total:
            del self._last_progress[event.description]
        elif (share - last_share >= 0.1 and waited >= 5) or (share > last_share and waited >= 60):
            self._last_progress[event.description] = (share, event.time)
            left = f"  ETA {clock((1 - share) * waited / (share - last_share))}"
        else:
            return
        self._print(f"{event.description}: {event.done:,}/{total:,} ({100 * share:.0f} %){left}")

    def _draw_bar(self, event: Progress) -> None:
        description = escape_control_chars(event.description, 40)
        if self._bar is None or self._task is None or self._task[0] != description:
            self.close()
            # the console is told everything, since rich would otherwise read the process's own environment; drawn here,
            # by no thread
            console = Console(file=self.file, force_terminal=True, no_color=not self._color, highlight=False)
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Bar(*columns, console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
            self._bar.start()
            self._task = (description, self._bar.add_task(description, total=event.total))
            self._last_progress[description] = (0.0, 0.0)
        over = event.done >= event.total
        self._bar.update(self._task[1], completed=event.done, total=max(event.done, event.total))
        if over or event.time - self._last_progress[description][1] >= 0.1:
            self._last_progress[description] = (0.0, event.time)
            self._bar.refresh()
        if over:
            self.close()
