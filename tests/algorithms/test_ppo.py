"""PPO: advantages, whitening, rewards, both clipped losses, and the gradients of a step with either critic.

Oracles: numbers worked out by hand, `oracles.gae` and `oracles.ppo_step` in float64, and the model of transformers in
float64 (`oracles.PlainModel`). A test named `..._is_found` plants a bug of other implementations, and shows that the
check of the test before it fails.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from algorithm_helpers import FakeCollector, by_key, error_against, largest, real_collector
from hypothesis import given
from hypothesis import strategies as st
from models import count_forwards, gradients, llama_roles, perturb, relative_error, zero_grad
from oracles import PlainModel, PPORow, ppo_step
from torch import Tensor

from lowrank_tune.algorithms import ppo as ppo_module
from lowrank_tune.algorithms.base import AlgorithmContext
from lowrank_tune.algorithms.ppo import (
    PPO,
    PPOBatch,
    adapt_kl_coef,
    shift_right,
    token_rewards,
    value_loss,
)
from lowrank_tune.algorithms.reward_failures import RewardFailure
from lowrank_tune.algorithms.rollouts import RolloutGroups
from lowrank_tune.batch import Batch, RolloutBatch
from lowrank_tune.config import PPOConfig
from lowrank_tune.errors import TrainingError
from lowrank_tune.functional import (
    apply_mask,
    clipped_policy_loss,
    explained_variance,
    gae,
    kl_k3,
    token_mean_weights,
    whiten,
)
from lowrank_tune.model.logprobs import Head, chunked_entropy
from lowrank_tune.model.roles import Roles
from lowrank_tune.stats import add_stats, to_floats

NAN = math.nan
Rows = Sequence[tuple[Any, ...]]


def padded_tensors(
    rows: Rows, filler: float = 0.0, gaps: int = 1, more: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """Returns the sequences of each row as (B, T) tensors, with `gaps` slots of `filler` before and between the tokens
    and `more` after them. The mask is the last tensor."""
    width = max(len(row[0]) for row in rows) * (1 + gaps) + gaps + more
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    tensors = [torch.full((len(rows), width), filler, dtype=dtype) for _ in rows[0]]
    for i, row in enumerate(rows):
        columns = [gaps + (1 + gaps) * t for t in range(len(row[0]))]
        mask[i, columns] = True
        for tensor, values in zip(tensors, row, strict=True):
            tensor[i, columns] = torch.tensor(np.asarray(values), dtype=dtype)
    return *tensors, mask


# --- advantages -------------------------------------------------------------------------------------------------------

ENDED = ([0.0, 0.0, 1.0], [0.5, 0.25, 0.5])
SHORT = ([1.0, 1.0], [0.5, 0.5])
"""Rewards and values of the tokens of a completion."""
BY_HAND = (
    # gamma 1, lam 1/2. Ended: delta 3 = 1 - .5, delta 2 = .5 - .25, delta 1 = .25 - .5. Truncated, with value 2 after
    # the last token: delta 3 = 1 + 2 - .5.
    (1.0, 0.5, [[0.0, 0.5, 0.5], [0.5, 1.5, 2.5], [1.25, 0.5]]),
    # gamma 1/2, lam 1: the discounted sum of the rewards minus the value. Truncated: 1/4 + 1/8 * 2 - .5 and so on.
    (0.5, 1.0, [[0.25 - 0.5, 0.5 - 0.25, 0.5], [0.25 + 0.25 - 0.5, 0.5 + 0.5 - 0.25, 1 + 1 - 0.5], [1.5 - 0.5, 0.5]]),
    # lam 0: delta alone.
    (1.0, 0.0, [[-0.25, 0.25, 0.5], [-0.25, 0.25, 2.5], [1.0, 0.5]]),
)
"""gamma, lam and the advantages of a row that ended, one that was truncated with value 2 after it, and a short one."""
BOOTSTRAP_VALUES = torch.tensor([0.0, 2.0, 0.0])


def advantage_error(compute: Callable[..., Tensor], filler: float = NAN) -> float:
    """Returns the largest distance from `BY_HAND`; infinite if a slot outside the mask is not 0."""
    errors = []
    for gamma, lam, expected in BY_HAND:
        for gaps, more in ((0, 0), (0, 3), (2, 1)):
            rewards, values, mask = padded_tensors([ENDED, ENDED, SHORT], filler, gaps, more)
            found = compute(rewards, values, mask, BOOTSTRAP_VALUES, gamma, lam)
            flat = torch.tensor([advantage for row in expected for advantage in row])
            errors.append(float((found[mask] - flat).abs().max()))
            errors.append(math.inf if found[~mask].any() else 0.0)
    return largest(errors)


def test_advantages_equal_numbers_by_hand() -> None:
    """GAE (arXiv:1506.02438, equation 16) gives the numbers of `BY_HAND`; with NaN outside the mask too."""
    assert advantage_error(gae) < 1e-7


def _truncated_is_ended(
    rewards: Tensor, values: Tensor, mask: Tensor, bootstrap: Tensor, gamma: float, lam: float
) -> Tensor:
    return gae(rewards, values, mask, torch.zeros_like(bootstrap), gamma, lam)


def _ended_is_truncated(
    rewards: Tensor, values: Tensor, mask: Tensor, bootstrap: Tensor, gamma: float, lam: float
) -> Tensor:
    return gae(rewards, values, mask, torch.full_like(bootstrap, 2.0), gamma, lam)


def _by_padded_width(
    rewards: Tensor, values: Tensor, mask: Tensor, bootstrap: Tensor, gamma: float, lam: float
) -> Tensor:
    """A row that does not fill the batch counts as ended, and the value after its last token is that of the next
    slot."""
    rewards, values = rewards.nan_to_num(0), values.nan_to_num(0.3)
    return apply_mask(gae(rewards, values, torch.ones_like(mask), bootstrap * mask[:, -1], gamma, lam), mask)


def _masked_by_multiplication(
    rewards: Tensor, values: Tensor, mask: Tensor, bootstrap: Tensor, gamma: float, lam: float
) -> Tensor:
    return gae(rewards * mask, values * mask, torch.ones_like(mask), bootstrap, gamma, lam) * mask


@pytest.mark.parametrize("bug", [_truncated_is_ended, _ended_is_truncated, _by_padded_width, _masked_by_multiplication])
def test_wrong_advantages_are_found(bug: Any) -> None:
    """`advantage_error` finds a wrong value after the last token, and masks by width or by multiplication."""
    assert advantage_error(bug) > 1e-2


NUMBER = st.floats(-50, 50, width=32)
ROW = st.integers(0, 6).flatmap(lambda n: st.tuples(*[st.lists(NUMBER, min_size=n, max_size=n)] * 2, NUMBER))
SHARE = st.floats(0, 1, width=32)


@given(
    st.lists(ROW, min_size=1, max_size=4),
    SHARE,
    SHARE,
    st.sampled_from([NAN, 0.0, 1e30, -math.inf]),
    st.integers(0, 2),
    st.integers(1, 3),
)
def test_advantages_equal_oracle(
    rows: list[Any], gamma: float, lam: float, filler: float, gaps: int, more: int
) -> None:
    """GAE equals the sum over l of (gamma lam)^l delta_(t+l), whatever stands outside the mask."""
    rewards, values, mask = padded_tensors([row[:2] for row in rows], filler, gaps, more)
    found = gae(rewards, values, mask, torch.tensor([row[2] for row in rows], dtype=torch.float64), gamma, lam)
    expected = [advantage for row in rows for advantage in oracles.gae(*row, gamma, lam)]
    assert np.allclose(found[mask].numpy(), expected, rtol=1e-6, atol=1e-4) and not found[~mask].any()


# --- whitening --------------------------------------------------------------------------------------------------------


def whitening_error(compute: Callable[[Tensor, Tensor], Tensor], more: int = 0) -> float:
    """Returns the distance from the values by hand for 1, 2, 3 and 6: mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5."""
    values, mask = padded_tensors([([1.0, 2.0],), ([3.0],), ([6.0],)], 100.0, 1, more)
    found = compute(values, mask)
    expected = torch.tensor([-2.0, -1.0, 0.0, 3.0]) / math.sqrt(3.5)
    return float((found[mask] - expected).abs().max() + found[~mask].abs().max())


@pytest.mark.parametrize("more", [0, 7])
def test_whitening_equals_numbers_by_hand(more: int) -> None:
    """Whitening is over all tokens of the batch, by the mean and the population variance (1/n)."""
    assert whitening_error(whiten, more) < 1e-6


def test_whitening_of_no_tokens_is_zero() -> None:
    """A batch whose mask is empty is whitened to zeros, not to NaN."""
    assert not whiten(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)).any()


def _mean_added_back(values: Tensor, mask: Tensor) -> Tensor:
    return apply_mask(whiten(values, mask) + float(values[mask].mean()), mask)


def _padding_counted(values: Tensor, mask: Tensor) -> Tensor:
    return apply_mask(whiten(values * mask, torch.ones_like(mask)), mask)


def _row_by_row(values: Tensor, masks: Tensor) -> Tensor:
    return torch.cat([whiten(row[None], mask[None]) for row, mask in zip(values, masks, strict=True)])


@pytest.mark.parametrize("bug", [_mean_added_back, _padding_counted, _row_by_row])
def test_wrong_whitening_is_found(bug: Any) -> None:
    """`whitening_error` finds a mean that is added back, padding that is counted, and whitening row by row."""
    assert whitening_error(bug) > 1e-2


@given(st.lists(st.lists(NUMBER, max_size=5), min_size=1, max_size=4), st.integers(1, 4))
def test_whitened_values_have_mean_0_and_variance_1(rows: list[list[float]], more: int) -> None:
    """Whitened values have mean 0 and variance 1, for any padding; equal values become 0."""
    values, mask = padded_tensors([(row,) for row in rows], NAN, 1, more)
    found = whiten(values, mask)
    numbers = [value for row in rows for value in row]
    assert not found[~mask].any()
    if not numbers or max(numbers) - min(numbers) <= 1e-6:
        # Equal values become exactly 0, in spite of rounding.
        assert not found.any()
        return
    assert float(found[mask].double().mean()) == pytest.approx(0, abs=1e-6)
    assert float(found[mask].double().square().mean()) == pytest.approx(1, abs=1e-5)
    other_values, other_mask = padded_tensors([(row,) for row in rows], 7.0, 1, more + 5)
    assert torch.equal(whiten(other_values, other_mask)[other_mask], found[mask])


def test_explained_variance_equals_numbers_by_hand() -> None:
    """1 - Var(returns - values) / Var(returns); NaN if the returns do not vary."""
    values, returns, mask = padded_tensors([([1.0, 1.0], [0.0, 2.0]), ([1.0], [4.0])], NAN)  # Var(returns) = 8/3
    assert explained_variance(values, returns, mask) == pytest.approx(0.0)
    assert math.isnan(explained_variance(returns, values, mask))
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(returns + 5, returns, mask) == 1.0
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3.0)


# --- rewards ----------------------------------------------------------------------------------------------------------


def reward_error(compute: Callable[..., Tensor]) -> float:
    """Returns the distance from the values by hand: kl_coef 1/2, log-ratios 1, -2, .5 with score 3, and .25 with score
    -1."""
    rows = [([-1.0, -3.0, -0.5], [-2.0, -1.0, -1.0]), ([-1.0], [-1.25]), ([], [])]
    old_logps, reference_logps, mask = padded_tensors(rows, NAN, 1, 2)
    found = compute(old_logps, reference_logps, mask, torch.tensor([3.0, -1.0, 9.0]), 0.5)
    expected = torch.tensor([-0.5, 1.0, 3.0 - 0.25, -1.0 - 0.125], dtype=torch.float64)
    return largest([float((found[mask] - expected).abs().max()), math.inf if found[~mask].any() else 0.0])


def test_token_rewards_equal_numbers_by_hand() -> None:
    """r_t = -kl_coef (log p_old - log ref), plus the score at the last token (arXiv:1909.08593, equation 2)."""
    assert reward_error(token_rewards) < 1e-12


def _score_at_the_pad_slot(
    old_logps: Tensor, reference_logps: Tensor, mask: Tensor, score: Tensor, kl_coef: float
) -> Tensor:
    rewards = -kl_coef * apply_mask(old_logps - reference_logps, mask)
    rewards[torch.arange(3), -1] += score
    return rewards


def _kl_added(old_logps: Tensor, reference_logps: Tensor, mask: Tensor, score: Tensor, kl_coef: float) -> Tensor:
    return token_rewards(old_logps, reference_logps, mask, score, -kl_coef)


def _score_at_every_token(
    old_logps: Tensor, reference_logps: Tensor, mask: Tensor, score: Tensor, kl_coef: float
) -> Tensor:
    return token_rewards(old_logps, reference_logps, mask, 0 * score, kl_coef) + score[:, None] * mask


@pytest.mark.parametrize("bug", [_score_at_the_pad_slot, _kl_added, _score_at_every_token])
def test_wrong_rewards_are_found(bug: Any) -> None:
    """`reward_error` finds a score in the padding or at every token, and a KL with the wrong sign."""
    assert reward_error(bug) > 1e-2


@pytest.mark.parametrize(
    ("kl", "gain", "expected"),
    [
        # 1 + 0.1 * 0.1, 1 - 0.1 * 0.1, the clip 1 + 0.2 * 0.1, and the clip 1 - 0.2 * 0.5.
        (0.11, 0.1, 0.05 * 1.01),
        (0.09, 0.1, 0.05 * 0.99),
        (9.0, 0.1, 0.05 * 1.02),
        (0.0, 0.5, 0.045),
    ],
)
def test_kl_coefficient_follows_its_target(kl: float, gain: float, expected: float) -> None:
    """kl_coef is multiplied by 1 + gain clip((KL - target) / target, -0.2, 0.2) (arXiv:1909.08593, equation 4)."""
    assert adapt_kl_coef(0.05, kl, 0.1, gain) == pytest.approx(expected)


def test_kl_coefficient_at_its_target_is_unchanged() -> None:
    """A KL that equals its target leaves the coefficient bit for bit."""
    assert adapt_kl_coef(0.05, 0.1, 0.1, 0.1) == 0.05


def test_k3_equals_numbers_by_hand() -> None:
    """k3 is e^d - d - 1 with d = log ref - log p: here d is ln 2 and 0."""
    logps, other_logps, mask = padded_tensors([([-1.0, -2.0], [-1.0 + math.log(2), -2.0])], NAN)
    k3 = kl_k3(logps, other_logps, mask)
    assert k3[mask].tolist() == pytest.approx([1 - math.log(2), 0.0])
    assert not k3[~mask].any()


# --- the losses -------------------------------------------------------------------------------------------------------

ORDERINGS = (
    # old value 0, clip 0.2: (new value, return) -> loss, slope. A value outside the clip that moves away from the
    # return has no slope.
    ("old < new < return", 1.0, 2.0, 1.8**2 / 2, 0.0),
    ("old < return < new", 1.0, 0.5, 0.5**2 / 2, 0.5),
    ("return < old < new", 1.0, -1.0, 2.0**2 / 2, 2.0),
    ("new < old < return", -1.0, 1.0, 2.0**2 / 2, -2.0),
    ("new < return < old", -1.0, -0.5, 0.5**2 / 2, -0.5),
    ("return < new < old", -1.0, -2.0, 1.8**2 / 2, 0.0),
)


def value_loss_error(compute: Callable[..., tuple[Tensor, Tensor]]) -> float:
    """Returns the largest distance of loss, slope and clip from `ORDERINGS`; infinite if a masked slot has a slope."""
    errors = []
    for _, new, target, loss, slope in ORDERINGS:
        values = torch.tensor([[new, NAN]], dtype=torch.float64, requires_grad=True)
        old_values = torch.tensor([[0.0, NAN]], dtype=torch.float64)
        mask = torch.tensor([[True, False]])
        per_token, is_clipped = compute(values, old_values, torch.full_like(old_values, target), mask, 0.2)
        (gradient,) = torch.autograd.grad(per_token.sum(), values)
        errors.append(abs(float(per_token[0, 0].detach()) - loss))
        errors.append(abs(float(gradient[0, 0]) - slope))
        errors.append(float(bool(is_clipped[0, 0]) != (slope == 0.0)))
        errors.append(math.inf if gradient[0, 1] else 0.0)
    return largest(errors)


def test_value_loss_equals_numbers_by_hand() -> None:
    """max((v - G)^2, (clip(v) - G)^2) / 2 and its slope, for the six orderings of old value, new value and return."""
    assert value_loss_error(value_loss) < 1e-12


def _smaller_of_both(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    values, old_values, returns = (apply_mask(tensor, mask) for tensor in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    loss, clipped_loss = (values - returns).square() / 2, (clipped - returns).square() / 2
    return torch.minimum(loss, clipped_loss), (clipped_loss < loss) & mask


def _clipped_around_the_return(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    return value_loss(values, returns, returns, mask, clip)


def _clipped_alone(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    values, old_values, returns = (apply_mask(tensor, mask) for tensor in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return (clipped - returns).square() / 2, (values - old_values).abs() > clip


def _not_halved(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    loss, is_clipped = value_loss(values, old_values, returns, mask, clip)
    return 2 * loss, is_clipped


@pytest.mark.parametrize("bug", [_smaller_of_both, _clipped_around_the_return, _clipped_alone, _not_halved])
def test_wrong_value_clip_is_found(bug: Any) -> None:
    """`value_loss_error` finds the minimum for the maximum, a clip around the return, a clip alone, and a lost 1/2."""
    assert value_loss_error(bug) > 1e-2


def random_rows(seed: int, lengths: Sequence[int] = (5, 2, 9, 1, 4, 0)) -> list[PPORow]:
    """Returns ratios on both sides of the clip, advantages of both signs, values in all orderings."""
    stream = np.random.default_rng(seed)
    rows = []
    for n in lengths:
        logps, values = -stream.exponential(2.0, n), stream.normal(0, 1, n)
        rows.append(
            PPORow(
                logps=logps,
                old_logps=logps + stream.normal(0, 0.3, n),
                advantages=stream.normal(0, 1, n),
                values=values,
                old_values=values + stream.normal(0, 0.4, n),
                returns=stream.normal(0, 1, n),
            )
        )
    return rows


def formula_error(dtype: torch.dtype, filler: float = 0.0, seed: int = 0, cliprange_value: float = 0.2) -> float:
    """Returns the largest distance of both losses and their slopes from `ppo_step`; infinite if a masked slot has a
    slope."""
    rows = random_rows(seed)
    columns = [(row.logps, row.old_logps, row.advantages, row.values, row.old_values, row.returns) for row in rows]
    logps, old_logps, advantages, values, old_values, returns, mask = padded_tensors(columns, filler, dtype=dtype)
    logps.requires_grad_()
    values.requires_grad_()
    weights = token_mean_weights(mask).to(dtype)
    log_ratio = apply_mask(logps - old_logps, mask)
    policy_losses, _ = ppo_module.clipped_policy_loss(log_ratio, apply_mask(advantages, mask), mask, 0.2, 0.2)
    value_losses, _ = value_loss(values, old_values, returns, mask, cliprange_value)
    policy_loss, mean_value_loss = (policy_losses * weights).sum(), (value_losses * weights).sum()
    slopes = torch.autograd.grad(policy_loss + mean_value_loss, (logps, values))
    step = ppo_step(rows, 0.2, cliprange_value, float(weights.max()))
    errors = [
        abs(float(policy_loss.detach()) - step.policy_loss) / abs(step.policy_loss),
        abs(float(mean_value_loss.detach()) - step.value_loss) / step.value_loss,
    ]
    for found, expected in zip(slopes, (step.policy_slopes, step.value_slopes), strict=True):
        wanted = torch.tensor(expected, dtype=torch.float64)
        errors.append(float((found[mask].double() - wanted).abs().max() / wanted.abs().max()))
        errors.append(math.inf if found[~mask].any() or found.isnan().any() else 0.0)
    return largest(errors)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str)
@pytest.mark.parametrize("cliprange_value", [0.2, 0.0])
@pytest.mark.parametrize("seed", range(8))
def test_losses_and_gradients_equal_oracle(
    seed: int, cliprange_value: float, dtype: torch.dtype, tolerance: float
) -> None:
    """Both losses and their gradients are those of `ppo_step` (arXiv:1707.06347, equation 7, and the clipped value
    loss)."""
    assert formula_error(dtype, seed=seed, cliprange_value=cliprange_value) < tolerance


@pytest.mark.parametrize("filler", [NAN, math.inf, -math.inf, 1e38])
def test_values_of_masked_slots_change_no_loss(filler: float) -> None:
    """NaN, infinity or 1e38 outside the mask change neither a loss nor a gradient."""
    assert formula_error(torch.float32, filler) < 2e-6


@given(
    st.lists(st.tuples(*[st.floats(-2, 2, width=32)] * 3), min_size=1, max_size=6), st.floats(0.015625, 0.5, width=32)
)
def test_value_loss_equals_oracle(triples: list[tuple[float, float, float]], clip: float) -> None:
    """The clipped value loss is that of `oracles.clipped_value_loss` for any values and any clip."""
    values, old_values, returns, mask = padded_tensors([tuple(zip(*triples, strict=True))], NAN)
    found, _ = value_loss(values, old_values, returns, mask, clip)
    expected = [oracles.clipped_value_loss(*triple, clip)[0] for triple in triples]
    assert np.allclose(found[mask].numpy(), expected, rtol=1e-9, atol=1e-12)


def _without_clip(log_ratio: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float) -> Any:
    return clipped_policy_loss(log_ratio, advantages, mask, 1e6, 1e6)


def _larger_of_both(log_ratio: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float) -> Any:
    loss, is_clipped = clipped_policy_loss(log_ratio, -advantages, mask, low, high)
    return -loss, is_clipped


def _inverse_ratio(log_ratio: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float) -> Any:
    return clipped_policy_loss(-log_ratio, advantages, mask, low, high)


@pytest.mark.parametrize("bug", [_without_clip, _larger_of_both, _inverse_ratio])
def test_wrong_policy_loss_is_found(monkeypatch: pytest.MonkeyPatch, bug: Any) -> None:
    """`formula_error` finds a loss without clip, the maximum for the minimum, and the inverse ratio."""
    monkeypatch.setattr(ppo_module, "clipped_policy_loss", bug)
    assert max(formula_error(torch.float64, seed=seed) for seed in range(3)) > 1e-3


def test_clipped_tokens_are_counted() -> None:
    """A token counts as clipped if the clip stops its gradient: a ratio above 1.2 with A > 0, or below 0.8 with A <
    0."""
    log_ratio = torch.tensor([[0.5, 0.9, 1.1, 1.5, 9.0]] * 2).log()
    mask = torch.tensor([[True, True, True, True, False]] * 2)
    advantages = torch.tensor([[1.0] * 5, [-1.0] * 5])
    _, is_clipped = clipped_policy_loss(log_ratio, advantages, mask, 0.2, 0.2)
    assert is_clipped.tolist() == [[False, False, False, True, False], [True, False, False, False, False]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropy_and_its_gradient_equal_float64(temperature: float) -> None:
    """The chunked entropy of a head with scale, soft cap and bias, and its gradient, are those of float64 and
    autograd."""
    stream = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(7, 8, generator=stream), torch.randn(11, 8, generator=stream)
    head = Head(weight, torch.randn(11, generator=stream), 0.5, 3.0)
    mine = hidden.clone().requires_grad_()
    (chunked_entropy(head, mine, temperature) * torch.arange(7)).sum().backward()
    plain = hidden.double().requires_grad_()
    z = 3.0 * torch.tanh((plain @ weight.double().T + head.bias.double()) * 0.5 / 3.0) / temperature  # type: ignore[union-attr]
    p = torch.log_softmax(z, dim=1)
    entropy = -(p.exp() * p).sum(dim=1)
    (entropy * torch.arange(7)).sum().backward()
    assert plain.grad is not None and mine.grad is not None and relative_error(mine.grad, plain.grad) < 1e-5
    assert relative_error(chunked_entropy(head, hidden, temperature), entropy.detach()) < 1e-6


# --- through a model --------------------------------------------------------------------------------------------------

SEPARATE = {"policy": ["sft", "policy"], "reference": ["sft"], "value": ["sft", "value"]}
SHARED = {**SEPARATE, "value": ["sft", "policy"]}
CRITICS = ("separate", "shared")


def make_roles(critic: str, **more: Any) -> Roles:
    """Returns fp32 roles over a frozen SFT adapter. The value is an adapter of its own (`separate`), or a head on the
    layers of the policy (`shared`). All have random weights."""
    extra, stacks = (["value"], SEPARATE) if critic == "separate" else ([], SHARED)
    roles = llama_roles(
        16, lower=["sft"], extra=extra, trainable=["policy", "value"], stacks=stacks, heads=["value"], **more
    )
    perturb(roles, "sft", size=0.05)
    perturb(roles, "policy", size=0.05, seed=2)
    perturb(roles, "value", size=0.05, seed=3)
    with torch.no_grad():
        roles.heads["value"].weight.mul_(0.1)
    return roles


@pytest.fixture(scope="module")
def roles_of() -> Callable[[str], Roles]:
    """Returns the roles of a critic."""
    roles = {critic: make_roles(critic) for critic in CRITICS}
    return roles.__getitem__


@pytest.fixture(scope="module")
def roles(roles_of: Callable[[str], Roles]) -> Roles:
    return roles_of("separate")


REWARDS = [[[1.0, 0.0, 0.5], [0.2, 0.9, 0.4]]]
TRUNCATED = (1, 5)


def ppo_over(roles: Roles, fake: dict[str, Any] | None = None, algorithm: type[PPO] = PPO, **settings: Any) -> PPO:
    """Returns PPO of a continued policy over given completions; `fake` are arguments of their collector."""
    if "value" not in roles.stacks or roles.stacks["value"] == roles.stacks["policy"]:
        settings["critic"] = "shared"
    config = PPOConfig(**{"num_ppo_epochs": 1, **settings})
    collector = FakeCollector(roles, REWARDS, **{"cut": TRUNCATED, **(fake or {})})
    return algorithm(AlgorithmContext(roles, fresh=False), config, collector)


def collect_moved(algorithm: PPO) -> RolloutBatch:
    """Returns rollouts whose old log-probs and values differ from the current ones, as in a later pass."""
    batch = algorithm.collect(0).batch
    stream = torch.Generator().manual_seed(0)
    batch.old_logps = batch.old_logps + token_noise(batch, stream)
    batch.values = batch.values + token_noise(batch, stream)
    return batch


def token_noise(batch: Batch, stream: torch.Generator) -> Tensor:
    """Returns noise that is the same for each token, independent of padding."""
    noise = torch.zeros(batch.input_ids.shape)
    noise[batch.loss_mask] = 0.3 * torch.randn(int(batch.loss_mask.sum()), generator=stream)
    return noise


@dataclass
class Pass:
    """Losses and gradients of policy and value, and the metrics, of one pass."""

    losses: list[float]
    gradients: list[Tensor]
    stats: dict[str, float]


def one_pass(algorithm: PPO, batch: Batch, joint: bool = False, **split: int | None) -> Pass:
    """Runs one pass over the rollouts; with `joint`, one backward pass for both losses of a micro-batch."""
    roles = algorithm.context.roles
    zero_grad(roles)
    roles.base.model.train()
    batch.token_weights = algorithm.token_weights(batch)
    losses = [0.0, 0.0]
    stats: dict[str, Any] = {}
    for micro in batch.split(**split or {"rows": 4}):
        graphs = []
        for which, term in enumerate(algorithm.compute_losses(micro)):
            losses[which] += float(term.loss.detach().double())
            add_stats(stats, term.stats)
            graphs.append(term.loss)
            if not joint:
                term.loss.backward()
        if joint:
            torch.stack(graphs).sum().backward()
    return Pass(losses, [gradients(roles, role) for role in ("policy", "value")], to_floats(stats))


def assert_same_pass(found: Pass, expected: Pass, rel: float = 1e-5) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=1e-5, abs=1e-7)
    assert found.stats == pytest.approx(expected.stats, rel=1e-4, abs=1e-6)
    for mine, theirs in zip(found.gradients, expected.gradients, strict=True):
        assert relative_error(mine, theirs) < rel


@dataclass
class PlainCompletion:
    """A completion by the plain models: log-probs, values and entropy with their graphs, and the advantages."""

    logps: Tensor
    values: Tensor
    entropy: Tensor
    advantages: list[float]

    @property
    def returns(self) -> list[float]:
        return [value + advantage for value, advantage in zip(self.values.tolist(), self.advantages, strict=True)]


def plain_completion(
    policy: PlainModel,
    value: PlainModel,
    ids: Tensor,
    positions: Tensor,
    score: float,
    is_truncated: bool,
    temperature: float,
    settings: PPOConfig,
) -> PlainCompletion:
    """Returns one completion by the plain models, from the definitions of rewards, values and GAE."""
    distribution = policy.log_softmax(ids.tolist(), temperature=temperature)[positions - 1]
    reference = policy.log_softmax(ids.tolist(), policy=False, temperature=temperature)[positions - 1]
    tokens = ids[positions][:, None]
    logps, reference_logps = (each.gather(1, tokens)[:, 0] for each in (distribution, reference))
    states = value.run(ids.tolist()).hidden_states[-1][0] @ value.trained["base_model.model.score.weight"][0]
    values = states[positions - 1]
    bootstrap = 0.0
    if is_truncated and settings.truncated_completions == "bootstrap":
        score, bootstrap = 0.0, float(states[-1].detach())
    elif is_truncated and settings.truncated_completions == "penalize":
        score -= settings.missing_eos_penalty
    rewards = (-settings.kl_coef * (logps - reference_logps)).tolist()
    rewards[-1] += score
    advantages = oracles.gae(rewards, values.tolist(), bootstrap, settings.gamma, settings.lam)
    return PlainCompletion(logps, values, -(distribution.exp() * distribution).sum(), advantages)


def step_error(roles: Roles, temperature: float = 0.7, **settings: Any) -> float:
    """Returns the largest distance of the returns, both losses, and the gradients of both adapters from the model of
    transformers in float64."""
    algorithm = ppo_over(roles, {"temperature": temperature}, kl_coef=0.3, **settings)
    batch = algorithm.collect(0).batch
    policy = PlainModel([roles.adapter_tensors("sft")], roles.adapter_tensors("policy"))
    value = PlainModel([roles.adapter_tensors("sft")], roles.adapter_tensors("value"))
    scores = [reward for group in REWARDS[0] for reward in group]
    positions = [mask.nonzero().squeeze(1) for mask in batch.completion_mask]
    completions = [
        plain_completion(
            policy,
            value,
            batch.input_ids[i][batch.attention_mask[i]],
            positions[i],
            scores[i],
            i in TRUNCATED,
            temperature,
            algorithm.settings,
        )
        for i in range(len(batch))
    ]
    batch.old_logps = batch.old_logps + token_noise(batch, torch.Generator().manual_seed(0))
    batch.values = batch.values + token_noise(batch, torch.Generator().manual_seed(1))
    losses = one_pass(algorithm, batch).losses
    policy_gradient, value_gradient = by_key(roles, "policy"), by_key(roles, "value")

    advantages = np.concatenate([completion.advantages for completion in completions])
    rows = [
        PPORow(
            logps=completion.logps.tolist(),
            old_logps=batch.old_logps[i][positions[i]].tolist(),
            advantages=(np.array(completion.advantages) - advantages.mean()) / advantages.std(),
            values=completion.values.tolist(),
            old_values=batch.values[i][positions[i]].tolist(),
            returns=completion.returns,
        )
        for i, completion in enumerate(completions)
    ]
    num_tokens = len(advantages)
    step = ppo_step(rows, algorithm.settings.cliprange, algorithm.settings.cliprange_value, 1 / num_tokens)
    entropy = torch.stack([completion.entropy for completion in completions]).sum()
    entropy_loss = -algorithm.settings.entropy / num_tokens * entropy
    logps = torch.cat([completion.logps for completion in completions])
    values = torch.cat([completion.values for completion in completions])
    (logps @ torch.tensor(step.policy_slopes, dtype=torch.float64) + entropy_loss).backward()
    (values @ torch.tensor(step.value_slopes, dtype=torch.float64)).backward()
    policy_loss = step.policy_loss + float(entropy_loss.detach())
    returns = torch.tensor(np.concatenate([completion.returns for completion in completions]))
    return max(
        error_against(policy_gradient, policy.gradient()),
        error_against(value_gradient, value.gradient()),
        abs(losses[0] - policy_loss) / abs(policy_loss),
        abs(losses[1] - step.value_loss) / step.value_loss,
        relative_error(batch.returns[batch.completion_mask], returns),
    )


STEP_SETTINGS = {"gamma": 0.9, "lam": 0.8, "missing_eos_penalty": 0.7}


@pytest.mark.parametrize(("truncated", "entropy"), [("penalize", 0.0), ("bootstrap", 0.0), ("keep", 0.2)])
def test_step_equals_plain_model(roles: Roles, truncated: str, entropy: float) -> None:
    """Returns, both losses and both gradients of a step are those of the model of transformers in float64."""
    assert step_error(roles, truncated_completions=truncated, entropy=entropy, **STEP_SETTINGS) < 2e-5


@pytest.mark.parametrize(
    ("name", "bug"),
    [
        # The value after a token instead of the value before it.
        ("shift_right", lambda states: states),
        # The tokens of prompts count among the returns.
        ("apply_mask", lambda values, mask: values),
        ("whiten", lambda values, mask: values),
    ],
)
def test_wrong_step_is_found(roles: Roles, monkeypatch: pytest.MonkeyPatch, name: str, bug: Any) -> None:
    """`step_error` finds values of the wrong place, returns of prompts, and advantages that are not whitened."""
    monkeypatch.setattr(ppo_module, name, bug)
    assert step_error(roles, truncated_completions="bootstrap", **STEP_SETTINGS) > 1e-3


def test_entropy_without_gradient_is_found(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    """`step_error` finds an entropy bonus without a gradient."""
    assert step_error(roles, entropy=0.2) < 2e-5
    monkeypatch.setattr("lowrank_tune.model.roles.chunked_entropy", lambda *given: chunked_entropy(*given).detach())
    assert step_error(roles, entropy=0.2) > 1e-3


def test_wrong_temperature_of_policy_is_found(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    """`step_error` finds log-probs of the policy at temperature 1 instead of the temperature of the sampler."""
    logps = Roles.logps
    monkeypatch.setattr(
        Roles, "logps", lambda self, role, batch, temperature=1.0, **more: logps(self, role, batch, **more)
    )
    assert step_error(roles, truncated_completions="bootstrap", **STEP_SETTINGS) > 1e-3


@pytest.mark.parametrize("critic", CRITICS)
def test_micro_batches_give_gradient_of_one_joint_backward(critic: str, roles_of: Callable[[str], Roles]) -> None:
    """Two backward passes a micro-batch give the gradient of one joint pass over the whole batch, for any split."""
    vf_coef = 0.3 if critic == "shared" else 1.0
    algorithm = ppo_over(roles_of(critic), vf_coef=0.3, entropy=0.05)
    batch = collect_moved(algorithm)
    expected = one_pass(algorithm, batch, joint=True, rows=99)
    assert all(gradient.any() and gradient.isfinite().all() for gradient in expected.gradients)
    for split in ({"rows": 1}, {"rows": 4}, {"tokens": 30}, {"rows": 99}):
        assert_same_pass(one_pass(algorithm, batch, **split), expected)
    total = expected.stats["loss"] + vf_coef * expected.stats["value_loss"]
    assert total == pytest.approx(sum(expected.losses), rel=1e-5)


def test_mean_of_micro_batch_means_is_found(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of splits finds weights that count the tokens of the micro-batch."""
    algorithm = ppo_over(roles)
    batch = collect_moved(algorithm)
    expected = one_pass(algorithm, batch, rows=99)
    select_rows = Batch.select_rows

    def select_and_weigh(self: Batch, *given: Any) -> Batch:
        micro = select_rows(self, *given)
        micro.token_weights = token_mean_weights(micro.loss_mask) / 2
        return micro

    monkeypatch.setattr(Batch, "select_rows", select_and_weigh)
    found = one_pass(algorithm, batch, rows=3)
    for mine, theirs in zip(found.gradients, expected.gradients, strict=True):
        assert relative_error(mine, theirs) > 1e-2


@pytest.mark.parametrize("critic", CRITICS)
def test_checkpointing_changes_no_gradient(critic: str) -> None:
    """Gradient checkpointing runs each layer twice and gives the same losses and gradients."""
    passes, counts = [], []
    for checkpointing in (False, True):
        roles = make_roles(critic, checkpointing=checkpointing)
        algorithm = ppo_over(roles)
        batch = collect_moved(algorithm)
        with count_forwards(roles) as count:
            passes.append(one_pass(algorithm, batch))
        counts.append(count[0])
    assert counts[1] == 2 * counts[0], "nothing was recomputed"
    assert_same_pass(passes[1], passes[0], rel=1e-6)


@pytest.mark.parametrize("critic", CRITICS)
def test_padding_changes_no_gradient(critic: str, roles_of: Callable[[str], Roles]) -> None:
    """Losses, gradients and metrics do not depend on width and ids of padding."""
    passes = []
    for padding in ({}, {"more": 5}, {"filler": 31}, {"more": 3, "filler": 1}):
        algorithm = ppo_over(roles_of(critic), padding, truncated_completions="bootstrap")
        passes.append(one_pass(algorithm, collect_moved(algorithm)))
    for found in passes[1:]:
        assert_same_pass(found, passes[0])


class _TwoGraphs(PPO):
    """Makes both graphs before the first backward pass."""

    def compute_losses(self, micro: RolloutBatch) -> Any:
        yield from list(super().compute_losses(micro))


def max_graphs(algorithm: PPO, monkeypatch: pytest.MonkeyPatch) -> int:
    """Returns the largest number of decoder graphs at one time: after their forward, before their backward pass."""
    num_graphs, most, real_hidden = 0, 0, Roles.hidden

    def hidden(self: Roles, role: str, batch: Batch) -> Tensor:
        nonlocal num_graphs, most
        found = real_hidden(self, role, batch)
        if found.requires_grad:
            num_graphs, most = num_graphs + 1, max(most, num_graphs + 1)
            found.register_hook(freed)
        return found

    def freed(gradient: Tensor) -> None:
        nonlocal num_graphs
        num_graphs -= 1

    batch = collect_moved(algorithm)
    with monkeypatch.context() as patch:
        patch.setattr(Roles, "hidden", hidden)
        one_pass(algorithm, batch)
    return most


@pytest.mark.parametrize("critic", CRITICS)
def test_one_graph_exists_at_a_time(
    critic: str, roles_of: Callable[[str], Roles], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph of the policy is freed before that of the value is computed."""
    assert max_graphs(ppo_over(roles_of(critic)), monkeypatch) == 1


@pytest.mark.parametrize("critic", CRITICS)
def test_second_graph_is_found(critic: str, roles_of: Callable[[str], Roles], monkeypatch: pytest.MonkeyPatch) -> None:
    """`max_graphs` finds losses that are both computed before the first backward pass."""
    assert max_graphs(ppo_over(roles_of(critic), algorithm=_TwoGraphs), monkeypatch) == 2


def test_separate_adapters_have_their_own_losses(roles: Roles) -> None:
    """The policy loss has a gradient only for the policy, the value loss only for the value, neither for the frozen
    adapter."""
    algorithm = ppo_over(roles)
    batch = collect_moved(algorithm)
    for which, mine, other in ((0, "policy", "value"), (1, "value", "policy")):
        zero_grad(roles)
        batch.token_weights = algorithm.token_weights(batch)
        list(algorithm.compute_losses(batch))[which].loss.backward()
        assert all(parameter.grad is None for parameter in roles.parameters(other))
        assert gradients(roles, mine).isfinite().all()
    assert not any(p.requires_grad for name, p in roles.base.model.named_parameters() if "lt_sft" in name)


# --- properties of a step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("critic", CRITICS)
def test_first_pass_has_ratio_one(critic: str, roles_of: Callable[[str], Roles]) -> None:
    """In the first pass the policy is the old policy: no token is clipped, `approx_kl` and the loss are 0."""
    algorithm = ppo_over(roles_of(critic))
    step_batch = algorithm.collect(0)
    stats = one_pass(algorithm, step_batch.batch).stats
    assert stats["clip_ratio"] == 0.0
    assert stats["value_clip_ratio"] == 0.0
    assert stats["approx_kl"] < 1e-10
    # The mean of whitened advantages is 0.
    assert stats["loss"] == pytest.approx(0.0, abs=1e-6)


def test_metrics_of_rollouts_by_hand(roles: Roles) -> None:
    """The rewards sum to 3 over 6 completions; `scores` have the penalty 1 of the two truncated ones."""
    metrics = to_floats(ppo_over(roles).collect(0).stats)
    assert metrics["reward"] == pytest.approx(3.0 / 6)
    assert metrics["scores"] == pytest.approx((3.0 - 2) / 6)
    assert metrics["kl_coef"] == 0.05
    assert metrics["kl"] > 0
    assert metrics["sampling/sampling_logp_difference/mean"] < 1e-6


def test_logged_advantages_are_means_of_completions(roles: Roles) -> None:
    """The log of a group contains the mean advantage of each completion."""
    algorithm = ppo_over(roles)
    step_batch = algorithm.collect(0)
    logged_advantages = algorithm.collector.logged[0][2]  # type: ignore[attr-defined]
    token_advantages = step_batch.batch.token_advantages
    mean_of_row_3 = float(token_advantages[3][step_batch.batch.completion_mask[3]].mean())
    assert logged_advantages.shape == (2, 3)
    assert float(logged_advantages[1, 0]) == pytest.approx(mean_of_row_3, abs=1e-6)


def test_fresh_policy_has_kl_0_and_passes_check() -> None:
    """A fresh policy equals its reference: KL 0, and the check passes. Another policy fails the check."""
    roles = llama_roles(
        4, lower=["sft"], extra=["value"], trainable=["policy", "value"], stacks=SEPARATE, heads=["value"]
    )
    perturb(roles, "sft")
    algorithm = PPO(AlgorithmContext(roles), PPOConfig(), FakeCollector(roles, REWARDS))
    step_batch = algorithm.collect(0)
    algorithm.check(step_batch.batch, 0)
    metrics = to_floats(step_batch.stats)
    assert metrics["kl"] == 0.0
    # A fresh head is zero.
    assert metrics["value"] == 0.0
    perturb(roles, "policy", size=0.02)
    with pytest.raises(TrainingError, match="the reference is not what it must be"):
        algorithm.check(step_batch.batch, 0)
    assert to_floats(algorithm.collect(0).stats)["kl"] > 1e-6


def test_sampler_mismatch_stops_run(roles: Roles) -> None:
    """Log-probs of the sampler that are off by more than `ppo.max_logprob_mismatch` raise TrainingError."""
    with pytest.raises(TrainingError, match=r"ppo\.max_logprob_mismatch"):
        ppo_over(roles, {"drift": 0.5}).collect(0)
    tolerant = ppo_over(roles, {"drift": 0.5}, max_logprob_mismatch=5.0)
    assert to_floats(tolerant.collect(0).stats)["sampling/sampling_logp_difference/mean"] > 0.1


def test_real_sampler_agrees_with_policy(roles: Roles) -> None:
    """The engine and the training forward pass give the same log-probs."""
    algorithm = PPO(AlgorithmContext(roles, fresh=False), PPOConfig(), real_collector(roles))
    assert to_floats(algorithm.collect(0).stats)["sampling/sampling_logp_difference/mean"] < 1e-5


def test_shift_right_equals_numbers_by_hand() -> None:
    """Each row moves one column to the right, and its first entry is 0."""
    shifted = shift_right(torch.arange(6.0).view(2, 3))
    assert shifted.tolist() == [[0.0, 0.0, 1.0], [0.0, 3.0, 4.0]]


@pytest.mark.parametrize(("kl_target", "factor"), [(None, 1.0), (1e-9, 1.1), (1e9, 0.9)])
def test_kl_coefficient_changes_after_its_step(roles: Roles, kl_target: float | None, factor: float) -> None:
    """A step has the coefficient of before, the next one the adapted one, which `state` and `restore` keep."""
    settings = {"kl_coef": 0.05, "kl_target": kl_target, "kl_gain": 0.5}
    algorithm = ppo_over(roles, **settings)
    assert to_floats(algorithm.collect(0).stats)["kl_coef"] == 0.05
    assert algorithm.kl_coef == pytest.approx(0.05 * factor)
    restored = ppo_over(roles, **settings)
    restored.restore(algorithm.state())
    assert restored.kl_coef == algorithm.kl_coef and restored.state() == algorithm.state()
    assert to_floats(restored.collect(0).stats)["kl_coef"] == algorithm.kl_coef


def test_each_pass_has_every_row_once(roles: Roles) -> None:
    """Three passes of four minibatches: each pass has each row once, in an order that depends on pass and seed."""
    batch = ppo_over(roles).collect(0).batch
    # The number of each row.
    batch.sequence_advantages = torch.arange(6)

    def rows_of(seed: int) -> list[list[int]]:
        minibatches = PPOBatch(batch, {}, 3, 4, seed=seed).minibatches()
        return [minibatch.sequence_advantages.tolist() for minibatch in minibatches]

    rows = rows_of(seed=5)
    passes = [rows[0:4], rows[4:8], rows[8:12]]
    assert len(rows) == 12 and all(rows)
    assert [sorted(itertools.chain(*minibatches)) for minibatches in passes] == [list(range(6))] * 3
    assert passes[0] != passes[1], "each pass has other minibatches"
    assert rows_of(seed=5) == rows
    assert rows_of(seed=6) != rows


def test_one_minibatch_is_the_batch_itself(roles: Roles) -> None:
    """With one minibatch a pass, each pass yields the batch itself."""
    batch = ppo_over(roles).collect(0).batch
    assert [minibatch is batch for minibatch in PPOBatch(batch, {}, 2).minibatches()] == [True, True]


def test_more_minibatches_than_rows_give_none_that_is_empty(roles: Roles) -> None:
    """99 minibatches of 6 rows are 6 minibatches."""
    batch = ppo_over(roles).collect(0).batch
    assert sum(1 for _ in PPOBatch(batch, {}, 1, 99).minibatches()) == 6


def test_approx_kl_equals_numbers_by_hand(roles: Roles) -> None:
    """`approx_kl` is KL(old || new), the mean of e^d - d - 1 with d = log p - log p_old. Here d is 1 in the first row
    and -2 in all others."""
    algorithm = ppo_over(roles)
    # Its old log-probs are those of the current policy.
    batch = algorithm.collect(0).batch
    shift = torch.full((len(batch), 1), 2.0)
    shift[0] = -1.0
    batch.old_logps = batch.old_logps + shift
    batch.token_weights = algorithm.token_weights(batch)
    first, others = int(batch.loss_mask[0].sum()), int(batch.loss_mask[1:].sum())
    expected = (first * (math.e - 2) + others * (math.exp(-2) + 1)) / (first + others)
    assert policy_stats(algorithm, batch)["approx_kl"].value == pytest.approx(expected, rel=1e-4)


def policy_stats(algorithm: PPO, batch: RolloutBatch) -> dict[str, Any]:
    batch.token_weights = algorithm.token_weights(batch)
    return next(algorithm.compute_losses(batch)).stats


def test_passes_end_above_target_kl(roles: Roles) -> None:
    """A pass whose `approx_kl` is above `target_kl` is the last one."""
    algorithm = ppo_over(roles)
    stats = policy_stats(algorithm, collect_moved(algorithm))
    assert stats["approx_kl"].value > 1e-3
    assert algorithm.should_continue(stats) and ppo_over(roles, target_kl=1.0).should_continue(stats)
    assert not ppo_over(roles, target_kl=1e-3).should_continue(stats)


def fail_rewards(algorithm: PPO, rows: Sequence[int], failure: RewardFailure) -> None:
    """Makes the rewards of these rows fail in every draw."""
    real_collect = algorithm.collector.collect

    def collect(step: int, draw: int, count: int | None = None) -> RolloutGroups:
        groups = real_collect(step, draw, count)
        for row in rows:
            groups.failed_rewards[row] = failure
            groups.reward_components[row] = NAN
            groups.rewards.flatten()[row] = NAN
        return groups

    algorithm.collector.collect = collect  # type: ignore[method-assign]


def test_failed_rewards_leave_the_step_of_the_others(roles: Roles) -> None:
    """A completion whose reward failed is removed; the others keep their returns, and a warning contains the reward."""
    algorithm = ppo_over(roles, {"cut": ()})
    fail_rewards(algorithm, [4], RewardFailure("answer", "error", "broke"))
    step_batch = algorithm.collect(0)
    batch = step_batch.batch
    whole = ppo_over(roles, {"cut": ()}).collect(0).batch
    assert len(batch) == 5 and all(map(math.isfinite, to_floats(step_batch.stats).values()))
    assert all(tensor.isfinite().all() for tensor in batch.tensors().values())
    for i, row in enumerate((0, 1, 2, 3, 5)):
        assert torch.equal(batch.input_ids[i][batch.attention_mask[i]], whole.input_ids[row][whole.attention_mask[row]])
        mine, theirs = batch.returns[i][batch.completion_mask[i]], whole.returns[row][whole.completion_mask[row]]
        assert relative_error(mine, theirs) < 1e-5
    assert float(algorithm.collector.logged[0][2][1, 1]) == 0.0  # type: ignore[attr-defined]
    assert "`answer`" in next(algorithm.diagnostics({"completions/clipped_ratio": 0.0}))


def test_step_without_rewards_has_no_gradient(roles: Roles) -> None:
    """If every reward fails, both losses and all gradients are 0."""
    algorithm = ppo_over(roles)
    fail_rewards(algorithm, range(6), RewardFailure("answer", "timeout", "slow"))
    found = one_pass(algorithm, algorithm.collect(0).batch)
    assert found.losses == [0.0, 0.0] and not any(gradient.any() for gradient in found.gradients)


def test_completions_without_end_give_warning(roles: Roles) -> None:
    """90 % of completions without an end give a warning that contains `rollout.max_new_tokens`."""
    assert list(ppo_over(roles).diagnostics({"completions/clipped_ratio": 0.8})) == []
    (warning,) = ppo_over(roles).diagnostics({"completions/clipped_ratio": 0.9})
    assert "most completions have no end, 90%" in warning and "rollout.max_new_tokens" in warning


# --- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("critic", CRITICS)
def test_saved_value_is_restored_bit_for_bit(critic: str) -> None:
    """The value's adapter and head are saved and loaded bit for bit, and the policy has no head."""
    one, other = make_roles(critic), make_roles(critic, seed=4)
    batch = ppo_over(one).collect(0).batch
    tensors = one.adapter_tensors("value")
    assert (len(tensors) == 1) == (critic == "shared")
    assert one.adapter_config("value")["modules_to_save"] == ["score"]
    with torch.no_grad():
        for parameter in other.parameters("value"):
            parameter.normal_()
    with one.inference_mode(), other.inference_mode():
        assert not torch.equal(one.scores("value", batch), other.scores("value", batch))
        other.load_adapter_tensors("value", tensors, "here")
        assert torch.equal(one.scores("value", batch), other.scores("value", batch))
    names = set(one.named_parameters("value"))
    assert names.isdisjoint(one.named_parameters("policy")) and "score.lt_value.weight" in names
    # The policy has no head.
    assert "base_model.model.score.weight" not in one.adapter_tensors("policy")
