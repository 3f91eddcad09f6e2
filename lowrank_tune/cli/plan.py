"""Will it fit the card?"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console

from lowrank_tune.cli.common import Debug, Overrides, app, loading_message, report_user_errors
from lowrank_tune.errors import UserError

DEFAULT_GPU_GIB = 24.0
"""What is planned for where no card is here and nobody names one."""


class PlanDevice(StrEnum):
    """Whose memory is planned."""

    cuda = "cuda"
    cpu = "cpu"


@app.command("plan")
def plan_command(
    recipe: Annotated[str, typer.Argument(metavar="PRESET|FILE", help="A preset's name, or a recipe file.")],
    overrides: Overrides = None,
    vram: Annotated[
        float | None, typer.Option("--vram", min=0.1, help="GiB of the card; by default the one that is here, else 24.")
    ] = None,
    device: Annotated[PlanDevice, typer.Option("--device", help="Plan for a card, or for the CPU.")] = PlanDevice.cuda,
    debug: Debug = False,
) -> None:
    """Say what a run will hold in memory, phase by phase, and what fits the card: from the recipe alone, without
    weights or a GPU. Ends with 2 where it does not fit."""
    with report_user_errors(debug):
        from lowrank_tune.recipe import load_any

        loaded = load_any(recipe, *(overrides or []))
        with loading_message():
            from lowrank_tune.memory_planner import gpu_memory_gib, plan
            from lowrank_tune.ui.plan_view import show

        console, fits = Console(highlight=False), True
        for number, stage_plan in enumerate(
            plan(loaded, 0.0 if device == PlanDevice.cpu else vram or gpu_memory_gib() or DEFAULT_GPU_GIB, device.value)
        ):
            if number:
                console.print()
            show(stage_plan, console)
            fits = fits and stage_plan.fits
        if not fits:
            raise typer.Exit(UserError.exit_code)
