"""Attention of a decoding step: one query per row against the cached keys and values.

On the CPU PyTorch's fused kernel splits its work into one tiny product for each row and head; two batched products over
all of them take half the time. On a GPU the query heads of a group become the queries of their one key head, because
with a mask transformers 5.17 copies keys and values once per query head in each layer and step (5.23 does not). Keys,
values, scaling and mask are those that the model's own modules pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lowrank_tune.model.causal_attention import (
    ATTENTION_KEY,
    DECODE_ATTENTION_NAME,
    GROUPED_SDPA_NAME,
    SDPA_NAME,
    AttentionName,
)

ATTENTION_BY_DEVICE = {"cpu": DECODE_ATTENTION_NAME, "cuda": GROUPED_SDPA_NAME}
"""Device type -> the attention of a decoding step."""
UNSUPPORTED_KWARGS = ("position_bias", "cache", "softcap", "s_aux")
"""Arguments with which transformers' own `sdpa` is called instead."""


def decode_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes attention as two batched products: query (B, H, 1, D), key and value (B, KV, W, D), mask (B, 1, 1, W),
    boolean (True: may be seen) or additive. Returns (B, 1, H, D).

    A call that is not a decoding step with a mask goes to transformers' own `sdpa`.
    """
    if attention_mask is None or not _is_decoding_step(query, dropout, kwargs):
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            **kwargs,
        )
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    grouped = _group_heads(query * scaling, key.shape[1])
    scores = torch.matmul(grouped, key.transpose(2, 3))
    if attention_mask.dtype == torch.bool:
        scores = scores.masked_fill_(~attention_mask, -torch.inf)
    else:
        scores = scores.add_(attention_mask)
    return _ungroup_heads(torch.matmul(scores.softmax(dim=-1), value)), None


def grouped_sdpa(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes SDPA with the query heads of a group as queries of their key head, so that keys and values are not
    copied.

    Shapes: query (B, H, 1, D), key and value (B, KV, W, D), mask (B, 1 or H, 1, W), boolean or additive. Returns (B, 1,
    H, D). A call that is not a decoding step with a mask goes to transformers' own `sdpa`, which groups the heads
    itself if there is no mask.
    """
    heads = query.shape[1]
    groups = key.shape[1]
    if attention_mask is None or groups == heads or not _is_decoding_step(query, dropout, kwargs):
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            **kwargs,
        )
    if attention_mask.shape[1] == heads:
        attention_mask = _group_heads(attention_mask, groups)
    grouped = _group_heads(query, groups)
    output = F.scaled_dot_product_attention(
        grouped,
        key,
        value,
        attn_mask=attention_mask,
        scale=scaling,
    )
    return _ungroup_heads(output), None


def _is_decoding_step(
    query: Tensor,
    dropout: float,
    kwargs: Mapping[str, Any],
) -> bool:
    return query.shape[2] == 1 and not dropout and all(kwargs.get(name) is None for name in UNSUPPORTED_KWARGS)


def _group_heads(x: Tensor, groups: int) -> Tensor:
    """(B, H, 1, D) -> (B, groups, H / groups, D)."""
    rows, _, _, width = x.shape
    return x.reshape(rows, groups, -1, width)


def _ungroup_heads(x: Tensor) -> Tensor:
    """(B, groups, H / groups, D) -> (B, 1, H, D)."""
    rows, _, _, width = x.shape
    return x.reshape(rows, 1, -1, width)


AttentionInterface.register(DECODE_ATTENTION_NAME, decode_attention)
AttentionInterface.register(GROUPED_SDPA_NAME, grouped_sdpa)
AttentionMaskInterface.register(DECODE_ATTENTION_NAME, sdpa_mask)
AttentionMaskInterface.register(GROUPED_SDPA_NAME, sdpa_mask)


@contextmanager
def batched_attention(model: Any) -> Iterator[None]:
    """Makes a model that attends by `sdpa` use the function of its device in `ATTENTION_BY_DEVICE`."""
    config = model.get_decoder().config
    name = ATTENTION_BY_DEVICE.get(model.device.type)
    if vars(config).get(ATTENTION_KEY) != SDPA_NAME or name is None:
        yield
        return
    with AttentionName(config, name):
        yield
