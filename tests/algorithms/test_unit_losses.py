"""The loss of each held-out row or pair: that of a batch of it alone, and together the mean that is reported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from algorithm_helpers import dpo_over, pair_batch, pair_rows
from models import llama_roles, load_base_of, perturb, ragged_batch, reward_roles, sft_over
from test_reward import reward_over

from lowrank_tune.algorithms.base import Algorithm, UnitLosses
from lowrank_tune.batch import Batch, rows_of_units
from lowrank_tune.evaluation.validation import _unit_scores


def sft_case() -> tuple[Algorithm[Any], Batch]:
    roles = llama_roles(16)
    perturb(roles, "policy")
    return sft_over(roles), ragged_batch()


def dpo_case() -> tuple[Algorithm[Any], Batch]:
    roles = llama_roles(16)
    perturb(roles, "policy")
    rows, masks = pair_rows()
    reference = [-float(len(row)) for row in rows]
    return dpo_over(roles), pair_batch(rows, masks, reference)


def reward_case() -> tuple[Algorithm[Any], Batch]:
    roles = reward_roles(load_base_of(16))
    perturb(roles, "reward")
    return reward_over(roles, centering=0.1), pair_batch(*pair_rows())


@pytest.mark.parametrize("case", [sft_case, dpo_case, reward_case])
def test_unit_losses_are_those_of_single_units_and_have_the_reported_mean(case: Any) -> None:
    algorithm, batch = case()
    with algorithm.context.roles.inference_mode():
        stats, units = algorithm.evaluate_units(batch)
        assert isinstance(units, UnitLosses)
        count = len(batch) // algorithm.rows_per_unit
        assert units.totals.shape == units.weights.shape == (count,)
        mean = float(units.totals.sum() / units.weights.sum())
        assert mean == pytest.approx(stats["loss"].value, rel=1e-5)
        assert {name: mean.value for name, mean in algorithm.eval_metrics(batch).items()} == {
            name: mean.value for name, mean in stats.items()
        }
        for unit in range(count):
            rows = rows_of_units([unit], algorithm.rows_per_unit)
            single, _ = algorithm.evaluate_units(batch.select_rows(rows))
            if units.weights[unit]:
                value = float(units.totals[unit] / units.weights[unit])
                assert single["loss"].value == pytest.approx(value, rel=1e-4, abs=1e-6)
            else:
                assert units.totals[unit] == 0


def test_scores_are_in_the_order_of_the_units_whatever_the_batches_were() -> None:
    parts = [
        UnitLosses(torch.tensor([6.0, 0.0]), torch.tensor([2, 0])),
        UnitLosses(torch.tensor([5.0]), torch.tensor([1])),
    ]
    scores = _unit_scores("rows", parts, [torch.tensor([2, 0]), torch.tensor([1])])
    assert scores is not None
    assert (scores.scores, scores.weights) == ([0.0, -5.0, -3.0], [0.0, 1.0, 2.0])
    assert _unit_scores("rows", [], []) is None
