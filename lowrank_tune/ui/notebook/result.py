"""The result of a run as HTML: curves, last and best figures, held-out figures, warnings and the next steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_tune.errors import UserError
from lowrank_tune.json_files import get_list, get_mapping, get_number, get_objects
from lowrank_tune.ui.formatting import HIDDEN_METRICS, METRIC_FORMATS, percent, wall_time
from lowrank_tune.ui.html import render, style_of
from lowrank_tune.ui.metrics import chart_title, pair_side
from lowrank_tune.ui.notebook.charts import leading_charts
from lowrank_tune.ui.notebook.next_steps import next_steps
from lowrank_tune.ui.report import read_chain, read_run_log
from lowrank_tune.ui.report.curves import ChartCard
from lowrank_tune.ui.report.heldout import figure_label, figure_names, format_figure
from lowrank_tune.ui.report.run_log import RunLog
from lowrank_tune.ui.run_paths import is_chain

MAX_WARNINGS = 10
LEADING_ROWS = 6
"""Rows of a table of figures that are visible at once; the others unfold."""


@dataclass(frozen=True)
class Row:
    """A row of a table: a label, and a text for each column."""

    label: str
    cells: Sequence[str]


@dataclass(frozen=True)
class StageResult:
    """A stage, or a whole run: its title, its last and its best figures, and its charts."""

    title: str
    rows: Sequence[Row]
    charts: Sequence[ChartCard]


def result_html(summary: Mapping[str, Any], folder: Path) -> str:
    """Returns the result of a run or a chain, from its summary and, for the curves, from its events."""
    heldout = get_mapping(summary, "heldout_details")
    html = render(
        "notebook_result",
        style=style_of("notebook.css"),
        name=str(summary.get("name") or folder.name),
        status=str(summary.get("status", "unknown")),
        facts=_facts(summary),
        stages=_stages(summary, _run_logs(folder)),
        heldout_names=list(heldout),
        heldout_rows=_heldout_rows(heldout),
        pair_rows=_pair_rows(summary),
        warnings=get_list(summary, "warnings")[:MAX_WARNINGS],
        num_rows=LEADING_ROWS,
        folder=str(folder),
        steps=next_steps(summary, folder),
    )
    return str(html)


def _run_logs(folder: Path) -> list[RunLog]:
    """Returns the logs of the stages that have begun; none if they cannot be read."""
    try:
        if is_chain(folder):
            return read_chain(folder).started_stages
        return [read_run_log(folder)]
    except UserError:
        # the figures of the summary are shown without curves
        return []


def _facts(summary: Mapping[str, Any]) -> str:
    parts = []
    if "step" in summary:
        parts.append(f"{get_number(summary, 'step'):,.0f} of {get_number(summary, 'steps'):,.0f} steps")
    if "seconds" in summary:
        parts.append(wall_time(get_number(summary, "seconds"), int(get_number(summary, "sessions", 1))))
    return ", ".join(parts)


def _stages(summary: Mapping[str, Any], run_logs: Sequence[RunLog]) -> list[StageResult]:
    listed = get_objects(summary, "stages") or [summary]
    stages = []
    for index, stage in enumerate(listed):
        log = run_logs[index] if index < len(run_logs) else None
        algorithm = str(stage.get("algorithm", "")).upper()
        title = f"{stage.get('name', '?')}: {algorithm}, {_facts(stage)}" if len(listed) > 1 else ""
        charts = [] if log is None else leading_charts(log)
        stages.append(StageResult(title, _metric_rows(stage), charts))
    return stages


def _metric_rows(stage: Mapping[str, Any]) -> list[Row]:
    """Returns the last and the best value of each metric, as the line of a step formats it."""
    last = get_mapping(stage, "last")
    best = get_mapping(stage, "best")
    rows = [Row("step", [_step(last), _step(best)])] if last or best else []
    for name, (_, format_value) in METRIC_FORMATS.items():
        if name in HIDDEN_METRICS or not name:
            continue
        cells = [_cell(values, name, format_value) for values in (last, best)]
        if any(cells):
            rows.append(Row(_metric_label(name), cells))
    return rows


def _metric_label(name: str) -> str:
    """Returns the title of a metric's chart; of one side of a pair also which side."""
    side = pair_side(name)
    return f"{chart_title(name.removesuffix(side) + 'chosen')}, {side}" if side else chart_title(name)


def _step(values: Mapping[str, Any]) -> str:
    return f"{get_number(values, 'step'):,.0f}" if "step" in values else ""


def _cell(values: Mapping[str, Any], name: str, format_value: Callable[[float], str]) -> str:
    value = values.get(name)
    return format_value(value) if isinstance(value, (int, float)) else ""


def _heldout_rows(heldout: Mapping[str, Any]) -> list[Row]:
    stats: dict[str, dict[str, float]] = {}
    for stage in heldout:
        figures = get_mapping(heldout, stage)
        stats[stage] = {name: get_number(figures, name) for name in figures}
    rows = []
    for name in figure_names(stats):
        cells = [format_figure(name, figures[name]) if name in figures else "" for figures in stats.values()]
        rows.append(Row(figure_label(name), cells))
    return rows


def _pair_rows(summary: Mapping[str, Any]) -> list[Row]:
    """Returns the share of held-out pairs that are right, by stage."""
    stages: Iterable[Mapping[str, Any]] = get_objects(summary, "stages") or [summary]
    rows = []
    for stage in stages:
        figures = get_mapping(stage, "heldout_pairs")
        if "accuracy" in figures:
            label = f"held-out pairs right, {stage.get('algorithm', '?')}"
            rows.append(Row(label, [percent(get_number(figures, "accuracy"))]))
    return rows
