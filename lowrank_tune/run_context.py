"""What all stages of a run share: its sinks, what they have seen, the device, and the requests of the user."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowrank_tune.checkpoint import RunFolder
from lowrank_tune.config import RecipeConfig
from lowrank_tune.errors import UserError
from lowrank_tune.events import Event, SampleLogged, StepEnd, is_warning, warning
from lowrank_tune.training import trackers
from lowrank_tune.training.run_totals import Session, TotalsCounter
from lowrank_tune.training.signals import TrainerControl
from lowrank_tune.training.sinks import EventBus, JsonLines, Sink
from lowrank_tune.training.stage import StagePosition
from lowrank_tune.ui.notebook import NotebookView, in_notebook
from lowrank_tune.ui.terminal.device import can_show
from lowrank_tune.ui.terminal.plain import LineLogger
from lowrank_tune.ui.terminal.tui import Tui
from lowrank_tune.ui.watch import read_events


class SummaryRecorder:
    """Sink that keeps what the summary needs: warnings, the metrics of the last step, totals of all sessions.

    `earlier` has the events emitted before the log file was open, None after that.
    """

    def __init__(self) -> None:
        self.earlier: list[Event] | None = []
        self.warnings: list[str] = []
        self.last: dict[str, float] = {}
        self.counter = TotalsCounter()

    def __call__(self, event: Event) -> None:
        if self.earlier is not None:
            self.earlier.append(event)
        if is_warning(event):
            self.warnings.append(event.message)
        self._add(event)

    def _add(self, event: Event) -> None:
        self.counter.apply(event)
        if isinstance(event, StepEnd):
            self.last = {"step": event.step, **event.stats}

    def start_stage(self, events: Iterable[Event]) -> None:
        """Starts a stage: keeps the warnings of this session, and the totals and the last metrics in the log.

        A stage that was killed at its very end has no step left to do, so its last metrics are only in the log.
        """
        self.warnings = [event.message for event in self.earlier or [] if is_warning(event)]
        self.earlier = None
        self.last = {}
        self.counter = TotalsCounter()
        for event in events:
            self._add(event)

    def close(self) -> None: ...


@dataclass(eq=False)
class _CallbackSink:
    function: Callable[[Event], None]

    def __call__(self, event: Event) -> None:
        self.function(event)

    def close(self) -> None: ...


class RunContext:
    """What all stages of a run share: event sinks, the control that a user may set, and the device."""

    def __init__(
        self,
        control: TrainerControl,
        set_training: Callable[[bool], None],
        ui: str,
        device: torch.device | None,
        on_event: Callable[[Event], None] | None,
    ) -> None:
        self.control = control
        self.set_training = set_training
        self.device = device
        # the values of settings that are `auto`, by stage
        self.auto_settings: Mapping[str, Mapping[str, Any]] = {}
        # what all stages may use together on a GPU, unless a stage sets a budget
        self.gpu_budget_bytes = 0
        # of a chain, which share one base
        self.stages: tuple[RecipeConfig, ...] = ()
        self.recorder = SummaryRecorder()
        self.emit = EventBus(self.recorder)
        # below the running cell of a notebook, from its first event on
        self.notebook = NotebookView() if ui == "auto" and in_notebook() else None
        self.shows_dashboard = ui in ("auto", "tui") and can_show(sys.stdout, os.environ, forced=ui == "tui")
        if self.notebook is not None:
            self.emit.attach(self.notebook)
        elif ui != "none" and not self.shows_dashboard:
            self.emit.attach(LineLogger())
        if on_event is not None:
            self.emit.attach(_CallbackSink(on_event))

    def show_dashboard(self, log_file: Path, earlier: Iterable[Event]) -> None:
        """Opens the dashboard, once, and sends it the earlier events."""
        if self.notebook is not None:
            self.notebook.replay(earlier)
            self.notebook = None
        elif self.shows_dashboard:
            self.shows_dashboard = False
            self.emit.attach(Tui(self.control, log_file), earlier)

    def warn(self, messages: Iterable[str]) -> None:
        """Emits warnings."""
        for message in messages:
            self.emit(warning(message))

    def with_auto_settings(self, recipe: RecipeConfig) -> RecipeConfig:
        """Returns the recipe with the planned values of its `auto` settings."""
        planned = self.auto_settings.get(recipe.name)
        if not planned:
            return recipe
        train = recipe.train.model_copy(update=dict(planned))
        return recipe.model_copy(update={"train": train})

    def open_sinks(
        self,
        recipe: RecipeConfig,
        folder: RunFolder,
        position: StagePosition,
        resumed_from: int | None,
    ) -> Iterator[tuple[Sink, Sequence[Event]]]:
        """Yields the sinks of a stage, each with the events that it missed: log, samples, trackers.

        A log that is opened for a resumed run loses what follows the checkpoint. Trackers need it: it is read before.
        """
        logged_events = list(read_events(folder.events)) if recipe.train.trackers else []
        missed_events = self.recorder.earlier or ()
        yield JsonLines(folder.events, resumed_from), missed_events
        yield (
            JsonLines(
                folder.samples,
                resumed_from,
                event_types=(SampleLogged,),
            ),
            missed_events,
        )
        path = folder.path.resolve()
        name = path.name if position.count == 1 else f"{path.parent.name}-{path.name}"
        started = trackers.start_trackers(
            recipe.train.trackers,
            recipe.train.project,
            name,
            folder.path,
            recipe.to_dict(),
            resumed_from,
            logged_events,
        )
        for tracker in started:
            yield tracker, ()

    def emit_failure(
        self,
        error: BaseException,
        step: int,
        session: Session,
        position: StagePosition,
    ) -> None:
        """Emits `RunEnded` for an error. A log that cannot be written now must not hide that error."""
        event = position.ended(
            "interrupted" if isinstance(error, KeyboardInterrupt) else "failed",
            int(self.recorder.last.get("step", step)),
            session,
            session.totals(self.recorder.counter.totals),
            str(error) if isinstance(error, UserError) else type(error).__name__,
        )
        with suppress(UserError):
            self.emit(event)
