"""`data`: what a run would train on."""

from __future__ import annotations

import typer
from rich.console import Console

from lowrank_tune.cli.common import Debug, Overrides, Recipe, app, line_logger, loading_message, report_user_errors
from lowrank_tune.errors import UserError


@app.command("data")
def data_command(
    recipe: Recipe,
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Print what a run would train on: mixture, lengths, rows with errors and their lines, end token, loss mask."""
    with report_user_errors(debug):
        from lowrank_tune.config import load_any

        loaded = load_any(recipe, *(overrides or []))
        with loading_message():
            from lowrank_tune.data_report import inspect_data
            from lowrank_tune.events import Event, Progress, is_warning
            from lowrank_tune.ui.views.data import show

        def on_event(event: Event) -> None:
            if isinstance(event, Progress) or is_warning(event):
                plain(event)

        faulty = False
        for stage in loaded.stages:
            with line_logger() as plain:
                inspected = inspect_data(stage, on_event)
            show(inspected, f"{stage.name}: {stage.algorithm} of {stage.base.model}", Console(highlight=False))
            faulty = faulty or bool(inspected.faults)
        if faulty:
            raise typer.Exit(UserError.exit_code)
