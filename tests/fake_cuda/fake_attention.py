"""Scaled dot-product attention with the kernel that torch would choose on the fake GPU."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
MASK_ALIGNMENT = 8
"""The memory-efficient kernel copies a mask whose last dimension is no multiple of this number."""
_cpu_attention = F.scaled_dot_product_attention


def fake_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Computes query (B, H, T, D), key and value (B, KV, S, D) -> (B, H, T, D): by flash attention in half precision
    without a mask, else by the memory-efficient kernel."""
    if not query.is_cuda:
        return _cpu_attention(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (_to_half(each) for each in (query, key, value))
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1])
    if attn_mask is None and query.dtype != torch.float32:
        outputs = aten._scaled_dot_product_flash_attention(
            query,
            key,
            value,
            dropout_p,
            is_causal,
            scale=scale,
        )
        return outputs[0]  # type: ignore[no-any-return]
    assert query.shape[1] == key.shape[1], "the memory-efficient kernel needs as many key heads as query heads"
    if attn_mask is not None:
        attn_mask = _additive_mask(attn_mask, query).expand(*query.shape[:3], key.shape[2])
    outputs = aten._scaled_dot_product_efficient_attention(
        query,
        key,
        value,
        attn_mask,
        torch.is_grad_enabled() and query.requires_grad,
        dropout_p,
        is_causal,
        scale=scale,
    )
    return outputs[0]  # type: ignore[no-any-return]


def _to_half(x: Tensor) -> Tensor:
    if x.dtype == torch.float32:
        return x.to(torch.bfloat16)
    return x


def _additive_mask(mask: Tensor, query: Tensor) -> Tensor:
    """Makes a mask additive and aligned, as torch does in each call (`convert_boolean_attn_mask`, `pad_bias`)."""
    if mask.dtype == torch.bool:
        zero = torch.zeros((), dtype=query.dtype, device=mask.device)
        mask = torch.where(mask.logical_not(), -torch.inf, zero)
    width = mask.shape[-1]
    if width % MASK_ALIGNMENT:
        mask = F.pad(mask, (0, -width % MASK_ALIGNMENT))[..., :width]
    return mask
