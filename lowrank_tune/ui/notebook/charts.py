"""The most important charts of a run, with the code of the report."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_tune.ui.metrics import charts_of
from lowrank_tune.ui.report.curves import ChartCard, chart_card, metric_series, pair_series
from lowrank_tune.ui.report.run_log import RunLog, StepValues
from lowrank_tune.ui.svg import Series

MAX_CHARTS = 4


def leading_charts(run_log: RunLog, count: int = MAX_CHARTS) -> list[ChartCard]:
    """Returns the first charts of the run's algorithm that have values."""
    cards: list[ChartCard] = []
    for names in charts_of(run_log.algorithm):
        points = _values(run_log, names[0])
        card = chart_card(
            names[0],
            "",
            _series(run_log, names),
            points,
        )
        if card is not None:
            cards.append(card)
        if len(cards) == count:
            break
    return cards


def _values(run_log: RunLog, name: str) -> StepValues:
    """Returns the values of the steps, or else those of the validations."""
    return run_log.series.get(name) or run_log.checks.get(f"eval_{name}", {})


def _series(run_log: RunLog, names: Sequence[str]) -> list[Series]:
    if len(names) > 1:
        return pair_series({name: _values(run_log, name) for name in names})
    (name,) = names
    return metric_series(
        "training",
        run_log.series.get(name, {}),
        run_log.checks.get(f"eval_{name}", {}),
        "validation",
    )
