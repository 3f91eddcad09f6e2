"""`watch`: the dashboard of runs of other processes."""

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
    """Show runs of other processes, or finished ones; several beside each other."""
    with report_user_errors(debug):
        for run in runs:
            check_run(run)
        from lowrank_tune.ui.watch import watch

        watch(runs, plain=ui == UiMode.plain)
