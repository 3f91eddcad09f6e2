"""One run: folder, sinks, base, loop, and what is left at the end. `run(recipe)` is the whole kit in one call."""

from __future__ import annotations

import html
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

from lowrank_tune import unsloth_import
from lowrank_tune.assembly import build
from lowrank_tune.assembly.run_date import with_template_date
from lowrank_tune.checkpoint import (
    RunFolder,
    as_user_error,
    broken_final_reason,
    latest_checkpoint,
    quarantine_broken_final,
)
from lowrank_tune.config import Chain, RecipeConfig, backends_of, differences, dump, load_any
from lowrank_tune.config.chain import stage_folder
from lowrank_tune.config.memory import suggestions
from lowrank_tune.errors import OutOfMemory, UserError
from lowrank_tune.events import Emit, Event, LogMessage, RunEnded, SampleLogged, StepEnd
from lowrank_tune.memory_planner import gpu_memory_gib
from lowrank_tune.model.base import Base
from lowrank_tune.model.oom import DoesNotFit, free_traceback, is_out_of_memory
from lowrank_tune.preflight import check_before_loading
from lowrank_tune.training import trackers
from lowrank_tune.training.final_adapter import final_folder
from lowrank_tune.training.signals import TrainerControl, handle_signals
from lowrank_tune.training.sinks import EventBus, JsonLines, Sink, log_gaps
from lowrank_tune.training.stage import Stage
from lowrank_tune.ui.report import write_report
from lowrank_tune.ui.terminal.device import can_show
from lowrank_tune.ui.terminal.plain import LineLogger
from lowrank_tune.ui.terminal.tui import Tui
from lowrank_tune.ui.views.summary import summary_table
from lowrank_tune.ui.wall_time import WallTime
from lowrank_tune.ui.watch import read_events


@dataclass(frozen=True)
class RunResult:
    """How a run ended, where its folder is, and its `summary.json`."""

    status: Literal["done", "interrupted"]
    folder: Path
    summary: dict[str, Any]

    def __repr__(self) -> str:
        return f"RunResult(status={self.status!r}, folder={str(self.folder)!r})"

    def _repr_html_(self) -> str:
        """The table that the command line prints, for a notebook."""
        return f"<pre>{html.escape(summary_table(self.summary, self.folder))}</pre>"


class _SummaryRecorder:
    """Keeps the events that came before the log file was open, the warnings, and the last values, for the summary."""

    def __init__(self) -> None:
        self.earlier: list[Event] | None = []
        self.warnings: list[str] = []
        self.last: dict[str, float] = {}
        self.earlier_seconds = 0.0  # of the sessions before

    def __call__(self, event: Event) -> None:
        if self.earlier is not None:
            self.earlier.append(event)
        if isinstance(event, LogMessage) and event.level == "warning":
            self.warnings.append(event.message)
        if isinstance(event, StepEnd):
            self.last = {"step": event.step, **event.stats}

    def start_stage(self, events: Iterable[Event], start_time: float) -> None:
        """A stage begins: it has its own warnings, and the last values of the part of it that stands in the log: one
        that was killed at its very end has no step left to do."""
        self.warnings = [
            event.message for event in self.earlier or () if isinstance(event, LogMessage) and event.level == "warning"
        ]
        # the messages of the checks before the stage are of this session, and in the log already
        session_start = min([start_time, *(event.time for event in self.earlier or ())])
        self.earlier = None
        self.last = {}
        wall_time = WallTime()
        for event in events:
            if event.time < session_start:
                wall_time.apply(event)
            if isinstance(event, StepEnd):
                self.last = {"step": event.step, **event.stats}
        self.earlier_seconds = wall_time.seconds

    def emit_failure(
        self,
        emit: Emit,
        status: Literal["interrupted", "failed"],
        step: int,
        seconds: float,
        message: str,
        position: StagePosition,
    ) -> None:
        """The last event of a run that broke. The disk may be full by now, and what broke the run is what its user must
        read."""
        with suppress(UserError):
            emit(
                RunEnded(
                    status=status,
                    step=int(self.last.get("step", step)),
                    seconds=seconds,
                    message=message,
                    stage=position.number,
                    stages=position.count,
                )
            )

    def close(self) -> None: ...


def run(
    recipe: RecipeConfig | Chain | str | Path,
    *overrides: str,
    out: str | Path | None = None,
    ui: str = "auto",
    device: torch.device | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> RunResult:
    """Runs a recipe or a chain of them, a preset's name or a recipe file; continues it where an unfinished run of it
    lies in the folder.

    Raises UserError (a sentence for the person) and KeyboardInterrupt at a second Ctrl-C. `on_event` sees every event.
    """
    if isinstance(recipe, (RecipeConfig, Chain)):
        loaded = recipe
    else:
        loaded = load_any(recipe, *overrides)
    unsloth_import.import_unsloth(backends_of(loaded))  # refused here where nobody did it in time
    control = TrainerControl()
    with handle_signals(control) as set_training:  # around the screen too, which must be taken down whatever comes
        context = _RunContext(control, set_training, ui, device, on_event)
        try:
            path = Path(out) if out else Path("runs") / (loaded.name or "run")
            planned = RunFolder.pick(path)
            if device is None or device.type == "cuda":
                vram_gib = gpu_memory_gib()
            else:
                vram_gib = None
            finished = finished_stages(loaded, planned)
            context.auto_settings = check_before_loading(loaded, planned, finished, vram_gib, context.emit)
            loaded = with_template_date(loaded, path)
            folder = RunFolder.open(path, loaded.to_dict(), dump(loaded), differences, out is not None, context.emit)
            try:
                if isinstance(loaded, Chain):
                    context.stages = loaded.stages
                    return run_chain(loaded, folder, context)
                return run_stage(loaded, folder, context, StagePosition())[0]
            finally:
                write_html_report(folder)
                folder.close()
        finally:
            context.emit.close()


@dataclass(frozen=True)
class StagePosition:
    """Where a run stands in a chain: stage `number` of `count`, under its name there; and what is known of the stage
    before it."""

    number: int = 1
    count: int = 1
    name: str | None = None
    previous_results: Mapping[str, Any] = field(default_factory=dict)


class _RunContext:
    """What all stages of a run share: who listens, who may interrupt, and on which device."""

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
        self.auto_settings: Mapping[str, Mapping[str, Any]] = {}  # what `auto` stands for, by stage
        self.stages: tuple[RecipeConfig, ...] = ()  # of a chain: they share one base
        self.recorder = _SummaryRecorder()
        self.emit = EventBus(self.recorder)
        self.shows_dashboard = ui in ("auto", "tui") and can_show(sys.stdout, os.environ, forced=ui == "tui")
        if ui != "none" and not self.shows_dashboard:
            self.emit.attach(LineLogger())
        if on_event is not None:
            self.emit.attach(_CallbackSink(on_event))

    def show_dashboard(self, log_file: Path, earlier: Iterable[Event]) -> None:
        """Puts the dashboard up, once, with what it missed."""
        if self.shows_dashboard:
            self.shows_dashboard = False
            self.emit.attach(Tui(self.control, log_file), earlier)


def run_stage(
    recipe: RecipeConfig,
    folder: RunFolder,
    context: _RunContext,
    position: StagePosition,
    base: Base | None = None,
    console_log: Path | None = None,
    previous_events: Iterable[Event] = (),
) -> tuple[RunResult, Base]:
    """One algorithm in its folder, from its newest checkpoint to its end. The base comes back without any adapter, for
    the next stage."""
    start_time = time.time()
    emit = context.emit
    recorder = context.recorder
    step = 0
    files: list[Sink] = []
    exit_stack = ExitStack()
    try:
        checkpoint = latest_checkpoint(folder.checkpoints, emit)
        step = checkpoint[0] if checkpoint else 0
        for gap in log_gaps(folder.events, folder.samples, step) if checkpoint else ():
            emit(LogMessage(message=gap, level="warning"))
        if position.count > 1:
            name = f"{folder.path.resolve().parent.name}-{folder.path.name}"
        else:
            name = folder.path.resolve().name
        if recipe.train.trackers:
            earlier_events = list(read_events(folder.events))
        else:
            earlier_events = []
        for path, only in ((folder.events, ()), (folder.samples, (SampleLogged,))):
            files.append(JsonLines(path, step if checkpoint else None, event_types=only))
            emit.attach(files[-1], recorder.earlier or ())
        for tracker in trackers.start_trackers(
            recipe.train.trackers,
            recipe.train.project,
            name,
            folder.path,
            recipe.to_dict(),
            step if checkpoint else None,
            earlier_events,
        ):
            files.append(tracker)
            emit.attach(tracker)
        recorder.start_stage(read_events(folder.events), start_time)
        context.show_dashboard(console_log or folder.console_log, chain(previous_events, read_events(folder.events)))
        if auto_settings := context.auto_settings.get(recipe.name):
            recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=dict(auto_settings))})
        built = build(recipe, emit, context.device, base, fresh=checkpoint is None, stages=context.stages)
        exit_stack.callback(built.close)
        stage = Stage(
            recipe,
            folder,
            built,
            emit,
            context.control,
            checkpoint,
            (position.number, position.count),
            position.name,
            position.previous_results,
        )
        step, finished = stage.train(context.set_training)
        earlier_seconds = recorder.earlier_seconds
        stage.finish(finished, start_time, recorder.last, recorder.warnings, final_folder, earlier_seconds)
        built.roles.unload_adapters()
        return RunResult("done" if finished else "interrupted", folder.path, stage.summary), built.base
    except BaseException as error:
        if is_out_of_memory(error) or isinstance(error, DoesNotFit):
            error = _out_of_memory(error, recipe)
        if isinstance(error, UserError):
            message = str(error)
        else:
            message = type(error).__name__
        recorder.emit_failure(
            emit,
            "interrupted" if isinstance(error, KeyboardInterrupt) else "failed",
            step,
            time.time() - start_time,
            message,
            position,
        )
        raise error
    finally:
        exit_stack.close()
        for file in files:
            emit.detach(file)


def _out_of_memory(error: BaseException, recipe: RecipeConfig) -> OutOfMemory:
    """The sentence with what to type. What the failed attempt held is let go: the process may go on."""
    lines = str(error).splitlines() or [""]
    kind = ""
    tokens = 0
    if isinstance(error, DoesNotFit):
        kind = error.kind
        tokens = error.tokens
    free_traceback(error)
    if lines[0].startswith("out of memory"):
        message = lines[0]
    else:
        message = f"out of memory: {lines[0]}"
    return OutOfMemory(f"{message}; {suggestions(recipe, kind, tokens, torch.cuda.is_available())}")


def run_chain(stage_chain: Chain, folder: RunFolder, context: _RunContext) -> RunResult:
    """Stage after stage over one base in memory, each adapter flowing into the next stack; a stage that has ended is
    left as it is."""
    folders: dict[str, str] = {}
    summaries: list[dict[str, Any]] = []
    base: Base | None = None
    for number, name in enumerate((stage.name for stage in stage_chain.stages), 1):
        path = folder.path / stage_folder(number, name)
        finished_summary = summary_of(path)
        is_finished = finished_summary is not None and finished_summary["status"] == "done"
        if is_finished and quarantine_broken_final(path / "final", context.emit):
            with as_user_error(path / "summary.json"):
                (path / "summary.json").unlink()
            is_finished = False
        if finished_summary is not None and is_finished:
            context.emit(
                LogMessage(
                    message=f"stage {number} of {len(stage_chain.stages)}, {name}, has ended and is left as it is: "
                    f"{path}"
                )
            )
            steps = finished_summary.get("step", 0)
            for gap in log_gaps(path / "events.jsonl", path / "samples.jsonl", steps, has_ended=True):
                context.emit(LogMessage(message=gap, level="warning"))
            folders[name] = str(path.resolve())
            summaries.append(finished_summary)
            continue
        recipe = stage_chain.recipe_of(number - 1, folders)
        position = StagePosition(
            number,
            len(stage_chain.stages),
            name,
            _reusable_heldout(stage_chain, number, summaries),
        )
        earlier_events = [
            event for earlier in folders.values() for event in read_events(Path(earlier) / "events.jsonl")
        ]
        with RunFolder.open(path, recipe.to_dict(), dump(recipe), differences, True, context.emit) as opened:
            try:
                outcome, base = run_stage(recipe, opened, context, position, base, folder.console_log, earlier_events)
            finally:
                write_html_report(opened)
        summaries.append(outcome.summary)
        folders[name] = str(path.resolve())
        if outcome.status == "interrupted":
            break
    summary = chain_summary(stage_chain, summaries)
    folder.write_json("summary.json", summary)
    return RunResult(summary["status"], folder.path, summary)


def finished_stages(loaded: RecipeConfig | Chain, folder: Path) -> frozenset[str]:
    """The stages of a chain that have ended in its folder and will be left as they are. A stage whose final folder is
    broken is not one of them: it is continued, and writes that folder again."""
    if not isinstance(loaded, Chain):
        return frozenset()
    finished: set[str] = set()
    for number, stage in enumerate(loaded.stages, 1):
        path = folder / stage_folder(number, stage.name)
        summary = summary_of(path)
        if summary is not None and summary["status"] == "done" and broken_final_reason(path / "final") is None:
            finished.add(stage.name)
    return frozenset(finished)


def summary_of(path: Path) -> dict[str, Any] | None:
    """The summary that a run left; None where there is none, or a broken one."""
    try:
        summary = json.loads((path / "summary.json").read_bytes())
    except (OSError, ValueError):
        return None
    if isinstance(summary, dict) and "status" in summary:
        return summary
    return None


def _reusable_heldout(stage_chain: Chain, number: int, summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Held-out figures of the stages before, where this one would measure just the same: nothing is asked twice."""
    current = stage_chain.stages[number - 1]
    reusable: dict[str, Any] = {"heldout": {}, "answers": {}}
    for stage, summary in zip(stage_chain.stages, summaries, strict=False):
        ignored_keys = {"eval_steps", "on_reward_hacking"}  # which say nothing of how a final adapter is asked
        if (stage.evaluate.model_dump(exclude=ignored_keys), stage.seed, stage.data.system_prompt) == (
            current.evaluate.model_dump(exclude=ignored_keys),
            current.seed,
            current.data.system_prompt,
        ):
            reusable["heldout"] |= summary.get("heldout_details", {})
            reusable["answers"] |= summary.get("answers", {})
    return reusable


def chain_summary(stage_chain: Chain, summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """What the stages left, together; held-out figures under the names of the base and of the stages."""
    stages = []
    for number, (stage, summary) in enumerate(zip(stage_chain.stages, summaries, strict=False), 1):
        kept_keys = ("algorithm", "status", "step", "steps", "seconds", "last", "best", "heldout_pairs")
        stages.append(
            {
                "name": stage.name,
                "folder": stage_folder(number, stage.name),
                **{key: summary[key] for key in kept_keys if key in summary},
            }
        )
    merged = {
        key: {name: value for summary in summaries for name, value in summary.get(key, {}).items()}
        for key in ("heldout", "heldout_details", "answers")
    }
    done = len(summaries) == len(stage_chain.stages) and all(summary["status"] == "done" for summary in summaries)
    all_warnings = [
        f"{stage['name']}: {warning}"
        for stage, summary in zip(stages, summaries, strict=True)
        for warning in summary["warnings"]
    ]
    return {
        "version": 1,
        "status": "done" if done else "interrupted",
        "name": stage_chain.name,
        "algorithm": stage_chain.algorithm,
        "seconds": round(sum(stage.get("seconds", 0.0) for stage in stages), 1),
        "stages": stages,
        **merged,
        "warnings": all_warnings,
    }


class _CallbackSink:
    def __init__(self, function: Callable[[Event], None]) -> None:
        self.function = function

    def __call__(self, event: Event) -> None:
        self.function(event)

    def close(self) -> None: ...


def write_html_report(folder: RunFolder) -> None:
    """The page for a browser, whichever way the run ended. It is a gift: that it cannot be written breaks nothing."""
    if not folder.events.exists() and not any(folder.path.glob("*/events.jsonl")):
        return
    try:
        write_report(folder.path)
    except Exception as error:
        warnings.warn(
            f"report.html could not be written: {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
