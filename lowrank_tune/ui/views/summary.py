"""The end of a run in lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank_tune.json_files import get_list, get_mapping, get_number, get_objects
from lowrank_tune.ui import escape_control_chars
from lowrank_tune.ui.formatting import format_stats, percent, rate, wall_time
from lowrank_tune.ui.terminal.text_layout import fold
from lowrank_tune.ui.views.next_commands import next_lines

LABEL_WIDTH = 11
MAX_NAME = 60
OUTPUTS = {
    "final": "the adapter, to load, merge or export",
    "report.html": "curves, samples and warnings, for a browser",
    "summary.json": "this table for programs",
    "samples.jsonl": "what the model answered, step by step",
    "events.jsonl": "everything that was measured",
    "checkpoints": "where the run can be continued",
    "recipe.yaml": "the recipe, complete: it repeats the run",
    "console.log": "what libraries printed",
}


def summary_table(
    summary: Mapping[str, Any],
    folder: Path,
    width: int | None = None,
) -> str:
    """Returns the end of a run or a chain in lines: status, metrics, held-out figures, warnings, files, next commands.

    Control characters are escaped. Lines are broken at words before they reach `width`.
    """
    stages = get_objects(summary, "stages")
    lines = [
        f"status     {_name(summary.get('status', 'unknown'), None)}",
        *_progress(summary),
    ]
    lines += _last_and_best(summary)
    for stage in stages:
        lines += _stage_lines(stage)
    lines += _heldout_lines(summary)
    if stages:
        lines += _pair_lines({f"{_name(stage.get('name', '?')):12} ": stage for stage in stages})
    else:
        lines += _pair_lines({"": summary})
    for warning in get_list(summary, "warnings"):
        lines.append(f"warning    {_name(warning, 200)}")
    lines.append(f"in         {_name(folder, None)}")
    lines += _file_lines(stages, folder)
    if width is not None:
        lines = [
            fold(
                line,
                width,
                LABEL_WIDTH,
            )
            for line in lines
        ]
    lines += next_lines(
        summary,
        stages or [summary],
        folder,
        width,
    )
    return "\n".join(lines)


def _name(
    value: Any,
    limit: int | None = MAX_NAME,
) -> str:
    return escape_control_chars(str(value), limit)


def _numbers(data: Any) -> dict[str, float]:
    """Returns the numbers of an object that anyone may have edited."""
    if not isinstance(data, Mapping):
        return {}
    return {str(key): float(value) for key, value in data.items() if isinstance(value, (int, float))}


def _progress(summary: Mapping[str, Any]) -> Iterator[str]:
    for name in ("step", "steps"):
        value = summary.get(name)
        if isinstance(value, (int, float)):
            yield f"{name:10} {value:,}"
    if isinstance(summary.get("seconds"), (int, float)):
        yield f"{'seconds':10} {_wall_time(summary)}"
    if "tokens_per_second" in summary:
        speed = summary["tokens_per_second"]
        written = rate(speed) if isinstance(speed, (int, float)) else "-"
        yield f"{'tokens/s':10} {written}"


def _wall_time(summary: Mapping[str, Any]) -> str:
    """Returns the wall time of all sessions of a run, a chain or a stage."""
    return wall_time(get_number(summary, "seconds"), int(get_number(summary, "sessions", 1)))


def _last_and_best(summary: Mapping[str, Any]) -> Iterator[str]:
    for name in ("last", "best"):
        stats = _numbers(summary.get(name))
        if stats:
            step = stats.pop("step", None)
            at = "" if step is None else f"  (step {step:.0f})"
            yield f"{name:10} {format_stats(stats)}{at}"


def _stage_lines(stage: Mapping[str, Any]) -> Iterator[str]:
    """Yields how a stage of a chain ended, and below it its last and best values."""
    numbers = _numbers({key: stage.get(key) for key in ("step", "steps", "seconds")})
    line = f"{_name(stage.get('name', '?')):10} {_name(stage.get('algorithm', '?'))}: {_name(stage.get('status', '?'))}"
    if {"step", "steps"} <= numbers.keys():
        line += f", step {numbers['step']:,.0f} of {numbers['steps']:,.0f}"
    if "seconds" in numbers:
        line += f" in {_wall_time(stage)}"
    yield line
    for values in _last_and_best(stage):
        yield f"  {values}"


def _heldout_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    heldout = get_mapping(summary, "heldout")
    if heldout:
        yield "held-out exact answers"
    for model, value in heldout.items():
        shares = value if isinstance(value, Mapping) else {"": value}
        words = []
        for name, share in shares.items():
            if isinstance(share, (int, float)):
                words.append(f"{name} {percent(share)}".strip())
        yield f"  {_name(model):12} {_name('  '.join(words), None)}"


def _pair_lines(summaries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the figures of held-out pairs, from the summary for each label."""
    lines = []
    for label, summary in summaries.items():
        figures = _numbers(summary.get("heldout_pairs"))
        if figures:
            lines.append(f"  {label}{format_stats(figures)}")
    return ["held-out pairs", *lines] if lines else []


def _file_lines(
    stages: Sequence[Mapping[str, Any]],
    folder: Path,
) -> Iterator[str]:
    outputs = {}
    for stage in stages:
        if isinstance(stage.get("folder"), str):
            name = _name(stage.get("name", "?"))
            outputs[stage["folder"]] = f"stage {name}: its own run folder, with its adapter in final"
    for file, description in {**outputs, **OUTPUTS}.items():
        if _exists(folder / file):
            yield f"  {_name(file):16} {description}"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        # the name of a stage's folder may be invalid
        return False
