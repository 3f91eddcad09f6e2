"""Runs recipes and chains: folder, sinks, base, stages, summary. `run(recipe)` is the kit in one call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch

from lowrank_tune import unsloth_import
from lowrank_tune.assembly import build
from lowrank_tune.assembly.run_date import with_template_date
from lowrank_tune.checkpoint import (
    RunFolder,
    Snapshot,
    as_user_error,
    broken_final_reason,
    latest_checkpoint,
    quarantine_broken_final,
)
from lowrank_tune.config import Chain, RecipeConfig, backends_of, differences, dump, load_any
from lowrank_tune.config.chain import stage_folder
from lowrank_tune.config.memory import suggestions
from lowrank_tune.errors import OutOfMemory, UserError
from lowrank_tune.events import Emit, Event, LogMessage, warning
from lowrank_tune.memory_planner.planned_gpu import installed_spec
from lowrank_tune.memory_planner.update_speed import estimated_update_speed
from lowrank_tune.model.base import HashedBase
from lowrank_tune.model.gpu_memory import read_gpu_memory
from lowrank_tune.model.oom import DoesNotFit, free_traceback, is_out_of_memory
from lowrank_tune.preflight import check_before_loading
from lowrank_tune.preflight.run_memory import MEMORY_FILE, RunMemory, start_memory
from lowrank_tune.run_context import RunContext
from lowrank_tune.run_summary import SUMMARY, read_done_summary
from lowrank_tune.training.final_adapter import final_folder
from lowrank_tune.training.run_totals import Session, totals_of
from lowrank_tune.training.signals import TrainerControl, handle_signals
from lowrank_tune.training.sinks import log_gaps
from lowrank_tune.training.speed import SpeedComparison
from lowrank_tune.training.stage import Stage, StagePosition
from lowrank_tune.training.summaries import chain_summary, reusable_results
from lowrank_tune.ui.notebook import result_html
from lowrank_tune.ui.report import write_report
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
        """Curves, figures and next steps, for a notebook."""
        return result_html(self.summary, self.folder)


def run(
    recipe: RecipeConfig | Chain | str | Path,
    *overrides: str,
    out: str | Path | None = None,
    ui: str = "auto",
    device: torch.device | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> RunResult:
    """Runs a recipe or a chain, given as an object, a preset name or a file; resumes an unfinished run in its folder.

    `ui` is `auto` (curves below the cell of a notebook, the dashboard in a terminal, else lines), `tui`, `plain` or
    `none`. `on_event` is called with every event. Raises UserError, and KeyboardInterrupt at a second Ctrl-C.
    """
    if isinstance(recipe, (RecipeConfig, Chain)):
        loaded = recipe
    else:
        loaded = load_any(recipe, *overrides)
    # raises UserError if unsloth was not imported in time
    unsloth_import.import_unsloth(backends_of(loaded))
    control = TrainerControl()
    # the signal handlers enclose the dashboard, which must be closed on every path
    with handle_signals(control) as set_training:
        context = RunContext(
            control,
            set_training,
            ui,
            device,
            on_event,
        )
        try:
            return _run_in_folder(loaded, out, context)
        finally:
            context.emit.close()


def _run_in_folder(
    loaded: RecipeConfig | Chain,
    out: str | Path | None,
    context: RunContext,
) -> RunResult:
    """Checks what can be checked before loading, opens the run folder and runs the stages."""
    path = Path(out) if out else Path("runs") / (loaded.name or "run")
    planned = RunFolder.pick(path)
    memory = _start_memory(path, context)
    finished = finished_stages(loaded, planned)
    context.auto_settings = check_before_loading(
        loaded,
        planned,
        finished,
        None if memory is None else memory.budget_gib,
        context.emit,
        {} if memory is None else memory.kept_values(loaded.stages),
    )
    loaded = with_template_date(loaded, path)
    folder = RunFolder.open(
        path,
        loaded.to_dict(),
        dump(loaded),
        differences,
        out is not None,
        context.emit,
    )
    try:
        if memory is not None:
            context.gpu_budget_bytes = memory.budget_bytes
            memory = memory.with_values(loaded.stages, context.auto_settings)
            folder.write_json(MEMORY_FILE, memory.to_dict())
        if isinstance(loaded, Chain):
            context.stages = loaded.stages
            return run_chain(loaded, folder, context)
        result, _ = run_stage(
            loaded,
            folder,
            context,
            StagePosition(),
        )
        return result
    finally:
        write_html_report(folder)
        folder.close()


def _start_memory(path: Path, context: RunContext) -> RunMemory | None:
    """Returns the memory that the run may use: that of its first start, or what is free now. None without a GPU."""
    if context.device is not None and context.device.type != "cuda":
        return None
    memory = read_gpu_memory(context.device)
    if memory is None:
        return None
    return start_memory(path, memory, context.emit)


def run_stage(
    recipe: RecipeConfig,
    folder: RunFolder,
    context: RunContext,
    position: StagePosition,
    base: HashedBase | None = None,
    console_log: Path | None = None,
    previous_events: Iterable[Event] = (),
) -> tuple[RunResult, HashedBase]:
    """Runs one algorithm in its folder, from its newest checkpoint to its end.

    Returns the result, and the base without adapters for the next stage: it is what it was at the start.
    """
    session = Session(shares_first_session=position.shares_session)
    step = 0
    cleanup = ExitStack()
    try:
        checkpoint = latest_checkpoint(folder.checkpoints, context.emit)
        if checkpoint is not None:
            step = checkpoint[0]
            context.warn(log_gaps(folder.events, folder.samples, step))
            earlier = totals_of(read_events(folder.events))
            if earlier.sessions:
                session = replace(session, earlier=earlier, shares_first_session=earlier.shares_first_session)
        resumed_from = None if checkpoint is None else step
        for sink, missed_events in context.open_sinks(recipe, folder, position, resumed_from):
            cleanup.callback(context.emit.detach, sink)
            context.emit.attach(sink, missed_events)
        context.recorder.start_stage(read_events(folder.events))
        context.show_dashboard(console_log or folder.console_log, chain(previous_events, read_events(folder.events)))
        recipe = context.with_auto_settings(recipe)
        stage = _load_stage(
            recipe,
            folder,
            context,
            position,
            base,
            checkpoint,
            session,
        )
        cleanup.callback(stage.built.close)
        step, finished = stage.train(context.set_training)
        recorder = context.recorder
        stage.finish(
            finished,
            recorder.counter.totals,
            recorder.last,
            recorder.warnings,
            final_folder,
        )
        stage.built.roles.unload_adapters()
        return RunResult(stage.summary["status"], folder.path, stage.summary), stage.built.hashed_base
    except BaseException as error:
        if is_out_of_memory(error) or isinstance(error, DoesNotFit):
            error = _out_of_memory(error, recipe)
        context.emit_failure(error, step, session, position)
        raise error
    finally:
        cleanup.close()


def _load_stage(
    recipe: RecipeConfig,
    folder: RunFolder,
    context: RunContext,
    position: StagePosition,
    base: HashedBase | None,
    checkpoint: tuple[int, Snapshot] | None,
    session: Session,
) -> Stage:
    """Loads data, base and roles of a stage; a checkpoint restores its state."""
    built = build(
        recipe,
        context.emit,
        context.device,
        base,
        fresh=checkpoint is None,
        stages=context.stages,
        gpu_budget_bytes=context.gpu_budget_bytes,
    )
    try:
        return Stage(
            recipe,
            folder,
            built,
            context.emit,
            context.control,
            checkpoint,
            position,
            _speed_comparison(recipe, built.base.device, context.emit),
            session,
        )
    except BaseException:
        built.close()
        raise


def _speed_comparison(
    recipe: RecipeConfig,
    device: torch.device,
    emit: Emit,
) -> SpeedComparison | None:
    """Returns the estimate of the update's speed to compare with; None without a GPU whose rates are known, or if
    nothing is planned."""
    gpu = installed_spec() if device.type == "cuda" else None
    if gpu is None or recipe.train.memory_check == "off":
        return None
    try:
        estimated = estimated_update_speed(recipe, gpu)
    except UserError as error:
        emit(warning(f"the speed of the update is not estimated: {error}"))
        return None
    return SpeedComparison(estimated, emit)


def _out_of_memory(error: BaseException, recipe: RecipeConfig) -> OutOfMemory:
    """Returns the error for the user, with what to change, and frees what the failed attempt holds."""
    kind = ""
    tokens = 0
    if isinstance(error, DoesNotFit):
        kind = error.kind
        tokens = error.tokens
    first_line = str(error).partition("\n")[0]
    free_traceback(error)
    if not first_line.startswith("out of memory"):
        first_line = f"out of memory: {first_line}"
    return OutOfMemory(f"{first_line}; {suggestions(recipe, kind, tokens, torch.cuda.is_available())}")


def run_chain(
    stage_chain: Chain,
    folder: RunFolder,
    context: RunContext,
) -> RunResult:
    """Runs stage after stage over one base in memory; a stage that is done in its folder is kept.

    The adapter of each policy stage is frozen below those of the later stages.
    """
    folders: dict[str, str] = {}
    summaries: list[dict[str, Any]] = []
    base: HashedBase | None = None
    count = len(stage_chain.stages)
    for number, stage in enumerate(stage_chain.stages, 1):
        path = folder.path / stage_folder(number, stage.name)
        summary = _finished_summary(path, context)
        if summary is not None:
            message = f"stage {number} of {count}, {stage.name}, has ended and is left as it is: {path}"
            context.emit(LogMessage(message=message))
            context.warn(
                log_gaps(
                    path / "events.jsonl",
                    path / "samples.jsonl",
                    summary.get("step", 0),
                    has_ended=True,
                )
            )
        else:
            previous_results = reusable_results(stage_chain, number, summaries)
            position = StagePosition(
                number,
                count,
                stage.name,
                previous_results,
                shares_session=base is not None,
            )
            recipe = stage_chain.recipe_of(number - 1, folders)
            summary, base = _run_chain_stage(
                recipe,
                path,
                folder.console_log,
                context,
                position,
                base,
                folders,
            )
        summaries.append(summary)
        folders[stage.name] = str(path.resolve())
        if summary["status"] == "interrupted":
            break
    result = chain_summary(stage_chain, summaries)
    folder.write_json(SUMMARY, result)
    return RunResult(result["status"], folder.path, result)


def _finished_summary(path: Path, context: RunContext) -> dict[str, Any] | None:
    """Returns the summary of a stage that is done, None if it has to run.

    A stage whose final folder is damaged has to run again: the folder is moved aside and the summary removed.
    """
    summary = read_done_summary(path)
    if summary is None:
        return None
    if quarantine_broken_final(path / "final", context.emit):
        with as_user_error(path / SUMMARY):
            (path / SUMMARY).unlink()
        return None
    return summary


def _run_chain_stage(
    recipe: RecipeConfig,
    path: Path,
    console_log: Path,
    context: RunContext,
    position: StagePosition,
    base: HashedBase | None,
    earlier_folders: Mapping[str, str],
) -> tuple[dict[str, Any], HashedBase]:
    """Runs one stage of a chain in its folder; returns its summary and the base."""
    earlier_events: list[Event] = []
    for earlier in earlier_folders.values():
        earlier_events += read_events(Path(earlier) / "events.jsonl")
    with RunFolder.open(path, recipe.to_dict(), dump(recipe), differences, True, context.emit) as folder:
        try:
            result, base = run_stage(
                recipe,
                folder,
                context,
                position,
                base,
                console_log,
                earlier_events,
            )
        finally:
            write_html_report(folder)
    return result.summary, base


def finished_stages(loaded: RecipeConfig | Chain, folder: Path) -> frozenset[str]:
    """Returns the stages of a chain that are done in its folder.

    A stage with a damaged final folder is not done: it is continued, and writes that folder again.
    """
    if not isinstance(loaded, Chain):
        return frozenset()
    finished: set[str] = set()
    for number, stage in enumerate(loaded.stages, 1):
        path = folder / stage_folder(number, stage.name)
        if read_done_summary(path) is not None and broken_final_reason(path / "final") is None:
            finished.add(stage.name)
    return frozenset(finished)


def write_html_report(folder: RunFolder) -> None:
    """Writes `report.html`, also for a run that failed. An error here is only a warning."""
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
