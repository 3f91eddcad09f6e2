"""Pure functions of tensors that several algorithms share: weights, masks, losses and estimators."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_tune.stats import WeightedMean

MAX_EXPONENT = 100.0


def step_seed(seed: int, step: int) -> int:
    """Returns a seed for a step of a run. The odd multipliers give neighboring steps unrelated seeds."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % (1 << 63)


def weighted_sum(values: Sequence[float], weights: Sequence[float]) -> float:
    """Returns the reward of a completion: the sum of its rewards, each times its weight."""
    return sum(weight * value for value, weight in zip(values, weights, strict=True))


def token_mean_weights(mask: Tensor) -> Tensor:
    """Returns weights of a mean over the tokens of the whole step: 1 / (number of tokens); (B, T) bool -> (B, T) fp32,
    0 outside the mask."""
    return mask.float() / mask.sum().clamp_min(1)


def perplexity(loss: float) -> float:
    """Returns exp of a mean loss in nats per token, at most exp(100), so that it is a finite number."""
    return math.exp(min(loss, MAX_EXPONENT))


def pair_mean_weights(rows: Tensor) -> Tensor:
    """Returns weights of a mean over the pairs of the whole step: 1 / (number of pairs) for each row; any (B, ...)
    tensor of the rows -> (B,) fp32."""
    num_rows = len(rows)
    return torch.full(
        (num_rows,),
        2.0 / max(1, num_rows),
        dtype=torch.float32,
        device=rows.device,
    )


def pair_accuracy(difference: Tensor) -> WeightedMean:
    """Returns the share of pairs whose chosen side has the higher score, `difference` (P,) > 0. A tie counts half."""
    difference = difference.detach()
    num_correct = (difference > 0).float().sum() + 0.5 * (difference == 0).float().sum()
    return WeightedMean(num_correct, len(difference))


def apply_mask(values: Tensor, mask: Tensor) -> Tensor:
    """Returns `values` with 0 outside the mask. Values outside, NaN included, affect neither the loss nor the
    gradient."""
    return torch.where(
        mask,
        values,
        torch.zeros(
            (),
            dtype=values.dtype,
            device=values.device,
        ),
    )


def masked_mean(values: Tensor, mask: Tensor) -> WeightedMean:
    """Returns the mean of `values` over the mask, detached."""
    return WeightedMean(apply_mask(values.detach(), mask).sum(), mask.sum())


def mean(values: Tensor) -> WeightedMean:
    """Returns the mean of all `values`, detached."""
    return WeightedMean(values.detach().float().sum(), values.numel())


def clipped_policy_loss(
    log_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    epsilon_low: float,
    epsilon_high: float,
) -> tuple[Tensor, Tensor]:
    """Returns the clipped surrogate loss of each token (PPO, arXiv:1707.06347, equation 7) and whether the clip stopped
    its gradient; (B, T) each.

    `log_ratio` (B, T) is log p - log p_old; `advantages` is (B, T), or (B, 1) for whole sequences.
    """
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    objective = ratio * advantages
    clipped_objective = clipped_ratio * advantages
    is_clipped = (clipped_objective < objective) & mask
    loss = -torch.minimum(objective, clipped_objective)
    return apply_mask(loss, mask), is_clipped


def kl_k3(
    logps: Tensor,
    other_logps: Tensor,
    mask: Tensor,
) -> Tensor:
    """Returns the k3 estimate of KL(p || other) for each token that p drew: e^d - d - 1 with d = log other - log p;
    (B, T), never negative (http://joschu.net/blog/kl-approx.html)."""
    d = apply_mask(other_logps - logps, mask)
    return torch.expm1(d) - d


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    bootstrap_values: Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> Tensor:
    """Returns generalized advantage estimates (arXiv:1506.02438, equation 16) of the tokens of the mask; (B, T) fp32,
    0 outside it.

    rewards (B, T): reward of token t; values (B, T): value before token t; bootstrap_values (B,): value after the last
    token, 0 for a completion that ended. Tokens outside the mask are skipped, whatever their values are.
    """
    rewards = apply_mask(rewards, mask).double()
    values = apply_mask(values, mask).double()
    advantages = torch.zeros_like(rewards)
    next_value = bootstrap_values.double()
    running = torch.zeros_like(bootstrap_values, dtype=torch.float64)
    for t in range(rewards.shape[1] - 1, -1, -1):
        in_mask = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = torch.where(in_mask, delta + gamma * lam * running, running)
        next_value = torch.where(in_mask, values[:, t], next_value)
        advantages[:, t] = apply_mask(running, in_mask)
    return advantages.float()


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Returns `values` with mean 0 and variance 1 (1/n) over the mask, (B, T) fp32, 0 outside it. Values that are all
    equal (within 1e-6) become exactly 0."""
    selected = values[mask].double()
    if not len(selected) or float(selected.max() - selected.min()) <= 1e-6:
        return torch.zeros_like(values)
    std = selected.var(correction=0).sqrt()
    whitened = (values.double() - selected.mean()) / std
    return apply_mask(whitened.float(), mask)


def explained_variance(
    values: Tensor,
    returns: Tensor,
    mask: Tensor,
) -> float:
    """Returns 1 - Var(returns - values) / Var(returns) over the mask: 1 for values that predict the returns exactly, 0
    for constant ones; nan if the returns do not vary."""
    targets = returns[mask].double()
    predictions = values[mask].double()
    if not len(targets):
        return float("nan")
    variance = float(targets.var(correction=0))
    if not variance:
        return float("nan")
    return 1.0 - float((targets - predictions).var(correction=0)) / variance


def reliability_bins(difference: Tensor, num_bins: int = 10) -> list[tuple[float, float, int]]:
    """Returns the calibration of a preference model: (mean confidence, share of correct pairs, pairs) of each bin.

    difference (P,): score of the chosen minus score of the rejected answer. The model prefers the answer with the
    higher score, with confidence sigmoid(|difference|) in [0.5, 1] (Bradley-Terry). Bins have equal widths, and empty
    ones are left out. A tie counts as half correct.
    """
    difference = difference.double()
    confidence = torch.sigmoid(difference.abs())
    correct = (difference > 0).double() + 0.5 * (difference == 0).double()
    bin_index = ((confidence - 0.5) * 2 * num_bins).long().clamp_max(num_bins - 1)
    result = []
    for index in sorted(set(bin_index.tolist())):
        in_bin = bin_index == index
        result.append((float(confidence[in_bin].mean()), float(correct[in_bin].mean()), int(in_bin.sum())))
    return result


def calibration_error(bins: list[tuple[float, float, int]]) -> float:
    """Returns the expected calibration error (arXiv:1706.04599): the mean distance between confidence and share of
    correct pairs, over all pairs; nan without pairs."""
    num_pairs = sum(count for _, _, count in bins)
    if not num_pairs:
        return float("nan")
    return sum(abs(confidence - share) * count for confidence, share, count in bins) / num_pairs


def correlation(a: Tensor, b: Tensor) -> float:
    """Returns Pearson's correlation; nan if one of the two does not vary."""
    a = a.double() - a.double().mean()
    b = b.double() - b.double().mean()
    norm = float(a.norm() * b.norm())
    if not norm:
        return float("nan")
    return float(a @ b) / norm
