"""Look at runs: live, as a page, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowrank_tune.cli.common import Debug, Ui, UiMode, app, check_run, report_user_errors


@app.command("watch")
def watch_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of runs, or their events.jsonl.")],
    ui: Ui = UiMode.auto,
    debug: Debug = False,
) -> None:
    """Show runs that happen elsewhere, or happened; several beside each other."""
    with report_user_errors(debug):
        for run in runs:
            check_run(run)
        from lowrank_tune.ui.watch import watch

        watch(runs, plain=ui == UiMode.plain)


@app.command("report")
def report_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")], debug: Debug = False
) -> None:
    """Write RUN/report.html anew: curves, samples, data, recipe, in one file for a browser."""
    with report_user_errors(debug):
        check_run(run)
        from lowrank_tune.ui.report import write_report

        print(write_report(run))


@app.command("compare")
def compare_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of runs or chains, finished or not.")],
    html: Annotated[
        Path | None, typer.Option("--html", help="File for the page; else compare.html beside RUN.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Put runs side by side: curves, held-out results, and where their recipes differ; here, and as one page for a
    browser."""
    with report_user_errors(debug):
        for run in runs:
            check_run(run)
        from lowrank_tune.ui.compare import compare

        print(f"the page: {compare(runs, html)}")
