"""GRPO: advantages, every loss and its gradient, KL estimators, groups of equal rewards, the log-probs of the sampler,
and short runs.

Oracles: numbers worked out by hand, `oracles.grpo_step` in float64, exact expectations over a small vocabulary, and the
model of transformers in float64 (`oracles.PlainModel`). A test named `..._is_found` plants a bug, and shows that the
check of the test before it fails.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from algorithm_helpers import (
    INFORMATIVE_REWARDS,
    MAX_NEW_TOKENS,
    FakeCollector,
    by_key,
    completion_rows,
    error_against,
    file_bytes,
    largest,
    one_pass,
    policy_over_sft,
    real_collector,
    record_packing,
    run_with_events,
    step_metrics,
)
from hypothesis import given
from hypothesis import strategies as st
from models import changed_tensors, perturb, relative_error
from oracles import PlainModel, PolicyRow, grpo_step
from safetensors.torch import load_file
from torch import Tensor

from lowrank_tune import runner as runner_module
from lowrank_tune.algorithms import grpo as grpo_module
from lowrank_tune.algorithms.base import AlgorithmContext
from lowrank_tune.algorithms.grpo import GRPO, MAX_RESAMPLES, group_advantages, kl_penalty, policy_loss, zero_std_groups
from lowrank_tune.batch import RolloutBatch
from lowrank_tune.config import GRPOConfig
from lowrank_tune.errors import TrainingError
from lowrank_tune.events import GroupLogged, LogMessage
from lowrank_tune.model.adapters import WEIGHTS
from lowrank_tune.model.roles import Roles
from lowrank_tune.stats import to_floats

LOSS_TYPES = ("grpo", "dapo", "dr_grpo", "gspo", "cispo")
ESTIMATORS = ("k3_ratio", "k3", "k2", "exact")
LOW = 0.2
HIGH = {"dapo": 0.28, "cispo": 1.1}
"""Upper clips, low enough to be reached here; 0.2 for all others."""
BETA = 0.3

# --- advantages -------------------------------------------------------------------------------------------------------


def test_advantages_equal_numbers_by_hand() -> None:
    """(R - mean R) / (std R + 1e-4) of each group (arXiv:2402.03300), and R - mean R for Dr. GRPO
    (arXiv:2503.20783)."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    # Standard deviations with 1/n: each reward of the first group is 0.5 from its mean.
    s = 0.5 + 1e-4
    t = math.sqrt((1.5**2 + 3 * 0.5**2) / 4) + 1e-4
    expected = [[0.5 / s, -0.5 / s, -0.5 / s, 0.5 / s], [1.5 / t, -0.5 / t, -0.5 / t, -0.5 / t], [0.0] * 4]
    assert torch.allclose(group_advantages(rewards), torch.tensor(expected), rtol=1e-6, atol=0)
    centered = [[0.5, -0.5, -0.5, 0.5], [1.5, -0.5, -0.5, -0.5], [0.0] * 4]
    assert group_advantages(rewards, scale_by_std=False).tolist() == centered
    assert zero_std_groups(rewards).tolist() == [False, False, True]


def test_advantages_of_equal_rewards_are_exactly_zero() -> None:
    """Seven rewards of 0.7 have advantages of exactly 0 in fp32."""
    rewards = torch.full((1, 7), 0.7)
    assert group_advantages(rewards).tolist() == [[0.0] * 7]
    assert group_advantages(rewards, scale_by_std=False).tolist() == [[0.0] * 7]
    # The formula alone gives rounding noise in fp32.
    assert ((rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-4)).any()


def test_rewards_that_differ_by_rounding_count_as_equal() -> None:
    """0.1 + 0.2 equals 0.3 for a group; a difference of 1e-5 does not count as equal."""
    nearly_equal = torch.tensor([[0.1 + 0.2, 0.3], [0.3, 0.3 + 1e-5]], dtype=torch.float64)
    assert zero_std_groups(nearly_equal).tolist() == [True, False]


REWARD = st.floats(-100, 100, width=32)


@given(
    st.integers(1, 5).flatmap(
        lambda n: st.lists(st.lists(REWARD, min_size=n + 1, max_size=n + 1), min_size=1, max_size=4)
    )
)
def test_advantages_equal_oracle(rewards: list[list[float]]) -> None:
    """Advantages of any rewards are those of `oracles.group_advantages` by NumPy."""
    for scale_by_std in (True, False):
        found = group_advantages(torch.tensor(rewards, dtype=torch.float64), scale_by_std).double().numpy()
        expected = oracles.group_advantages(rewards, scale_by_std)
        for advantages, wanted, group in zip(found, expected, rewards, strict=True):
            if np.ptp(group) <= 1e-6:
                assert (advantages == 0).all()
            else:
                assert np.allclose(advantages, wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())


# --- losses against the oracle ----------------------------------------------------------------------------------------


def random_rows(seed: int, lengths: Sequence[int] = (5, 2, 9, 1, 4, 0)) -> tuple[list[PolicyRow], list[float]]:
    """Returns log-probs with ratios on both sides of the clip, and advantages of both signs."""
    stream = np.random.default_rng(seed)
    rows = []
    for n in lengths:
        logps = -stream.exponential(2.0, n)
        rows.append(PolicyRow(logps, logps + stream.normal(0, 0.3, n), logps + stream.normal(0, 0.8, n)))
    signs = np.where(np.arange(len(lengths)) % 2, -1, 1)
    return rows, [float(advantage) for advantage in signs * stream.uniform(0.2, 2, len(lengths))]


def padded_tensors(
    rows: Sequence[PolicyRow], dtype: torch.dtype, filler: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns logps, old_logps, reference_logps and mask, (B, T), with gaps before, inside and after each row that
    contain `filler`."""
    width = 2 * max(len(row.logps) for row in rows) + 3
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    logps, old_logps, reference_logps = (torch.full((len(rows), width), filler, dtype=dtype) for _ in range(3))
    for i, row in enumerate(rows):
        columns = [2 + 2 * t + i % 2 for t in range(len(row.logps))]
        mask[i, columns] = True
        logps[i, columns] = torch.tensor(row.logps, dtype=dtype)
        old_logps[i, columns] = torch.tensor(row.old_logps, dtype=dtype)
        reference_logps[i, columns] = torch.tensor(row.reference_logps, dtype=dtype)
    return logps, old_logps, reference_logps, mask


def weights_of(loss_type: str, mask: Tensor) -> Tensor:
    """Returns the token weights for a mask."""
    algorithm = GRPO(None, GRPOConfig(loss_type=loss_type), FakeCollector(None, []))  # type: ignore[arg-type]
    return algorithm.token_weights(RolloutBatch(torch.zeros(mask.shape, dtype=torch.long), torch.ones_like(mask), mask))


def formula_error(loss_type: str, estimator: str, dtype: torch.dtype, filler: float = 0.0, seed: int = 0) -> float:
    """Returns the largest distance of loss and slopes from `grpo_step`, relative to the largest of them; infinite if a
    masked slot has a slope."""
    rows, advantages = random_rows(seed)
    high = HIGH.get(loss_type, 0.2)
    logps, old_logps, reference_logps, mask = padded_tensors(rows, dtype, filler)
    logps.requires_grad_()
    per_token, _ = grpo_module.policy_loss(
        loss_type, logps, old_logps, torch.tensor(advantages, dtype=dtype), mask, LOW, high
    )
    per_token = per_token + BETA * grpo_module.kl_penalty(estimator, logps, old_logps, reference_logps, mask)
    loss = (per_token * weights_of(loss_type, mask)).sum()
    (slope,) = torch.autograd.grad(loss, logps)
    expected = grpo_step(loss_type, rows, advantages, LOW, high, BETA, estimator, MAX_NEW_TOKENS)
    slopes = torch.tensor(list(itertools.chain(*expected.slopes)), dtype=torch.float64)
    return largest(
        [
            abs(float(loss.detach()) - expected.loss) / abs(expected.loss),
            float((slope[mask].double() - slopes).abs().max() / slopes.abs().max()),
            0.0 if float(slope[~mask].abs().max()) == 0 else math.inf,
        ]
    )


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("estimator", ESTIMATORS[:3])
def test_loss_and_gradient_equal_oracle(loss_type: str, estimator: str) -> None:
    """Each loss with each KL estimator, and its gradient, are those of `grpo_step`."""
    for seed in range(8):
        # The weights are fp32 also in float64.
        assert formula_error(loss_type, estimator, torch.float64, seed=seed) < 3e-7
        assert formula_error(loss_type, estimator, torch.float32, seed=seed) < 1e-6


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("filler", [math.nan, math.inf, -math.inf, 1e38])
@pytest.mark.parametrize("estimator", ESTIMATORS[:3])
def test_values_of_masked_slots_change_no_loss(estimator: str, loss_type: str, filler: float) -> None:
    """NaN, infinity or 1e38 outside the mask change neither the loss nor its gradient."""
    assert formula_error(loss_type, estimator, torch.float32, filler) < 1e-6


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_oracle_slopes_equal_central_differences(loss_type: str) -> None:
    """The derivatives of `grpo_step` are the central differences of its loss. The clipped weight of cispo is a
    constant, as its formula requires."""
    rows, advantages = random_rows(3)

    def loss_of(rows: Sequence[PolicyRow], advantages: Sequence[float], estimator: str) -> float:
        return grpo_step(loss_type, rows, advantages, LOW, 0.2, BETA, estimator, MAX_NEW_TOKENS).loss

    for estimator in ("k3", "k3_ratio", "k2"):
        slopes = grpo_step(loss_type, rows, advantages, LOW, 0.2, BETA, estimator, MAX_NEW_TOKENS).slopes
        for i, t in ((0, 1), (2, 4), (4, 0)):

            def loss_at(h: float, i: int = i, t: int = t, estimator: str = estimator) -> float:
                logps = np.array(rows[i].logps)
                logps[t] += h
                moved = [*rows]
                moved[i] = PolicyRow(logps, rows[i].old_logps, rows[i].reference_logps)
                if loss_type != "cispo":
                    return loss_of(moved, advantages, estimator)
                weight = min(math.exp(rows[i].logps[t] - rows[i].old_logps[t]), 0.2)
                kl = loss_of(moved, [0.0] * len(rows), estimator)
                return kl - weight * advantages[i] * logps[t] / sum(len(row.logps) for row in rows)

            assert (loss_at(1e-6) - loss_at(-1e-6)) / 2e-6 == pytest.approx(slopes[i][t], abs=1e-8)


def _without_clip(
    loss_type: str, logps: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    return policy_loss(loss_type, logps, old, advantages, mask, 1.0, 1e9)


def _clip_sides_swapped(
    loss_type: str, logps: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    return policy_loss(loss_type, logps, old, advantages, mask, high / 2, low / 2)


def _masked_by_multiplication(
    loss_type: str, logps: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    loss, is_clipped = policy_loss(loss_type, logps, old, advantages, torch.ones_like(mask), low, high)
    return loss * mask, is_clipped


@pytest.mark.parametrize("bug", [_without_clip, _clip_sides_swapped])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_wrong_clip_is_found(monkeypatch: pytest.MonkeyPatch, loss_type: str, bug: Any) -> None:
    """`formula_error` finds a loss without a clip, and one with exchanged sides of the clip."""
    monkeypatch.setattr(grpo_module, "policy_loss", bug)
    assert max(formula_error(loss_type, "k3", torch.float64, seed=seed) for seed in range(3)) > 1e-3


def test_masking_by_multiplication_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """`formula_error` with NaN outside the mask finds loss * mask, which is NaN there."""
    monkeypatch.setattr(grpo_module, "policy_loss", _masked_by_multiplication)
    assert formula_error("grpo", "k3", torch.float32) < 1e-6 < formula_error("grpo", "k3", torch.float32, math.nan)


def test_wrong_kl_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """`formula_error` finds k3 instead of k3_ratio, and the reverse."""
    monkeypatch.setattr(
        grpo_module, "kl_penalty", lambda name, *rest: kl_penalty("k3" if name == "k3_ratio" else "k3_ratio", *rest)
    )
    assert min(formula_error("grpo", estimator, torch.float64) for estimator in ("k3", "k3_ratio")) > 1e-3


def test_clipped_tokens_are_counted() -> None:
    """A token counts as clipped if the clip stops its gradient; for cispo, if its weight is the upper clip."""
    log_ratio, old_logps = torch.tensor([[0.5, 0.9, 1.1, 1.5, 9.0]] * 2).log(), torch.zeros(2, 5)
    advantages = torch.tensor([1.0, -1.0])
    mask = torch.tensor([[True, True, True, True, False]] * 2)
    _, is_clipped = policy_loss("grpo", log_ratio, old_logps, advantages, mask, 0.2, 0.3)
    assert is_clipped.tolist() == [[False, False, False, True, False], [True, False, False, False, False]]
    _, is_clipped = policy_loss("cispo", log_ratio, old_logps, advantages, mask, 0.2, 1.2)
    assert is_clipped.tolist() == [[False] * 3 + [True, False]] * 2
    assert not policy_loss("grpo", log_ratio, log_ratio, advantages, mask, 0.2, 0.3)[1].any()


# --- the expectation of each KL estimator, over a vocabulary of five --------------------------------------------------


def expected_penalty(estimator: str, logits: Tensor, reference_logps: Tensor) -> tuple[float, Tensor]:
    """Returns the expectation of the estimator and of its gradient by the logits, with old = policy: each token once,
    weighted with its probability."""
    logps = torch.log_softmax(logits, 0)
    old_logps, mask = logps.detach(), torch.ones(1, len(logits), dtype=torch.bool)
    penalties = grpo_module.kl_penalty(estimator, logps[None], old_logps[None], reference_logps[None], mask)
    mean = (old_logps.exp() * penalties[0]).sum()
    return float(mean.detach()), torch.autograd.grad(mean, logits, retain_graph=True)[0]


def exact_kl(logits: Tensor, reference_logps: Tensor, forward: bool) -> tuple[float, Tensor]:
    """Returns KL(p || ref), or with `forward` KL(ref || p), and its gradient by the logits."""
    logps = torch.log_softmax(logits, 0)
    if forward:
        kl = (reference_logps.exp() * (reference_logps - logps)).sum()
    else:
        kl = (logps.exp() * (logps - reference_logps)).sum()
    return float(kl.detach()), torch.autograd.grad(kl, logits, retain_graph=True)[0]


def random_distributions(seed: int) -> tuple[Tensor, Tensor]:
    """Returns logits of a policy with a gradient, and log-probs of a reference, (5,) float64 each."""
    stream = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, generator=stream, dtype=torch.float64)
    reference_logps = torch.log_softmax(torch.randn(5, generator=stream).double(), 0)
    return logits.requires_grad_(), reference_logps


@pytest.mark.parametrize(("estimator", "forward"), [("k3_ratio", False), ("k3", True), ("k2", False)])
@pytest.mark.parametrize("seed", range(10))
def test_expected_gradient_of_estimator_is_that_of_its_kl(seed: int, estimator: str, forward: bool) -> None:
    """The expected gradient of k3_ratio and k2 is that of KL(p || ref), that of k3 is that of KL(ref || p)."""
    logits, reference_logps = random_distributions(seed)
    _, gradient = exact_kl(logits, reference_logps, forward)
    _, found = expected_penalty(estimator, logits, reference_logps)
    assert relative_error(found, gradient) < 1e-10


@pytest.mark.parametrize("estimator", ["k3_ratio", "k3"])
@pytest.mark.parametrize("seed", range(10))
def test_expected_k3_is_the_reverse_kl(seed: int, estimator: str) -> None:
    """The value of k3 and k3_ratio is in expectation KL(p || ref)."""
    logits, reference_logps = random_distributions(seed)
    kl, _ = exact_kl(logits, reference_logps, forward=False)
    mean, _ = expected_penalty(estimator, logits, reference_logps)
    assert mean == pytest.approx(kl, abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_expected_gradient_of_k3_is_not_that_of_the_reverse_kl(seed: int) -> None:
    """The gradient of k3 is not that of the KL which it estimates: a reason for k3_ratio."""
    logits, reference_logps = random_distributions(seed)
    _, gradient = exact_kl(logits, reference_logps, forward=False)
    _, found = expected_penalty("k3", logits, reference_logps)
    assert relative_error(found, gradient) > 1e-2


# --- through a model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def roles() -> Roles:
    return policy_over_sft()


def grpo_over(
    roles: Roles,
    loss_type: str = "grpo",
    rewards: Any = INFORMATIVE_REWARDS,
    fake: Mapping[str, Any] = {},
    **settings: Any,
) -> GRPO:
    """Returns GRPO of a continued policy over given completions; `fake` are arguments of their collector."""
    config = GRPOConfig(loss_type=loss_type, epsilon_high=HIGH.get(loss_type), **settings)
    return GRPO(AlgorithmContext(roles, fresh=False), config, FakeCollector(roles, rewards, **fake))


def noisy(logps: Tensor, size: float = 0.3, seed: int = 0) -> Tensor:
    return logps + size * torch.randn(logps.shape, generator=torch.Generator().manual_seed(seed))


def model_error(roles: Roles, loss_type: str, estimator: str, temperature: float = 0.7) -> tuple[float, float]:
    """Returns the distance of loss and gradient of a whole step from the model of transformers in float64. The old
    log-probs differ from those of the policy."""
    algorithm = grpo_over(roles, loss_type, fake={"temperature": temperature}, beta=BETA, kl_estimator=estimator)
    batch = algorithm.collect(0).batch
    batch.old_logps = noisy(batch.sampler_logps)
    loss, _, _ = one_pass(algorithm, batch)
    plain = PlainModel([roles.adapter_tensors("sft")], roles.adapter_tensors("policy"))
    row_logps, row_kls, rows = [], [], []
    for i in range(len(batch)):
        ids = batch.input_ids[i][batch.attention_mask[i]]
        positions = batch.completion_mask[i].nonzero().squeeze(1)
        distribution = plain.log_softmax(ids.tolist(), temperature=temperature)[positions - 1]
        with torch.no_grad():
            reference = plain.log_softmax(ids.tolist(), policy=False, temperature=temperature)[positions - 1]
        tokens = ids[positions][:, None]
        logps = distribution.gather(1, tokens).squeeze(1)
        row_logps.append(logps)
        row_kls.append((distribution.exp() * (distribution - reference)).sum())
        reference_logps = reference.gather(1, tokens).squeeze(1)
        rows.append(PolicyRow(logps.tolist(), batch.old_logps[i][positions].tolist(), reference_logps.tolist()))
    advantages = batch.sequence_advantages.tolist()
    high = HIGH.get(loss_type, 0.2)
    step = grpo_step(loss_type, rows, advantages, LOW, high, BETA, estimator, MAX_NEW_TOKENS)
    expected = step.loss
    # A sum whose gradient is that of the step.
    surrogate = torch.zeros((), dtype=torch.float64)
    for logps, kl, slopes, weight in zip(row_logps, row_kls, step.slopes, step.weights, strict=True):
        surrogate = surrogate + (logps * torch.tensor(slopes, dtype=torch.float64)).sum()
        if estimator == "exact":
            surrogate = surrogate + BETA * weight * kl
            expected += BETA * weight * float(kl.detach())
    surrogate.backward()
    return abs(loss - expected) / abs(expected), error_against(by_key(roles, "policy"), plain.gradient())


@pytest.mark.parametrize(
    ("loss_type", "estimator"),
    [("grpo", "k3_ratio"), ("dapo", "k3"), ("dr_grpo", "k2"), ("gspo", "exact"), ("cispo", "exact")],
)
def test_step_equals_plain_model(roles: Roles, loss_type: str, estimator: str) -> None:
    """Loss and gradient of a step are those of the model of transformers in float64, with the KL over the vocabulary
    too."""
    loss, gradient = model_error(roles, loss_type, estimator)
    assert loss < 1e-5 and gradient < 1e-5


def test_exact_kl_without_gradient_is_found(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    """`model_error` finds a KL over the vocabulary without a gradient."""
    exact = Roles.full_vocab_kl
    monkeypatch.setattr(
        Roles, "full_vocab_kl", lambda self, p, q, *rest, gradient: exact(self, p, q, *rest, gradient=gradient).detach()
    )
    assert model_error(roles, "grpo", "exact")[1] > 1e-3


def test_wrong_temperature_of_policy_is_found(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    """`model_error` finds log-probs of the policy at temperature 1 instead of the temperature of the sampler."""
    logps = Roles.logps
    monkeypatch.setattr(Roles, "logps", lambda self, role, batch, temperature=1.0: logps(self, role, batch))
    assert model_error(roles, "grpo", "k3")[1] > 1e-3


# --- properties of a step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_give_gradient_of_whole_step(roles: Roles, loss_type: str) -> None:
    """Loss, gradient and metrics do not depend on the size of the micro-batches."""
    results = []
    for split in ({"rows": 1}, {"rows": 4}, {"tokens": 30}, {"rows": 99}):
        algorithm = grpo_over(
            roles,
            loss_type,
            fake={"drift": 0.2},
            old_logprobs_from="sampler",
            kl_estimator="exact" if loss_type == "dapo" else "k3_ratio",
        )
        results.append(one_pass(algorithm, algorithm.collect(0).batch, **split))
    first_loss, first_gradient, first_stats = results[0]
    for loss, gradient, stats in results[1:]:
        assert loss == pytest.approx(first_loss, rel=1e-5, abs=1e-7)
        assert relative_error(gradient, first_gradient) < 1e-5
        assert stats == pytest.approx(first_stats, rel=1e-5, abs=1e-6)
    assert first_stats["loss"] == pytest.approx(first_loss, rel=1e-5)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_padding_changes_no_gradient(roles: Roles, loss_type: str) -> None:
    """Loss, gradient and metrics do not depend on width and ids of padding."""
    results = []
    for padding in ({}, {"more": 5}, {"filler": 31}, {"more": 3, "filler": 1}):
        algorithm = grpo_over(roles, loss_type, fake=padding, num_iterations=2)
        results.append(one_pass(algorithm, algorithm.collect(0).batch))
    first_loss, first_gradient, first_stats = results[0]
    for loss, gradient, stats in results[1:]:
        assert loss == pytest.approx(first_loss, rel=1e-5, abs=1e-7)
        assert relative_error(gradient, first_gradient) < 1e-5
        assert stats == pytest.approx(first_stats, rel=1e-4, abs=1e-6)


def test_token_weights_equal_numbers_by_hand() -> None:
    """Weights of 2, 7 and 0 tokens: 1 / (N length), 1 / tokens of the step, or 1 / (N max_new_tokens)."""
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[0, 1:3], mask[1, 2:9] = True, True
    assert weights_of("grpo", mask).sum(dim=1).tolist() == pytest.approx([1 / 3, 1 / 3, 0.0])
    assert weights_of("dapo", mask)[mask].tolist() == pytest.approx([1 / 9] * 9)
    assert weights_of("dr_grpo", mask)[mask].tolist() == pytest.approx([1 / (3 * MAX_NEW_TOKENS)] * 9)
    assert torch.equal(weights_of("gspo", mask), weights_of("grpo", mask))
    assert torch.equal(weights_of("cispo", mask), weights_of("dapo", mask))


def test_first_of_several_passes_has_ratio_one(roles: Roles) -> None:
    """The first pass has ratio 1 and the loss of a single pass; a changed policy is clipped against the same old
    log-probs."""
    algorithm = grpo_over(roles, num_iterations=3, beta=0.0)
    step_batch = algorithm.collect(0)
    minibatches = list(step_batch.minibatches())
    assert len(minibatches) == 3 and all(minibatch is step_batch.batch for minibatch in minibatches)
    batch = minibatches[0]
    policy_logps = roles.logps("policy", batch).logps.detach()
    assert float((policy_logps - batch.old_logps)[batch.loss_mask].abs().max()) < 1e-5
    loss, _, stats = one_pass(algorithm, batch)
    assert stats["clip_ratio"] == 0.0 and "sampling/sampling_logp_difference/mean" in stats
    single = grpo_over(roles, beta=0.0)
    single_loss, _, _ = one_pass(single, single.collect(0).batch)
    assert single.collect(0).batch.old_logps is None and loss == pytest.approx(single_loss, abs=1e-6)
    kept = roles.adapter_tensors("policy")
    try:
        perturb(roles, "policy", size=0.3, seed=9)
        assert algorithm.should_continue({}) is True
        _, _, later = one_pass(algorithm, batch)
    finally:
        roles.load_adapter_tensors("policy", kept, "here")
    # `old_logps` are those of the policy that drew the completions.
    assert later["clip_ratio"] > 0.1
    assert "sampling/sampling_logp_difference/mean" not in later


@pytest.mark.parametrize(("truncated", "rows"), [("keep", 6), ("mask", 4)])
def test_truncated_completions_are_kept_or_masked(roles: Roles, truncated: str, rows: int) -> None:
    """With `mask`, truncated completions have no weight, but their rewards count in the advantages of their group."""
    algorithm = grpo_over(roles, fake={"cut": (0, 4)}, truncated_completions=truncated)
    batch = algorithm.collect(0).batch
    assert int(batch.loss_mask.any(dim=1).sum()) == rows and len(batch) == 6
    expected = group_advantages(torch.tensor(INFORMATIVE_REWARDS[0]))
    assert torch.equal(batch.sequence_advantages.view(2, 3), expected)
    weights = algorithm.token_weights(batch)
    # A masked completion still counts among the N of the mean.
    assert weights.sum() == pytest.approx(rows / 6)
    assert (weights[[0, 4]].sum() == 0) == (truncated == "mask")


def test_truncated_completion_is_penalized(roles: Roles) -> None:
    """With `penalize`, the advantages are those of rewards minus `missing_eos_penalty`; the metric `reward` is without
    it."""
    algorithm = grpo_over(
        roles,
        rewards=[[[0.5] * 3, [0.0, 1.0, 1.0]]],
        fake={"cut": (1, 5)},
        truncated_completions="penalize",
        missing_eos_penalty=0.5,
    )
    step_batch = algorithm.collect(0)
    expected = group_advantages(torch.tensor([[0.5, 0.0, 0.5], [0.0, 1.0, 0.5]]))
    assert torch.allclose(step_batch.batch.sequence_advantages.view(2, 3), expected)
    metrics = to_floats(step_batch.stats)
    assert metrics["reward"] == pytest.approx(3.5 / 6) and metrics["frac_reward_zero_std"] == 0.5


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_step_of_masked_completions_has_no_gradient(roles: Roles, loss_type: str) -> None:
    """If all completions are masked, loss and gradient are exactly 0."""
    algorithm = grpo_over(roles, loss_type, fake={"cut": range(6)}, truncated_completions="mask")
    loss, gradient, _ = one_pass(algorithm, algorithm.collect(0).batch)
    assert loss == 0.0 and not gradient.any()


MIXED_REWARDS = [
    [[0.7] * 3, [0.0, 1.0, 0.0], [0.1] * 3, [1.0] * 3],
    [[0.3] * 3, [1.0, 0.0, 0.0], [0.0] * 3],
    [[0.0, 0.0, 1.0], [0.5] * 3],
    [[0.2] * 3],
    [[1.0, 0.0, 0.0]],
]
"""Rewards of each draw. The last draw must not happen."""


@pytest.mark.parametrize(
    ("zero_std", "prompts", "requested_counts"),
    [
        ("keep", ["prompt 0.0", "prompt 0.1", "prompt 0.2", "prompt 0.3"], [None]),
        ("drop", ["prompt 0.1"], [None]),
        ("resample", ["prompt 0.1", "prompt 1.1", "prompt 2.0"], [None, 3, 2, 1]),
    ],
)
def test_zero_std_groups_are_kept_dropped_or_resampled(
    roles: Roles, zero_std: str, prompts: list[str], requested_counts: list[int | None]
) -> None:
    """`resample` draws as many prompts again as have groups of equal rewards, until there are four draws."""
    assert MAX_RESAMPLES == 4
    algorithm = grpo_over(roles, rewards=MIXED_REWARDS, zero_std_groups=zero_std)
    step_batch = algorithm.collect(0)
    groups, advantages = algorithm.collector.logged[0][1:]
    assert algorithm.collector.requested_counts == requested_counts
    assert [prompt.text for prompt in groups.prompts] == prompts
    assert groups.texts == [f"{prompt} answer {i}" for prompt in prompts for i in range(3)]
    assert torch.equal(groups.reward_components.view_as(groups.rewards), groups.rewards)
    assert len(groups.truncated) == len(step_batch.batch) == advantages.numel() == 3 * len(prompts)
    assert torch.equal(advantages.flatten(), step_batch.batch.sequence_advantages)
    is_zero_std = zero_std_groups(groups.shaped_rewards)
    assert not advantages[is_zero_std].any() and advantages[~is_zero_std].all()
    assert int(is_zero_std.sum()) == (3 if zero_std == "keep" else 0)
    metrics = to_floats(step_batch.stats)
    assert metrics["frac_reward_zero_std"] == pytest.approx(7 / 10 if zero_std == "resample" else 3 / 4)
    assert metrics["rollout_seconds"] == 2.0 * len(requested_counts), "not the time of every draw"
    loss, gradient, _ = one_pass(algorithm, step_batch.batch)
    assert math.isfinite(loss) and gradient.any()


def test_resampled_rows_are_the_rows_that_were_drawn(roles: Roles) -> None:
    """Rows of several draws are joined to one width: ids, masks and log-probs of each row are those of its draw."""
    algorithm = grpo_over(roles, rewards=MIXED_REWARDS, zero_std_groups="resample")
    batch = algorithm.collect(0).batch
    rows = []
    for draw, group, num_groups in ((0, 1, 4), (1, 1, 3), (2, 0, 2)):
        drawn, _ = completion_rows(num_groups, 3, seed=draw)
        rows += drawn[3 * group : 3 * group + 3]
    assert [batch.input_ids[i][batch.attention_mask[i]].tolist() for i in range(9)] == rows
    logps = algorithm.collector.logps("policy", batch)
    assert float((batch.sampler_logps - logps)[batch.loss_mask].abs().max()) < 1e-5
    assert not batch.sampler_logps[~batch.loss_mask].any()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize(("zero_std", "beta"), [("keep", 0.0), ("drop", 0.0), ("drop", 0.5), ("resample", 0.5)])
def test_step_of_zero_std_groups_has_no_gradient(roles: Roles, loss_type: str, zero_std: str, beta: float) -> None:
    """Groups of equal rewards alone give loss and gradient 0. With `drop` their KL is dropped too: near the reference
    its gradient is rounding noise, which Adam would scale up to a whole step."""
    rewards = [[[0.7] * 7, [0.1] * 7]] * 4
    algorithm = grpo_over(roles, loss_type, rewards, beta=beta, zero_std_groups=zero_std)
    loss, gradient, stats = one_pass(algorithm, algorithm.collect(0).batch)
    assert loss == 0.0
    assert not gradient.any() and not gradient.isnan().any()
    assert all(map(math.isfinite, stats.values()))
    # The next step has rewards that differ, and trains.
    algorithm.collector.rewards = INFORMATIVE_REWARDS * 4
    _, gradient, _ = one_pass(algorithm, algorithm.collect(1).batch)
    assert gradient.any()


def test_kept_zero_std_groups_have_a_kl_gradient(roles: Roles) -> None:
    """With `keep` and beta > 0, groups of equal rewards have the gradient of the KL."""
    algorithm = grpo_over(roles, rewards=[[[0.7] * 7]], beta=0.5, zero_std_groups="keep")
    loss, gradient, stats = one_pass(algorithm, algorithm.collect(0).batch)
    assert loss > 0 and gradient.any() and stats["kl"] > 0


def test_most_groups_of_equal_rewards_give_warning(roles: Roles) -> None:
    """80 % of groups of equal rewards give a warning, except if their rewards are high."""
    algorithm = grpo_over(roles)
    assert list(algorithm.diagnostics({"frac_reward_zero_std": 0.79, "reward": 0.1})) == []
    (warning,) = algorithm.diagnostics({"frac_reward_zero_std": 0.9, "reward": 0.1})
    assert "90%" in warning and "rollout.num_generations" in warning
    # Groups whose completions are all correct.
    assert list(algorithm.diagnostics({"frac_reward_zero_std": 0.9, "reward": 0.9})) == []


def test_kl_in_the_reward_equals_numbers_by_hand(roles: Roles) -> None:
    """With `kl_in_reward` the advantages are those of R - beta (log p_sampler - log ref), summed over the tokens."""
    beta = 0.4
    algorithm = grpo_over(
        roles, rewards=[[[0.5, 0.5, 0.5], [1.0, 0.0, 0.0]]], fake={"drift": 0.1}, beta=beta, kl_in_reward=True
    )
    step_batch = algorithm.collect(0)
    batch = step_batch.batch
    rewards = []
    for i, reward in enumerate([0.5, 0.5, 0.5, 1.0, 0.0, 0.0]):
        positions = batch.completion_mask[i].nonzero().squeeze(1).tolist()
        kl = sum(float(batch.sampler_logps[i, t]) - float(batch.reference_logps[i, t]) for t in positions)
        rewards.append(reward - beta * kl)
    expected = group_advantages(torch.tensor(rewards).view(2, 3))
    assert torch.allclose(batch.sequence_advantages.view(2, 3), expected, atol=1e-4) and expected.all()
    metrics = to_floats(step_batch.stats)
    assert metrics["reward"] == pytest.approx(2.5 / 6) and metrics["frac_reward_zero_std"] == 0.5
    loss, gradient, stats = one_pass(algorithm, batch)
    loss_without_kl, gradient_without_kl, _ = one_pass(grpo_over(roles, beta=0.0), batch)
    # The loss has no second KL.
    assert loss == loss_without_kl
    assert torch.equal(gradient, gradient_without_kl)
    assert stats["kl"] > 0


# --- the log-probs of the sampler -------------------------------------------------------------------------------------


def test_shared_prompts_change_no_gradient(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference and old log-probs, loss and gradient with prompts that are computed once are those of whole rows; the
    rows of a group stay adjacent in any split."""
    packed = record_packing(monkeypatch)
    results = []
    for share, split in (
        (False, {"rows": 4}),
        (True, {"rows": 4}),
        (True, {"rows": 3}),
        (True, {"tokens": 90}),
        (True, {"rows": 99}),
    ):
        monkeypatch.setattr(roles.decoder, "share_prefixes", share)
        config = GRPOConfig(beta=0.3, num_iterations=2)
        algorithm = GRPO(AlgorithmContext(roles, fresh=False), config, real_collector(roles, long=True))
        batch = algorithm.collect(0).batch
        packed.clear()
        results.append((one_pass(algorithm, batch, **split), batch.reference_logps, batch.old_logps))
        assert any(packed) == share
        prefixes = [micro.shared_prefix for micro in batch.split(**split)]
        groups_within = sum(int((prefix[1:] == 0).sum()) for prefix in prefixes)
        groups_at_start = sum(int(prefix[0] == 0) for prefix in prefixes)
        assert groups_within + groups_at_start == 3
    (first_loss, first_gradient, first_stats), first_reference, first_old = results[0]
    for (loss, gradient, stats), reference_logps, old_logps in results[1:]:
        assert loss == pytest.approx(first_loss, rel=1e-4, abs=1e-6)
        assert relative_error(gradient, first_gradient) < 1e-5
        assert stats == pytest.approx(first_stats, rel=1e-4, abs=1e-6)
        assert torch.allclose(reference_logps, first_reference, atol=1e-5)
        assert torch.allclose(old_logps, first_old, atol=1e-5)


def first_pass(
    roles: Roles, temperature: float = 0.8, old_logprobs_from: str = "sampler", **settings: Any
) -> tuple[GRPO, dict[str, float]]:
    """Runs a step on the real engine, which samples at 0.8, with the update at `temperature`."""
    config = GRPOConfig(old_logprobs_from=old_logprobs_from, beta=0.0, **settings)
    algorithm = GRPO(AlgorithmContext(roles, fresh=False), config, real_collector(roles))
    batch = algorithm.collect(0).batch
    algorithm.collector.temperature = temperature
    _, _, stats = one_pass(algorithm, batch)
    return algorithm, stats | {"frac_reward_zero_std": 0.0, "reward": 0.5}


def test_sampler_agrees_with_policy(roles: Roles) -> None:
    """The engine and the training forward pass give the same log-probs, and no warning."""
    algorithm, stats = first_pass(roles)
    assert stats["sampling/sampling_logp_difference/mean"] < 1e-5 and stats["clip_ratio"] == 0.0
    algorithm.check_metrics(stats)
    assert list(algorithm.diagnostics(stats)) == []


@pytest.mark.parametrize("old_logprobs_from", ["sampler", "recomputed"])
def test_wrong_temperature_stops_run(roles: Roles, old_logprobs_from: str) -> None:
    """Log-probs of the sampler that are off by more than `grpo.max_logprob_mismatch` raise TrainingError."""
    algorithm, stats = first_pass(roles, 0.4, old_logprobs_from)
    assert stats["sampling/sampling_logp_difference/mean"] > 0.1
    with pytest.raises(TrainingError, match=r"grpo\.max_logprob_mismatch"):
        algorithm.check_metrics(stats)
    tolerant, stats = first_pass(roles, 0.4, old_logprobs_from, max_logprob_mismatch=50.0)
    tolerant.check_metrics(stats)
    assert list(tolerant.diagnostics(stats)) == []


def test_sampler_logps_equal_plain_model(roles: Roles) -> None:
    """The log-probs of the engine are those of the model of transformers in float64, at its temperature."""
    batch = real_collector(roles).collect(0, 0).batch
    plain = PlainModel([roles.adapter_tensors("sft"), roles.adapter_tensors("policy")])
    for i in range(len(batch)):
        ids = batch.input_ids[i][batch.attention_mask[i]]
        positions = batch.completion_mask[i].nonzero().squeeze(1)
        with torch.no_grad():
            logps = plain.log_softmax(ids.tolist(), policy=False, temperature=0.8)
        assert torch.allclose(
            logps[positions - 1, ids[positions]].float(), batch.sampler_logps[i][positions], atol=1e-4
        )


# --- whole runs -------------------------------------------------------------------------------------------------------


def small_grpo(sft: Path, **more: Any) -> dict[str, Any]:
    """Returns a recipe of GRPO with two steps over the frozen adapter of an SFT run."""
    return {
        "name": "grpo",
        "algorithm": "grpo",
        "base": {"model": "tiny-tutor", "bits": 4},
        "adapters": {"sft": {"path": str(sft)}, "policy": {"r": 4}},
        "data": {"train": [{"dataset": "builtin:arithmetic", "max_samples": 20}]},
        "rewards": [{"name": "answer"}, {"name": "length", "target_tokens": 5, "weight": 0.5}],
        "rollout": {"num_generations": 4, "max_new_tokens": 10},
        "train": {
            "max_steps": 2,
            "prompts_per_step": 3,
            "micro_batch_size": 5,
            "learning_rate": 5e-3,
            "gradient_checkpointing": False,
        },
        **more,
    }


def logged_groups(events: Sequence[Any]) -> list[Any]:
    return [(event.step, event.prompt, event.completions) for event in events if isinstance(event, GroupLogged)]


def test_frozen_adapter_and_base_are_unchanged_after_run(cache: Path, tmp_path: Path, sft_run: Path) -> None:
    """GRPO over a frozen adapter changes no byte of its files or of the base, and starts with KL 0."""
    files = file_bytes(sft_run)
    outcome, events = run_with_events(small_grpo(sft_run), tmp_path / "run")
    assert file_bytes(sft_run) == files
    below = json.loads((sft_run / "summary.json").read_text())
    assert outcome.summary["base_hash"]["end"] == outcome.summary["base_hash"]["start"] == below["base_hash"]["end"]
    assert set(outcome.summary["adapter_hashes"]) == {"sft"}
    steps = step_metrics(events)
    assert 0 <= steps[0]["kl"] < 1e-9 < steps[1]["kl"] and steps[0]["sampling/sampling_logp_difference/mean"] < 1e-5
    trained = load_file(tmp_path / "run" / "final" / WEIGHTS)
    assert all(tensor.any() for key, tensor in trained.items() if "lora_B" in key), "the policy was not trained"


def test_two_runs_with_one_seed_are_equal(cache: Path, tmp_path: Path, sft_run: Path) -> None:
    """Two runs of one recipe have the same metrics, completions and weights."""
    _, events = run_with_events(small_grpo(sft_run), tmp_path / "one")
    steps = step_metrics(events)
    ended = load_file(tmp_path / "one" / "final" / WEIGHTS)
    _, again = run_with_events(small_grpo(sft_run), tmp_path / "two")
    assert step_metrics(again) == steps
    assert changed_tensors(ended, load_file(tmp_path / "two" / "final" / WEIGHTS)) == set()
    assert logged_groups(again) == logged_groups(events)
    assert len(logged_groups(events)) == 2


def test_runs_with_other_seeds_differ(cache: Path, tmp_path: Path, sft_run: Path) -> None:
    """Another seed draws completions with another mean reward or length."""
    rollouts = []
    for seed in (0, 1):
        recipe = small_grpo(sft_run, seed=seed, train={**small_grpo(sft_run)["train"], "max_steps": 1})
        (step,) = step_metrics(run_with_events(recipe, tmp_path / str(seed))[1])
        rollouts.append((step["reward"], step["completions/mean_length"]))
    assert rollouts[0] != rollouts[1]


def test_fresh_policy_that_differs_from_reference_stops_run(
    cache: Path, tmp_path: Path, sft_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fresh policy whose adapter is not zero raises TrainingError before the first step."""
    real = runner_module.build

    def perturbed(*given: Any, **more: Any) -> Any:
        built = real(*given, **more)
        perturb(built.roles, "policy", size=0.05)
        return built

    monkeypatch.setattr(runner_module, "build", perturbed)
    with pytest.raises(TrainingError, match="the reference is not what it must be"):
        run_with_events(small_grpo(sft_run), tmp_path / "run")


GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl.gz"


@pytest.mark.slow
@pytest.mark.skipif(not GSM8K.exists(), reason="needs the real data")
def test_run_on_questions_that_are_too_hard(cache: Path, tmp_path: Path) -> None:
    """200 questions of GSM8K that the tiny base cannot answer: rewards near 0, warnings, and no training on noise."""
    with gzip.open(GSM8K, "rt", encoding="utf-8") as lines:
        (tmp_path / "gsm8k.jsonl").write_text("".join(itertools.islice(lines, 200)), encoding="utf-8")
    recipe = {
        "name": "gsm8k",
        "algorithm": "grpo",
        "base": {"model": "tiny-tutor"},
        "adapters": {"policy": {"r": 4}},
        "data": {"train": [{"dataset": str(tmp_path / "gsm8k.jsonl")}], "max_prompt_length": 512},
        "rewards": [{"name": "answer"}],
        "rollout": {"num_generations": 4, "max_new_tokens": 48},
        "train": {"max_steps": 2, "prompts_per_step": 4, "micro_batch_size": 8, "gradient_checkpointing": False},
    }
    outcome, events = run_with_events(recipe, tmp_path / "run")
    notes = [(event.level, event.message) for event in events if isinstance(event, LogMessage)]
    steps = step_metrics(events)
    assert outcome.summary["status"] == "done" and len(steps) == 2
    assert any("prompts of 200 of 200 rows" in text and "200 with a gold answer" in text for _, text in notes)
    assert all(step["reward"] <= 0.2 and step["frac_reward_zero_std"] >= 0.5 for step in steps)
    assert any(level == "warning" and ("signal" in text or "zero reward std" in text) for level, text in notes)
    if all(step["frac_reward_zero_std"] == 1.0 for step in steps):
        assert any(
            level == "warning" and "most groups have equal rewards and give no gradient, 100%" in text
            for level, text in notes
        )
        assert not any(t.any() for key, t in load_file(tmp_path / "run" / "final" / WEIGHTS).items() if "lora_B" in key)
