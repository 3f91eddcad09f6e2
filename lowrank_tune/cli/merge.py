"""Take home what a run made."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowrank_tune.cli.common import Debug, app, check_run, loading_message, report_user_errors


class MergeWeights(StrEnum):
    """`dequantized`: the weights that were trained over; `original`: those that the base's author published."""

    dequantized = "dequantized"
    original = "original"


def proof_table(rows: Sequence[tuple[str, str]]) -> Table:
    """How a merged model compares with what was trained."""
    table = Table("trained against merged", "", box=None)
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return table


@app.command("merge")
def merge_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run that has ended.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the merged model; else RUN/merged.")] = None,
    weights: Annotated[
        MergeWeights,
        typer.Option("--weights", help="Base weights to merge into: dequantized 4-bit, as trained, or original."),
    ] = MergeWeights.dequantized,
    debug: Debug = False,
) -> None:
    """Merge what a run trained into its base, in bf16, and compare the result with what was trained. Ends with 1 where
    they differ."""
    with report_user_errors(debug):
        check_run(run)
        with loading_message():
            from lowrank_tune.export import MergeReport, merge
            from lowrank_tune.ui.terminal.plain import LineLogger

        plain = LineLogger(sys.stderr)

        def show(proof: MergeReport) -> None:
            plain.close()
            Console(highlight=False).print(proof_table(proof.table()))

        try:
            print(f"merged: {merge(run, out, weights.value, plain, show).folder}")
        finally:
            plain.close()
