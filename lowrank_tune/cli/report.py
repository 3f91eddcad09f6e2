"""`report`: the HTML report of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowrank_tune.cli.common import Debug, app, check_run, report_user_errors


@app.command("report")
def report_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")], debug: Debug = False
) -> None:
    """Write RUN/report.html again: curves, samples, data, recipe, in one file for a browser."""
    with report_user_errors(debug):
        check_run(run)
        from lowrank_tune.ui.report import write_report

        print(write_report(run))
