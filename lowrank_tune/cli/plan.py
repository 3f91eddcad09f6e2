"""`plan`: the memory and the time that a run needs."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console

from lowrank_tune.cli.common import Debug, Overrides, Recipe, app, loading_message, report_user_errors
from lowrank_tune.errors import UserError


class PlanDevice(StrEnum):
    """The device that is planned for."""

    cuda = "cuda"
    cpu = "cpu"


@app.command("plan")
def plan_command(
    recipe: Recipe,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu",
            metavar="NAME",
            help="GPU whose memory and speed are planned: 3090, 4090, 5090, l4, t4, a100, h100 or h200. Default: that "
            "of this machine, or 4090 without one.",
        ),
    ] = None,
    vram: Annotated[
        float | None,
        typer.Option(
            "--vram",
            min=0.1,
            metavar="GIB",
            help="Memory of the GPU, in place of its own: what is free now, or all of a named one.",
        ),
    ] = None,
    device: Annotated[PlanDevice, typer.Option("--device", help="Plan for a GPU, or for the CPU.")] = PlanDevice.cuda,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Print the memory that a run needs in each phase, whether it fits the GPU, and an estimate of its hours: from the
    recipe alone, without weights or a GPU. Exit code 2 if it does not fit."""
    with report_user_errors(debug):
        from lowrank_tune.config import Chain, load_any

        if gpu is not None and device == PlanDevice.cpu:
            raise UserError(f"--gpu {gpu} is a GPU, and --device cpu plans for the CPU: leave one of them out")
        loaded = load_any(recipe, *(overrides or []))
        with loading_message():
            from lowrank_tune.memory_planner import plan_with_time
            from lowrank_tune.memory_planner.planned_gpu import PlannedGpu, planned_gpu
            from lowrank_tune.ui.views.plan import PlanPrinter
            from lowrank_tune.ui.views.plan_json import plan_to_dict

        planned = PlannedGpu(0.0, None)
        if device == PlanDevice.cuda:
            planned = planned_gpu(gpu, vram)
        printer = PlanPrinter(Console(highlight=False, quiet=as_json), isinstance(loaded, Chain))
        stages = []
        for stage_plan, run_time in plan_with_time(
            loaded,
            planned.vram_gib,
            device.value,
            planned.spec,
        ):
            printer.show(stage_plan, run_time)
            stages.append(plan_to_dict(stage_plan, run_time))
        printer.finish(planned.note)
        if as_json:
            print(json.dumps({"note": planned.note, "stages": stages}, indent=2))
        if not all(stage["fits"] for stage in stages):
            raise typer.Exit(UserError.exit_code)
