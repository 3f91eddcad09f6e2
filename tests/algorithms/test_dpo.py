"""DPO: every loss and its gradient by hand, in float64 and through a plain model; one gradient for any split; a checked
reference."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from algorithm_helpers import (
    accumulated,
    by_key,
    collected_step,
    error_against,
    largest,
    pair_batch,
    pair_rows,
    reference_sums,
    run_with_events,
)
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from models import (
    CPU,
    VOCAB,
    changed_tensors,
    llama_roles,
    make_batch,
    perturb,
    relative_error,
    roles_over,
    same_bytes,
)
from oracles import PlainModel, dpo_step
from safetensors.torch import load_file, save
from torch import Tensor

from lowrank_tune import Recipe, run
from lowrank_tune import assembly as assembly_module
from lowrank_tune import runner as runner_module
from lowrank_tune.algorithms import dpo as dpo_module
from lowrank_tune.algorithms import reference_logps as reference_module
from lowrank_tune.algorithms.base import AlgorithmContext
from lowrank_tune.algorithms.dpo import DPO, chosen_mask, dpo_loss
from lowrank_tune.algorithms.reference_logps import reference_logps
from lowrank_tune.assembly import build
from lowrank_tune.assembly import sources as sources_module
from lowrank_tune.batch import Batch, PairBatch
from lowrank_tune.config import DPOConfig
from lowrank_tune.data import collate_units
from lowrank_tune.errors import TrainingError
from lowrank_tune.events import RunStarted, StepEnd
from lowrank_tune.functional import token_mean_weights
from lowrank_tune.model.adapters import WEIGHTS
from lowrank_tune.model.logprobs import LogProbs
from lowrank_tune.model.roles import Roles
from lowrank_tune.stats import to_floats

LOSS_TYPES = ("sigmoid", "ipo", "hinge", "robust", "apo_zero", "sigmoid_norm")

# --- the losses against the oracle ------------------------------------------------------------------------------------


def losses_and_slopes(
    loss_type: str,
    chosen_logratio: Sequence[float],
    rejected_logratio: Sequence[float],
    beta: float,
    label_smoothing: float,
    num_tokens: Sequence[tuple[int, int]],
    dtype: torch.dtype,
) -> tuple[list[float], list[float], list[float]]:
    """The losses of the package, and their derivatives by both log-ratios."""
    chosen = torch.tensor(chosen_logratio, dtype=dtype, requires_grad=True)
    rejected = torch.tensor(rejected_logratio, dtype=dtype, requires_grad=True)
    chosen_tokens, rejected_tokens = (torch.tensor(counts) for counts in zip(*num_tokens, strict=True))
    losses = dpo_module.dpo_loss(loss_type, chosen, rejected, beta, label_smoothing, chosen_tokens, rejected_tokens)
    chosen_slopes, rejected_slopes = torch.autograd.grad(losses.sum(), [chosen, rejected])
    return losses.tolist(), chosen_slopes.tolist(), rejected_slopes.tolist()


def formula_error(
    loss_type: str,
    chosen_logratio: Sequence[float],
    rejected_logratio: Sequence[float],
    beta: float,
    label_smoothing: float,
    num_tokens: Sequence[tuple[int, int]],
    dtype: torch.dtype,
) -> float:
    """The largest distance from the oracle, relative to the numbers that are added on the way."""
    found = losses_and_slopes(loss_type, chosen_logratio, rejected_logratio, beta, label_smoothing, num_tokens, dtype)
    errors = []
    for *values, chosen, rejected, tokens in zip(*found, chosen_logratio, rejected_logratio, num_tokens, strict=True):
        expected = oracles.dpo(loss_type, chosen, rejected, beta, label_smoothing, tokens)
        m, n = tokens if loss_type in ("ipo", "sigmoid_norm") else (1, 1)
        size = abs(chosen / m) + abs(rejected / n)
        if loss_type == "ipo":
            scale = size + 1 / (2 * beta)
            scales = (scale**2, 2 * scale / m, 2 * scale / n)
        else:
            scale = (1 + beta * size) / (1 - 2 * label_smoothing)
            scales = (scale, beta * scale / m, beta * scale / n)
        errors += [abs(a - b) / scale for a, b, scale in zip(values, expected, scales, strict=True)]
    return largest(errors)


LOGRATIO = st.one_of(
    st.floats(-1000, 1000, width=32), st.floats(-3, 3, width=32), st.sampled_from([0.0, 1e3, -1e3, 1e-30])
)
TOKENS = st.tuples(st.integers(1, 300), st.integers(1, 300))
PAIRS = st.lists(st.tuples(LOGRATIO, LOGRATIO, TOKENS), min_size=1, max_size=5)
BETA = st.one_of(st.floats(2**-10, 10, width=32), st.sampled_from([2.0**-10, 0.125, 10.0]))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@given(pairs=PAIRS, beta=BETA, label_smoothing=st.sampled_from([0.0, 0.0625, 0.25, 0.4375]))
def test_loss_and_gradient_equal_the_oracle(
    loss_type: str, pairs: list[tuple[float, float, tuple[int, int]]], beta: float, label_smoothing: float
) -> None:
    chosen, rejected, num_tokens = zip(*pairs, strict=True)
    # hinge has no derivative at its corner
    assume(loss_type != "hinge" or all(abs(beta * (a - b) - 1) > 1e-5 for a, b in zip(chosen, rejected, strict=True)))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        assert formula_error(loss_type, chosen, rejected, beta, label_smoothing, num_tokens, dtype) < tolerance


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize(("chosen", "rejected", "beta"), [(0.3, -0.7, 0.5), (-2.0, 1.5, 0.9), (3.0, 2.9, 2.0)])
@pytest.mark.parametrize(("label_smoothing", "num_tokens"), [(0.0, (1, 1)), (0.2, (3, 7))])
def test_the_oracle_has_the_slopes_of_its_loss(
    loss_type: str,
    chosen: float,
    rejected: float,
    beta: float,
    label_smoothing: float,
    num_tokens: tuple[int, int],
) -> None:
    """By central differences."""

    def oracle(chosen: float, rejected: float) -> tuple[float, float, float]:
        return oracles.dpo(loss_type, chosen, rejected, beta, label_smoothing, num_tokens)

    h = 1e-6
    _, chosen_slope, rejected_slope = oracle(chosen, rejected)
    by_chosen = (oracle(chosen + h, rejected)[0] - oracle(chosen - h, rejected)[0]) / (2 * h)
    by_rejected = (oracle(chosen, rejected + h)[0] - oracle(chosen, rejected - h)[0]) / (2 * h)
    assert chosen_slope == pytest.approx(by_chosen, abs=1e-7)
    assert rejected_slope == pytest.approx(by_rejected, abs=1e-7)


LN3 = math.log(3)  # sigma(ln 3) = 3/4, sigma(-ln 3) = 1/4
BY_HAND: list[tuple[str, float, float, float, tuple[int, int], float, float, float]] = [
    # loss_type, a+, a-, beta, tokens, loss, and the derivatives by a+ and a-
    ("sigmoid", 0.0, 0.0, 0.1, (1, 1), math.log(2), -0.05, 0.05),  # beta sigma(0)
    ("sigmoid", 2 * LN3, 0.0, 0.5, (9, 2), math.log(4 / 3), -0.125, 0.125),  # x = ln 3: 0.5 * 1/4
    ("sigmoid", -LN3, LN3, 0.5, (9, 2), math.log(4), -0.375, 0.375),  # x = -ln 3: 0.5 * 3/4
    ("ipo", 0.0, 0.0, 0.5, (2, 3), 1.0, -1.0, 2 / 3),  # (0 - 1)^2; 2 * -1 / 2, and / -3
    ("ipo", 6.0, -2.0, 0.5, (3, 4), 2.25, 1.0, -0.75),  # d' = 2 + 1/2; (3/2)^2; 3 / 3, and 3 / -4
    ("ipo", 4.0, 0.0, 0.5, (4, 1), 0.0, 0.0, 0.0),  # d' = 1 = 1 / (2 beta): the minimum
    ("hinge", 1.0, -0.5, 0.5, (7, 1), 0.25, -0.5, 0.5),  # 1 - 0.75
    ("hinge", 4.0, 0.0, 0.5, (7, 1), 0.0, 0.0, 0.0),  # 1 - 2 is below zero
    ("hinge", 0.0, 2.0, 0.5, (7, 1), 2.0, -0.5, 0.5),  # 1 + 1
    # e = 1/4: ln 2 (3/4 - 1/4) / (1/2); 0.5 (3/8 + 1/8) / (1/2)
    ("robust", 0.0, 0.0, 0.5, (7, 1), math.log(2), -0.5, 0.5),
    # 0.5 (3/4 1/4 + 1/4 3/4) / (1/2)
    ("robust", 2 * LN3, 0.0, 0.5, (7, 1), 1.5 * math.log(4 / 3) - 0.5 * math.log(4), -0.375, 0.375),
    # 0.5 (9/16 + 1/16) / (1/2)
    ("robust", 0.0, 2 * LN3, 0.5, (7, 1), 1.5 * math.log(4) - 0.5 * math.log(4 / 3), -0.625, 0.625),
    ("apo_zero", 0.0, 0.0, 1.0, (7, 1), 1.0, -0.25, 0.25),  # 1 - 1/2 + 1/2
    ("apo_zero", LN3, -LN3, 1.0, (7, 1), 0.5, -0.1875, 0.1875),  # 1 - 3/4 + 1/4; sigma sigma' = 3/16
    ("apo_zero", -LN3, 0.0, 1.0, (7, 1), 1.25, -0.1875, 0.25),  # 1 - 1/4 + 1/2
    ("sigmoid_norm", 2 * LN3, 0.0, 1.0, (2, 5), math.log(4 / 3), -0.125, 0.05),  # x = ln 3: 1/4 over 2 and 5 tokens
    ("sigmoid_norm", 0.0, 3 * LN3, 1.0, (4, 3), math.log(4), -0.1875, 0.25),  # x = -ln 3: 3/4 over 4 and 3
    ("sigmoid_norm", 4 * LN3, LN3, 1.0, (2, 1), math.log(4 / 3), -0.125, 0.25),  # x = 2 ln 3 - ln 3
]


def wrong_by_hand(loss_types: Sequence[str] = LOSS_TYPES) -> set[str]:
    """The losses whose numbers differ from those by hand."""
    wrong = set()
    for loss_type, chosen, rejected, beta, tokens, *expected in BY_HAND:
        if loss_type in loss_types:
            found = losses_and_slopes(loss_type, [chosen], [rejected], beta, 0.25, [tokens], torch.float64)
            if [values[0] for values in found] != pytest.approx(expected, abs=1e-12):
                wrong.add(loss_type)
    return wrong


def test_losses_by_hand() -> None:
    assert wrong_by_hand() == set()


def test_the_oracle_by_hand() -> None:
    for loss_type, chosen, rejected, beta, tokens, *expected in BY_HAND:
        assert oracles.dpo(loss_type, chosen, rejected, beta, 0.25, tokens) == pytest.approx(expected, abs=1e-12)


def _sums_for_means(
    loss_type: str, chosen: Tensor, rejected: Tensor, beta: float, e: float, m: Tensor, n: Tensor
) -> Tensor:
    return dpo_loss(loss_type, chosen, rejected, beta, e, torch.ones_like(m), torch.ones_like(n))


def _swapped(loss_type: str, chosen: Tensor, rejected: Tensor, beta: float, e: float, m: Tensor, n: Tensor) -> Tensor:
    return dpo_loss(loss_type, rejected, chosen, beta, e, n, m)


def _rounded(loss_type: str, chosen: Tensor, rejected: Tensor, beta: float, e: float, m: Tensor, n: Tensor) -> Tensor:
    return dpo_loss(loss_type, chosen.bfloat16().to(chosen.dtype), rejected, beta, e, m, n)


def _smoothed_sigmoid(
    loss_type: str, chosen: Tensor, rejected: Tensor, beta: float, e: float, m: Tensor, n: Tensor
) -> Tensor:
    if loss_type != "sigmoid":
        return dpo_loss(loss_type, chosen, rejected, beta, e, m, n)
    return (1 - 2 * e) * dpo_loss("robust", chosen, rejected, beta, e, m, n)


def _beta_twice(
    loss_type: str, chosen: Tensor, rejected: Tensor, beta: float, e: float, m: Tensor, n: Tensor
) -> Tensor:
    return dpo_loss(loss_type, chosen, rejected, beta * beta, e, m, n)


def _log_of_sigmoid(
    loss_type: str, chosen: Tensor, rejected: Tensor, beta: float, e: float, m: Tensor, n: Tensor
) -> Tensor:
    return -torch.log(torch.sigmoid(beta * (chosen - rejected)))


@pytest.mark.parametrize(
    ("bug", "found_in"),
    [
        (_sums_for_means, {"ipo", "sigmoid_norm"}),
        (_swapped, set(LOSS_TYPES)),
        (_rounded, {"sigmoid", "robust", "apo_zero", "sigmoid_norm"}),
        (_smoothed_sigmoid, {"sigmoid"}),
        (_beta_twice, {"sigmoid", "ipo", "hinge", "robust"}),
    ],
)
def test_wrong_losses_are_found(monkeypatch: pytest.MonkeyPatch, bug: Any, found_in: set[str]) -> None:
    monkeypatch.setattr(dpo_module, "dpo_loss", bug)
    assert wrong_by_hand() >= found_in


def not_finite(loss_types: Sequence[str]) -> set[str]:
    """The losses that are not finite, or have no finite gradient, for log-ratios of a diverged run."""
    wrong = set()
    extremes = [0.0, 1e3, -1e3, 1e4, -1e4]
    chosen, rejected = zip(*((a, b) for a in extremes for b in extremes), strict=True)
    for loss_type in loss_types:
        for beta in (1e-3, 0.1, 10.0):
            found = losses_and_slopes(loss_type, chosen, rejected, beta, 0.25, [(1, 3)] * len(chosen), torch.float32)
            if not all(math.isfinite(value) for values in found for value in values):
                wrong.add(loss_type)
    return wrong


def test_extreme_logratios_give_finite_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not_finite(LOSS_TYPES) == set()
    monkeypatch.setattr(dpo_module, "dpo_loss", _log_of_sigmoid)
    assert not_finite(["sigmoid"]) == {"sigmoid"}


def test_a_pair_that_is_far_off_keeps_its_slope() -> None:
    """The derivative of sigmoid at x = -1e4 is -beta, not 0."""
    _, chosen_slopes, _ = losses_and_slopes("sigmoid", [-1e3], [0.0], 10.0, 0.0, [(1, 1)], torch.float32)
    assert chosen_slopes == [-10.0]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_an_answer_without_tokens_gives_a_finite_loss(loss_type: str) -> None:
    """The data has no such answer; one must not break the step: its log-ratio is 0."""
    found = losses_and_slopes(loss_type, [0.0, 2.0], [2.0, 0.0], 0.5, 0.25, [(0, 3), (3, 0)], torch.float32)
    assert all(math.isfinite(value) for values in found for value in values)


# --- a step over given log-probs --------------------------------------------------------------------------------------


class GivenLogps:
    """Roles without a model: the log-probs of the policy are a leaf tensor, and a micro-batch gets those of its
    rows."""

    def __init__(self, logps: Tensor) -> None:
        self.leaf = logps.clone().requires_grad_()

    def logps(self, role: str, batch: PairBatch, *_: Any) -> LogProbs:
        assert role == "policy"
        rows = self.leaf[batch.row_indices][:, : batch.input_ids.shape[1]]
        values = torch.where(batch.loss_mask, rows, torch.zeros((), dtype=rows.dtype))
        return LogProbs(values, torch.zeros_like(values))


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[list[float]], list[list[bool]], list[float]]:
    """Log-probs of the tokens of ragged rows, masks with at least one scored token, and reference sums near or far."""
    logps, masks, reference = [], [], []
    for _ in range(2 * draw(st.integers(1, 4))):
        length = draw(st.integers(2, 9))
        logps.append(draw(st.lists(st.floats(-400, 0), min_size=length, max_size=length)))
        mask = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        mask[draw(st.integers(1, length - 1))] = True
        masks.append(mask)
        reference.append(draw(st.floats(-1500, 0)))
    return logps, masks, reference


def step_error(
    drawn: tuple[list[list[float]], list[list[bool]], list[float]],
    loss_type: str,
    beta: float,
    label_smoothing: float,
    sft_coef: float,
    **split: int,
) -> float:
    """The largest distance of loss, gradient and metrics of a step from the oracle, relative to their sizes."""
    logps, masks, reference = drawn
    batch = PairBatch(**make_batch([[3] * len(row) for row in logps], masks).tensors())
    batch.row_indices = torch.arange(len(logps))
    batch.reference_sequence_logps = torch.tensor(reference, dtype=torch.float64)
    padded_logps = torch.full(batch.input_ids.shape, torch.nan, dtype=torch.float64)
    for i, row in enumerate(logps):
        padded_logps[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
    roles = GivenLogps(padded_logps)
    settings = DPOConfig(loss_type=loss_type, beta=beta, label_smoothing=label_smoothing, sft_coef=sft_coef)
    loss, stats = collected_step(DPO(AlgorithmContext(roles), settings), batch, **split)  # type: ignore[arg-type]
    expected = dpo_step(logps, masks, reference, loss_type, beta, label_smoothing, sft_coef)
    assert roles.leaf.grad is not None
    slopes = torch.zeros_like(padded_logps)
    for place, slope in expected.slopes.items():
        slopes[place] = slope
    # terms that cancel in a sum leave their rounding
    sizes = {name: 1 + sum(map(abs, values)) for name, values in expected.metrics.items()}
    slope_size = sft_coef + slopes.abs().max() + 1e-9 * beta
    errors = [
        abs(loss - expected.loss) / (sizes["loss"] + abs(expected.loss)),
        float((roles.leaf.grad - slopes).abs().max() / slope_size),
    ]
    errors += [abs(stats[name] - np.mean(values)) / sizes[name] for name, values in expected.metrics.items()]
    return largest(errors)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("sft_coef", [0.0, 0.7])
@hypothesis_settings(max_examples=40)
@given(drawn=steps(), beta=BETA, label_smoothing=st.sampled_from([0.0, 0.25]), rows=st.sampled_from([2, 4, 8]))
def test_a_step_equals_the_oracle(
    loss_type: str, sft_coef: float, drawn: Any, beta: float, label_smoothing: float, rows: int
) -> None:
    assert step_error(drawn, loss_type, beta, label_smoothing, sft_coef, rows=rows) < 1e-6


DRAWN = (
    [
        [-1.0, -2.0, -0.5],
        [-1.0, -3.0],
        [-0.1, -0.2, -0.3, -0.4],
        [-0.7, -2.5, -0.2],
        [-1.0, -9.0],
        [-2.0, -1.0, -1.5, -1.0, -1.0],
    ],
    [
        [False, True, True],
        [True, True],
        [False, False, True, True],
        [False, True, True],
        [False, True],
        [False, True, False, True, True],
    ],
    [-2.0, -3.5, -1.0, -2.0, -8.0, -4.0],
)


def _first_token_scored(self: DPO, micro: PairBatch) -> Iterator[Any]:
    first_logps = self.context.roles.leaf[micro.row_indices, 0].detach()  # type: ignore[attr-defined]
    micro.reference_sequence_logps = micro.reference_sequence_logps + first_logps
    yield from real_compute_losses(self, micro)


def _no_reference(self: DPO, micro: PairBatch) -> Iterator[Any]:
    micro.reference_sequence_logps = torch.zeros_like(micro.reference_sequence_logps)
    yield from real_compute_losses(self, micro)


def _sft_mean_of_micro_batches(self: DPO, micro: PairBatch) -> Iterator[Any]:
    micro.sft_weights = token_mean_weights(chosen_mask(micro.loss_mask)) * len(micro) / 6
    yield from real_compute_losses(self, micro)


real_compute_losses = DPO.compute_losses


@pytest.mark.parametrize("bug", [_first_token_scored, _no_reference, _sft_mean_of_micro_batches])
def test_a_bug_of_a_step_is_found(monkeypatch: pytest.MonkeyPatch, bug: Any) -> None:
    assert step_error(DRAWN, "sigmoid", 0.5, 0.0, 0.7, rows=2) < 1e-6
    monkeypatch.setattr(DPO, "compute_losses", bug)
    assert step_error(DRAWN, "sigmoid", 0.5, 0.0, 0.7, rows=2) > 1e-3


@pytest.mark.parametrize(
    ("name", "bug"),
    [
        ("chosen_mask", lambda mask: mask),
        ("pair_mean_weights", lambda rows: torch.full((len(rows),), 1 / len(rows))),
    ],
)
def test_wrong_weights_are_found(monkeypatch: pytest.MonkeyPatch, name: str, bug: Any) -> None:
    monkeypatch.setattr(dpo_module, name, bug)
    assert step_error(DRAWN, "sigmoid", 0.5, 0.0, 0.7) > 1e-3


def test_separated_pairs_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DPO, "rows_per_unit", 1)
    assert step_error(DRAWN, "sigmoid", 0.5, 0.0, 0.0) > 1e-3


# --- through a model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def roles() -> Roles:
    """fp32, a frozen SFT adapter below the policy, both with weights that matter."""
    found = llama_roles(16, lower=["sft"])
    perturb(found, "sft", size=0.05)
    perturb(found, "policy", size=0.05, seed=2)
    return found


MODEL_BETA = 0.3


def dpo_over(roles: Roles, loss_type: str = "sigmoid", sft_coef: float = 0.0, **context: Any) -> DPO:
    settings = DPOConfig(loss_type=loss_type, beta=MODEL_BETA, label_smoothing=0.2, sft_coef=sft_coef)
    return DPO(AlgorithmContext(roles, **context), settings)


def model_error(roles: Roles, loss_type: str, sft_coef: float) -> tuple[float, float]:
    """The distance of loss and gradient from transformers' logits in float64."""
    rows, masks = pair_rows()
    reference = reference_sums(roles, rows, masks)
    loss, _, _ = accumulated(dpo_over(roles, loss_type, sft_coef), pair_batch(rows, masks, reference), rows=4)
    plain = PlainModel([roles.adapter_tensors("sft")], roles.adapter_tensors("policy"))
    num_pairs, num_chosen_tokens = len(rows) // 2, sum(map(sum, masks[::2]))
    expected = 0.0
    for i in range(0, len(rows), 2):
        chosen_logp, rejected_logp = (plain.sequence_logp(rows[row], masks[row]) for row in (i, i + 1))
        pair_loss, chosen_slope, rejected_slope = oracles.dpo(
            loss_type,
            float(chosen_logp.detach()) - reference[i],
            float(rejected_logp.detach()) - reference[i + 1],
            MODEL_BETA,
            0.2,
            (sum(masks[i]), sum(masks[i + 1])),
        )
        expected += pair_loss / num_pairs - sft_coef * float(chosen_logp.detach()) / num_chosen_tokens
        pair_gradient = (chosen_slope * chosen_logp + rejected_slope * rejected_logp) / num_pairs
        (pair_gradient - sft_coef * chosen_logp / num_chosen_tokens).backward()
    return abs(loss - expected) / (1 + abs(expected)), error_against(by_key(roles, "policy"), plain.gradient())


@pytest.mark.parametrize(
    ("loss_type", "sft_coef"), [*((loss_type, 0.0) for loss_type in LOSS_TYPES), ("sigmoid", 0.5), ("ipo", 1.0)]
)
def test_a_step_equals_the_plain_model(roles: Roles, loss_type: str, sft_coef: float) -> None:
    loss, gradient = model_error(roles, loss_type, sft_coef)
    assert loss < 1e-5 and gradient < 1e-4


def _without_sft(self: Roles, role: str, batch: Batch, *rest: Any) -> LogProbs:
    stack = self.stacks["policy"]
    self.stacks["policy"] = stack[-1:]
    try:
        return real_logps(self, role, batch, *rest)
    finally:
        self.stacks["policy"] = stack


def _prompt_scored(self: Roles, role: str, batch: Batch, *rest: Any) -> LogProbs:
    return real_logps(self, role, replace(batch, completion_mask=batch.attention_mask), *rest)


real_logps = Roles.logps


@pytest.mark.parametrize("bug", [_without_sft, _prompt_scored])
def test_a_wrong_stack_or_mask_is_found(monkeypatch: pytest.MonkeyPatch, roles: Roles, bug: Any) -> None:
    monkeypatch.setattr(Roles, "logps", bug)
    assert max(model_error(roles, "apo_zero", 0.0)) > 1e-2  # in a difference of the sides the prompt cancels


SPLITS: list[dict[str, int | None]] = [
    {"rows": 2},
    {"rows": 4},
    {"rows": 6},
    {"tokens": 1},
    {"tokens": 40},
    {"tokens": 10_000},
]


def split_error(roles: Roles, loss_type: str, sft_coef: float) -> float:
    """The largest distance of loss, gradient and metrics of a split step from those of a whole one."""
    rows, masks = pair_rows()
    batch = pair_batch(rows, masks, reference_sums(roles, rows, masks))
    algorithm = dpo_over(roles, loss_type, sft_coef)
    loss, gradient, stats = accumulated(algorithm, batch)
    errors = []
    for split in SPLITS:
        split_loss, split_gradient, split_stats = accumulated(algorithm, batch, **split)
        errors += [abs(split_loss - loss) / abs(loss), relative_error(split_gradient, gradient)]
        # Metrics are differences of log-probs of several nats, with the rounding of these in fp32.
        errors += [abs(split_stats[name] - stats[name]) / (abs(stats[name]) + 1) for name in stats]
    return max(errors)


@pytest.mark.parametrize(
    ("loss_type", "sft_coef"), [("sigmoid", 0.0), ("ipo", 0.0), ("sigmoid", 0.5), ("sigmoid_norm", 0.5)]
)
def test_any_split_gives_one_gradient(roles: Roles, loss_type: str, sft_coef: float) -> None:
    assert split_error(roles, loss_type, sft_coef) < 5e-6


def _mean_of_means(self: DPO, micro: PairBatch) -> Iterator[Any]:
    micro.token_weights = torch.full((len(micro),), 2 / len(micro))
    yield from real_compute_losses(self, micro)


def _sft_mean_of_means(self: DPO, micro: PairBatch) -> Iterator[Any]:
    micro.sft_weights = token_mean_weights(chosen_mask(micro.loss_mask))
    yield from real_compute_losses(self, micro)


@pytest.mark.parametrize(("bug", "sft_coef"), [(_mean_of_means, 0.0), (_sft_mean_of_means, 0.5)])
def test_means_of_micro_batches_are_found(
    monkeypatch: pytest.MonkeyPatch, roles: Roles, bug: Any, sft_coef: float
) -> None:
    monkeypatch.setattr(DPO, "compute_losses", bug)
    assert split_error(roles, "sigmoid", sft_coef) > 1e-2


PADDINGS: list[dict[str, Any]] = [
    {"more": 7},
    {"filler": 1},
    {"more": 3, "filler": VOCAB - 1},
    {"left": True},
    {"left": True, "more": 2, "filler": 9},
]


@pytest.mark.parametrize("how", PADDINGS, ids=str)
def test_padding_and_order_change_nothing(roles: Roles, how: dict[str, Any]) -> None:
    rows, masks = pair_rows()
    reference = reference_sums(roles, rows, masks)
    algorithm = dpo_over(roles, sft_coef=0.5)
    loss, gradient, _ = accumulated(algorithm, pair_batch(rows, masks, reference))
    padded, same, _ = accumulated(algorithm, pair_batch(rows, masks, reference, **how))
    assert padded == pytest.approx(loss, rel=1e-5) and relative_error(same, gradient) < 1e-5
    order = [j for i in (3, 0, 4, 2, 1) for j in (2 * i, 2 * i + 1)]
    shuffled = pair_batch([rows[j] for j in order], [masks[j] for j in order], [reference[j] for j in order], **how)
    other, same, _ = accumulated(algorithm, shuffled, rows=4)
    assert other == pytest.approx(loss, rel=1e-5) and relative_error(same, gradient) < 1e-5


def test_ids_in_padding_are_not_read_at_all(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, masks = pair_rows()
    reference = reference_sums(roles, rows, masks)
    algorithm = dpo_over(roles, sft_coef=0.5)
    found = []
    for garbage in (0, 1, 10**9, -7):
        batch = pair_batch(rows, masks, reference, more=2)
        batch.input_ids = batch.input_ids.where(batch.attention_mask, garbage)
        batch.completion_mask = batch.completion_mask | ~batch.attention_mask
        found.append(accumulated(algorithm, batch)[:2])
    assert all(loss == found[0][0] and same_bytes(gradient, found[0][1]) for loss, gradient in found[1:])


def sharing_error(roles: Roles) -> float:
    """Distance of loss and gradient with the prompt's work shared from those of whole rows. Long prompts, so that it is
    worth it."""
    rows, masks = pair_rows([(40, 6, 9), (33, 2, 12), (50, 1, 1)])
    reference = reference_sums(roles, rows, masks)
    algorithm = dpo_over(roles, sft_coef=0.5)
    loss, gradient, _ = accumulated(algorithm, pair_batch(rows, masks, reference))
    shared, same, _ = accumulated(algorithm, pair_batch(rows, masks, reference, share=True), rows=2)
    return max(abs(shared - loss) / abs(loss), relative_error(same, gradient))


def test_shared_prompts_change_nothing(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    planted: list[bool] = []
    real = Roles.pack

    def watched(self: Roles, batch: Batch) -> Any:
        planted.append((tree := real(self, batch)) is not None)
        return tree

    monkeypatch.setattr(Roles, "pack", watched)
    assert sharing_error(roles) < 1e-5 and any(planted), "nothing was shared: this test saw nothing"

    def blind(self: Roles, batch: Batch) -> Any:  # a rejected answer that also sees the chosen one
        tree = real(self, batch)
        return tree and replace(
            tree,
            attention_mask=tree.attention_mask
            | (tree.position_ids[:, None, None, :] <= tree.position_ids[:, None, :, None]),
        )

    monkeypatch.setattr(Roles, "pack", blind)
    assert sharing_error(roles) > 1e-3


def test_a_tie_is_half_right_and_loss_is_ln_2(roles: Roles) -> None:
    """A policy that is its reference: every loss at its own start."""
    rows, masks = pair_rows()
    policy = llama_roles(16, lower=["sft"])
    policy.load_adapter_tensors("sft", roles.adapter_tensors("sft"), "here")
    with policy.inference_mode():
        reference = policy.logps("reference", pair_batch(rows, masks)).logps.sum(dim=1).tolist()
    start = {
        "sigmoid": math.log(2),
        "ipo": (1 / 0.6) ** 2,
        "hinge": 1.0,
        "robust": math.log(2),
        "apo_zero": 1.0,
        "sigmoid_norm": math.log(2),
    }
    for loss_type, expected in start.items():
        loss, gradient, stats = accumulated(dpo_over(policy, loss_type), pair_batch(rows, masks, reference))
        assert (
            loss == pytest.approx(expected, abs=1e-6)
            and stats["rewards/accuracies"] == 0.5
            and stats["rewards/margins"] == 0.0
        )
        assert float(gradient.norm()) > 1e-4, "a fresh adapter moves all the same"
    observed = to_floats(dpo_over(policy).step_metrics(pair_batch(rows, masks, reference)))
    assert observed == {"kl": 0.0}


def test_figures_by_the_plain_model(roles: Roles) -> None:
    rows, masks = pair_rows()
    reference = reference_sums(roles, rows, masks)
    figures = accumulated(dpo_over(roles), pair_batch(rows, masks, reference), rows=4)[2]
    plain = PlainModel([roles.adapter_tensors("sft")], roles.adapter_tensors("policy"))
    with torch.no_grad():
        logps = [float(plain.sequence_logp(row, mask)) for row, mask in zip(rows, masks, strict=True)]
    ratios = np.array(logps) - np.array(reference)
    tokens = np.array([sum(mask) for mask in masks])
    expected = {
        "logps_per_token/chosen": sum(logps[::2]) / tokens[::2].sum(),
        "logps_per_token/rejected": sum(logps[1::2]) / tokens[1::2].sum(),
        "logps/chosen_delta": ratios[::2].sum() / tokens[::2].sum(),
        "rewards/chosen": 0.3 * ratios[::2].mean(),
        "rewards/rejected": 0.3 * ratios[1::2].mean(),
        "rewards/margins": 0.3 * (ratios[::2] - ratios[1::2]).mean(),
        "rewards/accuracies": (ratios[::2] > ratios[1::2]).mean(),
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    scores = dpo_over(roles).scores(pair_batch(rows, masks, reference)).tolist()
    assert scores == pytest.approx((0.3 * ratios).tolist(), rel=1e-4, abs=1e-5)
    measured = to_floats(dpo_over(roles).eval_metrics(pair_batch(rows, masks, reference)))
    assert measured == pytest.approx(figures, rel=1e-5, abs=1e-6)
    mask_kl, count = 0.0, 0
    with torch.no_grad():
        for row, mask in zip(rows, masks, strict=True):
            p, q = (plain.log_softmax(row, policy) for policy in (True, False))
            kl = (p.exp() * (p - q)).sum(dim=1)
            mask_kl, count = (
                mask_kl + sum(float(kl[t - 1]) for t, in_mask in enumerate(mask) if in_mask),
                count + sum(mask),
            )
    assert to_floats(dpo_over(roles).step_metrics(pair_batch(rows, masks, reference)))["kl"] == pytest.approx(
        mask_kl / count, rel=1e-4
    )


@pytest.mark.parametrize(("change", "warned"), [(0.0, False), (-0.49, False), (-0.51, True), (1.0, False)])
def test_unlearned_answers_give_a_warning(change: float, warned: bool) -> None:
    algorithm = DPO(SimpleNamespace(), DPOConfig())  # type: ignore[arg-type]
    warnings_by_step = [list(algorithm.diagnostics({"logps/chosen_delta": change})) for _ in range(4)]
    assert [bool(messages) for messages in warnings_by_step] == [False, False, warned, warned], (
        "three steps in a row: one is noise"
    )
    assert all(
        "less likely than under the reference" in message and "dpo.beta" in message
        for messages in warnings_by_step
        for message in messages
    )
    assert not list(algorithm.diagnostics({"logps/chosen_delta": 0.0})) and not list(
        algorithm.diagnostics({"logps/chosen_delta": -9.0})
    ), "counted anew"


def falls(roles: Roles) -> bool:
    """Whether thirty steps on one batch bring the loss down by half and every pair the right way round."""
    rows, masks = pair_rows()
    with roles.inference_mode():
        reference = roles.logps("reference", pair_batch(rows, masks)).logps.sum(dim=1).tolist()
    batch, algorithm = pair_batch(rows, masks, reference), dpo_over(roles)
    optimizer = torch.optim.AdamW(roles.parameters("policy"), lr=1e-2)
    losses: list[float] = []
    for _ in range(30):
        loss, _, stats = accumulated(algorithm, batch)
        losses.append(loss)
        optimizer.step()
    return losses[-1] < 0.5 * losses[0] and stats["rewards/accuracies"] == 1.0


def test_it_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    assert falls(llama_roles(16, checkpointing=True))
    monkeypatch.setattr(dpo_module, "dpo_loss", lambda *given: dpo_loss(*given).detach().requires_grad_())
    with pytest.raises(AssertionError):
        assert falls(llama_roles(16))


# --- step 0: the reference is asserted --------------------------------------------------------------------------------


def started(bits: int = 16, share: bool = True, fresh: bool = True, **more: Any) -> tuple[Roles, DPO, Batch]:
    """A frozen SFT adapter that matters, a fresh policy on top, and pairs with reference log-probs as the cache would
    bring them."""
    roles = llama_roles(bits, lower=["sft"], **more)
    perturb(roles, "sft", size=0.05)
    rows, masks = pair_rows([(40, 6, 9), (33, 2, 12), (50, 1, 1)])
    batch = pair_batch(rows, masks, share=share)
    with roles.inference_mode():
        batch.reference_sequence_logps = roles.logps("reference", pair_batch(rows, masks)).logps.sum(dim=1)
    return roles, dpo_over(roles, reference_description="the base with the frozen adapter sft", fresh=fresh), batch


def _nothing(roles: Roles, batch: Batch) -> None: ...


def _sft_exchanged(roles: Roles, batch: Batch) -> None:
    perturb(roles, "sft", size=0.05, seed=9)


def _sft_nudged(roles: Roles, batch: Batch) -> None:
    for name, parameter in roles.base.model.named_parameters():
        if ".lt_sft." in name:
            parameter.data.mul_(1.001)


def _policy_not_zero(roles: Roles, batch: Batch) -> None:
    perturb(roles, "policy", size=0.01)


def _policy_not_zero_anywhere(roles: Roles, batch: Batch) -> None:
    """The smallest fault: one element of one B in the last layer."""
    last = [
        p
        for name, p in roles.base.model.named_parameters()
        if ".lt_policy." in name and "lora_B" in name and "down_proj" in name
    ][-1]
    last.data[3, 1] = 1e-2


def _dropout_below(roles: Roles, batch: Batch) -> None:
    for module in roles.base.model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["lt_sft"] = torch.nn.Dropout(0.3)


def _reference_is_the_base(roles: Roles, batch: Batch) -> None:
    roles.stacks["reference"] = []


def _reference_is_the_policy(roles: Roles, batch: Batch) -> None:
    perturb(roles, "policy", size=0.05)
    roles.stacks["reference"] = roles.stacks["policy"]


def _cache_off(roles: Roles, batch: Batch) -> None:
    batch.reference_sequence_logps[3] += 1e-3


def _cache_swapped(roles: Roles, batch: Batch) -> None:
    batch.reference_sequence_logps = batch.reference_sequence_logps.flip(0)


def _cache_not_a_number(roles: Roles, batch: Batch) -> None:
    batch.reference_sequence_logps[0] = math.nan


CACHE_FAULTS = [_sft_exchanged, _sft_nudged, _reference_is_the_policy, _cache_off, _cache_swapped, _cache_not_a_number]
EQUALITY_FAULTS = [_policy_not_zero, _policy_not_zero_anywhere, _dropout_below, _reference_is_the_base]


@pytest.mark.parametrize(
    "how", [{}, {"bits": 4}, {"checkpointing": True}, {"share": False}, {"dropout": 0.2}, {"fresh": False}], ids=str
)
def test_a_sound_reference_passes(how: dict[str, Any]) -> None:
    roles, algorithm, batch = started(**how)
    before = torch.random.get_rng_state()
    algorithm.check(batch, 0)
    assert roles.base.model.training and not any(p.grad is not None for p in roles.parameters("policy"))
    assert how.get("dropout") or same_bytes(before, torch.random.get_rng_state())


@pytest.mark.parametrize("fault", CACHE_FAULTS + EQUALITY_FAULTS)
def test_a_reference_that_was_tampered_with_stops_the_run(fault: Any) -> None:
    roles, algorithm, batch = started()
    fault(roles, batch)
    with pytest.raises(TrainingError, match="reference") as caught:
        algorithm.check(batch, 0)
    assert "the base with the frozen adapter sft" in str(caught.value) and caught.value.exit_code == 1


@pytest.mark.parametrize("fault", CACHE_FAULTS)
@pytest.mark.parametrize(("fresh", "step"), [(False, 0), (True, 7)])
def test_a_continued_policy_may_differ_but_its_cache_may_not(fault: Any, fresh: bool, step: int) -> None:
    roles, algorithm, batch = started(fresh=fresh)
    perturb(roles, "policy", size=0.05)
    algorithm.check(batch, step)
    fault(roles, batch)
    with pytest.raises(TrainingError, match="cached log-probs of the reference"):
        algorithm.check(batch, step)


def test_the_cache_may_differ_by_noise_and_no_more() -> None:
    roles, algorithm, batch = started()
    tokens = batch.loss_mask.sum(dim=1)
    exact = batch.reference_sequence_logps.clone()
    for nats, good in ((5e-6, True), (-5e-6, True), (1.6e-5, False), (-1.6e-5, False)):
        batch.reference_sequence_logps = exact + nats * tokens
        if good:
            algorithm.check(batch, 0)
        else:
            with pytest.raises(TrainingError):
                algorithm.check(batch, 0)


# --- the reference's log-probs are the data's: cached, and never stale ------------------------------------------------


def small_dpo(**changes: Any) -> dict[str, Any]:
    return {
        "name": "dpo",
        "algorithm": "dpo",
        "base": {"model": "tiny-tutor", "bits": 16},
        "adapters": {"policy": {"r": 4}},
        "data": {
            "train": [{"dataset": "builtin:arithmetic-preferences", "max_samples": 40}],
            "eval_fraction": 0.2,
            "max_length": 256,
        },
        "train": {
            "max_steps": 4,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "learning_rate": 2e-3,
            "logging_steps": 1,
            "gradient_checkpointing": False,
        },
        **changes,
    }


@pytest.fixture(scope="module")
def ground() -> Iterator[Any]:
    """A small DPO run, built: its data and its fp32 base, on which nothing stands."""
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patched:
        patched.setenv("LOWRANK_TUNE_CACHE", scratch)
        few = {**small_dpo()["data"], "train": [{"dataset": "builtin:arithmetic-preferences", "max_samples": 12}]}
        built = build(Recipe.from_dict(small_dpo(data=few)), lambda event: None, CPU)
        built.roles.unload_adapters()
        yield built


@contextmanager
def over(built: Any, **lora: Any) -> Iterator[Roles]:
    """A frozen SFT adapter under a policy, on the base of the ground."""
    roles = roles_over(built.base, lower=["sft"], **lora)
    perturb(roles, "sft", size=0.02)
    try:
        yield roles
    finally:
        roles.unload_adapters()


@pytest.fixture
def standing(ground: Any) -> Iterator[Roles]:
    with over(ground) as roles:
        yield roles


@contextmanager
def counted() -> Iterator[list[int]]:
    """How many batches the reference has seen."""
    seen, real = [0], Roles.logps

    def logps(self: Roles, role: str, batch: Batch, *rest: Any) -> LogProbs:
        seen[0] += role == "reference"
        return real(self, role, batch, *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Roles, "logps", logps)
        yield seen


def sums_of(
    built: Any, roles: Roles, cache: Path, micro_tokens: int = 600, base_hash: str = "b", store: Any = None
) -> tuple[Tensor, int]:
    """The log-probs, and how many batches it took."""
    store = built.data.train if store is None else store
    with counted() as seen:
        sums = reference_logps(
            roles,
            store,
            lambda units: collate_units(store, units, 0),
            micro_tokens,
            base_hash,
            cache,
            lambda event: None,
        )
    return sums, seen[0]


def test_cached_log_probs_are_fresh_ones(ground: Any, standing: Roles, cache: Path) -> None:
    roles = standing
    first, batches = sums_of(ground, roles, cache)
    again, none = sums_of(ground, roles, cache)
    assert batches > 1 and none == 0 and same_bytes(first, again)
    fresh, _ = sums_of(ground, roles, cache / "elsewhere")
    assert same_bytes(first, fresh)
    alone = torch.stack([plain_sum(roles, ground.data.train[i]) for i in range(len(first))])
    tokens = torch.tensor([sum(ground.data.train[i].completion_mask) for i in range(len(first))])
    assert float(((first - alone).abs() / tokens).max()) < 1e-5
    other, _ = sums_of(ground, roles, cache / "other", micro_tokens=200)
    assert float(((first - other).abs() / tokens).max()) < 1e-5


def plain_sum(roles: Roles, row: Any) -> Tensor:
    """By transformers' own logits, a row at a time."""
    ids, mask = torch.tensor([list(map(int, row.input_ids))]), torch.tensor(list(map(bool, row.completion_mask)))
    with roles.inference_mode(), roles.activate("reference"):
        logp = torch.log_softmax(roles.base.model(input_ids=ids).logits[0].double(), dim=1)
    return logp[:-1].gather(1, ids[0, 1:, None])[:, 0][mask[1:]].sum()


def stale(ground: Any, cache: Path) -> set[str]:
    """Changes after which the cache of before is still believed. Empty is right."""
    believed, train = set(), ground.data.train

    def look(name: str, roles: Roles, **how: Any) -> None:
        if sums_of(ground, roles, cache, **how)[1] == 0:
            believed.add(name)

    with over(ground) as roles:
        sums_of(ground, roles, cache)
        look("base", roles, base_hash="c")
        look("rows", roles, store=train.select_units(np.arange(train.units - 1)))
        look("order of rows", roles, store=train.select_units(np.arange(train.units)[::-1].copy()))
        for name in ("input_ids", "completion_mask"):  # what another template, or another mask, would give
            values = train._arrays[name] = np.array(train._arrays[name])
            at = int(train._arrays["starts"][train.indices[0] + 1]) - 2
            values[at] ^= 1
            look(name, roles)
            values[at] ^= 1
        roles.stacks["reference"] = []
        look("stack", roles)
        roles.stacks["reference"] = ["lt_sft"]
        roles.base = replace(roles.base, bits=4)
        look("bits", roles)
        roles.base = replace(roles.base, bits=16)
        assert sums_of(ground, roles, cache)[1] == 0, "all is as it was, and nothing is found"
        next(p for name, p in roles.base.model.named_parameters() if ".lt_sft." in name).data[0, 0] += 1e-6
        look("an element of the adapter", roles)
    for name, lora in (("alpha", {"lora_alpha": 8.0}), ("rslora", {"use_rslora": True})):
        with over(ground, **lora) as roles:
            look(name, roles)
    return believed


def test_what_they_depend_on_is_in_their_name(ground: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stale(ground, cache) == set()
    with monkeypatch.context() as planted:
        planted.setattr(Roles, "adapter_tensors", lambda self, name: {})
        assert stale(ground, cache / "1") == {"an element of the adapter"}
    with monkeypatch.context() as planted:
        planted.setattr(type(ground.data.train), "content_hash", lambda self: str(len(self)))
        assert stale(ground, cache / "2") == {"order of rows", "input_ids", "completion_mask"}
    with monkeypatch.context() as planted:
        planted.setattr(reference_module, "_cache_key", lambda *_: "same")
        assert len(stale(ground, cache / "3")) >= 8  # all but a store of another length


@pytest.mark.parametrize("harm", ["truncated", "flipped", "empty", "another count", "unsigned"])
def test_a_broken_file_is_computed_anew(ground: Any, standing: Roles, cache: Path, harm: str) -> None:
    roles = standing
    first, batches = sums_of(ground, roles, cache)
    (file,) = (cache / "reference").glob("*.safetensors")
    content = file.read_bytes()
    flipped = bytearray(content)
    at = content.index(first.numpy().tobytes()[:8])
    flipped[at + 2] ^= 1
    new = {
        "truncated": content[:-7],
        "flipped": bytes(flipped),
        "empty": b"",
        "another count": save({"sums": first[:-2]}),
        "unsigned": save({"sums": first}),
    }[harm]
    file.write_bytes(new)
    again, computed = sums_of(ground, roles, cache)
    assert computed == batches and same_bytes(again, first) and file.read_bytes() == content


def test_every_flipped_bit_is_found(ground: Any, cache: Path) -> None:
    """In the numbers or their checksum, any bit; in the header any that makes it something else."""
    sums = torch.randn(12)
    file = cache / "one.safetensors"
    reference_module._write_cache(file, sums)
    content = file.read_bytes()
    for bit in range(0, 8 * len(content), 3):
        broken = bytearray(content)
        broken[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bytes(broken))
        found = reference_module._read_cache(file, 12)
        assert found is None or same_bytes(found, sums), f"bit {bit}"


def test_a_second_build_computes_nothing(cache: Path) -> None:
    recipe = Recipe.from_dict(small_dpo())
    with counted() as seen:
        first = build(recipe, lambda event: None, CPU)
        assert seen[0] > 0
        before, seen[0] = seen[0], 0
        notes: list[str] = []
        second = build(recipe, lambda event: notes.append(getattr(event, "message", "")), CPU)
        assert seen[0] == 0 and sum("computed before" in note for note in notes) == 2  # training rows, validation rows
        a, b = (one.algorithm.collect(0).batch.reference_sequence_logps for one in (first, second))
        assert same_bytes(a, b) and before > 1
        build(Recipe.from_dict(small_dpo(base={"model": "tiny-tutor", "bits": 4})), lambda event: None, CPU)
        assert seen[0] == before
        seen[0] = 0
        build(
            Recipe.from_dict(small_dpo(data={**small_dpo()["data"], "system_prompt": "Be brief."})),
            lambda event: None,
            CPU,
        )
        assert seen[0] > 0


def test_two_builds_with_one_seed_are_equal(cache: Path) -> None:
    one, two, other = (build(Recipe.from_dict(small_dpo(seed=seed)), lambda event: None, CPU) for seed in (5, 5, 6))
    assert changed_tensors(one.roles.adapter_tensors("policy"), two.roles.adapter_tensors("policy")) == set()
    assert changed_tensors(one.roles.adapter_tensors("policy"), other.roles.adapter_tensors("policy")) != set()
    for step in range(3):
        a, b = (built.algorithm.collect(step).batch for built in (one, two))
        mine, same = a.tensors(), b.tensors()
        assert mine.keys() == same.keys() and all(same_bytes(mine[name], same[name]) for name in mine)
    assert not same_bytes(one.algorithm.collect(0).batch.row_indices, other.algorithm.collect(0).batch.row_indices)


def test_the_cached_sums_belong_to_their_rows(cache: Path) -> None:
    """Through `build`, its order and its collating: each row of a training step has the log-prob of that row."""
    built = build(Recipe.from_dict(small_dpo()), lambda event: None, CPU)
    for step in (0, 1):
        batch = built.algorithm.collect(step).batch
        with built.roles.inference_mode():
            fresh = built.roles.logps("reference", batch).logps.sum(dim=1)
        assert float((fresh - batch.reference_sequence_logps).abs().max()) < 1e-3
        assert float((fresh.flip(0) - batch.reference_sequence_logps).abs().max()) > 1e-1
        assert same_bytes(batch.margin, torch.zeros(len(batch))) and len(batch) == 16


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["sigmoid", pytest.param("robust", marks=pytest.mark.slow)])
def test_a_run_starts_at_ln_2_and_kl_0(cache: Path, tmp_path: Path, loss: str) -> None:
    events = run_with_events(small_dpo(dpo={"loss_type": loss}), tmp_path / "run")[1]
    first = next(event for event in events if isinstance(event, StepEnd)).stats
    assert (
        first["loss"] == pytest.approx(math.log(2), abs=1e-5)
        and first["kl"] == 0.0
        and abs(first["rewards/margins"]) < 1e-4
    )
    assert next(event for event in events if isinstance(event, RunStarted)).reference == "the base, adapters off"


def _sums_off(patch: pytest.MonkeyPatch) -> None:
    real = sources_module.reference_logps
    patch.setattr(sources_module, "reference_logps", lambda *given: real(*given) + 0.5)


def _top_not_zero(patch: pytest.MonkeyPatch) -> None:
    real = assembly_module.load_roles

    def roles_of(*given: Any) -> Roles:
        roles = real(*given)
        perturb(roles, "policy", size=0.02)
        return roles

    patch.setattr(assembly_module, "load_roles", roles_of)


@pytest.mark.parametrize("tamper", [_top_not_zero, pytest.param(_sums_off, marks=pytest.mark.slow)])
def test_a_run_with_a_wrong_reference_stops_before_its_first_step(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tamper: Any
) -> None:
    tamper(monkeypatch)
    events: list[Any] = []
    with pytest.raises(TrainingError, match="reference.*the base, adapters off"):
        run(Recipe.from_dict(small_dpo()), out=tmp_path / "run", ui="none", device=CPU, on_event=events.append)
    assert not any(isinstance(event, StepEnd) for event in events) and not (tmp_path / "run" / "final").exists()
    monkeypatch.setattr(DPO, "check", lambda self, micro, step: None)
    assert run_with_events(small_dpo(), tmp_path / "unchecked")[0].status == "done", (
        "without the check nothing else would tell"
    )


@pytest.fixture(scope="module")
def sft_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short SFT run, whose adapter DPO stands on; with dropout, which must not fire below DPO."""
    recipe = {
        "name": "sft",
        "algorithm": "sft",
        "base": {"model": "tiny-tutor", "bits": 4},
        "adapters": {"policy": {"r": 4, "lora_dropout": 0.2}},
        "data": {"train": [{"dataset": "builtin:arithmetic", "max_samples": 60}], "eval_fraction": 0.1},
        "train": {"max_steps": 6, "global_batch_size": 8, "learning_rate": 5e-3, "gradient_checkpointing": False},
    }
    out = tmp_path_factory.mktemp("below") / "sft"
    run(Recipe.from_dict(recipe), out=out, ui="none", device=CPU)
    return out


def above(sft: Path) -> dict[str, Any]:
    return small_dpo(base={"model": "tiny-tutor", "bits": 4}, adapters={"sft": {"path": str(sft)}, "policy": {"r": 4}})


def test_the_sft_adapter_is_the_same_after_dpo_on_top(
    cache: Path, tmp_path: Path, sft_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    real = runner_module.build
    monkeypatch.setattr(runner_module, "build", lambda *given, **more: kept.append(real(*given, **more)) or kept[-1])
    files = {path: path.read_bytes() for path in sft_run.rglob("*") if path.is_file()}
    ended: dict[str, dict[str, Tensor]] = {}

    def at_the_end(event: Any) -> None:
        if isinstance(event, StepEnd) and event.step == event.steps:
            ended.update({name: kept[0].roles.adapter_tensors(name) for name in ("sft", "policy")})
        events.append(event)

    events: list[Any] = []
    outcome = run(Recipe.from_dict(above(sft_run)), out=tmp_path / "dpo", ui="none", device=CPU, on_event=at_the_end)
    assert {path: path.read_bytes() for path in sft_run.rglob("*") if path.is_file()} == files
    assert changed_tensors(ended["sft"], load_file(sft_run / "final" / WEIGHTS)) == set()
    below = json.loads((sft_run / "summary.json").read_text())
    assert outcome.summary["base_hash"]["end"] == outcome.summary["base_hash"]["start"] == below["base_hash"]["end"]
    assert set(outcome.summary["adapter_hashes"]) == {"sft"}
    assert (
        next(event for event in events if isinstance(event, RunStarted)).reference
        == "the base with the frozen adapter sft"
    )
    assert next(event for event in events if isinstance(event, StepEnd)).stats["kl"] == 0.0
    assert all(tensor.any() for key, tensor in ended["policy"].items() if "lora_B" in key), (
        "nothing was trained: the test saw nothing"
    )


def test_a_frozen_adapter_that_moves_fails_the_run(
    cache: Path, tmp_path: Path, sft_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    real = runner_module.build
    monkeypatch.setattr(runner_module, "build", lambda *given, **more: kept.append(real(*given, **more)) or kept[-1])

    def nudge(event: Any) -> None:
        if isinstance(event, StepEnd) and event.step == 2:
            next(p for name, p in kept[0].base.model.named_parameters() if ".lt_sft." in name).data[0, 0] += 1e-3

    with pytest.raises(TrainingError, match="frozen adapter"):
        run(Recipe.from_dict(above(sft_run)), out=tmp_path / "dpo", ui="none", device=CPU, on_event=nudge)


def test_a_policy_goes_on_from_a_path(cache: Path, tmp_path: Path, sft_run: Path) -> None:
    """It need not equal its reference, and a person is told; the cached log-probs are still compared."""
    recipe = small_dpo(base={"model": "tiny-tutor", "bits": 4}, adapters={"policy": {"path": str(sft_run)}})
    events = run_with_events(recipe, tmp_path / "run")[1]
    assert any("need not agree" in getattr(event, "message", "") for event in events)
    assert next(event for event in events if isinstance(event, StepEnd)).stats["kl"] > 1e-4
    with pytest.MonkeyPatch.context() as patched, pytest.raises(TrainingError, match="cached log-probs"):
        _sums_off(patched)
        run_with_events(recipe, tmp_path / "again")
