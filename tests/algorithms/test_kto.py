"""KTO: the loss by hand and in float64, the KL estimate, the weights of both classes, and a step of any split.

Oracles: numbers worked out by hand, `oracles.kto`, and the model of transformers in float64 (`oracles.PlainModel`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import oracles
import pytest
import torch
from algorithm_helpers import (
    KTO_BETA,
    KTO_LOSSES,
    KTO_WEIGHTS,
    accumulated,
    by_key,
    error_against,
    kto_over,
    labeled_batch,
    loss_after_training,
    own_reference_sums,
    pair_rows,
    policy_over_sft,
    reference_sums,
)
from hypothesis import given
from hypothesis import strategies as st
from models import llama_roles, perturb, relative_error, same_bytes
from oracles import PlainModel

from lowrank_tune.algorithms import kl_estimate as kl_module
from lowrank_tune.algorithms import kto as kto_module
from lowrank_tune.algorithms.base import AlgorithmContext
from lowrank_tune.algorithms.kl_estimate import KLEstimator, distance_of_prompts, mismatched_rows, rows_of_batch
from lowrank_tune.algorithms.kto import KTO, STEPS_WITHOUT_KL, class_weights, kto_loss
from lowrank_tune.batch import LabeledBatch, Row
from lowrank_tune.config import KTOConfig
from lowrank_tune.model.roles import Roles
from lowrank_tune.stats import to_floats

# --- the loss of a row ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss_type", "logratio", "label", "kl", "expected"),
    [
        ("kto", 2.0, True, 2.0, 0.5),
        ("kto", 2.0 + math.log(3) / 0.5, True, 2.0, 0.25),
        ("kto", 2.0 + math.log(3) / 0.5, False, 2.0, 0.75),
        ("kto", 0.0, False, 0.0, 0.5),
        ("apo_zero_unpaired", math.log(3) / 0.5, True, 9.0, 0.25),
        ("apo_zero_unpaired", math.log(3) / 0.5, False, 9.0, 0.75),
    ],
)
def test_loss_by_hand(loss_type: str, logratio: float, label: bool, kl: float, expected: float) -> None:
    """With beta 0.5 a distance of log(3) / 0.5 has a sigmoid of 3/4."""
    losses = kto_loss(loss_type, torch.tensor([logratio]), torch.tensor([label]), torch.tensor([kl]), 0.5)
    assert float(losses) == pytest.approx(expected, abs=1e-6)


ROWS = st.lists(
    st.tuples(st.floats(-1000, 1000, width=32), st.booleans(), st.floats(0, 300, width=32)), min_size=1, max_size=6
)


@pytest.mark.parametrize("loss_type", KTO_LOSSES)
@given(rows=ROWS, beta=st.one_of(st.floats(2**-10, 10, width=32), st.sampled_from([2.0**-10, 0.125, 10.0])))
def test_loss_and_gradient_equal_oracle(loss_type: str, rows: list[tuple[float, bool, float]], beta: float) -> None:
    """Loss and derivative are those of `oracles.kto`: 1e-12 in fp64."""
    logratios, labels, kls = zip(*rows, strict=True)
    leaf = torch.tensor(logratios, dtype=torch.float64, requires_grad=True)
    losses = kto_loss(loss_type, leaf, torch.tensor(labels), torch.tensor(kls, dtype=torch.float64), beta)
    (slopes,) = torch.autograd.grad(losses.sum(), [leaf])
    expected = [oracles.kto(loss_type, *row, beta) for row in rows]
    assert losses.tolist() == pytest.approx([loss for loss, _ in expected], rel=1e-12, abs=1e-12)
    assert slopes.tolist() == pytest.approx([slope for _, slope in expected], rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("loss_type", KTO_LOSSES)
@pytest.mark.parametrize(("logratio", "label"), [(0.3, True), (-2.0, False), (3.0, False)])
def test_oracle_slopes_equal_central_differences(loss_type: str, logratio: float, label: bool) -> None:
    h = 1e-6
    _, slope = oracles.kto(loss_type, logratio, label, 0.7, 0.5)
    above, below = (oracles.kto(loss_type, logratio + sign * h, label, 0.7, 0.5)[0] for sign in (1, -1))
    assert slope == pytest.approx((above - below) / (2 * h), abs=1e-8)


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_weights", "counts", "expected"),
    [
        (("auto", "auto"), (10, 10), (1.0, 1.0)),
        (("auto", "auto"), (4, 3), (1.0, 1.0)),
        (("auto", "auto"), (1, 10), (10.0, 1.0)),
        (("auto", "auto"), (10, 1), (1.0, 7.5)),
        (("auto", 2.0), (10, 10), (2.0, 2.0)),
        (("auto", 0.5), (10, 10), (0.5 * 4 / 3, 0.5)),
        ((2.0, "auto"), (10, 10), (2.0, 1.5)),
        ((3.0, 1.0), (1, 10), (3.0, 1.0)),
        (("auto", "auto"), (10, 0), (1.0, 1.0)),
        ((2.0, "auto"), (0, 10), (2.0, 1.0)),
    ],
)
def test_weights_by_hand(given_weights: Any, counts: tuple[int, int], expected: tuple[float, float]) -> None:
    assert class_weights(*given_weights, *counts) == pytest.approx(expected)


@given(counts=st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)), weight=st.floats(0.01, 100))
def test_automatic_weights_balance_the_classes(counts: tuple[int, int], weight: float) -> None:
    """All desirable answers weigh 1 to 4/3 times as much as all undesirable ones (arXiv:2402.01306, equation 8)."""
    for one, other in (("auto", "auto"), (weight, "auto"), ("auto", weight)):
        desirable, undesirable = class_weights(one, other, *counts)  # type: ignore[arg-type]
        assert 1 - 1e-9 <= desirable * counts[0] / (undesirable * counts[1]) <= 4 / 3 + 1e-9
        assert weight in (desirable, undesirable) or (one, other) == ("auto", "auto")


# --- mismatched rows --------------------------------------------------------------------------------------------------


def test_mismatched_rows_by_hand() -> None:
    """The prompt of each row with the answer of the next, in a circle, cut at the maximum length."""
    rows = [
        Row([1, 2, 10], [False, False, True]),
        Row([3, 20, 21, 22, 23], [False, True, False, True, True]),
        Row([4, 5, 6, 30], [False, False, False, True]),
    ]
    found = mismatched_rows(rows, 5)
    assert [list(row.input_ids) for row in found] == [[1, 2, 20, 21, 22], [3, 30], [4, 5, 6, 10]]
    assert [list(row.completion_mask) for row in found] == [
        [False, False, True, False, True],
        [False, True],
        [False, False, False, True],
    ]
    assert mismatched_rows(rows[:1], 5) == []


def test_mismatched_rows_have_the_answers_to_other_prompts() -> None:
    """Both answers of a pair are neighbors: the answers are shifted by two rows."""
    rows = [Row([prompt, answer], [False, True]) for prompt, answer in ((1, 10), (1, 11), (2, 20), (2, 21), (3, 30))]
    assert distance_of_prompts(rows) == 2
    found = [list(row.input_ids) for row in mismatched_rows(rows, 5, 2)]
    assert found == [[1, 20], [1, 21], [2, 30], [2, 10], [3, 11]]
    assert distance_of_prompts([Row([1, answer], [False, True]) for answer in (10, 11, 12)]) == 1
    assert distance_of_prompts(rows[::2]) == 1


def test_a_log_ratio_that_is_no_number_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    estimator = KLEstimator(cast(Any, None), 8, 64)
    monkeypatch.setattr(KLEstimator, "_logps", lambda self, role, batch: torch.full(batch.input_ids.shape, math.nan))
    rows = [Row([1, 10], [False, True]), Row([2, 20], [False, True])]
    assert math.isnan(estimator.estimate(rows))


def test_rows_of_a_batch_are_without_padding() -> None:
    rows, masks = pair_rows()
    for padding in ({}, {"more": 3, "filler": 9}, {"left": True}):
        found = rows_of_batch(labeled_batch(rows, masks, **padding))
        assert [row.input_ids for row in found] == rows and [row.completion_mask for row in found] == masks


# --- through a model --------------------------------------------------------------------------------------------------

SPLITS: tuple[dict[str, int], ...] = ({"rows": 1}, {"rows": 3}, {"tokens": 1}, {"tokens": 40}, {"tokens": 10_000})
LABELS = [True, False, False, True, True, True, False, True, False, True]


@pytest.fixture(scope="module")
def roles() -> Roles:
    return policy_over_sft()


def step_batch(roles: Roles, **padding: Any) -> LabeledBatch:
    rows, masks = pair_rows()
    return labeled_batch(rows, masks, reference_sums(roles, rows, masks), LABELS, **padding)


def plain_estimate(roles: Roles, plain: PlainModel, rows: Sequence[Any], masks: Sequence[Any]) -> float:
    """Returns z0 by the model of transformers: prompt i with answer i + 1, one row at a time."""
    differences = []
    for i in range(len(rows)):
        following = (i + 1) % len(rows)
        start, answer = masks[i].index(True), masks[following].index(True)
        row = [*rows[i][:start], *rows[following][answer:]]
        mask = [False] * start + [True] * (len(row) - start)
        with torch.no_grad():
            logp, reference = (float(plain.sequence_logp(row, mask, policy=policy)) for policy in (True, False))
        differences.append(logp - reference)
    return max(0.0, float(np.mean(differences)))


def model_error(roles: Roles, loss_type: str) -> tuple[float, float, float]:
    """Returns the distance of loss, gradient and KL estimate from the model of transformers in float64."""
    rows, masks = pair_rows()
    batch = step_batch(roles)
    loss, _, _ = accumulated(kto_over(roles, loss_type), batch, rows=4)
    plain = PlainModel([roles.adapter_tensors("sft")], roles.adapter_tensors("policy"))
    reference = reference_sums(roles, rows, masks)
    kl = plain_estimate(roles, plain, rows, masks) if loss_type == "kto" else 0.0
    expected = 0.0
    for row, mask, label, reference_sum in zip(rows, masks, LABELS, reference, strict=True):
        logp = plain.sequence_logp(row, mask)
        row_loss, slope = oracles.kto(loss_type, float(logp.detach()) - reference_sum, label, kl, KTO_BETA)
        weight = KTO_WEIGHTS[0 if label else 1] / len(rows)
        expected += weight * row_loss
        (weight * slope * logp).backward()
    kl_error = abs(estimate_of_step(kto_over(roles, loss_type), batch) - kl)
    return abs(loss - expected), error_against(by_key(roles, "policy"), plain.gradient()), kl_error


def estimate_of_step(algorithm: KTO, batch: LabeledBatch) -> float:
    """Returns z0 of a step of this batch."""

    def get_batch(step: int) -> LabeledBatch:
        return replace(batch)

    algorithm.context = replace(algorithm.context, get_batch=get_batch)
    estimates = algorithm.collect(0).batch.kl_estimate
    assert estimates is not None and len(set(estimates.tolist())) == 1
    return float(estimates[0])


@pytest.mark.parametrize("loss_type", KTO_LOSSES)
def test_step_equals_plain_model(roles: Roles, loss_type: str) -> None:
    """Loss, gradient and z0 are those of the model of transformers in float64, one row at a time."""
    loss, gradient, kl = model_error(roles, loss_type)
    assert loss < 1e-5 and gradient < 1e-4 and kl < 1e-3
    estimate = estimate_of_step(kto_over(roles, loss_type), step_batch(roles))
    assert (estimate > 0.5) == (loss_type == "kto"), "an estimate of 0 would compare nothing"


def _answer_of_the_row_itself(rows: Sequence[Row], max_length: int, distance: int) -> list[Row]:
    return list(rows)


def test_wrong_estimate_differs_from_plain_model(monkeypatch: pytest.MonkeyPatch, roles: Roles) -> None:
    """`model_error` finds a KL estimate from matched rows."""
    monkeypatch.setattr(kl_module, "mismatched_rows", _answer_of_the_row_itself)
    assert max(model_error(roles, "kto")) > 1e-2


def test_estimate_does_not_depend_on_the_size_of_its_passes(roles: Roles) -> None:
    rows = rows_of_batch(step_batch(roles))
    estimates = [
        kto_over(roles, micro_tokens=micro_tokens).kl_estimator.estimate(rows) for micro_tokens in (1, 40, 10_000)
    ]
    assert estimates == pytest.approx([estimates[0]] * 3, rel=1e-4) and estimates[0] > 0.01


def split_error(roles: Roles, loss_type: str) -> float:
    """Returns the largest distance of loss, gradient and metrics of a split step from those of a whole one."""
    algorithm = kto_over(roles, loss_type)
    batch = step_batch(roles)
    loss, gradient, stats = accumulated(algorithm, batch)
    errors = []
    for split in SPLITS:
        split_loss, split_gradient, split_stats = accumulated(algorithm, batch, **split)
        assert split_stats.keys() == stats.keys()
        errors += [abs(split_loss - loss) / abs(loss), relative_error(split_gradient, gradient)]
        errors += [abs(split_stats[name] - stats[name]) / (abs(stats[name]) + 1) for name in stats]
    return max(errors)


@pytest.mark.parametrize("loss_type", KTO_LOSSES)
def test_micro_batches_give_gradient_of_whole_step(roles: Roles, loss_type: str) -> None:
    """Loss, gradient and metrics do not depend on the size of the micro-batches."""
    assert split_error(roles, loss_type) < 5e-6


def _estimate_of_the_micro_batch(self: KTO, micro: LabeledBatch) -> Any:
    estimate = self.kl_estimator.estimate(rows_of_batch(micro))
    micro.kl_estimate = torch.full((len(micro),), estimate)
    yield from real_compute_losses(self, micro)


def _mean_of_means(self: KTO, micro: LabeledBatch) -> Any:
    micro.token_weights = self._class_weights(micro) / len(micro)
    yield from real_compute_losses(self, micro)


real_compute_losses = KTO.compute_losses


@pytest.mark.parametrize("bug", [_estimate_of_the_micro_batch, _mean_of_means])
def test_values_of_a_micro_batch_are_found(monkeypatch: pytest.MonkeyPatch, roles: Roles, bug: Any) -> None:
    """`split_error` finds a KL estimate, and a mean, of a micro-batch."""
    monkeypatch.setattr(KTO, "compute_losses", bug)
    assert split_error(roles, "kto") > 1e-3


@pytest.mark.parametrize("padding", [{"more": 5}, {"filler": 7}, {"left": True, "more": 2}], ids=str)
def test_padding_changes_no_gradient(roles: Roles, padding: dict[str, Any]) -> None:
    algorithm = kto_over(roles)
    loss, gradient, _ = accumulated(algorithm, step_batch(roles))
    padded_loss, padded_gradient, _ = accumulated(algorithm, step_batch(roles, **padding), rows=3)
    assert padded_loss == pytest.approx(loss, rel=1e-5) and relative_error(padded_gradient, gradient) < 1e-5


def test_no_gradient_flows_through_the_estimate(roles: Roles) -> None:
    """The gradient of a step is that of the loss with z0 as a constant."""
    algorithm = kto_over(roles)
    batch = step_batch(roles)
    _, gradient, _ = accumulated(algorithm, batch)
    estimate = estimate_of_step(algorithm, batch)
    constant = kto_over(roles)
    constant.kl_estimator = SimpleNamespace(estimate=lambda rows: estimate)  # type: ignore[assignment]
    assert same_bytes(accumulated(constant, batch)[1], gradient)


# --- a policy that equals its reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", KTO_LOSSES)
def test_fresh_policy_has_half_of_the_weights_as_loss(loss_type: str) -> None:
    """A policy that equals its reference has r = 0 and z0 = 0: the loss is the mean weight times 1/2."""
    roles = llama_roles(16, lower=["sft"])
    perturb(roles, "sft", size=0.05)
    rows, masks = pair_rows()
    reference = own_reference_sums(roles, labeled_batch(rows, masks))
    loss, gradient, stats = accumulated(
        kto_over(roles, loss_type), labeled_batch(rows, masks, reference.tolist(), LABELS)
    )
    share = sum(LABELS) / len(LABELS)
    assert loss == pytest.approx((share * KTO_WEIGHTS[0] + (1 - share) * KTO_WEIGHTS[1]) / 2, abs=1e-6)
    assert stats["rewards/accuracies"] == 0.5 and float(gradient.norm()) > 1e-4


@pytest.mark.parametrize("loss_type", KTO_LOSSES)
def test_training_separates_the_classes(loss_type: str) -> None:
    roles = policy_over_sft()
    first, last, stats = loss_after_training(kto_over(roles, loss_type), step_batch(roles))
    assert last < first / 2 and stats["rewards/chosen"] > 0 > stats["rewards/rejected"]
    assert stats["rewards/accuracies"] > 0.9


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_equal_plain_model(roles: Roles) -> None:
    """Means of each class, in the units of TRL: rewards are beta r, log-probs are sums over an answer."""
    rows, masks = pair_rows()
    plain = PlainModel([roles.adapter_tensors("sft")], roles.adapter_tensors("policy"))
    with torch.no_grad():
        logps = np.array([float(plain.sequence_logp(row, mask)) for row, mask in zip(rows, masks, strict=True)])
    logratios = logps - np.array(reference_sums(roles, rows, masks))
    is_desirable = np.array(LABELS)
    num_tokens = np.array([sum(mask) for mask in masks])
    algorithm = kto_over(roles)
    _, _, stats = accumulated(algorithm, step_batch(roles), rows=3)
    stats |= algorithm.derived_metrics(stats)
    expected = {
        "rewards/chosen": KTO_BETA * logratios[is_desirable].mean(),
        "rewards/rejected": KTO_BETA * logratios[~is_desirable].mean(),
        "rewards/margins": KTO_BETA * (logratios[is_desirable].mean() - logratios[~is_desirable].mean()),
        "rewards/accuracies": ((logratios > 0) == is_desirable).mean(),
        "logps/chosen": logps[is_desirable].mean(),
        "logps/rejected": logps[~is_desirable].mean(),
        "logps/chosen_delta": logratios[is_desirable].sum() / num_tokens[is_desirable].sum(),
    }
    assert {name: stats[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert algorithm.scores(step_batch(roles)).tolist() == pytest.approx(
        (KTO_BETA * logratios).tolist(), rel=1e-4, abs=1e-4
    )


@pytest.mark.parametrize(("labels", "absent"), [([True] * 10, "rejected"), ([False] * 10, "chosen")])
def test_a_step_of_one_class_has_no_metrics_of_the_other(roles: Roles, labels: list[bool], absent: str) -> None:
    algorithm = kto_over(roles)
    batch = replace(step_batch(roles), labels=torch.tensor(labels))
    loss, _, stats = accumulated(algorithm, batch, rows=3)
    assert math.isfinite(loss) and all(math.isfinite(value) for value in stats.values())
    assert not any(absent in name for name in stats) and algorithm.derived_metrics(stats) == {}


def test_validation_has_the_estimate_of_all_of_its_rows(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of a validation is that of a step of the same rows, whatever the size of its batches."""
    # These rows are pairs, whose answers would be shifted by two rows.
    monkeypatch.setattr(kto_module, "distance_of_prompts", lambda rows: 1)
    algorithm = kto_over(roles)
    batch = step_batch(roles)
    expected, _, stats = accumulated(algorithm, batch)
    algorithm.start_validation(rows_of_batch(batch))  # type: ignore[arg-type]
    found, losses = algorithm.evaluate_batch(batch)
    stats["kl"] = estimate_of_step(algorithm, batch)
    assert to_floats(found) == pytest.approx(stats, rel=1e-5, abs=1e-6)
    single = [algorithm.evaluate_batch(batch.select_rows(torch.tensor([row])))[1] for row in range(len(batch))]
    assert torch.cat(single).tolist() == pytest.approx(losses.tolist(), rel=1e-4)
    assert float(losses.mean()) == pytest.approx(expected, rel=1e-5)


def quiet_kto() -> KTO:
    return KTO(AlgorithmContext(SimpleNamespace()), KTOConfig(), max_length=8, micro_tokens=8)  # type: ignore[arg-type]


@pytest.mark.parametrize(("change", "warned"), [(0.0, False), (-0.49, False), (-0.51, True)])
def test_desirable_answers_that_become_unlikely_give_a_warning(change: float, warned: bool) -> None:
    algorithm = quiet_kto()
    messages = [list(algorithm.diagnostics({"logps/chosen_delta": change})) for _ in range(4)]
    assert [bool(found) for found in messages] == [False, False, warned, warned]
    assert all("kto.beta" in text for found in messages for text in found)


@pytest.mark.parametrize(("kl", "chosen", "warned"), [(0.0, -1.0, True), (0.1, -1.0, False), (0.0, 1.0, False)])
def test_an_estimate_of_0_while_all_is_unlearned_gives_a_warning(kl: float, chosen: float, warned: bool) -> None:
    algorithm = quiet_kto()
    metrics = {"kl": kl, "rewards/chosen": chosen}
    messages = [list(algorithm.diagnostics(metrics)) for _ in range(STEPS_WITHOUT_KL)]
    assert not any(messages[:-1]) and bool(messages[-1]) is warned


def test_a_wrong_loss_is_found(monkeypatch: pytest.MonkeyPatch, roles: Roles) -> None:
    """`model_error` finds labels that are exchanged, and a loss without z0."""
    real = kto_module.kto_loss
    for bug in (
        lambda kind, logratio, labels, kl, beta: real(kind, logratio, ~labels, kl, beta),
        lambda kind, logratio, labels, kl, beta: real("apo_zero_unpaired", logratio, labels, kl, beta),
    ):
        monkeypatch.setattr(kto_module, "kto_loss", bug)
        assert max(model_error(roles, "kto")[:2]) > 1e-3
