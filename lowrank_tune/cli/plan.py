"""`plan`: the memory that a run needs."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from lowrank_tune.cli.common import Debug, Overrides, Recipe, app, loading_message, report_user_errors
from lowrank_tune.cli.plan_max_length import parse_max_length, print_max_length
from lowrank_tune.errors import UserError

if TYPE_CHECKING:
    from lowrank_tune.config import Chain, RecipeConfig

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
            help="Memory of the GPU. Default: that of this machine's GPU, or 24 without one.",
        ),
    ] = None,
    device: Annotated[PlanDevice, typer.Option("--device", help="Plan for a GPU, or for the CPU.")] = PlanDevice.cuda,
    max_length: Annotated[
        str | None,
        typer.Option(
            "--max-length",
            metavar="auto|TOKENS",
            help="Plan the longest row that fits, or rows of this length, with the settings for long rows.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result of --max-length as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Print the memory that a run needs in each phase, and whether it fits the GPU: from the recipe alone, without
    weights or a GPU. Exit code 2 if it does not fit."""
    with report_user_errors(debug):
        _check_options(max_length, as_json, device)
        from lowrank_tune.config import load_any

        loaded = load_any(recipe, *(overrides or []))
        with loading_message():
            from lowrank_tune.memory_planner import gpu_memory_gib

        console = Console(highlight=False)
        found_gib = None
        vram_gib = 0.0
        if device == PlanDevice.cuda:
            found_gib = vram or gpu_memory_gib()
            vram_gib = found_gib or DEFAULT_GPU_GIB
        if max_length is not None:
            fits = print_max_length(
                recipe,
                overrides or [],
                parse_max_length(max_length),
                vram_gib,
                console,
                as_json,
            )
        else:
            fits = _print_plans(
                loaded,
                vram_gib,
                device,
                console,
            )
        if device == PlanDevice.cuda and found_gib is None and not as_json:
            console.print(f"no GPU found: {DEFAULT_GPU_GIB:.0f} GiB are assumed; --vram GIB plans for another size")
        if not fits:
            raise typer.Exit(UserError.exit_code)


def _check_options(
    max_length: str | None,
    as_json: bool,
    device: PlanDevice,
) -> None:
    """Raises UserError for options that contradict each other, before torch is imported."""
    if max_length is None:
        if as_json:
            raise UserError("--json: is a form of the result of --max-length; give both")
        return
    parse_max_length(max_length)
    if device == PlanDevice.cpu:
        raise UserError("--max-length: is planned for a GPU; leave out --device cpu")


def _print_plans(
    loaded: RecipeConfig | Chain,
    vram_gib: float,
    device: PlanDevice,
    console: Console,
) -> bool:
    """Prints the plan of a recipe, or of each stage of a chain. Returns whether all of them fit."""
    from lowrank_tune.config import Chain
    from lowrank_tune.memory_planner import Plan, plan
    from lowrank_tune.ui.views.plan import show, worst_stage_line

    in_chain = isinstance(loaded, Chain)
    plans = list[Plan]()
    for stage_plan in plan(loaded, vram_gib, device.value):
        if plans:
            console.print()
        show(stage_plan, console, in_chain)
        plans.append(stage_plan)
    if in_chain:
        console.print()
        console.print(worst_stage_line(plans))
    return all(stage_plan.fits for stage_plan in plans)
