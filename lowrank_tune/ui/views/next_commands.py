"""The commands for what a run trained, or for the run that was interrupted, with its path."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len

from lowrank_tune.run_summary import read_done_summary
from lowrank_tune.ui import escape_control_chars
from lowrank_tune.ui.run_paths import run_folders

INDENT = "  "
GAP = "  "
PROGRAM = "lowrank-tune"


def next_lines(
    summary: Mapping[str, Any],
    stages: Sequence[Mapping[str, Any]],
    folder: Path,
    width: int | None,
) -> list[str]:
    """Returns the commands, each with what it does; empty if the run has failed.

    No command is broken: if a line would be longer than `width`, all descriptions are below their commands.
    """
    commands = next_commands(
        summary,
        stages,
        folder,
    )
    if not commands:
        return []
    longest = max(map(cell_len, commands))
    written = {command: command + " " * (longest - cell_len(command)) for command in commands}
    lines = [f"{INDENT}{written[command]}{GAP}{words}" for command, words in commands.items()]
    if width is not None and max(map(cell_len, lines)) >= width:
        lines = []
        for command, words in commands.items():
            lines += [f"{INDENT}{command}", f"{INDENT}{INDENT}{INDENT}{words}"]
    return ["next", *lines]


def next_commands(
    summary: Mapping[str, Any],
    stages: Sequence[Mapping[str, Any]],
    folder: Path,
) -> dict[str, str]:
    """Returns the commands, each with what it does."""
    run = _quoted(folder)
    if summary.get("status") == "interrupted":
        return {f"{PROGRAM} run {_quoted(folder / 'recipe.yaml')} --out {run}": "continue it, as the same command does"}
    if summary.get("status") != "done":
        return {}
    if all(stage.get("algorithm") == "reward" for stage in stages):
        commands = {f"score {run} --file rows.jsonl": "score answers with it"}
    else:
        commands = {
            f"chat {run}": "chat with it",
            f"eval {run}": "answer held-out questions",
            f"merge {run}": "merge it into its base",
            f"export {run} --to gguf": "write it for llama.cpp",
        }
    earlier = earlier_run(folder)
    if earlier is not None:
        commands[f"compare {_quoted(earlier)} {run}"] = "compare with an earlier run"
    commands[f"report {run}"] = "write report.html again"
    return {f"{PROGRAM} {command}": words for command, words in commands.items()}


def earlier_run(folder: Path) -> Path | None:
    """Returns the newest other run or chain beside a run that is done, None if there is none."""
    try:
        beside = [run for run in run_folders(folder.parent) if run.name != folder.name]
    except OSError:
        return None
    return next((run for run in beside if read_done_summary(run) is not None), None)


def _quoted(path: Path) -> str:
    return escape_control_chars(shlex.quote(str(path)))
