"""The attention kernel that torch would choose on the planned device: on meta tensors SDPA would compute T x T scores,
which it does on no device."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
FLASH_BACKEND = 1
"""torch's number of the backend (`torch.nn.attention.SDPBackend`)."""
FLASH_ALIGNMENT = 8
"""CUDA's kernels pad the width of a head to a multiple of this number."""
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
    """Computes query (B, H, T, D), key and value (B, KV, S, D) -> (B, H, T, D) with the kernel that torch chooses on
    `device`."""
    options: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    if query.is_meta or key.is_meta or value.is_meta:
        query = query.to("meta")
        key = key.to("meta")
        value = value.to("meta")
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            # torch turns a boolean mask into an additive one.
            attn_mask = torch.empty(
                attn_mask.shape,
                dtype=query.dtype,
                device="meta",
            )
        if device != "cpu":
            return _attend_on_cuda(
                query,
                key,
                value,
                attn_mask,
                **options,
            )
        if _cpu_uses_flash(
            query,
            key,
            value,
            attn_mask,
            enable_gqa=enable_gqa,
            **options,
        ):
            outputs = aten._scaled_dot_product_flash_attention_for_cpu(
                query,
                key,
                value,
                attn_mask=attn_mask,
                **options,
            )
            return outputs[0]  # type: ignore[no-any-return]
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask,
        enable_gqa=enable_gqa,
        **options,
    )


def _attend_on_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """Flash attention for half precision without a mask, else memory-efficient attention."""
    width = query.shape[-1]
    if scale is None:
        scale = width**-0.5
    query = _pad_head_dim(query)
    key = _pad_head_dim(key)
    value = _pad_head_dim(value)
    if mask is None and width <= FLASH_MAX_HEAD_DIM and query.dtype != torch.float32:
        outputs = aten._scaled_dot_product_flash_attention(
            query,
            key,
            value,
            dropout_p,
            is_causal,
            scale=scale,
        )
    else:
        if mask is not None:
            mask = mask.expand(*query.shape[:3], key.shape[2])
        outputs = aten._scaled_dot_product_efficient_attention(
            query,
            key,
            value,
            mask,
            torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad),
            dropout_p,
            is_causal,
            scale=scale,
        )
    return outputs[0][..., :width]  # type: ignore[no-any-return]


def _pad_head_dim(x: Tensor) -> Tensor:
    if x.shape[-1] % FLASH_ALIGNMENT:
        return F.pad(x, (0, -x.shape[-1] % FLASH_ALIGNMENT))
    return x


def _cpu_uses_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **options: Any,
) -> bool:
    """Returns torch's choice for uninitialized CPU tensors of the same shapes."""
    if mask is not None:
        mask = torch.empty(mask.shape, dtype=mask.dtype)
    choice = torch._fused_sdp_choice(
        _empty_on_cpu(query),
        _empty_on_cpu(key),
        _empty_on_cpu(value),
        mask,
        **options,
    )
    return choice == FLASH_BACKEND


def _empty_on_cpu(x: Tensor) -> Tensor:
    return torch.empty_strided(
        x.shape,
        x.stride(),
        dtype=x.dtype,
        requires_grad=x.requires_grad,
    )
