"""Attention of a decoding step over pages of keys and values, by PyTorch's variable-length flash attention.

FlashAttention 2 accepts pages of a multiple of 256 tokens and heads of up to 256 numbers. It must not split the keys of
a sequence: with pages its choice of splits returns wrong rows (pytorch issue 194167, torchtitan issue 3235).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from lowrank_tune.model.causal_attention import CAUSAL_MODEL_TYPES, SDPA_NAMES

varlen_attn: Any = None
# Older versions of PyTorch have no such module, or no pages in it.
with suppress(ImportError):
    from torch.nn.attention import varlen

    varlen_attn = varlen.varlen_attn

PAGED_NAME = "lowrank_tune_paged"
"""The attention function of a step over pages. It has no mask function, so that transformers makes no mask."""
PAGE_SIZE = 256
MAX_HEAD_WIDTH = 256
MIN_CAPABILITY = (8, 0)
"""FlashAttention runs on GPUs from Ampere on."""
VARLEN_ARGUMENTS = frozenset(("block_table", "seqused_k", "num_splits", "enable_gqa"))


@dataclass(frozen=True)
class PageTables:
    """Where the sequences of a step have their tokens: the pages (B, P) int32 and the number of tokens (B,) int32 of
    each, all at most `width`."""

    pages: Tensor
    lengths: Tensor
    width: int


PagedAttention = Callable[[Tensor, Tensor, Tensor, PageTables, float | None], Tensor]
"""Queries (B, H, D), keys and values (pages, page size, KV, D), tables, scale -> (B, H, D)."""


def varlen_paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: PageTables,
    scale: float | None,
) -> Tensor:
    """Computes attention of one query per sequence over the first tokens of its pages."""
    starts = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device)
    output = varlen_attn(
        query.to(keys.dtype),
        keys,
        values,
        starts,
        starts * tables.width,
        1,
        tables.width,
        scale=scale,
        enable_gqa=query.shape[1] != keys.shape[2],
        seqused_k=tables.lengths,
        block_table=tables.pages,
        num_splits=1,
    )
    return output.to(query.dtype)  # type: ignore[no-any-return]


def attend_to_pages(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    page_tables: PageTables,
    paged_attention: PagedAttention,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes attention as transformers' layers call it: query (B, H, 1, D), key and value (pages, page size, KV, D).
    Returns (B, 1, H, D). The last two arguments are those of the decoder's forward pass."""
    output = paged_attention(query[:, :, 0], key, value, page_tables, scaling)
    return output[:, None], None


AttentionInterface.register(PAGED_NAME, attend_to_pages)


def attends_to_pages(config: Any) -> bool:
    """Returns whether a decoder's attention reads nothing but keys and values, in the widths of flash attention."""
    if config.model_type not in CAUSAL_MODEL_TYPES or config._attn_implementation not in SDPA_NAMES:
        return False
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return bool(width <= MAX_HEAD_WIDTH and width % 8 == 0)


def has_flash_attention(model: Any) -> bool:
    """Returns whether `varlen_paged_attention` runs on a model's device in the dtype of its keys."""
    if model.device.type != "cuda" or not has_varlen_pages():
        return False
    is_half = model.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cuda")
    return is_half and torch.cuda.get_device_capability(model.device) >= MIN_CAPABILITY


def has_varlen_pages() -> bool:
    """Returns whether this PyTorch has variable-length attention with pages."""
    return varlen_attn is not None and inspect.signature(varlen_attn).parameters.keys() >= VARLEN_ARGUMENTS
