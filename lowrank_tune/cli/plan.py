"""`lowrank-tune plan`: the memory that a run needs, how long it takes, and the longest row that fits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from lowrank_tune.cli.common import Debug, Overrides, Recipe, app, loading_message, report_user_errors, status_message
from lowrank_tune.cli.plan_max_length import parse_max_length, print_max_length
from lowrank_tune.errors import UserError

if TYPE_CHECKING:
    from lowrank_tune.config import Chain, RecipeConfig
    from lowrank_tune.memory_planner import Plan
    from lowrank_tune.memory_planner.planned_gpu import PlannedGpu
    from lowrank_tune.memory_planner.run_time import RunTime

    PlanWithTime = tuple[Plan, RunTime | None]


class PlanDevice(StrEnum):
    """The device that is planned for."""

    cuda = "cuda"
    cpu = "cpu"


Gpu = Annotated[
    str | None,
    typer.Option(
        "--gpu",
        metavar="NAME",
        help="GPU whose memory and speed are planned: 3090, 4090, 5090, l4, t4, a100, h100 or h200. Default: that "
        "of this machine, or 4090 without one.",
    ),
]
Vram = Annotated[
    float | None,
    typer.Option(
        "--vram",
        min=0.1,
        metavar="GIB",
        help="Memory of the GPU, in place of its own: what is free now, or all of a named one.",
    ),
]
Device = Annotated[PlanDevice, typer.Option("--device", help="Plan for a GPU, or for the CPU.")]
MaxLength = Annotated[
    str | None,
    typer.Option(
        "--max-length",
        metavar="auto|TOKENS",
        help="Plan the longest row that fits, or rows of this length, with the settings for long rows.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command("plan")
def plan_command(
    recipe: Recipe,
    overrides: Overrides = None,
    gpu: Gpu = None,
    vram: Vram = None,
    device: Device = PlanDevice.cuda,
    max_length: MaxLength = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Print the memory that a run needs in each phase, whether it fits the GPU, and an estimate of its hours: from the
    recipe alone, without weights or a GPU. Exit code 2 if it does not fit."""
    with report_user_errors(debug):
        _check_options(gpu, vram, device, max_length)
        from lowrank_tune.config import load_any

        loaded = load_any(recipe, *(overrides or []))
        with loading_message():
            from lowrank_tune.memory_planner.planned_gpu import PlannedGpu, planned_gpu

        planned = PlannedGpu(0.0, None)
        if device == PlanDevice.cuda:
            planned = planned_gpu(gpu, vram)
        console = Console(highlight=False)
        if max_length is None:
            fits = _print_plans(
                loaded,
                planned,
                device,
                as_json,
            )
        else:
            fits = print_max_length(
                recipe,
                overrides or [],
                parse_max_length(max_length),
                planned.vram_gib,
                console,
                as_json,
            )
            if planned.note and vram is None and not as_json:
                console.print(planned.note)
        if not fits:
            raise typer.Exit(UserError.exit_code)


def _check_options(
    gpu: str | None,
    vram: float | None,
    device: PlanDevice,
    max_length: str | None,
) -> None:
    """Raises UserError for options that contradict each other, before torch is imported."""
    if max_length is not None:
        parse_max_length(max_length)
    if device != PlanDevice.cpu:
        return
    given = {
        "--gpu": gpu,
        "--vram": vram,
        "--max-length": max_length,
    }
    for option, value in given.items():
        if value is not None:
            raise UserError(f"{option} {value} is for a GPU, and --device cpu plans for the CPU: leave one of them out")


def _print_plans(
    loaded: RecipeConfig | Chain,
    planned: PlannedGpu,
    device: PlanDevice,
    as_json: bool,
) -> bool:
    """Prints the plan of a recipe, or of each stage of a chain. Returns whether all of them fit."""
    from lowrank_tune.config import Chain
    from lowrank_tune.memory_planner import plan_with_time
    from lowrank_tune.ui.views.plan import PlanPrinter
    from lowrank_tune.ui.views.plan_json import plan_to_dict

    printer = PlanPrinter(Console(highlight=False, quiet=as_json), isinstance(loaded, Chain))
    plans = plan_with_time(
        loaded,
        planned.vram_gib,
        device.value,
        planned.spec,
    )
    stages = []
    for stage_plan, run_time in _with_status(plans):
        printer.show(stage_plan, run_time)
        stages.append(plan_to_dict(stage_plan, run_time))
    printer.finish(planned.note)
    if as_json:
        print(json.dumps({"note": planned.note, "stages": stages}, indent=2))
    return all(stage["fits"] for stage in stages)


def _with_status(plans: Iterator[PlanWithTime]) -> Iterator[PlanWithTime]:
    """Yields the plans, with a message at a terminal while each of them is computed."""
    while True:
        with status_message("planning: a simulation takes some seconds"):
            found = next(plans, None)
        if found is None:
            return
        yield found
