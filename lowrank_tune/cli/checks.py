"""What to look at before anything is trained: data, rewards, this machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lowrank_tune.cli.common import INTERRUPTED, Debug, Overrides, app, loading_message, report_user_errors
from lowrank_tune.errors import UserError


@app.command("data")
def data_command(
    recipe: Annotated[str, typer.Argument(metavar="PRESET|FILE", help="A preset's name, or a recipe file.")],
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Show what would be trained on, before anything is: mixture, lengths, faulty rows with their lines, end token,
    loss mask."""
    with report_user_errors(debug):
        from lowrank_tune.recipe import Chain, load_any

        loaded = load_any(recipe, *(overrides or []))
        with loading_message():
            from lowrank_tune.data_report import inspect_data
            from lowrank_tune.events import Event, LogMessage, Progress
            from lowrank_tune.ui.data_view import show
            from lowrank_tune.ui.plain import LineLogger

        def on_event(event: Event) -> None:
            if isinstance(event, Progress) or isinstance(event, LogMessage) and event.level == "warning":
                plain(event)

        faulty = False
        for stage in loaded.stages if isinstance(loaded, Chain) else (loaded,):
            plain = LineLogger(sys.stderr)
            try:
                inspected = inspect_data(stage, on_event)
            finally:
                plain.close()
            show(inspected, f"{stage.name}: {stage.algorithm} of {stage.base.model}", Console(highlight=False))
            faulty = faulty or bool(inspected.faults)
        if faulty:
            raise typer.Exit(UserError.exit_code)


@app.command("verify")
def verify_command(
    recipe: Annotated[
        str, typer.Argument(metavar="PRESET|FILE", help="A preset's name, or a recipe file, with rewards.")
    ],
    overrides: Overrides = None,
    file: Annotated[
        str | None,
        typer.Option(
            "--file",
            help="Responses: rows of the data with a column completion, response "
            "or completions. Without it: the reference answers of the data.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Judge only so many.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="File for what each reward said of each response.")] = None,
    debug: Debug = False,
) -> None:
    """Run the rewards over a file of responses: verdicts, times, disagreement. Ends with 1 where a run would stop at
    these failures."""
    with report_user_errors(debug):
        from lowrank_tune.recipe import Chain, load_any

        loaded = load_any(recipe, *(overrides or []))
        stages = [stage for stage in (loaded.stages if isinstance(loaded, Chain) else (loaded,)) if stage.rewards]
        if not stages:
            raise UserError(f"{recipe} has no rewards: no algorithm of it learns from completions")
        if out is not None and (out.is_dir() or not out.parent.is_dir()):
            raise UserError(
                f"{out}: {'is a folder' if out.is_dir() else 'there is no such folder'}; name a file for the verdicts"
            )
        with loading_message():
            from lowrank_tune.score_completions import verify
            from lowrank_tune.ui.plain import LineLogger
            from lowrank_tune.ui.verify_view import show

        status, lines = 0, list[str]()
        for stage in stages:
            plain = LineLogger(sys.stderr)
            try:
                result = verify(stage, file, limit, plain)
            finally:
                plain.close()
            show(result, f"{stage.name}, {file or 'reference answers'}", Console(highlight=False))
            lines += [
                json.dumps({**({"stage": stage.name} if len(stages) > 1 else {}), **line})
                for line in result.to_records()
            ]
            status = INTERRUPTED if result.interrupted else max(status, int(result.stop_reason() is not None))
            if result.interrupted:
                break
        if out is not None:
            try:
                out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            except OSError as error:
                raise UserError(f"{out}: cannot be written: {error.strerror or error}") from error
            print(f"all verdicts: {out}")
        if status:
            raise typer.Exit(status)


@app.command("doctor")
def doctor_command(debug: Debug = False) -> None:
    """Check this machine: Python, torch, the card, 4-bit arithmetic, versions, disk, terminal. Ends with 1 where
    something needed fails."""
    with report_user_errors(debug):
        from lowrank_tune.doctor import print_results, run_checks

        findings = run_checks()
        print_results(findings, Console(highlight=False))
        if any(finding.level == "fault" for finding in findings):
            raise typer.Exit(1)
