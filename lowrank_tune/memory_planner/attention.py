"""Which kernel attends, and what it needs: SDPA on meta tensors would take the way of T x T scores, which no device
takes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
FLASH_BACKEND = 1  # torch's number of the backend (`torch.nn.attention.SDPBackend`)
# CUDA's kernels pad the width of a head to the first, up to the second
FLASH_ALIGNMENT = 8
FLASH_MAX_HEAD_DIM = 256


def attend(
    device: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """query (B, H, T, D), key and value (B, heads, S, D) -> (B, H, T, D), by the kernel that torch takes on
    `device`."""
    if not any(tensor.is_meta for tensor in (query, key, value)):
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    query, key, value = (tensor if tensor.is_meta else tensor.to("meta") for tensor in (query, key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        # torch turns it into what is added to the scores
        attn_mask = torch.empty(attn_mask.shape, dtype=query.dtype, device="meta")
    options = (dropout_p, is_causal)
    if device == "cpu":
        if _flash_on_cpu(query, key, value, attn_mask, *options, scale, enable_gqa):
            return _first(
                aten._scaled_dot_product_flash_attention_for_cpu(
                    query,
                    key,
                    value,
                    *options,
                    attn_mask=attn_mask,
                    scale=scale,
                )
            )
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask,
            *options,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    width = query.shape[-1]
    scale = width**-0.5 if scale is None else scale
    query, key, value = (_pad_head_dim(tensor) for tensor in (query, key, value))
    if attn_mask is None and width <= FLASH_MAX_HEAD_DIM and query.dtype != torch.float32:
        return _first(aten._scaled_dot_product_flash_attention(query, key, value, *options, scale=scale))[..., :width]
    if attn_mask is not None:
        attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    compute_logsumexp = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    return _first(
        aten._scaled_dot_product_efficient_attention(
            query,
            key,
            value,
            attn_mask,
            compute_logsumexp,
            *options,
            scale=scale,
        )
    )[..., :width]


def _first(outputs: tuple[Tensor, ...]) -> Tensor:
    return outputs[0]


def _pad_head_dim(x: Tensor) -> Tensor:
    if x.shape[-1] % FLASH_ALIGNMENT:
        return F.pad(x, (0, -x.shape[-1] % FLASH_ALIGNMENT))
    return x


def _flash_on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    gqa: bool,
) -> bool:
    """Asks torch, of real tensors of the same shapes, whose pages nobody ever touches."""
    q, k, v = (
        torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, requires_grad=tensor.requires_grad)
        for tensor in (query, key, value)
    )
    if mask is None:
        real_mask = None
    else:
        real_mask = torch.empty(mask.shape, dtype=mask.dtype)
    return torch._fused_sdp_choice(q, k, v, real_mask, dropout, causal, scale=scale, enable_gqa=gqa) == FLASH_BACKEND
