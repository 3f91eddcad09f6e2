"""Output of `lowrank-tune score RUN --file FILE`: distribution of the scores, best and worst answers, and metrics of
pairs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, pstdev, quantiles

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowrank_tune.evaluation.response_scores import ScoredResponse
from lowrank_tune.evaluation.validation import PairScores
from lowrank_tune.ui import escape_control_chars
from lowrank_tune.ui.formatting import number, percent

SHOWN = 3
PAIRS = {
    "accuracy": ("the chosen answer scores higher", percent),
    "margin": ("chosen minus rejected, mean", number),
    "calibration_error": ("calibration error", number),
    "prefers_longer": ("prefers the longer answer", percent),
    "length_correlation": ("correlation of score and length", number),
}


def show(responses: Sequence[ScoredResponse], pairs: PairScores | None, console: Console) -> None:
    """Draws it."""
    scores = [response.score for response in responses]
    figures = Table("", "", box=None, show_header=False)
    figures.add_row("answers scored", f"{len(scores):,}")
    figures.add_row("mean, spread", f"{number(fmean(scores))}, {number(pstdev(scores))}")
    if len(scores) > 1:
        figures.add_row("quartiles", ", ".join(number(value) for value in quantiles(scores, n=4)))
    for name, (label, write) in PAIRS.items() if pairs is not None else ():
        assert pairs is not None
        figures.add_row(label, write(pairs.metrics()[name]))
    console.print(figures)
    ranked = sorted(responses, key=lambda response: -response.score)
    count = min(SHOWN, (len(ranked) + 1) // 2)
    table = Table("score", "where", "asked", "answered", "tokens", show_lines=True, title="the best and the worst")
    for response in [*ranked[:count], *(ranked[-min(count, len(ranked) - count) :] if len(ranked) > count else [])]:
        where = escape_control_chars(response.location.rpartition("/")[2], 60) + (
            f" {response.side}" if response.side else ""
        )
        table.add_row(
            number(response.score),
            where,
            Text(escape_control_chars(response.prompt, 300)),
            Text(escape_control_chars(response.text, 500)),
            str(response.tokens),
        )
    console.print(table)
