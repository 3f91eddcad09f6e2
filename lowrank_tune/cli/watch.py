"""`watch`: the dashboard of runs of other processes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowrank_tune.cli.common import Debug, Ui, UiMode, app, check_run, report_user_errors
from lowrank_tune.ui.run_paths import is_folder_of_runs


@app.command("watch")
def watch_command(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Folders of runs, their events.jsonl, or one folder of runs.")
    ],
    ui: Ui = UiMode.auto,
    debug: Debug = False,
) -> None:
    """Show runs of other processes, or finished ones; several beside each other. Of a folder of runs, the newest
    one and each one that starts later."""
    with report_user_errors(debug):
        if len(runs) == 1 and is_folder_of_runs(runs[0]):
            from lowrank_tune.ui.watch_folder import watch_folder

            watch_folder(runs[0], plain=ui == UiMode.plain)
            return
        for run in runs:
            check_run(run)
        from lowrank_tune.ui.watch import watch

        watch(runs, plain=ui == UiMode.plain)
