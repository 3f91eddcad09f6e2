"""Plans of KTO: the passes over mismatched rows are a phase of their own, in memory and in time."""

from __future__ import annotations

import pytest

from lowrank_tune.config import Recipe
from lowrank_tune.memory_planner.planner import phases_of
from lowrank_tune.memory_planner.repetitions import tokens_of_phase
from lowrank_tune.memory_planner.run_length import run_length
from lowrank_tune.memory_planner.sizes import sizes_of
from lowrank_tune.memory_planner.specs import simulation_specs
from lowrank_tune.memory_planner.step_costs import step_costs


def kernels_by_phase(*settings: str) -> dict[str, float]:
    """Returns how many kernels each phase starts."""
    recipe = Recipe.load("tiny-kto", "train.micro_batch_size=2", "data.max_length=64", *settings)
    (spec,) = simulation_specs(recipe, "cuda")
    return {name: sum(cost.kernels.values()) for name, cost in step_costs(spec, 0, {}).items()}


def test_estimate_has_the_passes_of_policy_and_reference() -> None:
    """Two passes over mismatched rows before each update, two more in each validation; none without an estimate."""
    found = kernels_by_phase()
    assert found["KL estimate"] > 1.8 * found["reference"]
    without = kernels_by_phase("kto.loss_type=apo_zero_unpaired")
    assert "KL estimate" not in without
    for other in ("tiny-sft", "tiny-dpo"):
        (spec,) = simulation_specs(Recipe.load(other, "train.micro_batch_size=2", "data.max_length=64"), "cuda")
        assert "KL estimate" not in [phase.name for phase in phases_of(spec)]
    assert found["validation"] == pytest.approx(without["validation"] + found["KL estimate"], rel=0.05)


def test_rows_of_pairs_count_twice() -> None:
    """Both answers of a pair are rows of a step, and the estimate reads as many tokens as the update."""
    recipe = Recipe.load("qwen2.5-7b-kto")
    length = run_length(recipe)
    assert length is not None and length.steps == pytest.approx(40_000 * 0.98 / 32)
    assert tokens_of_phase("KL estimate", recipe, length) == length.tokens
    assert sizes_of(recipe).rows_per_unit == 1 and sizes_of(recipe).labeled
