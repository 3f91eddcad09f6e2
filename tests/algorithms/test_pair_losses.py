"""The loss of each validation pair: that of the pair alone, in the order of the store, and together the mean that is
reported."""

from __future__ import annotations

from statistics import fmean
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from algorithm_helpers import dpo_over, pair_batch, pair_rows
from models import llama_roles, load_base_of, perturb, ragged_batch, reward_roles, sft_over
from test_reward import reward_over

from lowrank_tune.algorithms.base import Algorithm
from lowrank_tune.batch import Batch, rows_of_units
from lowrank_tune.evaluation.pair_losses import ValidationResult
from lowrank_tune.evaluation.validation import validate
from lowrank_tune.events import ignore_event


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


def validated(algorithm: Algorithm[Any], batch: Batch, micro_tokens: int) -> ValidationResult:
    lengths = batch.attention_mask.sum(dim=1).tolist()
    rows_per_unit = algorithm.rows_per_unit
    rows: Any = SimpleNamespace(
        rows_per_unit=rows_per_unit,
        lengths=np.array(lengths),
        families=np.arange(len(lengths)) // rows_per_unit,
    )

    def collate(indices: np.ndarray) -> Batch:
        return batch.select_rows(torch.from_numpy(indices))

    return validate(algorithm, algorithm.context.roles, rows, collate, micro_tokens, ignore_event)


@pytest.mark.parametrize("case", [dpo_case, reward_case])
def test_pair_losses_are_those_of_single_pairs_and_have_the_reported_mean(case: Any) -> None:
    algorithm, batch = case()
    single: list[float] = []
    with algorithm.context.roles.inference_mode():
        for pair in range(len(batch) // 2):
            stats = algorithm.eval_metrics(batch.select_rows(rows_of_units([pair], 2)))
            single.append(stats["loss"].value)
    assert len(set(single)) == len(single) > 1
    for micro_tokens in (1, 10_000):
        result = validated(algorithm, batch, micro_tokens)
        assert result.pair_losses == pytest.approx(single, rel=1e-4)
        assert result.metrics["loss"] == pytest.approx(fmean(single), rel=1e-4)


def test_rows_of_sft_are_no_pairs() -> None:
    result = validated(*sft_case(), 10_000)
    assert result.pair_losses == [] and result.metrics["loss"] > 0
