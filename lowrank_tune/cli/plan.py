"""`plan`: the memory that a run needs."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console

from lowrank_tune.cli.common import Debug, Overrides, Recipe, app, loading_message, report_user_errors
from lowrank_tune.errors import UserError

DEFAULT_GPU_GIB = 24.0
"""Memory of the planned GPU, without a GPU in this machine and without --vram."""


class PlanDevice(StrEnum):
    """The device whose memory is planned."""

    cuda = "cuda"
    cpu = "cpu"


@app.command("plan")
def plan_command(
    recipe: Recipe,
    overrides: Overrides = None,
    vram: Annotated[
        float | None,
        typer.Option(
            "--vram",
            min=0.1,
            metavar="GIB",
            help="Memory of the GPU. Default: what is free on this machine's GPU, or 24 without one.",
        ),
    ] = None,
    device: Annotated[PlanDevice, typer.Option("--device", help="Plan for a GPU, or for the CPU.")] = PlanDevice.cuda,
    debug: Debug = False,
) -> None:
    """Print the memory that a run needs in each phase, and whether it fits the GPU: from the recipe alone, without
    weights or a GPU. Exit code 2 if it does not fit."""
    with report_user_errors(debug):
        from lowrank_tune.config import Chain, load_any

        loaded = load_any(recipe, *(overrides or []))
        in_chain = isinstance(loaded, Chain)
        with loading_message():
            from lowrank_tune.memory_planner import Plan, gpu_budget_gib, plan
            from lowrank_tune.ui.views.plan import show, worst_stage_line

        console = Console(highlight=False)
        plans = list[Plan]()
        found_gib = None
        vram_gib = 0.0
        if device == PlanDevice.cuda:
            found_gib = vram or gpu_budget_gib()
            vram_gib = found_gib or DEFAULT_GPU_GIB
        for stage_plan in plan(loaded, vram_gib, device.value):
            if plans:
                console.print()
            show(stage_plan, console, in_chain)
            plans.append(stage_plan)
        if in_chain:
            console.print()
            console.print(worst_stage_line(plans))
        if device == PlanDevice.cuda and found_gib is None:
            console.print(f"no GPU found: {DEFAULT_GPU_GIB:.0f} GiB are assumed; --vram GIB plans for another size")
        if not all(stage_plan.fits for stage_plan in plans):
            raise typer.Exit(UserError.exit_code)
