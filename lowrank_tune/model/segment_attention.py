"""Attention over the segments of a packed row (`model/sequence_packing.py`), as a function that transformers calls.

The segments are arguments of the decoder, which passes them to the attention function of each layer, so that a layer
that is recomputed gets those of its forward pass. On a GPU PyTorch's variable-length flash attention computes all
segments in one call, where this version of PyTorch has it; on the CPU `model/cpu_segment_attention.py`.
"""

from __future__ import annotations

import importlib
import inspect
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from lowrank_tune.model.cpu_segment_attention import cpu_segment_attention
from lowrank_tune.model.gather_rows import gather_rows
from lowrank_tune.model.sequence_packing import Segments

varlen_attn: Any = None
VARLEN_OPTIONS = frozenset[str]()
# PyTorch 2.9 has no such module.
with suppress(ImportError):
    varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    VARLEN_OPTIONS = frozenset(inspect.signature(varlen_attn).parameters)

MIN_CAPABILITY = (8, 0)
SEGMENTS_NAME = "lowrank_tune_segments"
"""Has no mask function, so that transformers creates no masks."""


def has_segment_attention(
    device: torch.device,
    dtype: torch.dtype,
) -> bool:
    """Returns whether this version of PyTorch computes attention over segments on a device. The function of PyTorch
    2.10 has no scale, which some models set; its kernel is for half precision and GPUs from Ampere on."""
    if device.type == "cpu":
        return True
    if device.type != "cuda" or not {"scale", "window_size"} <= VARLEN_OPTIONS:
        return False
    return dtype != torch.float32 and torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


def segment_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    max_length_q: int,
    max_length_k: int,
    key_index: Tensor | None = None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Returns (1, W, H, D) from queries (1, H, W, D) and keys and values (1, KV, W, D)."""
    segments = Segments(
        cu_seq_lens_q,
        cu_seq_lens_k,
        max_length_q,
        max_length_k,
        key_index,
    )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = attend_to_segments(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        segments,
        scale,
    )
    return output[None], None


AttentionInterface.register(SEGMENTS_NAME, segment_attention_forward)


def attend_to_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float,
) -> Tensor:
    """Returns (W, H, D) from queries (W, H, D) and keys and values (W, KV, D)."""
    if query.device.type == "cuda":
        return _varlen_attention(
            query,
            key,
            value,
            segments,
            scale,
        )
    return cpu_segment_attention(
        query,
        key,
        value,
        segments.cu_seq_lens_q,
        segments.cu_seq_lens_k,
        segments.key_index,
        scale,
    )


def _varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float,
) -> Tensor:
    if torch.is_autocast_enabled("cuda"):
        # Norms that autocast runs in fp32 make queries in fp32, and it does not cast the inputs of this function.
        half = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(half), key.to(half), value.to(half)
    if segments.key_index is not None:
        key = gather_rows(key, segments.key_index)
        value = gather_rows(value, segments.key_index)
    options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0)}
    if "enable_gqa" in VARLEN_OPTIONS:
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    return varlen_attn(  # type: ignore[no-any-return]
        query,
        key,
        value,
        segments.cu_seq_lens_q,
        segments.cu_seq_lens_k,
        segments.max_length_q,
        segments.max_length_k,
        **options,
    )
