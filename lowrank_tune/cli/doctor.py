"""`doctor`: checks of this machine."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from lowrank_tune.cli.common import Debug, app, report_user_errors

OfBase = Annotated[
    str | None,
    typer.Argument(
        metavar="PRESET|FILE",
        help="A recipe whose base is checked too: experts that stay in 16 bits, missing kernels.",
    ),
]


@app.command("doctor")
def doctor_command(recipe: OfBase = None, debug: Debug = False) -> None:
    """Check this machine: Python, torch, the GPU, 4-bit arithmetic, versions, disk, terminal. Exit code 1 if a required
    check fails."""
    with report_user_errors(debug):
        from lowrank_tune.config import Chain, load_any
        from lowrank_tune.doctor import print_results, run_checks

        base = None
        if recipe is not None:
            loaded = load_any(recipe)
            base = loaded.stages[0].base if isinstance(loaded, Chain) else loaded.base
        findings = run_checks(base=base)
        print_results(findings, Console(highlight=False))
        if any(finding.level == "fault" for finding in findings):
            raise typer.Exit(1)
