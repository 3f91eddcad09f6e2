"""Drawing tokens: temperature, top-k, top-p, min-p, and the log-probs of the very distribution that was drawn from."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_tune.generation.sampling_params import SamplingParams

BLOCK = 128
MAX_UNIFORM = 1.0 - 1e-12
"""A draw stays below the whole of the weights, whatever rounding does: the token found then has a weight that is not
0."""


def sample(logits: Tensor, sampling: SamplingParams, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """logits (N, V) fp32 over the temperature, uniform (N,) float64 in [0, 1) -> tokens (N,) and their log-probs (N,)
    float64.

    At temperature 0 the likeliest token, with its log-prob at temperature 1, unfiltered. Else the token at which the
    cumulated weights pass the uniform number: first the block of tokens, then the token in it, in float64. Overwrites
    the logits. Where they are not finite, so is the log-prob.
    """
    greedy = sampling.temperature == 0
    logits = logits if greedy else apply_top_k_top_p(logits, sampling)
    likeliest = logits.argmax(dim=1, keepdim=True) if greedy else None
    weights = logits.sub_(logits.amax(dim=1, keepdim=True)).exp_()
    if weights.shape[1] % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, -weights.shape[1] % BLOCK))
    blocks = weights.view(len(weights), -1, BLOCK)
    cumulative = blocks.sum(dim=2).double().cumsum(dim=1)
    if likeliest is None:
        tokens = _inverse_cdf(blocks, cumulative, uniform[:, None])
    else:
        tokens = likeliest
    return tokens.squeeze(1), (weights.gather(1, tokens).double() / cumulative[:, -1:]).log().squeeze(1)


def apply_top_k_top_p(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """The logits with -inf for what top-k, then top-p, then min-p leave out. The likeliest token always stays."""
    if 0 < sampling.top_k < logits.shape[1]:
        threshold = logits.topk(sampling.top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, order = logits.sort(dim=1, descending=True, stable=True)
        p = ordered.softmax(dim=1)
        out = p.cumsum(dim=1) - p >= sampling.top_p  # what came before suffices
        out[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(out).scatter_(1, order, out), -torch.inf)
    if sampling.min_p > 0.0:
        threshold = logits.amax(dim=1, keepdim=True) + torch.log(torch.tensor(sampling.min_p))
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    return logits


def _inverse_cdf(blocks: Tensor, cumulative: Tensor, uniform: Tensor) -> Tensor:
    """blocks (N, n, BLOCK) of weights, upto (N, n) their cumulated sums -> (N, 1) tokens."""
    target = (uniform * cumulative[:, -1:]).minimum(cumulative[:, -1:] * MAX_UNIFORM)
    # beyond the last one only for NaN
    block = torch.searchsorted(cumulative, target, right=True).clamp_max(cumulative.shape[1] - 1)
    end = cumulative.gather(1, block)
    start = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp_min(0)), 0.0)
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block[:, 0]].double().cumsum(dim=1)
    # The block's sum was rounded once, in fp32: the share of it that is wanted is looked up, not the amount.
    fraction = ((target - start) / (end - start)).clamp(0.0, MAX_UNIFORM)
    return block * BLOCK + torch.searchsorted(inside, fraction * inside[:, -1:], right=True).clamp_max(BLOCK - 1)
