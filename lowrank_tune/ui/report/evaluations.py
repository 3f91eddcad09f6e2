"""The evaluations of `lowrank-tune eval`: the newest one open, the earlier ones collapsed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from lowrank_tune.evaluation import EvalRecord, read_records
from lowrank_tune.ui.formatting import format_time
from lowrank_tune.ui.html import render
from lowrank_tune.ui.views.evaluation import (
    describe_evaluation,
    heads,
    rows,
)

MAX_EVALUATIONS = 20


@dataclass(frozen=True)
class EvaluationCard:
    """One evaluation as it is shown."""

    time: str
    origin: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]


def section(folder: Path) -> Markup:
    """Returns the evaluations of a folder, newest first; empty if there are none."""
    records = read_records(folder)[-MAX_EVALUATIONS:]
    if not records:
        return Markup()
    return render("evaluations", cards=[_card(record) for record in reversed(records)])


def _card(record: EvalRecord) -> EvaluationCard:
    columns = heads(record)
    cells = [row[: len(columns)] for row in rows(record)]
    return EvaluationCard(
        format_time(record.time),
        record.origin,
        columns,
        cells,
        describe_evaluation(record),
    )
