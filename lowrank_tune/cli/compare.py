"""`compare`: several runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowrank_tune.cli.common import Debug, app, check_run, report_user_errors


@app.command("compare")
def compare_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of runs or chains, finished or not.")],
    html: Annotated[
        Path | None, typer.Option("--html", help="File for the page; else compare-A-B.html beside run A.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Compare runs: curves, held-out results and settings that differ; printed here, and as one page for a browser."""
    with report_user_errors(debug):
        for run in runs:
            check_run(run)
        from lowrank_tune.ui.compare import compare

        print(f"the page: {compare(runs, html)}")
