"""One run: folder, sinks, base, loop, and what is left at the end. `run(recipe)` is the whole kit in one call."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch

from lowrank_tune import early, settings, trackers
from lowrank_tune.build import build
from lowrank_tune.checkpoint import RunFolder, newest
from lowrank_tune.control import Control, asked_by_signals
from lowrank_tune.errors import OutOfMemory, UserError
from lowrank_tune.events import Emit, Event, Note, RunEnded, Sampled, StepDone
from lowrank_tune.export import final_folder
from lowrank_tune.model.base import Base
from lowrank_tune.model.recovery import DoesNotFit, is_out_of_memory, let_go
from lowrank_tune.plan import card_gib, fitted
from lowrank_tune.recipe import Chain, backends_of, differences, dump, load_any
from lowrank_tune.recipe.memory import advice
from lowrank_tune.sinks import JsonLines, Sink, Tee
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

    def begin(self, events: Iterable[Event]) -> None:
        """A stage begins: it has its own warnings, and the last values of the part of it that stands in the log: one
        that was killed at its very end has no step left to do."""
        self.warnings = [
            event.message for event in self.earlier or () if isinstance(event, Note) and event.level == "warning"
        ]
        self.earlier, self.last = None, {}
        for event in events:
            if isinstance(event, StepDone):
                self.last = {"step": event.step, **event.stats}

    def tell_end(
        self, emit: Emit, status: Literal["interrupted", "failed"], step: int, seconds: float, message: str
    ) -> None:
        """The last event of a run that broke. The disk may be full by now, and what broke the run is what its user must
        read."""
        with suppress(UserError):
            emit(RunEnded(status=status, step=int(self.last.get("step", step)), seconds=seconds, message=message))

    def close(self) -> None: ...


def run(
    recipe: settings.Recipe | Chain | str | Path,
    *overrides: str,
    out: str | Path | None = None,
    ui: str = "auto",
    device: torch.device | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Outcome:
    """Runs a recipe or a chain of them, a preset's name or a recipe file; continues it where an unfinished run of it
    lies in the folder.

    Raises UserError (a sentence for the person) and KeyboardInterrupt at a second Ctrl-C. `on_event` sees every event.
    """
    loaded = recipe if isinstance(recipe, (settings.Recipe, Chain)) else load_any(recipe, *overrides)
    early.import_first(backends_of(loaded))  # refused here where nobody did it in time
    trackers.check(
        name for one in (loaded.stages if isinstance(loaded, Chain) else (loaded,)) for name in one.train.trackers
    )
    control, begun = Control(), time.time()
    with asked_by_signals(control) as training:  # around the screen too, which must be taken down whatever comes
        console = _Console(control, training, ui, device, on_event)
        try:
            if (room := card_gib() if device is None or device.type == "cuda" else None) is not None:
                console.fits = fitted(loaded, room, console.emit)
            path = Path(out) if out else Path("runs") / (loaded.name or "run")
            folder = RunFolder.open(path, loaded.to_dict(), dump(loaded), differences, out is not None, console.emit)
            try:
                if isinstance(loaded, Chain):
                    return run_chain(loaded, folder, console, begun)
                return run_stage(loaded, folder, console, Place())[0]
            finally:
                report(folder)
                folder.close()
        finally:
            console.emit.close()


@dataclass(frozen=True)
class Place:
    """Where a run stands in a chain: stage `number` of `count`, under its name there; and what is known of the stage
    before it."""

    number: int = 1
    count: int = 1
    name: str | None = None
    earlier: Mapping[str, Any] = field(default_factory=dict)


class _Console:
    """What all stages of a run share: who listens, who may interrupt, and on which device."""

    def __init__(
        self,
        control: Control,
        training: Callable[[bool], None],
        ui: str,
        device: torch.device | None,
        on_event: Callable[[Event], None] | None,
    ) -> None:
        self.control, self.training, self.device = control, training, device
        self.fits: Mapping[str, Mapping[str, Any]] = {}  # what `auto` stands for, by stage
        self.listener = _Listener()
        self.emit = Tee(self.listener)
        self.on_screen = ui in ("auto", "tui") and can_show(sys.stdout, os.environ, forced=ui == "tui")
        if ui != "none" and not self.on_screen:
            self.emit.attach(Plain())
        if on_event is not None:
            self.emit.attach(_Callback(on_event))

    def show(self, log: Path, earlier: Iterable[Event]) -> None:
        """Puts the dashboard up, once, with what it missed."""
        if self.on_screen:
            self.on_screen = False
            self.emit.attach(Tui(self.control, log), earlier)


def run_stage(
    recipe: settings.Recipe,
    folder: RunFolder,
    console: _Console,
    place: Place,
    base: Base | None = None,
    console_log: Path | None = None,
    before: Iterable[Event] = (),
) -> tuple[Outcome, Base]:
    """One algorithm in its folder, from its newest checkpoint to its end. The base comes back without any adapter, for
    the next stage."""
    begun, emit, listener, step = time.time(), console.emit, console.listener, 0
    files: list[Sink] = []
    closing = ExitStack()
    try:
        found = newest(folder.checkpoints, emit)
        step = found[0] if found else 0
        name = (
            f"{folder.path.resolve().parent.name}-{folder.path.name}" if place.count > 1 else folder.path.resolve().name
        )
        before_cut = list(events_in(folder.events)) if recipe.train.trackers else []
        for path, only in ((folder.events, ()), (folder.samples, (Sampled,))):
            files.append(JsonLines(path, step if found else None, only=only))
            emit.attach(files[-1], listener.earlier or ())
        for tracker in trackers.begin(
            recipe.train.trackers,
            recipe.train.project,
            name,
            folder.path,
            recipe.to_dict(),
            step if found else None,
            before_cut,
        ):
            files.append(tracker)
            emit.attach(tracker)
        listener.begin(events_in(folder.events))
        console.show(console_log or folder.console_log, chain(before, events_in(folder.events)))
        if changes := console.fits.get(recipe.name):
            recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=dict(changes))})
        built = build(recipe, emit, console.device, base, fresh=found is None)
        closing.callback(built.close)
        stage = Stage(
            recipe, folder, built, emit, console.control, found, (place.number, place.count), place.name, place.earlier
        )
        step, finished = stage.train(console.training)
        stage.finish(finished, begun, listener.last, listener.warnings, final_folder)
        built.roles.release()
        return Outcome("done" if finished else "interrupted", folder.path, stage.summary), built.base
    except BaseException as error:
        if is_out_of_memory(error) or isinstance(error, DoesNotFit):
            error = _out_of_memory(error, recipe)
        told = str(error) if isinstance(error, UserError) else type(error).__name__
        listener.tell_end(
            emit, "interrupted" if isinstance(error, KeyboardInterrupt) else "failed", step, time.time() - begun, told
        )
        raise error
    finally:
        closing.close()
        for file in files:
            emit.detach(file)


def _out_of_memory(error: BaseException, recipe: settings.Recipe) -> OutOfMemory:
    """The sentence with what to type. What the failed attempt held is let go: the process may go on."""
    said, kind, tokens = str(error).splitlines() or [""], "", 0
    if isinstance(error, DoesNotFit):
        kind, tokens = error.kind, error.tokens
    let_go(error)
    first = said[0] if said[0].startswith("out of memory") else f"out of memory: {said[0]}"
    return OutOfMemory(f"{first}; {advice(recipe, kind, tokens, torch.cuda.is_available())}")


def run_chain(recipes: Chain, folder: RunFolder, console: _Console, begun: float) -> Outcome:
    """Stage after stage over one base in memory, each adapter flowing into the next stack; a stage that has ended is
    left as it is."""
    folders: dict[str, str] = {}
    summaries: list[dict[str, Any]] = []
    base: Base | None = None
    for number, name in enumerate((stage.name for stage in recipes.stages), 1):
        path = folder.path / f"{number}-{name}"
        ended = summary_of(path)
        if ended is not None and ended["status"] == "done":
            console.emit(
                Note(message=f"stage {number} of {len(recipes.stages)}, {name}, has ended and is left as it is: {path}")
            )
            folders[name] = str(path.resolve())
            summaries.append(ended)
            continue
        recipe = recipes.recipe_of(number - 1, folders)
        place = Place(number, len(recipes.stages), name, _known(recipes, number, summaries))
        shown = [event for earlier in folders.values() for event in events_in(Path(earlier) / "events.jsonl")]
        with RunFolder.open(path, recipe.to_dict(), dump(recipe), differences, True, console.emit) as opened:
            try:
                outcome, base = run_stage(recipe, opened, console, place, base, folder.console_log, shown)
            finally:
                report(opened)
        summaries.append(outcome.summary)
        folders[name] = str(path.resolve())
        if outcome.status == "interrupted":
            break
    summary = chain_summary(recipes, summaries, time.time() - begun)
    folder.write_json("summary.json", summary)
    return Outcome(summary["status"], folder.path, summary)


def summary_of(path: Path) -> dict[str, Any] | None:
    """The summary that a run left; None where there is none, or a broken one."""
    try:
        found = json.loads((path / "summary.json").read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "status" in found else None


def _known(recipes: Chain, number: int, summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Held-out figures of the stages before, where this one would measure just the same: nothing is asked twice."""
    wanted = recipes.stages[number - 1]
    known: dict[str, Any] = {"heldout": {}, "answers": {}}
    for stage, summary in zip(recipes.stages, summaries, strict=False):
        apart = {"every", "on_hacking"}  # which say nothing of how a final adapter is asked
        if (stage.evaluate.model_dump(exclude=apart), stage.seed, stage.data.system) == (
            wanted.evaluate.model_dump(exclude=apart),
            wanted.seed,
            wanted.data.system,
        ):
            known["heldout"] |= summary.get("heldout_details", {})
            known["answers"] |= summary.get("answers", {})
    return known


def chain_summary(recipes: Chain, summaries: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """What the stages left, together; held-out figures under the names of the base and of the stages."""
    stages = []
    for number, (stage, summary) in enumerate(zip(recipes.stages, summaries, strict=False), 1):
        kept = ("algorithm", "status", "step", "steps", "seconds", "last", "best", "heldout_pairs")
        stages.append(
            {
                "name": stage.name,
                "folder": f"{number}-{stage.name}",
                **{key: summary[key] for key in kept if key in summary},
            }
        )
    merged = {
        key: {name: value for summary in summaries for name, value in summary.get(key, {}).items()}
        for key in ("heldout", "heldout_details", "answers")
    }
    done = len(summaries) == len(recipes.stages) and all(summary["status"] == "done" for summary in summaries)
    warned = [
        f"{stage['name']}: {warning}"
        for stage, summary in zip(stages, summaries, strict=True)
        for warning in summary["warnings"]
    ]
    return {
        "version": 1,
        "status": "done" if done else "interrupted",
        "name": recipes.name,
        "algorithm": recipes.algorithm,
        "seconds": round(seconds, 1),
        "stages": stages,
        **merged,
        "warnings": warned,
    }


class _Callback:
    def __init__(self, function: Callable[[Event], None]) -> None:
        self.function = function

    def __call__(self, event: Event) -> None:
        self.function(event)

    def close(self) -> None: ...


def report(folder: RunFolder) -> None:
    """The page for a browser, whichever way the run ended. It is a gift: that it cannot be written breaks nothing."""
    if not folder.events.exists() and not any(folder.path.glob("*/events.jsonl")):
        return
    try:
        write_report(folder.path)
    except Exception as error:
        warnings.warn(
            f"report.html could not be written: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=2
        )
