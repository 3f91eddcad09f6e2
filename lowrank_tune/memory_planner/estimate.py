"""The run-time estimate of a planned stage."""

from __future__ import annotations

from lowrank_tune.memory_planner.gpu_specs import GpuSpec
from lowrank_tune.memory_planner.plan_report import Plan
from lowrank_tune.memory_planner.planner import decoding_of
from lowrank_tune.memory_planner.run_length import RunLength
from lowrank_tune.memory_planner.run_time import RunTime, RunTimeModel
from lowrank_tune.memory_planner.simulation import SimulationSpec
from lowrank_tune.memory_planner.step_costs import step_costs


def estimate_run_time(
    spec: SimulationSpec,
    plan: Plan,
    gpu: GpuSpec,
    length: RunLength | None,
) -> RunTime:
    """Returns the time of a stage on a GPU, with the micro-batch and the recomputed layers of its plan."""
    rollouts = decoding_of(spec, plan.phases, plan.vram)
    costs = step_costs(spec, plan.recomputed, rollouts)
    model = RunTimeModel(
        spec.recipe,
        gpu,
        costs,
        rollouts,
    )
    return model.run_time(length)
