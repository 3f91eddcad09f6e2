"""The comparison as one page that needs nothing else: figures, curves of what runs share, and where their recipes
differ."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lowrank_tune.ui import escape_control_chars
from lowrank_tune.ui.compare.figures import rows
from lowrank_tune.ui.compare.runs import ComparedRun, common_metrics, differences, without_recipe
from lowrank_tune.ui.metrics import TITLES, descriptions_of
from lowrank_tune.ui.report.charts import ChartLine, downsample, smooth
from lowrank_tune.ui.report.html import table, text
from lowrank_tune.ui.report.page import alerts, document, issues
from lowrank_tune.ui.report.sections import NOT_LOG, chart_card

# lines of the style sheet; so few points are drawn as they are
NUM_COLORS = 6
MIN_POINTS_TO_SMOOTH = 15


def compare_page(runs: Sequence[ComparedRun]) -> str:
    """The page of these sides."""
    names = ", ".join(run.label for run in runs)
    messages = [f"{run.label}: {issue}" for run in runs for run_log in run.run_logs for issue in issues(run_log)]
    header = (
        f'<header><div class="row"><h1>{text(names, 300)}</h1></div><p class="sub"><b>{len(runs)}</b> runs '
        f"side by side</p></header>"
    )
    status = "failed" if any(run.status == "failed" for run in runs) else ""
    body = "\n".join([header, alerts(messages, status), _figures(runs), _curves(runs), _differences(runs)])
    return document(f"{names[:120]}: compared", body, "the events and summaries of these runs")


def _head(runs: Sequence[ComparedRun]) -> list[str]:
    return ["", *(f'<i class="key {_css_class(index)}"></i> {text(run.label, 80)}' for index, run in enumerate(runs))]


def _css_class(index: int) -> str:
    return f"run-{index % NUM_COLORS}"


def _figures(runs: Sequence[ComparedRun]) -> str:
    table_rows = [[text(label), *(_cell(label, cell) for cell in cells)] for label, cells in rows(runs)]
    return f'<h2>Side by side</h2><div class="card">{table(_head(runs), table_rows)}</div>'


def _cell(label: str, cell: str) -> str:
    if label == "ended":
        return f'<span class="pill {"done" if cell.startswith("done") else text(cell)}">{text(cell)}</span>'
    if label.startswith("held-out"):
        return f"<b>{text(cell)}</b>"
    return text(cell)


def _curves(runs: Sequence[ComparedRun]) -> str:
    run_indices = {run.label: run_index for run_index, run in enumerate(runs)}
    cards = []
    for name, metric_runs in common_metrics(runs):
        lines = [line for run in metric_runs if (line := _line(run, name, run_indices[run.label])) is not None]
        started = metric_runs[0].last.started
        meaning = descriptions_of(started.algorithm if started is not None else "sft").get(name, "")
        title = TITLES.get(name) or name.replace("_", " ").replace("heldout", "held-out")
        cards.append(chart_card(title, meaning, lines, name not in NOT_LOG, {}))
    if any(run.chain is not None for run in runs):
        chains = "; of a chain, those of the stage that began last"
    else:
        chains = ""
    heading = f'<h2>Curves <span class="soft">smooth{chains}</span></h2>'
    if cards:
        return f'{heading}<div class="grid2">{"".join(cards)}</div>'
    return "<p>No statistic was measured by two of these runs.</p>"


def _line(run: ComparedRun, name: str, run_index: int) -> ChartLine | None:
    points = [(float(step), value) for step, value in run.points(name).items() if math.isfinite(value)]
    drawn = points if len(points) <= MIN_POINTS_TO_SMOOTH else smooth(points)
    if points:
        return ChartLine(escape_control_chars(run.label, 60), _css_class(run_index), downsample(drawn, 150))
    return None


def _differences(runs: Sequence[ComparedRun]) -> str:
    changed_settings = differences(runs)
    unknown = without_recipe(runs)
    if unknown:
        names = text(", ".join(unknown), 400)
        note = f"<p>The settings of {names} are not known: there is no run.json that can be read.</p>"
    else:
        note = ""
    if not changed_settings:
        return f"<h2>Settings that differ</h2>{note or '<p>None: the recipes are the same.</p>'}"
    cells = [
        [
            text(key, 200),
            *('<span class="soft">not set</span>' if value is None else text(value, 300) for value in values),
        ]
        for key, values in changed_settings.items()
    ]
    return f'<h2>Settings that differ</h2>{note}<div class="card">{table(_head(runs), cells)}</div>'
