"""The end of a run in lines."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank_tune.ui import escape_control_chars
from lowrank_tune.ui.formatting import clock, format_stats, percent
from lowrank_tune.ui.terminal.text_layout import fold

LABEL = 11  # cells before the values


def summary_table(summary: Mapping[str, Any], folder: Path, width: int | None = None) -> str:
    """The end of a run or a chain in lines: how it ended, its metrics, held-out figures, warnings, where everything
    lies, and what can be done with it next. Inert. Lines are broken at words before they reach `width`."""
    lines = [f"status     {escape_control_chars(str(summary.get('status', 'unknown')))}", *_figures_of(summary)]
    stages = [stage for stage in _listed(summary, "stages") if isinstance(stage, Mapping)]
    for stage in stages:
        lines += _stage_lines(stage)
    lines += _heldout_lines(summary)
    scored = {str(stage.get("name", "?")): stage.get("heldout_pairs") for stage in stages} or {
        "": summary.get("heldout_pairs")
    }
    lines += _pairs_lines(scored)
    lines += [f"warning    {escape_control_chars(str(text), 200)}" for text in _listed(summary, "warnings")]
    lines.append(f"in         {escape_control_chars(str(folder))}")
    outputs = {
        str(
            stage["folder"]
        ): f"stage {escape_control_chars(str(stage.get('name', '?')), 60)}: its own run folder, with its adapter in "
        "final"
        for stage in stages
        if isinstance(stage.get("folder"), str)
    }
    lines += [
        f"  {escape_control_chars(name, 60):16} {description}"
        for name, description in {**outputs, **_OUTPUTS}.items()
        if _output_exists(folder, name)
    ]
    if width is not None:
        lines = [fold(line, width, LABEL) for line in lines]
    if summary.get("status") == "done":
        lines += _next_lines(stages or [summary], folder)
    return "\n".join(lines)


def _next_lines(stages: Sequence[Mapping[str, Any]], folder: Path) -> list[str]:
    """The commands for what a run trained."""
    run = escape_control_chars(shlex.quote(str(folder)))
    if all(stage.get("algorithm") == "reward" for stage in stages):
        commands = {f"score {run} --file rows.jsonl": "score answers with it"}
    else:
        commands = {
            f"chat {run}": "talk to it",
            f"eval {run}": "measure it on held-out questions",
            f"export {run} --to gguf": "write it for llama.cpp",
        }
    commands[f"report {run}"] = "write report.html again"
    size = max(map(len, commands))
    return ["next", *(f"  lowrank-tune {command:{size}}  {words}" for command, words in commands.items())]


def _listed(data: Mapping[str, Any], name: str) -> list[Any]:
    value = data.get(name)
    return value if isinstance(value, list) else []


def _output_exists(folder: Path, name: str) -> bool:
    try:
        return (folder / name).exists()
    except (OSError, ValueError):  # a name that is none
        return False


def _numbers(data: Any) -> dict[str, float]:
    """The numbers of an object that anyone may have edited."""
    if not isinstance(data, Mapping):
        return {}
    return {str(key): float(value) for key, value in data.items() if isinstance(value, (int, float))}


def _figures_of(summary: Mapping[str, Any]) -> list[str]:
    """Steps, seconds, the last and the best values of a run."""
    lines = []
    for name in ("step", "steps", "seconds"):
        if isinstance(value := summary.get(name), (int, float)):
            lines.append(f"{name:10} {clock(value) if name == 'seconds' else f'{value:,}'}")
    return lines + _last_and_best(summary)


def _last_and_best(summary: Mapping[str, Any]) -> list[str]:
    lines = []
    for name in ("last", "best"):
        if stats := _numbers(summary.get(name)):
            at = f"  (step {stats['step']:.0f})" if "step" in stats else ""
            lines.append(f"{name:10} {format_stats({key: value for key, value in stats.items() if key != 'step'})}{at}")
    return lines


def _stage_lines(stage: Mapping[str, Any]) -> list[str]:
    """A stage of a chain: how it ended, and below it its last and best values."""
    name, algorithm, status = (
        escape_control_chars(str(stage.get(key, "?")), 60) for key in ("name", "algorithm", "status")
    )
    numbers = _numbers({key: stage.get(key) for key in ("step", "steps", "seconds")})
    if {"step", "steps"} <= numbers.keys():
        where = f", step {numbers['step']:,.0f} of {numbers['steps']:,.0f}"
    else:
        where = ""
    if "seconds" in numbers:
        duration = f" in {clock(numbers['seconds'])}"
    else:
        duration = ""
    return [f"{name:10} {algorithm}: {status}{where}{duration}", *(f"  {line}" for line in _last_and_best(stage))]


def _heldout_lines(summary: Mapping[str, Any]) -> list[str]:
    heldout = summary.get("heldout")
    if not isinstance(heldout, Mapping) or not heldout:
        return []
    lines = ["held-out exact answers"]
    for who, value in heldout.items():
        shares = value if isinstance(value, Mapping) else {"": value}
        words = "  ".join(
            f"{key} {percent(share)}".strip() for key, share in shares.items() if isinstance(share, (int, float))
        )
        lines.append(f"  {escape_control_chars(str(who), 60):12} {escape_control_chars(words)}")
    return lines


def _pairs_lines(scored: Mapping[str, Any]) -> list[str]:
    """How well held-out pairs are told apart, by stage; `accuracy` is the share of pairs that are right."""
    metrics_by_stage = {name: figures for name, value in scored.items() if (figures := _numbers(value))}
    lines = [
        f"  {f'{escape_control_chars(name, 60):12} ' if name else ''}{format_stats(figures)}"
        for name, figures in metrics_by_stage.items()
    ]
    return ["held-out pairs", *lines] if lines else []


_OUTPUTS = {
    "final": "the adapter, to load, merge or export",
    "report.html": "curves, samples and warnings, for a browser",
    "summary.json": "this table for programs",
    "samples.jsonl": "what the model answered, step by step",
    "events.jsonl": "everything that was measured",
    "checkpoints": "where the run can be continued",
    "recipe.yaml": "the recipe, complete: it repeats the run",
    "console.log": "what libraries printed",
}
