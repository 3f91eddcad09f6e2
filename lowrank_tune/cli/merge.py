"""Merge the adapter of a run into its base."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowrank_tune.cli.common import (
    Debug,
    EndedRun,
    app,
    check_run,
    line_logger,
    loading_message,
    report_user_errors,
)

if TYPE_CHECKING:
    from lowrank_tune.export import MergeReport
    from lowrank_tune.ui.terminal.plain import LineLogger


class MergeWeights(StrEnum):
    """`dequantized`: the weights that the adapter was trained over; `original`: those that the base's author
    published."""

    dequantized = "dequantized"
    original = "original"


Weights = Annotated[
    MergeWeights,
    typer.Option("--weights", help="Base weights to merge into: dequantized 4-bit, as trained, or original."),
]


def print_comparison(logger: LineLogger, report: MergeReport) -> None:
    """Prints the comparison of a merged model with the trained one, after the bar of the logger."""
    logger.close()
    table = Table("trained against merged", "", box=None)
    for name, value in report.table():
        table.add_row(Text(name), Text(value))
    Console(highlight=False).print(table)


@app.command("merge")
def merge_command(
    run: EndedRun,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the merged model; else RUN/merged.")] = None,
    weights: Weights = MergeWeights.dequantized,
    debug: Debug = False,
) -> None:
    """Merge what a run trained into its base, in bf16, and compare the result with the trained model. Exits with 1 if
    they differ."""
    with report_user_errors(debug):
        check_run(run)
        with loading_message():
            from lowrank_tune.export import merge

        with line_logger() as logger:
            merged = merge(
                run,
                out,
                weights.value,
                logger,
                partial(print_comparison, logger),
            )
            print(f"merged: {merged.folder}")
