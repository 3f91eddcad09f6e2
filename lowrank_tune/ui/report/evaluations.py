"""What `lowrank-tune eval` added to a run: the newest evaluation open, the earlier ones collapsed."""

from __future__ import annotations

from pathlib import Path

from lowrank_tune.evaluation import EvalRecord, read_records
from lowrank_tune.ui.report.html import table, text
from lowrank_tune.ui.views import evaluation as evals_view

MAX_EVALUATIONS = 20


def section(folder: Path) -> str:
    """The evaluations of a folder, newest first; empty where there are none."""
    records = read_records(folder)[-MAX_EVALUATIONS:][::-1]
    if not records:
        return ""
    return "<h2>Evaluations</h2>" + "".join(_one(record, number == 0) for number, record in enumerate(records))


def _one(record: EvalRecord, is_open: bool) -> str:
    heads = evals_view.heads(record)
    rows = [
        [f"<b>{text(row[0])}</b>", *(text(cell) for cell in row[1 : len(heads)])] for row in evals_view.rows(record)
    ]
    notes = "".join(f'<p class="soft">{text(line, 600)}</p>' for line in evals_view.describe_evaluation(record))
    title = f'{text(evals_view.when(record))} <span class="soft">{text(record.origin, 200)}</span>'
    body = f'<div class="card">{table(map(text, heads), rows)}{notes}</div>'
    return f"<details{' open' if is_open else ''}><summary>{title}</summary>{body}</details>"
