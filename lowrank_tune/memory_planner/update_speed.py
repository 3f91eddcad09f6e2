"""The estimated speed of a run's update on this machine's GPU."""

from __future__ import annotations

from lowrank_tune.config import RecipeConfig
from lowrank_tune.memory_planner.gpu_specs import GpuSpec
from lowrank_tune.memory_planner.planner import recomputed_of
from lowrank_tune.memory_planner.repetitions import update_passes
from lowrank_tune.memory_planner.run_time import RunTimeModel
from lowrank_tune.memory_planner.specs import simulation_specs
from lowrank_tune.memory_planner.step_costs import OLD_AND_REFERENCE, REWARD_MODEL, step_costs


def estimated_update_speed(recipe: RecipeConfig, gpu: GpuSpec) -> float:
    """Returns tokens per second of a step without its rollouts, as the trainer counts tokens: once in each pass of the
    update. Values of `auto` must be replaced before. Raises UserError."""
    (spec,) = simulation_specs(recipe, "cuda")
    costs = step_costs(spec, recomputed_of(spec), {})
    run_time = RunTimeModel(
        recipe,
        gpu,
        costs,
        {},
    ).run_time(None)
    seconds_per_token = 1 / run_time.update.tokens_per_second
    for phase in run_time.phases:
        if phase.name in (OLD_AND_REFERENCE, REWARD_MODEL):
            seconds_per_token += 1 / phase.tokens_per_second / update_passes(recipe)
    return 1 / seconds_per_token
