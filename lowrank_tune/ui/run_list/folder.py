"""The runs of a folder, read leniently: a damaged run is listed as damaged."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowrank_tune.errors import UserError
from lowrank_tune.json_files import as_mapping, get_mapping, get_number, get_objects, read_json, read_json_object
from lowrank_tune.run_summary import SUMMARY, read_done_summary, summary_problem
from lowrank_tune.ui.run_list.best import best_of_summary
from lowrank_tune.ui.run_list.entry import ListedRun, RunState
from lowrank_tune.ui.run_list.session import last_event_time, read_events_of_run
from lowrank_tune.ui.run_paths import (
    EVENTS,
    is_chain,
    is_locked,
    is_run_folder,
    read_recipe,
    run_folders,
    stage_folders,
)

ARROW = " \u2192 "


def list_runs(folder: Path) -> list[ListedRun]:
    """Returns the runs and chains of a folder, the one with the newest event first.

    Raises UserError if it is not a folder, or is itself that of a single run.
    """
    if is_run_folder(folder) and not is_chain(folder):
        raise UserError(f"{folder}: is a run itself; give the folder that contains it, as `lowrank-tune runs runs`")
    try:
        folders = run_folders(folder)
    except FileNotFoundError:
        raise UserError(f"{folder}: there is no such folder; `lowrank-tune run` writes its runs to runs/") from None
    except OSError as error:
        raise UserError(f"{folder}: the runs cannot be listed ({error.strerror or error})") from error
    runs = [_listed(run) for run in folders]
    return sorted(
        runs,
        key=_sort_key,
        reverse=True,
    )


def _sort_key(run: ListedRun) -> tuple[float, str]:
    return run.updated, run.name


def _listed(folder: Path) -> ListedRun:
    """Returns a run of any kind with its size. Without an event it is as old as its folder."""
    run = _read_chain(folder) if is_chain(folder) else _read_run(folder)
    updated = run.updated
    if not updated:
        # a run may be deleted while the list is made
        with suppress(OSError):
            updated = folder.stat().st_mtime
    return replace(
        run,
        num_bytes=size_on_disk(folder),
        updated=updated,
    )


def _read_run(folder: Path) -> ListedRun:
    recipe, problem = _recipe_or_problem(folder)
    run = _with_recipe(ListedRun(folder), recipe)
    summary = read_done_summary(folder)
    try:
        if summary is not None:
            run = _done(run, summary)
        elif (folder / EVENTS).exists():
            run = _unfinished(run)
        elif is_locked(folder):
            run = replace(run, state=RunState.RUNNING)
    except OSError as error:
        return run.damaged(f"{EVENTS} cannot be read ({error.strerror or error})")
    # a run that continues replaces its summary
    if not problem and summary is None and run.state != RunState.RUNNING:
        problem = _problem_of_summary(folder)
    return run.damaged(problem) if problem else run


def _done(
    run: ListedRun,
    summary: Mapping[str, Any],
) -> ListedRun:
    events = run.folder / EVENTS
    return replace(
        run,
        state=RunState.DONE,
        best=best_of_summary(summary),
        step=int(get_number(summary, "step")),
        steps=int(get_number(summary, "steps")),
        seconds=get_number(summary, "seconds"),
        updated=last_event_time(events) if events.exists() else 0.0,
    )


def _unfinished(run: ListedRun) -> ListedRun:
    events = read_events_of_run(run.folder / EVENTS)
    if is_locked(run.folder):
        state = RunState.RUNNING
    elif events.ended is None:
        state = RunState.KILLED
    else:
        state = RunState(events.ended.status)
    started = events.started
    return replace(
        run,
        state=state,
        algorithm=run.algorithm or (str(started.algorithm) if started else ""),
        base=run.base or (str(started.model) if started else ""),
        best=events.best or events.last,
        step=events.step,
        steps=started.steps if started else 0,
        seconds=events.counter.totals.seconds,
        updated=events.time,
        problem=str(events.ended.message) if events.ended else "",
    )


def _read_chain(folder: Path) -> ListedRun:
    started = [_read_run(path) for path in stage_folders(folder) if path.is_dir()]
    last = started[-1] if started else ListedRun(folder)
    run = ListedRun(
        folder,
        _state_of_chain(folder, started),
        ARROW.join(str(stage.get("algorithm", "?")) for stage in get_objects(read_recipe(folder), "stages")),
        next((stage.base for stage in started if stage.base), ""),
        last.best,
        sum(stage.step for stage in started),
        sum(stage.steps for stage in started),
        max((stage.updated for stage in started), default=0.0),
        sum(stage.seconds for stage in started),
        problem=f"{last.name}: {last.problem}" if last.problem else "",
        stages=tuple(started),
    )
    problem = "" if run.state in (RunState.DONE, RunState.RUNNING) else _problem_of_summary(folder)
    return run.damaged(problem) if problem else run


def _state_of_chain(
    folder: Path,
    started: Sequence[ListedRun],
) -> RunState:
    if read_done_summary(folder) is not None:
        return RunState.DONE
    if is_locked(folder):
        return RunState.RUNNING
    if not started:
        return RunState.NOT_STARTED
    if started[-1].state == RunState.DONE:
        # between two stages
        status = read_json_object(folder / SUMMARY).get("status")
        return RunState.INTERRUPTED if status == RunState.INTERRUPTED else RunState.KILLED
    return started[-1].state


def _with_recipe(
    run: ListedRun,
    recipe: Mapping[str, Any],
) -> ListedRun:
    return replace(
        run,
        algorithm=str(recipe.get("algorithm", "")),
        base=str(get_mapping(recipe, "base").get("model", "")),
    )


def _recipe_or_problem(folder: Path) -> tuple[Mapping[str, Any], str]:
    """Returns the recipe in the `run.json` of a folder; without one an empty recipe, and why there is none."""
    try:
        content = read_json(folder / "run.json")
    except OSError as error:
        return {}, f"run.json cannot be read ({error.strerror or error})"
    except ValueError:
        return {}, "run.json is not valid JSON"
    recipe = get_mapping(as_mapping(content), "recipe")
    return recipe, "" if recipe else "run.json contains no recipe"


def _problem_of_summary(folder: Path) -> str:
    """Returns why the `summary.json` of a folder cannot be used, empty if it can, or if there is none."""
    problem = summary_problem(folder)
    return f"{SUMMARY}: {problem}" if problem else ""


def size_on_disk(folder: Path) -> int:
    """Returns the bytes of all files below a folder, of a link its own; what cannot be read counts as nothing."""
    total = 0
    pending = [os.fspath(folder)]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_size
        except OSError:
            continue
    return total
