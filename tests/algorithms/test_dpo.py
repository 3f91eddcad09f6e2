"""DPO: loss, gradient and metrics of an optimizer step.

Oracles: `oracles.dpo_step` over given log-probs, and the model of transformers in float64 (`oracles.PlainModel`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from algorithm_helpers import (
    DPO_BETA,
    DPO_LABEL_SMOOTHING,
    DPO_LOSSES,
    LONG_PROMPTS,
    PAIR_ORDER,
    PAIR_PADDINGS,
    PAIR_SPLITS,
    accumulated,
    by_key,
    collected_step,
    dpo_over,
    error_against,
    largest,
    loss_after_training,
    own_reference_sums,
    pair_batch,
    pair_rows,
    policy_over_sft,
    record_packing,
    reference_sums,
)
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from models import llama_roles, make_batch, relative_error, same_bytes
from oracles import PlainModel, dpo_step
from torch import Tensor

from lowrank_tune.algorithms import dpo as dpo_module
from lowrank_tune.algorithms.base import AlgorithmContext
from lowrank_tune.algorithms.dpo import DPO, chosen_mask, dpo_loss
from lowrank_tune.batch import Batch, PairBatch
from lowrank_tune.config import DPOConfig
from lowrank_tune.functional import token_mean_weights
from lowrank_tune.model.decoder import Decoder
from lowrank_tune.model.logprobs import LogProbs
from lowrank_tune.model.roles import Roles
from lowrank_tune.stats import to_floats

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
    """Draws log-probs of the tokens of ragged rows, masks with at least one scored token, and reference sums."""
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
    """Returns the largest distance of loss, gradient and metrics of a step from `dpo_step`, relative to their sizes."""
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
    # The rounding of terms remains when they cancel in a sum.
    sizes = {name: 1 + sum(map(abs, values)) for name, values in expected.metrics.items()}
    slope_size = sft_coef + slopes.abs().max() + 1e-9 * beta
    errors = [
        abs(loss - expected.loss) / (sizes["loss"] + abs(expected.loss)),
        float((roles.leaf.grad - slopes).abs().max() / slope_size),
    ]
    errors += [abs(stats[name] - np.mean(values)) / sizes[name] for name, values in expected.metrics.items()]
    return largest(errors)


BETA = st.one_of(st.floats(2**-10, 10, width=32), st.sampled_from([2.0**-10, 0.125, 10.0]))


@pytest.mark.parametrize("loss_type", DPO_LOSSES)
@pytest.mark.parametrize("sft_coef", [0.0, 0.7])
@hypothesis_settings(max_examples=40)
@given(drawn=steps(), beta=BETA, label_smoothing=st.sampled_from([0.0, 0.25]), rows=st.sampled_from([2, 4, 8]))
def test_step_equals_oracle(
    loss_type: str, sft_coef: float, drawn: Any, beta: float, label_smoothing: float, rows: int
) -> None:
    """Loss, gradient and metrics of a step in micro-batches are those of `dpo_step`, with and without the SFT term."""
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
def test_wrong_step_differs_from_oracle(monkeypatch: pytest.MonkeyPatch, bug: Any) -> None:
    """`step_error` finds a scored first token, a missing reference, and an SFT mean of means."""
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
def test_wrong_weights_differ_from_oracle(monkeypatch: pytest.MonkeyPatch, name: str, bug: Any) -> None:
    """`step_error` finds an SFT term of the rejected answers, and weights of 1 / rows instead of 1 / pairs."""
    monkeypatch.setattr(dpo_module, name, bug)
    assert step_error(DRAWN, "sigmoid", 0.5, 0.0, 0.7) > 1e-3


def test_pairs_split_over_micro_batches_differ_from_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    """`step_error` finds micro-batches that contain one row of a pair."""
    monkeypatch.setattr(DPO, "rows_per_unit", 1)
    assert step_error(DRAWN, "sigmoid", 0.5, 0.0, 0.0) > 1e-3


# --- through a model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def roles() -> Roles:
    return policy_over_sft()


def model_error(roles: Roles, loss_type: str, sft_coef: float) -> tuple[float, float]:
    """Returns the distance of loss and gradient from the model of transformers in float64."""
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
            DPO_BETA,
            DPO_LABEL_SMOOTHING,
            (sum(masks[i]), sum(masks[i + 1])),
        )
        expected += pair_loss / num_pairs - sft_coef * float(chosen_logp.detach()) / num_chosen_tokens
        pair_gradient = (chosen_slope * chosen_logp + rejected_slope * rejected_logp) / num_pairs
        (pair_gradient - sft_coef * chosen_logp / num_chosen_tokens).backward()
    return abs(loss - expected) / (1 + abs(expected)), error_against(by_key(roles, "policy"), plain.gradient())


@pytest.mark.parametrize(
    ("loss_type", "sft_coef"), [*((loss_type, 0.0) for loss_type in DPO_LOSSES), ("sigmoid", 0.5), ("ipo", 1.0)]
)
def test_step_equals_plain_model(roles: Roles, loss_type: str, sft_coef: float) -> None:
    """Loss and gradient of a step are those of the model of transformers in float64, one row at a time."""
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
def test_wrong_stack_or_mask_differs_from_plain_model(monkeypatch: pytest.MonkeyPatch, roles: Roles, bug: Any) -> None:
    """`model_error` finds a policy without the SFT adapter below it, and a scored prompt."""
    monkeypatch.setattr(Roles, "logps", bug)
    # The prompt cancels in a loss of a+ - a-, but not in apo_zero.
    assert max(model_error(roles, "apo_zero", 0.0)) > 1e-2


def split_error(roles: Roles, loss_type: str, sft_coef: float) -> float:
    """Returns the largest distance of loss, gradient and metrics of a split step from those of a whole one."""
    rows, masks = pair_rows()
    batch = pair_batch(rows, masks, reference_sums(roles, rows, masks))
    algorithm = dpo_over(roles, loss_type, sft_coef)
    loss, gradient, stats = accumulated(algorithm, batch)
    errors = []
    for split in PAIR_SPLITS:
        split_loss, split_gradient, split_stats = accumulated(algorithm, batch, **split)
        errors += [abs(split_loss - loss) / abs(loss), relative_error(split_gradient, gradient)]
        # Metrics are differences of log-probs of several nats, with the rounding of these in fp32.
        errors += [abs(split_stats[name] - stats[name]) / (abs(stats[name]) + 1) for name in stats]
    return max(errors)


@pytest.mark.parametrize(
    ("loss_type", "sft_coef"), [("sigmoid", 0.0), ("ipo", 0.0), ("sigmoid", 0.5), ("sigmoid_norm", 0.5)]
)
def test_micro_batches_give_gradient_of_whole_step(roles: Roles, loss_type: str, sft_coef: float) -> None:
    """Loss, gradient and metrics do not depend on the size of the micro-batches."""
    assert split_error(roles, loss_type, sft_coef) < 5e-6


def _mean_of_means(self: DPO, micro: PairBatch) -> Iterator[Any]:
    micro.token_weights = torch.full((len(micro),), 2 / len(micro))
    yield from real_compute_losses(self, micro)


def _sft_mean_of_means(self: DPO, micro: PairBatch) -> Iterator[Any]:
    micro.sft_weights = token_mean_weights(chosen_mask(micro.loss_mask))
    yield from real_compute_losses(self, micro)


@pytest.mark.parametrize(("bug", "sft_coef"), [(_mean_of_means, 0.0), (_sft_mean_of_means, 0.5)])
def test_mean_of_micro_batch_means_is_found(
    monkeypatch: pytest.MonkeyPatch, roles: Roles, bug: Any, sft_coef: float
) -> None:
    """`split_error` finds weights that count the rows or tokens of a micro-batch instead of the step."""
    monkeypatch.setattr(DPO, "compute_losses", bug)
    assert split_error(roles, "sigmoid", sft_coef) > 1e-2


@pytest.mark.parametrize("how", PAIR_PADDINGS, ids=str)
def test_padding_and_order_change_no_gradient(roles: Roles, how: dict[str, Any]) -> None:
    """Loss and gradient do not depend on the width, side or ids of padding, nor on the order of the pairs."""
    rows, masks = pair_rows()
    reference = reference_sums(roles, rows, masks)
    algorithm = dpo_over(roles, sft_coef=0.5)
    loss, gradient, _ = accumulated(algorithm, pair_batch(rows, masks, reference))
    in_order = pair_batch(rows, masks, reference, **how)
    order = [row for pair in PAIR_ORDER for row in (2 * pair, 2 * pair + 1)]
    shuffled = pair_batch([rows[i] for i in order], [masks[i] for i in order], [reference[i] for i in order], **how)
    for batch, split in ((in_order, {}), (shuffled, {"rows": 4})):
        padded_loss, padded_gradient, _ = accumulated(algorithm, batch, **split)
        assert padded_loss == pytest.approx(loss, rel=1e-5)
        assert relative_error(padded_gradient, gradient) < 1e-5


def test_ids_in_padding_are_not_read(roles: Roles) -> None:
    """Loss and gradient are bit-identical for any ids in the padding, also ids outside the vocabulary."""
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
    """Returns the distance of loss and gradient of a step whose prompts are computed once from those of whole rows."""
    rows, masks = pair_rows(LONG_PROMPTS)
    reference = reference_sums(roles, rows, masks)
    algorithm = dpo_over(roles, sft_coef=0.5)
    loss, gradient, _ = accumulated(algorithm, pair_batch(rows, masks, reference))
    shared_batch = pair_batch(rows, masks, reference, share=True)
    shared_loss, shared_gradient, _ = accumulated(algorithm, shared_batch, rows=2)
    return max(abs(shared_loss - loss) / abs(loss), relative_error(shared_gradient, gradient))


def test_shared_prompts_change_no_gradient(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradient are those of whole rows if the prompt of a pair is computed once."""
    packed = record_packing(monkeypatch)
    assert sharing_error(roles) < 1e-5
    assert any(packed), "no prompt was shared"


def test_rejected_answer_that_attends_to_chosen_answer_is_found(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sharing_error` finds a mask that lets the rejected answer attend to the chosen one."""
    pack = Decoder.pack

    def pack_with_wrong_mask(self: Decoder, batch: Batch) -> Any:
        packed = pack(self, batch)
        if packed is None:
            return None
        positions = packed.position_ids
        is_earlier = positions[:, None, None, :] <= positions[:, None, :, None]
        return replace(packed, attention_mask=packed.attention_mask | is_earlier)

    monkeypatch.setattr(Decoder, "pack", pack_with_wrong_mask)
    monkeypatch.setattr(roles.decoder.packed_rows, "enabled", False)
    assert sharing_error(roles) > 1e-3


# --- a policy that equals its reference -------------------------------------------------------------------------------

LOSS_AT_START = {
    "sigmoid": math.log(2),
    "ipo": (1 / (2 * DPO_BETA)) ** 2,
    "hinge": 1.0,
    "robust": math.log(2),
    "apo_zero": 1.0,
    "sigmoid_norm": math.log(2),
}
"""Each loss at a+ = a- = 0."""


@pytest.fixture(scope="module")
def fresh_step() -> tuple[Roles, PairBatch]:
    """A policy whose top adapter is fresh, so that it equals its reference, and pairs with their reference sums."""
    rows, masks = pair_rows()
    trained = policy_over_sft()
    roles = llama_roles(16, lower=["sft"])
    roles.load_adapter_tensors("sft", trained.adapter_tensors("sft"), "here")
    reference = own_reference_sums(roles, pair_batch(rows, masks))
    return roles, pair_batch(rows, masks, reference.tolist())


@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_fresh_policy_has_loss_of_zero_logratios(fresh_step: tuple[Roles, PairBatch], loss_type: str) -> None:
    """A policy that equals its reference has the loss at a+ = a- = 0, ties only, margin 0, and a gradient."""
    roles, batch = fresh_step
    loss, gradient, stats = accumulated(dpo_over(roles, loss_type), batch)
    assert loss == pytest.approx(LOSS_AT_START[loss_type], abs=1e-6)
    assert stats["rewards/accuracies"] == 0.5
    assert stats["rewards/margins"] == 0.0
    assert float(gradient.norm()) > 1e-4


def test_fresh_policy_has_kl_0(fresh_step: tuple[Roles, PairBatch]) -> None:
    """KL(policy || reference) of a policy that equals its reference is exactly 0."""
    roles, batch = fresh_step
    assert to_floats(dpo_over(roles).step_metrics(batch)) == {"kl": 0.0}


# --- metrics ----------------------------------------------------------------------------------------------------------


@dataclass
class PlainLogps:
    """A batch of pairs, and what the plain model computes for its rows."""

    batch: PairBatch
    logps: Any
    """log p(y | x), (rows,) float64."""
    log_ratios: Any
    """log p(y | x) - log ref(y | x)."""
    num_tokens: Any
    kl: float
    """KL(policy || reference), the mean over the tokens of all answers."""


@pytest.fixture(scope="module")
def plain_logps(roles: Roles) -> PlainLogps:
    rows, masks = pair_rows()
    reference = reference_sums(roles, rows, masks)
    plain = PlainModel([roles.adapter_tensors("sft")], roles.adapter_tensors("policy"))
    logps, kls = [], []
    with torch.no_grad():
        for row, mask in zip(rows, masks, strict=True):
            logps.append(float(plain.sequence_logp(row, mask)))
            p, q = (plain.log_softmax(row, policy) for policy in (True, False))
            kl = (p.exp() * (p - q)).sum(dim=1)
            kls += [float(kl[t - 1]) for t, in_mask in enumerate(mask) if in_mask]
    return PlainLogps(
        batch=pair_batch(rows, masks, reference),
        logps=np.array(logps),
        log_ratios=np.array(logps) - np.array(reference),
        num_tokens=np.array([sum(mask) for mask in masks]),
        kl=float(np.mean(kls)),
    )


def test_metrics_equal_plain_model(roles: Roles, plain_logps: PlainLogps) -> None:
    """Rewards are beta a, log-probs are nats per token of all answers of a side."""
    _, _, stats = accumulated(dpo_over(roles), plain_logps.batch, rows=4)
    chosen_ratios, rejected_ratios = plain_logps.log_ratios[::2], plain_logps.log_ratios[1::2]
    chosen_tokens, rejected_tokens = plain_logps.num_tokens[::2].sum(), plain_logps.num_tokens[1::2].sum()
    expected = {
        "logps_per_token/chosen": plain_logps.logps[::2].sum() / chosen_tokens,
        "logps_per_token/rejected": plain_logps.logps[1::2].sum() / rejected_tokens,
        "logps/chosen_delta": chosen_ratios.sum() / chosen_tokens,
        "rewards/chosen": DPO_BETA * chosen_ratios.mean(),
        "rewards/rejected": DPO_BETA * rejected_ratios.mean(),
        "rewards/margins": DPO_BETA * (chosen_ratios - rejected_ratios).mean(),
        "rewards/accuracies": (chosen_ratios > rejected_ratios).mean(),
    }
    assert {name: stats[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_scores_are_beta_times_log_ratios(roles: Roles, plain_logps: PlainLogps) -> None:
    """The score of a row is its implicit reward, beta (log p - log ref)."""
    scores = dpo_over(roles).scores(plain_logps.batch).tolist()
    assert scores == pytest.approx((DPO_BETA * plain_logps.log_ratios).tolist(), rel=1e-4, abs=1e-5)


def test_eval_metrics_equal_training_metrics(roles: Roles, plain_logps: PlainLogps) -> None:
    """An evaluation of a batch has the metrics of a training step on it."""
    _, _, stats = accumulated(dpo_over(roles), plain_logps.batch, rows=4)
    measured = to_floats(dpo_over(roles).eval_metrics(plain_logps.batch))
    assert measured == pytest.approx(stats, rel=1e-5, abs=1e-6)


def test_kl_metric_equals_plain_model(roles: Roles, plain_logps: PlainLogps) -> None:
    """`kl` is KL(policy || reference) over the whole vocabulary, per token of the answers."""
    metrics = to_floats(dpo_over(roles).step_metrics(plain_logps.batch))
    assert metrics["kl"] == pytest.approx(plain_logps.kl, rel=1e-4)


@pytest.mark.parametrize(("change", "warned"), [(0.0, False), (-0.49, False), (-0.51, True), (1.0, False)])
def test_chosen_answers_that_become_unlikely_give_warning(change: float, warned: bool) -> None:
    """Chosen answers 0.5 nats per token below the reference in three consecutive steps give a warning."""
    algorithm = DPO(SimpleNamespace(), DPOConfig())  # type: ignore[arg-type]
    warnings_by_step = [list(algorithm.diagnostics({"logps/chosen_delta": change})) for _ in range(4)]
    assert [bool(messages) for messages in warnings_by_step] == [False, False, warned, warned]
    for message in itertools.chain(*warnings_by_step):
        assert "less likely than under the reference" in message and "dpo.beta" in message
    # A step without a drop starts the count anew.
    assert not list(algorithm.diagnostics({"logps/chosen_delta": 0.0}))
    assert not list(algorithm.diagnostics({"logps/chosen_delta": -9.0}))


# --- training ---------------------------------------------------------------------------------------------------------


def can_learn(roles: Roles) -> bool:
    """Returns whether thirty steps on one batch halve the loss and order every pair."""
    rows, masks = pair_rows()
    reference = own_reference_sums(roles, pair_batch(rows, masks)).tolist()
    first, last, stats = loss_after_training(dpo_over(roles), pair_batch(rows, masks, reference))
    return last < 0.5 * first and stats["rewards/accuracies"] == 1.0


def test_thirty_steps_order_every_pair() -> None:
    """Thirty steps on one batch halve the loss, and every chosen answer then has the larger reward."""
    assert can_learn(llama_roles(16, checkpointing=True))


def test_detached_loss_does_not_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """`can_learn` finds a loss without a gradient."""
    monkeypatch.setattr(dpo_module, "dpo_loss", lambda *given: dpo_loss(*given).detach().requires_grad_())
    assert not can_learn(llama_roles(16))
