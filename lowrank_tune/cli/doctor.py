"""`doctor`: checks of this machine."""

from __future__ import annotations

import typer
from rich.console import Console

from lowrank_tune.cli.common import Debug, app, report_user_errors


@app.command("doctor")
def doctor_command(debug: Debug = False) -> None:
    """Check this machine: Python, torch, the GPU, 4-bit arithmetic, versions, disk, terminal. Exit code 1 if a required
    check fails."""
    with report_user_errors(debug):
        from lowrank_tune.doctor import print_results, run_checks

        findings = run_checks()
        print_results(findings, Console(highlight=False))
        if any(finding.level == "fault" for finding in findings):
            raise typer.Exit(1)
