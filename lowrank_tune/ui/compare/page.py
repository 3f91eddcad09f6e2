"""The comparison as one page: the figures, the curves that several runs have, and the settings that differ."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from lowrank_tune.ui import escape_control_chars
from lowrank_tune.ui.compare.figures import NOTES, rows
from lowrank_tune.ui.compare.page_file import runs_digest
from lowrank_tune.ui.compare.runs import (
    MIN_POINTS_TO_SMOOTH,
    ComparedRun,
    common_metrics,
    differences,
    without_recipe,
)
from lowrank_tune.ui.html import document, render
from lowrank_tune.ui.metrics import descriptions_of
from lowrank_tune.ui.report.curves import (
    ChartCard,
    chart_card,
)
from lowrank_tune.ui.report.page import issues
from lowrank_tune.ui.svg import Series, downsample, smooth

NUM_COLORS = 6
"""Colors of runs in the style sheet; the seventh run has the color of the first."""
MAX_BUCKETS = 150


def compare_page(runs: Sequence[ComparedRun]) -> str:
    """Returns the page of a comparison."""
    names = ", ".join(run.label for run in runs)
    heads = [_head(run, index) for index, run in enumerate(runs)]
    has_failed = any(run.status == "failed" for run in runs)
    body = render(
        "compare",
        names=names,
        digest=runs_digest(runs),
        runs=runs,
        heads=["", *heads],
        issues=_issues(runs),
        status="failed" if has_failed else "",
        figures=rows(runs),
        notes=NOTES,
        cards=_cards(runs),
        settings=differences(runs),
        without_recipe=", ".join(without_recipe(runs)),
    )
    return document(
        f"{names[:120]}: compared",
        body,
        "the events and summaries of these runs",
    )


def _issues(runs: Sequence[ComparedRun]) -> list[str]:
    messages = []
    for run in runs:
        for run_log in run.run_logs:
            messages += [f"{run.label}: {issue}" for issue in issues(run_log)]
    return messages


def _head(
    run: ComparedRun,
    index: int,
) -> Markup:
    return render(
        "run_head",
        kind=_css_class(index),
        label=run.label,
    )


def _css_class(index: int) -> str:
    return f"run-{index % NUM_COLORS}"


def _cards(runs: Sequence[ComparedRun]) -> list[ChartCard]:
    kinds = {run.label: _css_class(index) for index, run in enumerate(runs)}
    cards = []
    for name, metric_runs in common_metrics(runs):
        series = [
            _series(
                run,
                name,
                kinds[run.label],
            )
            for run in metric_runs
        ]
        description = descriptions_of(metric_runs[0].algorithm).get(name, "")
        card = chart_card(
            name,
            description,
            series,
            {},
        )
        if card is not None:
            cards.append(card)
    return cards


def _series(
    run: ComparedRun,
    name: str,
    kind: str,
) -> Series:
    points = run.curve(name)
    if len(points) > MIN_POINTS_TO_SMOOTH:
        points = smooth(points)
    return Series(
        escape_control_chars(run.label, 60),
        kind,
        downsample(points, MAX_BUCKETS),
    )
