"""`runs`: the runs in a folder."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lowrank_tune.cli.common import RUNS, Debug, app, report_user_errors

PIPED_WIDTH = 1000
"""In a pipe no column is left out and no cell is wrapped."""


@app.command("runs")
def runs_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of runs, or of a chain.")] = RUNS,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all figures of each run.")] = False,
    debug: Debug = False,
) -> None:
    """List the runs in a folder, newest first: state, algorithm, base, best metric, steps, age, wall time, size."""
    with report_user_errors(debug):
        from lowrank_tune.ui.run_list import list_runs, print_runs, runs_as_json

        runs = list_runs(folder)
        if as_json:
            print(runs_as_json(runs))
            return
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPED_WIDTH
        print_runs(runs, folder, Console(width=width, highlight=False))
