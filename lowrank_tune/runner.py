"""One run: folder, sinks, base, loop, and what is left at the end. `run(recipe)` is the whole kit in one call."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lowrank_tune import settings
from lowrank_tune.build import build
from lowrank_tune.checkpoint import RunFolder, newest
from lowrank_tune.control import Control, asked_by_signals
from lowrank_tune.errors import OutOfMemory, UserError
from lowrank_tune.events import Emit, Event, Note, RunEnded, Sampled, StepDone
from lowrank_tune.recipe import Recipe, differences, dump
from lowrank_tune.sinks import JsonLines, Tee
from lowrank_tune.stage import Stage
from lowrank_tune.ui.plain import Plain
from lowrank_tune.ui.report import write_report
from lowrank_tune.ui.terminal import can_show
from lowrank_tune.ui.tui import Tui
from lowrank_tune.ui.watch import events_in


@dataclass(frozen=True)
class Outcome:
    """How a run ended, where its folder is, and its `summary.json`."""

    status: Literal["done", "interrupted"]
    folder: Path
    summary: dict[str, Any]


class _Listener:
    """Keeps the events that came before the log file was open, the warnings, and the last values, for the summary."""

    def __init__(self) -> None:
        self.earlier: list[Event] | None = []
        self.warnings: list[str] = []
        self.last: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        if self.earlier is not None:
            self.earlier.append(event)
        if isinstance(event, Note) and event.level == "warning":
            self.warnings.append(event.message)
        if isinstance(event, StepDone):
            self.last = {"step": event.step, **event.stats}

    def catch_up(self, events: Iterable[Event]) -> None:
        """Takes over the last values of the part of a run that stands in the log: a run killed at its very end has no step left to do."""
        for event in events:
            if isinstance(event, StepDone):
                self.last = {"step": event.step, **event.stats}

    def tell_end(self, emit: Emit, status: Literal["interrupted", "failed"], step: int, seconds: float, message: str) -> None:
        """The last event of a run that broke. The disk may be full by now, and what broke the run is what its user must read."""
        with suppress(UserError):
            emit(RunEnded(status=status, step=int(self.last.get("step", step)), seconds=seconds, message=message))

    def close(self) -> None:
        self.earlier = None


def run(recipe: settings.Recipe | str | Path, *overrides: str, out: str | Path | None = None, ui: str = "auto",
        device: torch.device | None = None, on_event: Callable[[Event], None] | None = None) -> Outcome:  # fmt: skip
    """Runs a recipe, a preset's name or a recipe file; continues it where an unfinished run of it lies in the folder.

    Raises UserError (a sentence for the person) and KeyboardInterrupt at a second Ctrl-C. `on_event` sees every event.
    """
    if not isinstance(recipe, settings.Recipe):
        recipe = Recipe.load(recipe, *overrides)
    control = Control()
    with asked_by_signals(control) as training:  # around the screen too, which must be taken down whatever comes
        return _run(recipe, Path(out) if out else None, ui, device, on_event, control, training)


def _run(recipe: settings.Recipe, out: Path | None, ui: str, device: torch.device | None, on_event: Callable[[Event], None] | None,
         control: Control, training: Callable[[bool], None]) -> Outcome:  # fmt: skip
    begun, listener = time.time(), _Listener()
    emit = Tee(listener)
    on_screen = ui in ("auto", "tui") and can_show(sys.stdout, os.environ, forced=ui == "tui")
    if ui != "none" and not on_screen:
        emit.attach(Plain())
    if on_event is not None:
        emit.attach(_Callback(on_event))
    folder = RunFolder.open(out or Path("runs") / (recipe.name or "run"), recipe.to_dict(), dump(recipe), differences,
                            out is not None, emit)  # fmt: skip
    step = 0
    try:
        found = newest(folder.checkpoints, emit)
        step = found[0] if found else 0
        resumed_from = step if found else None
        for path, only in ((folder.events, ()), (folder.samples, (Sampled,))):
            emit.attach(JsonLines(path, resumed_from, only=only), listener.earlier or ())
        listener.earlier = None
        listener.catch_up(events_in(folder.events))
        if on_screen:
            emit.attach(Tui(control, folder.console_log), events_in(folder.events))
        stage = Stage(recipe, folder, build(recipe, emit, device), emit, control, found)
        step, finished = stage.train(training)
        stage.finish(finished, begun, listener.last, listener.warnings)
        status: Literal["done", "interrupted"] = "done" if finished else "interrupted"
        return Outcome(status, folder.path, stage.summary)
    except torch.OutOfMemoryError as error:
        advice = "try train.micro_batch_size=1, train.gradient_checkpointing=true or a smaller data.max_length"
        listener.tell_end(emit, "failed", step, time.time() - begun, "out of memory")
        raise OutOfMemory(f"out of memory: {str(error).splitlines()[0]}; {advice}") from error
    except BaseException as error:
        told = str(error) if isinstance(error, UserError) else type(error).__name__
        listener.tell_end(emit, "interrupted" if isinstance(error, KeyboardInterrupt) else "failed", step, time.time() - begun, told)
        raise
    finally:
        emit.close()
        _report(folder)
        folder.close()


class _Callback:
    def __init__(self, function: Callable[[Event], None]) -> None:
        self.function = function

    def __call__(self, event: Event) -> None:
        self.function(event)

    def close(self) -> None: ...


def _report(folder: RunFolder) -> None:
    """The page for a browser, whichever way the run ended. It is a gift: that it cannot be written breaks nothing."""
    if not folder.events.exists():
        return
    try:
        write_report(folder.path)
    except Exception as error:
        warnings.warn(f"report.html could not be written: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=2)
