"""The buffers of flash attention's backward pass on CUDA, which its operator does not return."""

from __future__ import annotations

import torch
from torch import Tensor

QUERY_BLOCK = 128
"""Queries are padded to a multiple of this number."""
SMALL_HEAD_DIM = 128
"""Heads up to this width are padded to a multiple of 32, wider ones to a multiple of 64."""


def flash_backward_buffers(query: Tensor, key: Tensor) -> list[Tensor]:
    """Returns buffers like those of torch's `mha_bwd` (`flash_attn/flash_api.cpp`) for query (B, H, T, D) and key (B,
    KV, S, D): the gradient of the queries in fp32, one sum per query, and, if several heads share keys, the gradients
    of keys and values for each head."""
    batch_size, num_heads, num_queries, width = query.shape
    num_kv_heads, num_keys = key.shape[1:3]
    padded_queries = _round_up(num_queries, QUERY_BLOCK)
    padded_width = _round_up(width, 32 if width <= SMALL_HEAD_DIM else 64)
    sums = torch.empty(
        batch_size,
        num_heads,
        padded_queries,
        dtype=torch.float32,
        device=query.device,
    )
    query_gradient = sums.new_empty(
        batch_size,
        padded_queries,
        num_heads,
        padded_width,
    )
    buffers = [sums, query_gradient]
    if num_kv_heads != num_heads:
        for _ in ("keys", "values"):
            buffers.append(
                key.new_empty(
                    batch_size,
                    num_keys,
                    num_heads,
                    width,
                )
            )
    return buffers


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
