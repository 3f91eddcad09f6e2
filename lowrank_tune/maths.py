"""Tensors in, tensors out: weightings, masking, and the estimators that several algorithms share. No model, no file."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_tune.types import Mean


def token_mean_weights(says: Tensor) -> Tensor:
    """(B, T) bool -> (B, T) fp32: 1 / (tokens of the whole step) on each token. A step without tokens weighs nothing."""
    return says.float() / says.sum().clamp_min(1)


def where_says(values: Tensor, says: Tensor) -> Tensor:
    """`values` with everything outside the mask replaced by 0: whatever stands there, NaN too, reaches neither loss nor gradient."""
    return torch.where(says, values, torch.zeros((), dtype=values.dtype, device=values.device))


def mean_over(values: Tensor, says: Tensor) -> Mean:
    """The mean of `values` over the mask, detached."""
    return Mean(where_says(values.detach(), says).sum(), says.sum())
