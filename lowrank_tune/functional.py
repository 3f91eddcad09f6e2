"""Tensors in, tensors out: weightings, masking, and the estimators that several algorithms share. No model, no file."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_tune.stats import WeightedMean


def step_seed(seed: int, step: int) -> int:
    """A seed for each step of each run; odd multipliers keep neighbors apart."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % (1 << 63)


def token_mean_weights(mask: Tensor) -> Tensor:
    """(B, T) bool -> (B, T) fp32: 1 / (tokens of the whole step) on each token. A step without tokens weighs
    nothing."""
    return mask.float() / mask.sum().clamp_min(1)


def sequence_mean_weights(rows: Tensor) -> Tensor:
    """Any (B, ...) tensor of pairs, two adjacent rows each -> (B,) fp32: 1 / (pairs of the whole step) on each row."""
    return torch.full((len(rows),), 2.0 / max(1, len(rows)), dtype=torch.float32, device=rows.device)


def pair_accuracy(difference: Tensor) -> WeightedMean:
    """The share of pairs whose chosen side is ahead, `difference` (P,) > 0; a tie counts half, as a coin would decide
    it."""
    difference = difference.detach()
    return WeightedMean((difference > 0).float().sum() + 0.5 * (difference == 0).float().sum(), len(difference))


def apply_mask(values: Tensor, mask: Tensor) -> Tensor:
    """`values` with everything outside the mask replaced by 0: whatever stands there, NaN too, reaches neither loss nor
    gradient."""
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


def masked_mean(values: Tensor, mask: Tensor) -> WeightedMean:
    """The mean of `values` over the mask, detached."""
    return WeightedMean(apply_mask(values.detach(), mask).sum(), mask.sum())


def mean(values: Tensor) -> WeightedMean:
    """The mean of all `values`, detached."""
    return WeightedMean(values.detach().float().sum(), values.numel())


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    bootstrap_values: Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> Tensor:
    """Generalized advantage estimation (arXiv:1506.02438, equation 16) over the tokens of the mask; (B, T) fp32, 0
    outside it.

    rewards (B, T): what token t earns; values (B, T): what is still to be earned before token t; after (B,): the same
    behind the last token, 0 for a completion that ended, the value of what was written where it was cut. Slots outside
    the mask are passed over, wherever they stand and whatever they hold.
    """
    rewards = apply_mask(rewards, mask).double()
    values = apply_mask(values, mask).double()
    advantages = torch.zeros_like(rewards)
    next_value = bootstrap_values.double()
    running = torch.zeros_like(bootstrap_values, dtype=torch.float64)
    for t in range(rewards.shape[1] - 1, -1, -1):
        in_mask = mask[:, t]
        running = torch.where(
            in_mask,
            rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * running,
            running,
        )
        next_value = torch.where(in_mask, values[:, t], next_value)
        advantages[:, t] = apply_mask(running, in_mask)
    return advantages.float()


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 (1/n) over the mask, (B, T) fp32, 0 outside it; values that are all equal (within 1e-6)
    become exactly 0."""
    selected = values[mask].double()
    if not len(selected) or float(selected.max() - selected.min()) <= 1e-6:
        return torch.zeros_like(values)
    std = selected.var(correction=0).sqrt()
    return apply_mask(((values.double() - selected.mean()) / std).float(), mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over the mask: 1 for values that foretell everything, 0 for constant
    ones; nan where returns do not vary."""
    targets = returns[mask].double()
    predictions = values[mask].double()
    variance = float(targets.var(correction=0)) if len(targets) else 0.0
    if variance:
        return 1.0 - float((targets - predictions).var(correction=0)) / variance
    return float("nan")


def reliability_bins(difference: Tensor, num_bins: int = 10) -> list[tuple[float, float, int]]:
    """How far the confidence of a preference model can be believed: (mean confidence, share that is right, pairs) of
    each bin.

    difference (P,): score of the chosen minus that of the rejected. The model prefers the side that is ahead, with
    confidence sigmoid(|difference|) in [0.5, 1] (Bradley-Terry); bins of equal width, empty ones left out; a tie is
    right by half.
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
    """Expected calibration error: the mean distance of confidence and share that is right, over all pairs
    (arXiv:1706.04599)."""
    total = sum(count for _, _, count in bins)
    if total:
        return sum(abs(confidence - right) * count for confidence, right, count in bins) / total
    return float("nan")


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's; nan where one of the two does not vary."""
    a = a.double() - a.double().mean()
    b = b.double() - b.double().mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size else float("nan")
