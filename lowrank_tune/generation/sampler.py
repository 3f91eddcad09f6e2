"""Draws tokens: temperature, top-k, top-p, min-p, and the log-probs of the same distribution that was drawn from."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_tune.generation.sampling_params import SamplingParams

BLOCK = 128
"""Tokens of the vocabulary in a block, whose weights are summed once."""
MAX_UNIFORM = 1.0 - 1e-12
"""A draw stays below the sum of the weights in spite of rounding, so that the drawn token has a weight above 0."""


def sample(
    logits: Tensor,
    sampling: SamplingParams,
    uniform: Tensor,
) -> tuple[Tensor, Tensor]:
    """Returns tokens (N,) and their log-probs (N,) float64, from logits (N, V) fp32 that are divided by the
    temperature, and uniform numbers (N,) float64 in [0, 1). Overwrites the logits.

    Temperature 0 returns the most likely token, with its log-prob at temperature 1 without filters. Otherwise the
    token is drawn by the inverse of the cumulative distribution. Where logits are not finite, so is the log-prob.
    """
    greedy = sampling.temperature == 0
    if greedy:
        tokens = logits.argmax(dim=1, keepdim=True)
    else:
        logits = apply_top_k_top_p(logits, sampling)
    weights = logits.sub_(logits.amax(dim=1, keepdim=True)).exp_()
    if weights.shape[1] % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, -weights.shape[1] % BLOCK))
    blocks = weights.view(len(weights), -1, BLOCK)
    cumulative = blocks.sum(dim=2).double().cumsum(dim=1)
    if not greedy:
        # The clamp has an effect only for NaN, which must not become a token beyond the vocabulary.
        tokens = _inverse_cdf(blocks, cumulative, uniform[:, None]).clamp_max_(logits.shape[1] - 1)
    probs = weights.gather(1, tokens).double() / cumulative[:, -1:]
    return tokens.squeeze(1), probs.log().squeeze(1)


def apply_top_k_top_p(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """Returns the logits with -inf for the tokens that top-k, then top-p, then min-p exclude. The most likely token
    always stays."""
    if 0 < sampling.top_k < logits.shape[1]:
        threshold = logits.topk(sampling.top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, order = logits.sort(
            dim=1,
            descending=True,
            stable=True,
        )
        probs = ordered.softmax(dim=1)
        # A token is excluded if the more likely ones already have a mass of top_p.
        excluded_in_order = probs.cumsum(dim=1) - probs >= sampling.top_p
        excluded_in_order[:, 0] = False
        excluded = torch.zeros_like(excluded_in_order).scatter_(1, order, excluded_in_order)
        logits = logits.masked_fill(excluded, -torch.inf)
    if sampling.min_p > 0.0:
        threshold = logits.amax(dim=1, keepdim=True) + torch.log(torch.tensor(sampling.min_p))
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    return logits


def _inverse_cdf(
    blocks: Tensor,
    cumulative: Tensor,
    uniform: Tensor,
) -> Tensor:
    """Returns the tokens (N, 1) at which the cumulative weights pass `uniform` (N, 1): first the block, then the token
    in it. blocks (N, n, BLOCK) contains weights, cumulative (N, n) the cumulative sums of the blocks, in float64."""
    total = cumulative[:, -1:]
    target = (uniform * total).minimum(total * MAX_UNIFORM)
    # The clamp has an effect only for NaN.
    block = torch.searchsorted(
        cumulative,
        target,
        right=True,
    ).clamp_max(cumulative.shape[1] - 1)
    block_end = cumulative.gather(1, block)
    previous_end = cumulative.gather(1, (block - 1).clamp_min(0))
    block_start = torch.where(block > 0, previous_end, 0.0)
    rows = torch.arange(len(blocks), device=blocks.device)
    inside = blocks[rows, block[:, 0]].double().cumsum(dim=1)
    # The block's sum was rounded in fp32, so the search inside the block is for a share of it, not for an amount.
    share = ((target - block_start) / (block_end - block_start)).clamp(0.0, MAX_UNIFORM)
    offset = torch.searchsorted(
        inside,
        share * inside[:, -1:],
        right=True,
    ).clamp_max(BLOCK - 1)
    return block * BLOCK + offset
