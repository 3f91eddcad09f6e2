"""Which kernel attends, and what it needs: SDPA on meta tensors would take the way of T x T scores, which no device takes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
FLASH_ALIGNED = 8  # CUDA's kernels pad the width of a head to it


def attend(device: str, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
           is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
    """query (B, H, T, D), key and value (B, heads, S, D) -> (B, H, T, D), by the kernel that torch takes on `device`."""
    if not any(one.is_meta for one in (query, key, value)):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    query, key, value = (one if one.is_meta else one.to("meta") for one in (query, key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty(attn_mask.shape, dtype=query.dtype, device="meta")  # torch turns it into what is added to the scores
    if device == "cpu":
        if _flash_on_cpu(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
            if enable_gqa and key.shape[1] != query.shape[1]:
                key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], 1) for one in (key, value))
            return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]  # type: ignore[no-any-return]
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    width = query.shape[-1]
    query, key, value = (F.pad(one, (0, -one.shape[-1] % FLASH_ALIGNED)) if one.shape[-1] % FLASH_ALIGNED else one for one in (query, key, value))
    if attn_mask is None and width <= 256 and query.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale or width**-0.5)[0][..., :width]  # type: ignore[no-any-return]
    if attn_mask is not None:
        attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    kept = torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, kept, dropout_p, is_causal, scale=scale or width**-0.5)[0][..., :width]  # type: ignore[no-any-return]


def _flash_on_cpu(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *how: Any) -> bool:
    """Asks torch, of real tensors of the same shapes, whose pages nobody ever touches."""
    dropout, causal, scale, gqa = how
    real = [torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, requires_grad=one.requires_grad) for one in (query, key, value)]
    real_mask = None if mask is None else torch.empty(mask.shape, dtype=mask.dtype)
    return bool(torch._fused_sdp_choice(*real, real_mask, dropout, causal, scale=scale, enable_gqa=gqa) == 1)
