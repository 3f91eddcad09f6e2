"""Attention of a decoding step on the CPU: one query a row against the columns that the row may see.

PyTorch's fused CPU kernel cuts its work into one tiny product for each row and head; two batched products over all of them take half the
time. Nothing else changes: keys and values, scaling and mask are what the model's own modules hand over.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "lowrank_tune_one_query"
FIELD = "_attn_implementation_internal"


def one_query(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
              scaling: float | None = None, **kwargs: Any) -> tuple[Tensor, None]:  # fmt: skip
    """query (B, H, 1, D), key and value (B, heads, W, D), mask (B, 1, 1, W), True: may be seen, or what is added to the scores. (B, 1, H, D).

    Whatever is no such step goes to transformers' own `sdpa`.
    """
    rows, heads, queries, width = query.shape
    if queries != 1 or dropout or attention_mask is None or any(kwargs.get(name) is not None for name in ("position_bias", "cache", "softcap")):
        found, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        return found, None
    grouped = (query * (width**-0.5 if scaling is None else scaling)).view(rows, key.shape[1], heads // key.shape[1], width)
    scores = torch.matmul(grouped, key.transpose(2, 3))
    if attention_mask.dtype == torch.bool:
        scores = scores.masked_fill_(~attention_mask, -torch.inf)
    else:
        scores = scores.add_(attention_mask)
    return torch.matmul(scores.softmax(dim=-1), value).view(rows, 1, heads, value.shape[-1]), None


AttentionInterface.register(NAME, one_query)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def batched_attention(model: Any) -> Iterator[None]:
    """While it is entered, a model on the CPU that attends by `sdpa` does so by `one_query`."""
    state = vars(model.get_decoder().config)  # for every few steps: the config's own setter checks all its fields
    if state.get(FIELD) != "sdpa" or model.device.type != "cpu":
        yield
        return
    state[FIELD] = NAME
    try:
        yield
    finally:
        state[FIELD] = "sdpa"
