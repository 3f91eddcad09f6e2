"""Bytes and FLOPs of an operation, as if one kernel read each input once and wrote each output once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
"""Operation -> position of its left matrix."""
GATHERS = {"index", "gather", "embedding", "index_select"}
"""Operations that read only as much as they write."""
SCATTERS = {"index_put", "index_put_", "index_copy", "index_copy_", "scatter", "scatter_"}
"""Operations that touch only as much as they are given."""
BLOCK = 64
NESTED_BLOCK = 256
NF4_BYTES = 0.5 + 1 / BLOCK + 4 / (BLOCK * NESTED_BLOCK)
"""Bytes of a packed weight: half a byte, an 8-bit scale for each block, and an fp32 scale for each block of those."""
UNPACK_LAUNCHES = 3
"""Kernels that unpack a 4-bit weight: its scales, their offset, the weight (`_dequant_linear_fallback`)."""
FUSED_MAX_ROWS = 1536
"""Rows above which bitsandbytes never fuses (`_gemm_4bit_custom_max_m`)."""
BACKWARD_FLOPS = 2.5
"""FLOPs of an attention's backward pass relative to its forward pass: five products of the scores' size to two."""
RESULT_BYTES = 2


@dataclass(frozen=True)
class Work:
    """What one operation costs."""

    kind: str
    num_bytes: float
    flops: float = 0.0
    launches: int = 1


def num_stored_bytes(tensor: Tensor) -> int:
    """Returns the bytes that a tensor really has: an expanded dimension counts once."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return tensor.element_size() * prod(sizes)


def work_of(
    name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    outputs: Sequence[Tensor],
) -> list[Work]:
    """Returns the work of an operation of torch or bitsandbytes, by the name of its schema without the namespace."""
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if name == "gemm_4bit":
        return gemm_4bit_work(args[0], args[2])
    if "attention" in name:
        return [attention_work(name, args, inputs, outputs)]
    if name in GATHERS:
        return [Work("elementwise", 2 * _total(outputs))]
    if name in SCATTERS:
        return [Work("elementwise", 3 * num_stored_bytes(inputs[-1]))]
    num_bytes = _total(inputs) + _total(outputs)
    # A product in place has the same arguments.
    product = name.removesuffix("_")
    if product in PRODUCTS:
        left, right = args[PRODUCTS[product] :][:2]
        return [Work("product", num_bytes, 2 * left.numel() * right.shape[-1])]
    return [Work("elementwise", num_bytes)]


def gemm_4bit_work(x: Tensor, weight_shape: Sequence[int]) -> list[Work]:
    """Returns the work of x (..., K) times a packed weight (N, K): one fused kernel, or an unpacked weight."""
    width, columns = weight_shape
    rows = x.numel() // columns
    flops = 2 * rows * width * columns
    moved = RESULT_BYTES * rows * (width + columns)
    weights = width * columns
    if is_fused(rows, width, columns):
        return [Work("fused 4-bit product", NF4_BYTES * weights + moved, flops)]
    return [
        Work("unpack", (NF4_BYTES + RESULT_BYTES) * weights, launches=UNPACK_LAUNCHES),
        Work("product", RESULT_BYTES * weights + moved, flops),
    ]


def is_fused(rows: int, width: int, columns: int) -> bool:
    """Returns bitsandbytes' own choice for the fake GPU."""
    # Its module can only be imported when the fake GPU is installed.
    from bitsandbytes.backends.cuda.ops import _gemm_4bit_use_custom_cuda

    return rows <= FUSED_MAX_ROWS and bool(_gemm_4bit_use_custom_cuda(0, torch.bfloat16, rows, width, columns))


def attention_work(
    name: str,
    args: Sequence[Any],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
) -> Work:
    """Returns the work of an attention: query (B, H, T, D), key (B, KV, S, D). Flash attention skips what a causal mask
    hides; the memory-efficient kernel computes all T x S scores."""
    is_backward = "backward" in name
    query, key = args[1:3] if is_backward else args[:2]
    rows, heads, length, width = query.shape
    flops = 4.0 * rows * heads * length * key.shape[2] * width
    kind = "dense attention"
    if "flash" in name:
        kind = "flash attention"
        if length > 1:
            flops /= 2
    if is_backward:
        flops *= BACKWARD_FLOPS
    return Work(kind, _total(inputs) + _total(outputs), flops)


def _total(tensors: Sequence[Tensor]) -> int:
    return sum(num_stored_bytes(tensor) for tensor in tensors)
