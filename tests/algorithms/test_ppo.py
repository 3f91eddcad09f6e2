"""Laws of PPO: advantages, whitening, rewards and both clipped losses by hand and in float64, with the bugs that others
had; two graphs that are one gradient, whatever the split and the padding; the coefficient of the KL; heads on the
policy's trunk."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import count_forwards, gradients, llama_roles, perturb, relative_error, zero_grad
from test_dpo import Plain, by_key, error_against
from test_grpo import FakeCollector, real_collector
from torch import Tensor

from lowrank_tune.algorithms import ppo as ppo_module
from lowrank_tune.algorithms.base import AlgorithmContext
from lowrank_tune.algorithms.ppo import (
    PPO,
    CriticConfig,
    GAEConfig,
    KLControlConfig,
    PPOBatch,
    UpdateConfig,
    adapt_kl_coef,
    kl_k3,
    shift_right,
    token_rewards,
)
from lowrank_tune.algorithms.reward_failures import RewardFailure
from lowrank_tune.batch import Batch
from lowrank_tune.errors import TrainingError
from lowrank_tune.functional import apply_mask, explained_variance, gae, token_mean_weights, whiten
from lowrank_tune.model.logprobs import Head, chunked_entropy
from lowrank_tune.model.roles import Roles
from lowrank_tune.stats import add_stats, to_floats

NAN = math.nan
Rows = Sequence[tuple[Any, ...]]


def padded_tensors(
    rows: Rows, filler: float = 0.0, gaps: int = 1, more: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """Each row's sequences as (B, T) tensors, with `gaps` slots before and between and `more` behind; the mask comes
    last."""
    width = max(len(row[0]) for row in rows) * (1 + gaps) + gaps + more
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    several = [torch.full((len(rows), width), filler, dtype=dtype) for _ in rows[0]]
    for i, row in enumerate(rows):
        places = [gaps + (1 + gaps) * t for t in range(len(row[0]))]
        mask[i, places] = True
        for into, values in zip(several, row, strict=True):
            into[i, places] = torch.tensor(np.asarray(values), dtype=dtype)
    return *several, mask


# --- advantages -------------------------------------------------------------------------------------------------------

ENDED = ([0.0, 0.0, 1.0], [0.5, 0.25, 0.5])
SHORT = ([1.0, 1.0], [0.5, 0.5])
BY_HAND = (
    # gamma 1, L 1/2. Ended: delta 3 = 1 - .5, delta 2 = .5 - .25, delta 1 = .25 - .5. Cut, worth 2 from there: delta 3
    # = 1 + 2 - .5.
    (1.0, 0.5, [[0.0, 0.5, 0.5], [0.5, 1.5, 2.5], [1.25, 0.5]]),
    # gamma 1/2, L 1: each is the discounted sum of what is earned, minus the value. Cut: 1/4 + 1/8 * 2 - .5 and so on.
    (0.5, 1.0, [[0.25 - 0.5, 0.5 - 0.25, 0.5], [0.25 + 0.25 - 0.5, 0.5 + 0.5 - 0.25, 1 + 1 - 0.5], [1.5 - 0.5, 0.5]]),
    # L 0: one step ahead alone.
    (1.0, 0.0, [[-0.25, 0.25, 0.5], [-0.25, 0.25, 2.5], [1.0, 0.5]]),
)
"""An ended row, one that was cut where 2 are still to come, and one that is short in the batch."""
AFTER = torch.tensor([0.0, 2.0, 0.0])


def hand_error(how: Callable[..., Tensor], filler: float = NAN) -> float:
    worst = 0.0
    for gamma, lam, expected in BY_HAND:
        for gaps, more in ((0, 0), (0, 3), (2, 1)):
            rewards, values, mask = padded_tensors([ENDED, ENDED, SHORT], filler, gaps, more)
            found = how(rewards, values, mask, AFTER, gamma, lam)
            flat = torch.tensor([a for row in expected for a in row])
            apart = float((found[mask] - flat).abs().max())
            worst = max(worst, apart if apart == apart and not found[~mask].any() else math.inf)
    return worst


def test_advantages_by_hand() -> None:
    assert hand_error(gae) < 1e-7


def _cut_is_an_end(rewards: Tensor, values: Tensor, mask: Tensor, after: Tensor, gamma: float, lam: float) -> Tensor:
    return gae(rewards, values, mask, torch.zeros_like(after), gamma, lam)


def _an_end_is_a_cut(rewards: Tensor, values: Tensor, mask: Tensor, after: Tensor, gamma: float, lam: float) -> Tensor:
    return gae(rewards, values, mask, torch.full_like(after, 2.0), gamma, lam)


def _by_padded_width(rewards: Tensor, values: Tensor, mask: Tensor, after: Tensor, gamma: float, lam: float) -> Tensor:
    """Whoever does not fill the batch has ended, and the value behind the last token is read from the slot after it."""
    rewards, values = rewards.nan_to_num(0), values.nan_to_num(0.3)
    everywhere = torch.ones_like(mask)
    return apply_mask(gae(rewards, values, everywhere, after * mask[:, -1], gamma, lam), mask)


def _masked_by_zero(rewards: Tensor, values: Tensor, mask: Tensor, after: Tensor, gamma: float, lam: float) -> Tensor:
    return gae(rewards * mask, values * mask, torch.ones_like(mask), after, gamma, lam) * mask


@pytest.mark.parametrize("bug", [_cut_is_an_end, _an_end_is_a_cut, _by_padded_width, _masked_by_zero])
def test_wrong_advantages_are_seen(bug: Any) -> None:
    assert hand_error(bug) > 1e-2


NUMBER = st.floats(-50, 50, width=32)
ROW = st.integers(0, 6).flatmap(lambda n: st.tuples(*[st.lists(NUMBER, min_size=n, max_size=n)] * 2, NUMBER))
SHARE = st.floats(0, 1, width=32)


def sums(rewards: Sequence[float], values: Sequence[float], after: float, gamma: float, lam: float) -> list[float]:
    """The definition: sum over l of (gamma L)^l delta_(t+l)."""
    ahead = [*values[1:], after][: len(values)]
    deltas = [r + gamma * v1 - v0 for r, v0, v1 in zip(rewards, values, ahead, strict=True)]
    return [sum((gamma * lam) ** i * delta for i, delta in enumerate(deltas[t:])) for t in range(len(values))]


@given(
    st.lists(ROW, min_size=1, max_size=4),
    SHARE,
    SHARE,
    st.sampled_from([NAN, 0.0, 1e30, -math.inf]),
    st.integers(0, 2),
    st.integers(1, 3),
)
def test_advantages_equal_their_sums(
    rows: list[Any], gamma: float, lam: float, filler: float, gaps: int, more: int
) -> None:
    rewards, values, mask = padded_tensors([row[:2] for row in rows], filler, gaps, more)
    found = gae(rewards, values, mask, torch.tensor([row[2] for row in rows], dtype=torch.float64), gamma, lam)
    expected = [a for row in rows for a in sums(*row, gamma, lam)]
    assert np.allclose(found[mask].numpy(), expected, rtol=1e-6, atol=1e-4) and not found[~mask].any()


# --- whitening --------------------------------------------------------------------------------------------------------


def white_error(how: Callable[[Tensor, Tensor], Tensor], more: int = 0) -> float:
    """1, 2, 3 and 6: mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5."""
    values, mask = padded_tensors([([1.0, 2.0],), ([3.0],), ([6.0],)], 100.0, 1, more)
    found = how(values, mask)
    expected = torch.tensor([-2.0, -1.0, 0.0, 3.0]) / math.sqrt(3.5)
    return float((found[mask] - expected).abs().max() + found[~mask].abs().max())


def test_whitening_by_hand() -> None:
    assert white_error(whiten) < 1e-6 and white_error(whiten, more=7) < 1e-6
    assert not whiten(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)).any()


def _mean_added_back(values: Tensor, mask: Tensor) -> Tensor:
    return apply_mask(whiten(values, mask) + float(values[mask].mean()), mask)


def _padding_counted(values: Tensor, mask: Tensor) -> Tensor:
    return apply_mask(whiten(values * mask, torch.ones_like(mask)), mask)


def _row_by_row(values: Tensor, masks: Tensor) -> Tensor:
    return torch.cat([whiten(row[None], mask[None]) for row, mask in zip(values, masks, strict=True)])


@pytest.mark.parametrize("bug", [_mean_added_back, _padding_counted, _row_by_row])
def test_wrong_whitening_is_seen(bug: Any) -> None:
    assert white_error(bug) > 1e-2


@given(st.lists(st.lists(NUMBER, max_size=5), min_size=1, max_size=4), st.integers(1, 4))
def test_whitened_values_have_mean_0_and_variance_1(rows: list[list[float]], more: int) -> None:
    values, masks = padded_tensors([(row,) for row in rows], NAN, 1, more)
    found = whiten(values, masks)
    chosen = [value for row in rows for value in row]
    assert not found[~masks].any()
    if not chosen or max(chosen) - min(chosen) <= 1e-6:
        assert not found.any(), "equal values are exactly nothing, whatever rounding leaves of them"
    else:
        assert float(found[masks].double().mean()) == pytest.approx(0, abs=1e-6)
        assert float(found[masks].double().square().mean()) == pytest.approx(1, abs=1e-5)
        again, mask = padded_tensors([(row,) for row in rows], 7.0, 1, more + 5)
        assert torch.equal(whiten(again, mask)[mask], found[masks])


def test_explained_variance_by_hand() -> None:
    values, returns, mask = padded_tensors([([1.0, 1.0], [0.0, 2.0]), ([1.0], [4.0])], NAN)  # variances 8/3 of both
    assert explained_variance(values, returns, mask) == pytest.approx(0.0) and math.isnan(
        explained_variance(returns, values, mask)
    )
    assert explained_variance(returns, returns, mask) == 1.0 and explained_variance(returns + 5, returns, mask) == 1.0
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3.0)


# --- rewards ----------------------------------------------------------------------------------------------------------


def reward_error(how: Callable[..., Tensor]) -> float:
    """lambda 1/2; log-ratios 1, -2, .5 with score 3, and .25 with score -1."""
    old, reference, mask = padded_tensors(
        [([-1.0, -3.0, -0.5], [-2.0, -1.0, -1.0]), ([-1.0], [-1.25]), ([], [])], NAN, 1, 2
    )
    found = how(old, reference, mask, torch.tensor([3.0, -1.0, 9.0]), 0.5)
    expected = torch.tensor([-0.5, 1.0, 3.0 - 0.25, -1.0 - 0.125], dtype=torch.float64)
    apart = float((found[mask] - expected).abs().max())
    return apart if apart == apart and not found[~mask].any() else math.inf


def test_token_rewards_by_hand() -> None:
    assert reward_error(token_rewards) < 1e-12


def _on_the_pad_slot(old: Tensor, reference: Tensor, mask: Tensor, score: Tensor, coefficient: float) -> Tensor:
    rewards = -coefficient * apply_mask(old - reference, mask)
    rewards[torch.arange(3), -1] += score
    return rewards


def _kl_gained(old: Tensor, reference: Tensor, mask: Tensor, score: Tensor, coefficient: float) -> Tensor:
    return token_rewards(old, reference, mask, score, -coefficient)


def _at_every_token(old: Tensor, reference: Tensor, mask: Tensor, score: Tensor, coefficient: float) -> Tensor:
    return token_rewards(old, reference, mask, 0 * score, coefficient) + score[:, None] * mask


@pytest.mark.parametrize("bug", [_on_the_pad_slot, _kl_gained, _at_every_token])
def test_wrong_rewards_are_seen(bug: Any) -> None:
    assert reward_error(bug) > 1e-2


def test_the_coefficient_follows_its_target() -> None:
    """Ziegler et al.: error (KL - target) / target, within 20 %, times the gain."""
    assert adapt_kl_coef(0.05, 0.11, 0.1, 0.1) == pytest.approx(0.05 * 1.01)
    assert adapt_kl_coef(0.05, 0.09, 0.1, 0.1) == pytest.approx(0.05 * 0.99)
    assert adapt_kl_coef(0.05, 9.0, 0.1, 0.1) == pytest.approx(0.05 * 1.02) and adapt_kl_coef(
        0.05, 0.0, 0.1, 0.5
    ) == pytest.approx(0.045)
    assert adapt_kl_coef(0.05, 0.1, 0.1, 0.1) == 0.05


def test_k3_by_hand() -> None:
    logps, other, mask = padded_tensors([([-1.0, -2.0], [-1.0 + math.log(2), -2.0])], NAN)
    assert (
        kl_k3(logps, other, mask)[mask].tolist() == pytest.approx([1 - math.log(2), 0.0])
        and not kl_k3(logps, other, mask)[~mask].any()
    )


# --- the losses -------------------------------------------------------------------------------------------------------

SIX = (
    # value: old 0, d 0.2. (new, return) -> loss, slope: a value that has left the clip and still goes away from the
    # return loses its slope.
    ("old < new < return", 1.0, 2.0, 1.8**2 / 2, 0.0),
    ("old < return < new", 1.0, 0.5, 0.5**2 / 2, 0.5),
    ("return < old < new", 1.0, -1.0, 2.0**2 / 2, 2.0),
    ("new < old < return", -1.0, 1.0, 2.0**2 / 2, -2.0),
    ("new < return < old", -1.0, -0.5, 0.5**2 / 2, -0.5),
    ("return < new < old", -1.0, -2.0, 1.8**2 / 2, 0.0),
)


def six_error(how: Callable[..., tuple[Tensor, Tensor]]) -> float:
    worst = 0.0
    for _, new, wanted, loss, slope in SIX:
        values = torch.tensor([[new, NAN]], dtype=torch.float64, requires_grad=True)
        other = torch.tensor([[0.0, NAN]], dtype=torch.float64)
        mask = torch.tensor([[True, False]])
        found, stopped = how(values, other, torch.full_like(other, wanted), mask, 0.2)
        (gradient,) = torch.autograd.grad(found.sum(), values)
        apart = (
            abs(float(found[0, 0].detach()) - loss)
            + abs(float(gradient[0, 0]) - slope)
            + (bool(stopped[0, 0]) != (slope == 0.0))
        )
        worst = max(worst, apart if apart == apart and not gradient[0, 1] else math.inf)
    return worst


def test_six_orderings_of_old_value_new_value_and_return() -> None:
    assert six_error(ppo_module.value_loss) < 1e-12


def _the_smaller(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    values, old, returns = (apply_mask(each, mask) for each in (values, old, returns))
    clipped = old + (values - old).clamp(-clip, clip)
    plain, other = (values - returns).square() / 2, (clipped - returns).square() / 2
    return torch.minimum(plain, other), (other < plain) & mask


def _around_the_return(
    values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    return ppo_module.value_loss(values, returns, returns, mask, clip)


def _clipped_alone(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    values, old, returns = (apply_mask(each, mask) for each in (values, old, returns))
    found = (old + (values - old).clamp(-clip, clip) - returns).square() / 2
    return found, (values - old).abs() > clip


def _not_halved(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    loss, stopped = ppo_module.value_loss(values, old, returns, mask, clip)
    return 2 * loss, stopped


@pytest.mark.parametrize("bug", [_the_smaller, _around_the_return, _clipped_alone, _not_halved])
def test_a_wrong_value_clip_is_seen(bug: Any) -> None:
    assert six_error(bug) > 1e-2


def oracle(rows: Rows, clip: float, value_clip: float, weight: float) -> tuple[float, list[float], float, list[float]]:
    """Rows of (log-probs, old, advantages, values, old values, returns) -> both losses and their slopes, worked by
    cases."""
    policy, value, slopes, value_slopes = 0.0, 0.0, [], []
    for row in rows:
        for p, o, a, v, v0, g in zip(*row, strict=True):
            r = math.exp(p - o)
            if (a > 0 and r > 1 + clip) or (a < 0 and r < 1 - clip):
                policy, slope = policy - weight * (1 + clip if a > 0 else 1 - clip) * a, 0.0
            else:
                policy, slope = policy - weight * r * a, -weight * r * a
            slopes.append(slope)
            near = min(max(v, v0 - value_clip), v0 + value_clip) if value_clip else v
            stands = (near - g) ** 2 > (v - g) ** 2
            value += weight * ((near if stands else v) - g) ** 2 / 2
            value_slopes.append(0.0 if stands else weight * (v - g))
    return policy, slopes, value, value_slopes


def drawn(seed: int, lengths: Sequence[int] = (5, 2, 9, 1, 4, 0)) -> list[tuple[Any, ...]]:
    """Ratios on both sides of the clip, advantages of both signs, values in all orderings."""
    stream = np.random.default_rng(seed)
    rows = []
    for n in lengths:
        logps, values = -stream.exponential(2.0, n), stream.normal(0, 1, n)
        rows.append(
            (
                logps,
                logps + stream.normal(0, 0.3, n),
                stream.normal(0, 1, n),
                values,
                values + stream.normal(0, 0.4, n),
                stream.normal(0, 1, n),
            )
        )
    return rows


def pure_error(dtype: torch.dtype, filler: float = 0.0, seed: int = 0, value_clip: float = 0.2) -> float:
    """Largest distance from the oracle: losses, slopes, and what leaks from masked slots."""
    rows = drawn(seed)
    logps, old, advantages, values, old_values, returns, mask = padded_tensors(rows, filler, dtype=dtype)
    logps.requires_grad_()
    values.requires_grad_()
    weight = token_mean_weights(mask).to(dtype)
    one = (ppo_module.policy_loss(logps, old, advantages, mask, 0.2)[0] * weight).sum()
    other = (ppo_module.value_loss(values, old_values, returns, mask, value_clip)[0] * weight).sum()
    slope, value_slope = torch.autograd.grad(one + other, (logps, values))
    policy, slopes, value, value_slopes = oracle(rows, 0.2, value_clip, float(weight.max()))
    apart = [abs(float(one.detach()) - policy) / abs(policy), abs(float(other.detach()) - value) / value]
    for found, expected in ((slope, slopes), (value_slope, value_slopes)):
        wanted = torch.tensor(expected, dtype=torch.float64)
        apart.append(float((found[mask].double() - wanted).abs().max() / wanted.abs().max()))
        apart.append(math.inf if found[~mask].any() or found.isnan().any() else 0.0)
    return max(each if each == each else math.inf for each in apart)


def test_losses_and_gradients_equal_the_formulas() -> None:
    for seed in range(8):
        for value_clip in (0.2, 0.0):
            assert pure_error(torch.float64, seed=seed, value_clip=value_clip) < 1e-12
            assert pure_error(torch.float32, seed=seed, value_clip=value_clip) < 2e-6


@pytest.mark.parametrize("filler", [NAN, math.inf, -math.inf, 1e38])
def test_what_stands_in_masked_slots_does_nothing(filler: float) -> None:
    assert pure_error(torch.float32, filler) < 2e-6


@given(
    st.lists(st.tuples(*[st.floats(-2, 2, width=32)] * 3), min_size=1, max_size=6), st.floats(0.015625, 0.5, width=32)
)
def test_value_loss_equals_plain_python(triples: list[tuple[float, float, float]], clip: float) -> None:
    values, old, returns, mask = padded_tensors([tuple(zip(*triples, strict=True))], NAN)
    found, _ = ppo_module.value_loss(values, old, returns, mask, clip)
    expected = [max((v - g) ** 2, (min(max(v, o - clip), o + clip) - g) ** 2) / 2 for v, o, g in triples]
    assert np.allclose(found[mask].numpy(), expected, rtol=1e-9, atol=1e-12)


def _no_clip(
    logps: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float, real: Any = ppo_module.policy_loss
) -> Any:
    return real(logps, old, advantages, mask, 1e6)


def _the_larger(
    logps: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float, real: Any = ppo_module.policy_loss
) -> Any:
    loss, stopped = real(logps, old, -advantages, mask, clip)
    return -loss, stopped


def _ratio_turned(
    logps: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float, real: Any = ppo_module.policy_loss
) -> Any:
    return real(old, logps, advantages, mask, clip)


@pytest.mark.parametrize("bug", [_no_clip, _the_larger, _ratio_turned])
def test_a_wrong_policy_loss_is_seen(monkeypatch: pytest.MonkeyPatch, bug: Any) -> None:
    monkeypatch.setattr(ppo_module, "policy_loss", bug)
    assert max(pure_error(torch.float64, seed=seed) for seed in range(3)) > 1e-3


def test_tokens_that_the_clip_stops_are_counted() -> None:
    ratios, mask = torch.tensor([[0.5, 0.9, 1.1, 1.5, 9.0]] * 2), torch.tensor([[True, True, True, True, False]] * 2)
    advantages = torch.tensor([[1.0] * 5, [-1.0] * 5])
    stopped = ppo_module.policy_loss(ratios.log(), torch.zeros(2, 5), advantages, mask, 0.2)[1]
    assert stopped.tolist() == [[False, False, False, True, False], [True, False, False, False, False]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropy_has_its_gradient(temperature: float) -> None:
    """Scale, soft cap, bias and chunks, against float64 and autograd."""
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

OWN = {"policy": ["sft", "policy"], "reference": ["sft"], "value": ["sft", "value"]}
TRUNK = {**OWN, "value": ["sft", "policy"]}


def make_roles(kind: str, **more: Any) -> Roles:
    """fp32, a frozen SFT adapter below; the value an adapter of its own, or a head on the policy's trunk. All with
    weights that matter."""
    extra, stacks = (["value"], OWN) if kind == "own" else ([], TRUNK)
    found = llama_roles(
        16, lower=["sft"], extra=extra, trainable=["policy", "value"], stacks=stacks, heads=["value"], **more
    )
    perturb(found, "sft", size=0.05)
    perturb(found, "policy", size=0.05, seed=2)
    perturb(found, "value", size=0.05, seed=3)
    with torch.no_grad():
        found.heads["value"].weight.mul_(0.1)
    return found


@pytest.fixture(scope="module")
def own() -> Roles:
    return make_roles("own")


@pytest.fixture(scope="module")
def trunk() -> Roles:
    return make_roles("trunk")


REWARDS = [[[1.0, 0.0, 0.5], [0.2, 0.9, 0.4]]]
CUT = (1, 5)


def over(roles: Roles, rewards: Any = REWARDS, fake: dict[str, Any] | None = None, **parts: Any) -> PPO:
    return PPO(
        AlgorithmContext(roles, None, fresh=False),
        FakeCollector(roles, rewards, **{"cut": CUT, **(fake or {})}),
        **parts,
    )  # type: ignore[arg-type]


def stirred(algorithm: PPO) -> Batch:
    """A harvest whose old log-probs and values are not those of the voices any more, as in a later pass."""
    part = algorithm.collect(0).batch
    stream = torch.Generator().manual_seed(0)
    part.extra["old"] = part.extra["old"] + _noise(part, stream)
    part.extra["values"] = part.extra["values"] + _noise(part, stream)
    return part


def _noise(part: Batch, stream: torch.Generator) -> Tensor:
    """The same noise for each token, wherever padding stands."""
    noise = torch.zeros(part.input_ids.shape)
    noise[part.loss_mask] = 0.3 * torch.randn(int(part.loss_mask.sum()), generator=stream)
    return noise


def one_pass(
    algorithm: PPO, part: Batch, joint: bool = False, **split: int | None
) -> tuple[list[float], list[Tensor], dict[str, float]]:
    """Losses and gradients of policy and value; with `joint` one backward pass for all terms of a micro-batch."""
    roles = algorithm.context.roles
    zero_grad(roles)
    roles.base.model.train()
    part.token_weights = algorithm.token_weights(part)
    losses, stats = [0.0, 0.0], {}
    for micro in part.split(**split or {"rows": 4}):
        kept = []
        for which, term in enumerate(algorithm.compute_losses(micro)):
            losses[which] += float(term.loss.detach().double())
            add_stats(stats, term.stats)
            kept.append(term.loss)
            if not joint:
                term.loss.backward()
        if joint:
            torch.stack(kept).sum().backward()
    return losses, [gradients(roles, role) for role in ("policy", "value")], to_floats(stats)


def step_error(roles: Roles, temperature: float = 0.7, **parts: Any) -> float:
    """Distance from transformers' model in float64, of all that `collect` fixes, both losses, and the gradients of both
    adapters."""
    algorithm = over(roles, fake={"temperature": temperature}, kl_control=KLControlConfig(kl_coef=0.3), **parts)
    part = algorithm.collect(0).batch
    policy = Plain([roles.adapter_tensors("sft")], roles.adapter_tensors("policy"))
    value = Plain([roles.adapter_tensors("sft")], roles.adapter_tensors("value"))
    head = value.trained["base_model.model.score.weight"][0]
    how, rows, undecided = algorithm.gae_config, [], torch.zeros((), dtype=torch.float64)
    for i, score in enumerate([reward for group in REWARDS[0] for reward in group]):
        ids, places = part.input_ids[i][part.attention_mask[i]], part.completion_mask[i].nonzero().squeeze(1)
        whole, other = (
            torch.log_softmax(policy.run(ids.tolist(), mine).logits[0] / temperature, dim=1)[places - 1]
            for mine in (True, False)
        )
        p, q = (each.gather(1, ids[places][:, None])[:, 0] for each in (whole, other))
        undecided = undecided - (whole.exp() * whole).sum()
        v = value.run(ids.tolist()).hidden_states[-1][0] @ head
        cut, bootstrap = i in CUT, how.truncated_completions == "bootstrap"
        ending = (
            0.0
            if cut and bootstrap
            else score - how.missing_eos_penalty * (cut and how.truncated_completions == "penalize")
        )
        rewards = [-0.3 * float(a - b) for a, b in zip(p.detach(), q.detach(), strict=True)]
        rewards[-1] += ending
        before = v[places - 1]
        advantages = sums(
            rewards, before.tolist(), float(v[-1].detach()) if cut and bootstrap else 0.0, how.gamma, how.lam
        )
        rows.append((p, before, np.array(advantages), np.array(before.tolist()) + advantages))
    flat = np.concatenate([row[2] for row in rows])
    part.extra["old"], part.extra["values"] = (
        part.extra[name] + _noise(part, torch.Generator().manual_seed(k)) for k, name in enumerate(("old", "values"))
    )
    losses, _, _ = one_pass(algorithm, part)
    mine = by_key(roles, "policy"), by_key(roles, "value")
    samples = [
        (
            p.tolist(),
            part.extra["old"][i][part.completion_mask[i]].tolist(),
            (a - flat.mean()) / flat.std(),
            v.tolist(),
            part.extra["values"][i][part.completion_mask[i]].tolist(),
            g,
        )
        for i, (p, v, a, g) in enumerate(rows)
    ]
    one, slopes, other, value_slopes = oracle(
        samples, algorithm.update.cliprange, algorithm.critic.cliprange_value, 1 / len(flat)
    )
    bonus = -algorithm.update.entropy_coef / len(flat) * undecided
    one += float(bonus.detach())
    (torch.cat([row[0] for row in rows]) @ torch.tensor(slopes, dtype=torch.float64) + bonus).backward()
    (torch.cat([row[1] for row in rows]) @ torch.tensor(value_slopes, dtype=torch.float64)).backward()
    apart = [
        error_against(mine[0], policy.gradient()),
        error_against(mine[1], value.gradient()),
        abs(losses[0] - one) / abs(one),
        abs(losses[1] - other) / other,
        relative_error(
            part.extra["returns"][part.completion_mask], torch.tensor(np.concatenate([row[3] for row in rows]))
        ),
    ]
    return max(apart)


@pytest.mark.parametrize("truncated", ["penalize", "bootstrap", "keep"])
def test_a_whole_step(own: Roles, truncated: str) -> None:
    assert (
        step_error(
            own,
            gae_config=GAEConfig(0.9, 0.8, truncated, 0.7),
            update=UpdateConfig(entropy_coef=0.2 * (truncated == "keep")),
        )
        < 2e-5
    )


def test_bugs_of_a_whole_step_are_seen(own: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_bug(name: str, bug: Any, owner: Any = ppo_module) -> float:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, bug)
            return step_error(own, gae_config=GAEConfig(0.9, 0.8, "bootstrap", 0.7))

    assert with_bug("shift_right", lambda states: states) > 1e-3, "the value of a state that has seen the token already"
    assert with_bug("apply_mask", lambda values, mask: values) > 1e-3, (
        "what stands in prompts counted among the returns"
    )
    assert with_bug("whiten", lambda values, mask: values) > 1e-3
    assert step_error(own, update=UpdateConfig(entropy_coef=0.2)) < 2e-5
    with monkeypatch.context() as patch:
        patch.setattr("lowrank_tune.model.roles.chunked_entropy", lambda *how: chunked_entropy(*how).detach())
        assert step_error(own, update=UpdateConfig(entropy_coef=0.2)) > 1e-3, "an entropy without its gradient"
    logps = Roles.logps
    assert (
        with_bug("logps", lambda self, role, batch, temperature=1.0, **more: logps(self, role, batch, **more), Roles)
        > 1e-3
    )


@pytest.mark.parametrize("kind", ["own", "trunk"])
def test_any_micro_batch_size_gives_the_gradient_of_one_joint_backward(
    kind: str, request: pytest.FixtureRequest
) -> None:
    algorithm = over(
        request.getfixturevalue(kind), critic=CriticConfig(vf_coef=0.3), update=UpdateConfig(entropy_coef=0.05)
    )
    part = stirred(algorithm)
    wanted = one_pass(algorithm, part, joint=True, rows=99)
    assert all(gradient.any() and gradient.isfinite().all() for gradient in wanted[1])
    for split in ({"rows": 1}, {"rows": 4}, {"tokens": 30}, {"rows": 99}):
        losses, found, stats = one_pass(algorithm, part, **split)
        assert losses == pytest.approx(wanted[0], rel=1e-5, abs=1e-7) and stats == pytest.approx(
            wanted[2], rel=1e-4, abs=1e-6
        )
        assert all(relative_error(mine, theirs) < 1e-5 for mine, theirs in zip(found, wanted[1], strict=True))
    assert wanted[2]["loss"] + 0.3 * wanted[2]["value_loss"] == pytest.approx(sum(wanted[0]), rel=1e-5)


def test_a_mean_of_means_is_seen(own: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = over(own)
    part = stirred(algorithm)
    wanted = one_pass(algorithm, part, rows=99)[1]
    taking = Batch.select_rows

    def anew(self: Batch, *how: Any) -> Batch:
        micro = taking(self, *how)
        micro.token_weights = token_mean_weights(micro.loss_mask) / 2
        return micro

    monkeypatch.setattr(Batch, "select_rows", anew)
    found = one_pass(algorithm, part, rows=3)[1]
    assert all(relative_error(mine, theirs) > 1e-2 for mine, theirs in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kind", ["own", "trunk"])
def test_recomputation_changes_no_gradient(kind: str) -> None:
    found, counts = [], []
    for checkpointing in (False, True):
        roles = make_roles(kind, checkpointing=checkpointing)
        algorithm = over(roles)
        part = stirred(algorithm)
        with count_forwards(roles) as count:
            found.append(one_pass(algorithm, part)[1])
        counts.append(count[0])
    assert counts[1] == 2 * counts[0], "nothing was recomputed"
    assert all(relative_error(mine, theirs) < 1e-6 for mine, theirs in zip(*found, strict=True))


@pytest.mark.parametrize("kind", ["own", "trunk"])
def test_padding_changes_nothing(kind: str, request: pytest.FixtureRequest) -> None:
    found = []
    for how in ({}, {"more": 5}, {"filler": 31}, {"more": 3, "filler": 1}):
        algorithm = over(
            request.getfixturevalue(kind), fake=how, gae_config=GAEConfig(truncated_completions="bootstrap")
        )
        found.append(one_pass(algorithm, stirred(algorithm)))
    for losses, slopes, stats in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-5, abs=1e-7) and stats == pytest.approx(
            found[0][2], rel=1e-4, abs=1e-6
        )
        assert all(relative_error(mine, theirs) < 1e-5 for mine, theirs in zip(slopes, found[0][1], strict=True))


class _Both(PPO):
    """Makes both graphs before one has died."""

    def compute_losses(self, micro: Batch) -> Any:
        yield from list(super().compute_losses(micro))


def alive_at_once(algorithm: PPO, monkeypatch: pytest.MonkeyPatch) -> int:
    """The most decoder graphs that stood at once: made by a forward pass and not yet gone through by a backward
    pass."""
    standing, most, real = 0, 0, Roles.hidden

    def hidden(self: Roles, role: str, batch: Batch) -> Tensor:
        nonlocal standing, most
        found = real(self, role, batch)
        if found.requires_grad:
            standing, most = standing + 1, max(most, standing + 1)
            found.register_hook(gone)
        return found

    def gone(gradient: Tensor) -> None:
        nonlocal standing
        standing -= 1

    part = stirred(algorithm)
    with monkeypatch.context() as patch:
        patch.setattr(Roles, "hidden", hidden)
        one_pass(algorithm, part)
    return most


@pytest.mark.parametrize("kind", ["own", "trunk"])
def test_one_graph_is_alive_at_a_time(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    roles = request.getfixturevalue(kind)
    assert alive_at_once(over(roles), monkeypatch) == 1
    assert (
        alive_at_once(_Both(AlgorithmContext(roles, None, fresh=False), FakeCollector(roles, REWARDS)), monkeypatch)
        == 2
    ), "the test sees nothing"  # type: ignore[arg-type]


def test_disjoint_adapters_have_their_own_losses(own: Roles) -> None:
    algorithm = over(own)
    part = stirred(algorithm)
    for which, mine, other in ((0, "policy", "value"), (1, "value", "policy")):
        zero_grad(own)
        part.token_weights = algorithm.token_weights(part)
        list(algorithm.compute_losses(part))[which].loss.backward()
        assert all(p.grad is None for p in own.parameters(other)) and gradients(own, mine).isfinite().all()
    assert not any(p.requires_grad for name, p in own.base.model.named_parameters() if "lt_sft" in name)


# --- laws of the step -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["own", "trunk"])
def test_the_first_pass_has_ratio_one(kind: str, request: pytest.FixtureRequest) -> None:
    algorithm = over(request.getfixturevalue(kind))
    experience = algorithm.collect(0)
    _, _, stats = one_pass(algorithm, experience.batch)
    assert stats["clip_ratio"] == 0.0 == stats["value_clip_ratio"] and stats["approx_kl"] < 1e-10
    assert stats["loss"] == pytest.approx(0.0, abs=1e-6), "whitened advantages around 0, ratios of 1"
    figures = to_floats(experience.stats)
    assert (
        figures["sampling/sampling_logp_difference/mean"] < 1e-6
        and figures["kl"] > 0
        and figures["reward"] == pytest.approx(3.0 / 6)
    )
    assert figures["scores"] == pytest.approx((3.0 - 2) / 6) and figures["kl_coef"] == 0.05
    shown = algorithm.collector.shown[0][2]  # type: ignore[attr-defined]
    white = experience.batch.extra["advantages"]
    assert shown.shape == (2, 3) and float(shown[1, 0]) == pytest.approx(
        float(white[3][experience.batch.completion_mask[3]].mean()), abs=1e-6
    )


def test_a_policy_that_is_its_reference_has_no_kl() -> None:
    roles = llama_roles(4, lower=["sft"], extra=["value"], trainable=["policy", "value"], stacks=OWN, heads=["value"])
    perturb(roles, "sft")
    algorithm = PPO(AlgorithmContext(roles, None), FakeCollector(roles, REWARDS))  # type: ignore[arg-type]
    experience = algorithm.collect(0)
    algorithm.check(experience.batch, 0)
    figures = to_floats(experience.stats)
    assert figures["kl"] == 0.0 and figures["value"] == 0.0, (
        "a fresh adapter changes nothing, and a fresh head finds all worth nothing"
    )
    perturb(roles, "policy", size=0.02)
    with pytest.raises(TrainingError, match="the reference is not what it must be"):
        algorithm.check(experience.batch, 0)
    assert to_floats(algorithm.collect(0).stats)["kl"] > 1e-6


def test_a_sampler_that_drifts_stops_the_run(own: Roles) -> None:
    with pytest.raises(TrainingError, match="ppo.max_logprob_mismatch"):
        over(own, fake={"drift": 0.5}).collect(0)
    assert (
        to_floats(over(own, fake={"drift": 0.5}, update=UpdateConfig(max_logprob_mismatch=5.0)).collect(0).stats)[
            "sampling/sampling_logp_difference/mean"
        ]
        > 0.1
    )


def test_the_real_sampler_and_the_policy_agree(own: Roles) -> None:
    experience = PPO(AlgorithmContext(own, None, fresh=False), real_collector(own)).collect(0)  # type: ignore[arg-type]
    assert to_floats(experience.stats)["sampling/sampling_logp_difference/mean"] < 1e-5
    assert (shift_right(torch.arange(6.0).view(2, 3)) == torch.tensor([[0.0, 0.0, 1.0], [0.0, 3.0, 4.0]])).all()


@pytest.mark.parametrize(("target", "kl", "moved"), [(None, 0.05, 1.0), (1e-9, 0.05, 1.1), (1e9, 0.05, 0.9)])
def test_the_coefficient_moves_after_its_step(own: Roles, target: float | None, kl: float, moved: float) -> None:
    algorithm = over(own, kl_control=KLControlConfig(kl, target, kl_gain=0.5))
    assert to_floats(algorithm.collect(0).stats)["kl_coef"] == kl and algorithm.kl_coef == pytest.approx(kl * moved)
    again = over(own, kl_control=KLControlConfig(kl, target, kl_gain=0.5))
    again.restore(algorithm.state())
    assert again.kl_coef == algorithm.kl_coef and again.state() == algorithm.state()
    assert to_floats(again.collect(0).stats)["kl_coef"] == algorithm.kl_coef


def test_passes_and_minibatches(own: Roles) -> None:
    batch = over(own).collect(0).batch
    batch.extra["place"] = torch.arange(6)
    seen = [part.extra["place"].tolist() for part in PPOBatch(batch, {}, 3, 4, seed=5).minibatches()]
    assert len(seen) == 12 and [sorted(sum(seen[i : i + 4], [])) for i in (0, 4, 8)] == [list(range(6))] * 3
    assert all(part for part in seen) and seen[:4] != seen[4:8], "every pass mixes anew"
    assert [part.extra["place"].tolist() for part in PPOBatch(batch, {}, 3, 4, seed=5).minibatches()] == seen
    assert [part.extra["place"].tolist() for part in PPOBatch(batch, {}, 3, 4, seed=6).minibatches()] != seen
    assert [part is batch for part in PPOBatch(batch, {}, 2).minibatches()] == [True, True]
    assert sum(1 for _ in PPOBatch(batch, {}, 1, 99).minibatches()) == 6, "no empty minibatch"


def test_the_kl_of_an_update_by_hand(own: Roles) -> None:
    """From the old policy, which drew the tokens, to the new one: the mean of e^d - d - 1 with d = log p - log p_old.
    Here d is 1 in the first row and -2 in all others."""
    algorithm = over(own)
    part = algorithm.collect(0).batch  # the policy has not moved: its log-probs are the old ones
    shift = torch.full((len(part), 1), 2.0)
    shift[0] = -1.0
    part.extra["old"] = part.extra["old"] + shift
    part.token_weights = algorithm.token_weights(part)
    first, others = int(part.loss_mask[0].sum()), int(part.loss_mask[1:].sum())
    wanted = (first * (math.e - 2) + others * (math.exp(-2) + 1)) / (first + others)
    assert algorithm._policy_term(part).stats["approx_kl"].value == pytest.approx(wanted, rel=1e-4)


def test_passes_end_at_the_limit(own: Roles) -> None:
    stats = {"approx_kl": over(own)._policy_term(weighted(over(own))).stats["approx_kl"]}
    assert stats["approx_kl"].value > 1e-3
    assert over(own).should_continue(stats) and over(own, kl_control=KLControlConfig(target_kl=1.0)).should_continue(
        stats
    )
    assert not over(own, kl_control=KLControlConfig(target_kl=1e-3)).should_continue(stats)


def weighted(algorithm: PPO) -> Batch:
    part = stirred(algorithm)
    part.token_weights = algorithm.token_weights(part)
    return part


def test_completions_without_a_reward_are_as_if_never_drawn(own: Roles) -> None:
    """Row 4 of 6 has no reward: the step is that of the other five."""
    algorithm = over(own, fake={"cut": ()})
    real, lost = algorithm.collector.collect, RewardFailure("answer", "error", "broke")

    def draw(step: int, draw: int, count: int | None = None) -> Any:
        rollouts = real(step, draw, count)
        rollouts.failed_rewards[4] = lost
        rollouts.rewards[1, 1] = rollouts.shaped_rewards[1, 1] = rollouts.reward_components[4] = NAN
        return rollouts

    algorithm.collector.collect = draw  # type: ignore[method-assign]
    experience = algorithm.collect(0)
    part, figures = experience.batch, to_floats(experience.stats)
    whole = over(own, fake={"cut": ()}).collect(0).batch
    assert (
        len(part) == 5
        and all(tensor.isfinite().all() for tensor in part.extra.values())
        and all(map(math.isfinite, figures.values()))
    )
    for i, row in enumerate((0, 1, 2, 3, 5)):
        assert torch.equal(part.input_ids[i][part.attention_mask[i]], whole.input_ids[row][whole.attention_mask[row]])
        assert (
            relative_error(
                part.extra["returns"][i][part.completion_mask[i]],
                whole.extra["returns"][row][whole.completion_mask[row]],
            )
            < 1e-5
        )
    assert float(algorithm.collector.shown[0][2][1, 1]) == 0.0  # type: ignore[attr-defined]
    assert "`answer`" in next(iter(algorithm.iter_warnings({"completions/clipped_ratio": 0.0})))


def test_a_step_without_rewards_changes_nothing(own: Roles) -> None:
    algorithm = over(own)
    real = algorithm.collector.collect

    def draw(*how: Any) -> Any:
        rollouts = real(*how)
        rollouts.failed_rewards = [RewardFailure("answer", "timeout", "slow")] * 6
        rollouts.rewards[:] = NAN
        return rollouts

    algorithm.collector.collect = draw  # type: ignore[method-assign]
    losses, slopes, _ = one_pass(algorithm, algorithm.collect(0).batch)
    assert losses == [0.0, 0.0] and not any(slope.any() for slope in slopes)


def test_completions_that_never_end_give_a_warning(own: Roles) -> None:
    assert list(over(own).iter_warnings({"completions/clipped_ratio": 0.8})) == []
    assert "most completions have no end, 90%" in next(
        iter(over(own).iter_warnings({"completions/clipped_ratio": 0.9}))
    )


# --- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["own", "trunk"])
def test_the_value_comes_back_bit_for_bit(kind: str) -> None:
    one, other = make_roles(kind), make_roles(kind, seed=4)
    part = over(one).collect(0).batch
    tensors = one.adapter_tensors("value")
    assert (len(tensors) == 1) == (kind == "trunk") and one.adapter_config("value")["modules_to_save"] == ["score"]
    with torch.no_grad():
        for parameter in other.parameters("value"):
            parameter.normal_()
    with one.inference_mode(), other.inference_mode():
        assert not torch.equal(one.scores("value", part), other.scores("value", part))
        other.load_adapter_tensors("value", tensors, "here")
        assert torch.equal(one.scores("value", part), other.scores("value", part))
    mine = set(one.named_parameters("value"))
    assert mine.isdisjoint(one.named_parameters("policy")) and "score.lt_value.weight" in mine
    assert "base_model.model.score.weight" not in one.adapter_tensors("policy"), "a policy has no head"
