"""Bytes, FLOPs and kind of the kernel that an operator starts on a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
bnb = torch.ops.bitsandbytes
HALF_BYTES = 2
"""Bytes of an element of an unpacked weight."""
BACKWARD_PRODUCTS = 2.5
"""Matrix products of the backward pass of attention for one of its forward pass: five for two."""
GATHERS = (
    aten.embedding.default,
    aten.index_select.default,
    aten.index.Tensor,
    aten.gather.default,
)
SCATTERS = (
    aten.index_put.default,
    aten.index_put_.default,
    aten.scatter.src,
    aten.scatter_.src,
    aten.index_copy_.default,
    aten.index_add_.default,
)
"""Operators that read or write a part of a large tensor."""
NO_KERNEL = (
    aten._local_scalar_dense.default,
    aten.lift_fresh.default,
    aten.detach.default,
    # A view, whose schema does not name it as one.
    aten._unsafe_view.default,
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
)


class KernelKind(StrEnum):
    """What limits a kernel besides the memory's bandwidth."""

    ELEMENTWISE = "elementwise"
    GEMM = "matrix product"
    FLASH = "flash attention"
    FLASH_BACKWARD = "flash attention, backward"
    MASKED = "attention with a mask"
    MASKED_BACKWARD = "attention with a mask, backward"
    NF4 = "4-bit product"


@dataclass(frozen=True, slots=True)
class Kernel:
    """One launch. A 4-bit product has the sizes `mnk` = (rows, outputs, inputs), because the GPU decides whether it is
    one kernel or four."""

    kind: KernelKind
    num_bytes: int
    flops: int = 0
    mnk: tuple[int, int, int] = (0, 0, 0)


def kernel_of(
    func: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    outputs: Any,
) -> Kernel | None:
    """Returns the kernel of an operator, None if it starts none: a view, or an allocation."""
    if func in NO_KERNEL or _is_view(func):
        return None
    given = _by_name(func, args, kwargs)
    if func is bnb.gemm_4bit.default:
        return _nf4_kernel(given)
    num_bytes = _bytes_of(
        func,
        args,
        kwargs,
        outputs,
    )
    if num_bytes == 0:
        return None
    name = func._schema.name.partition("::")[2]
    if "scaled_dot_product" in name and name.startswith("_"):
        return _attention_kernel(name, given, num_bytes)
    flops = _product_flops(name, given)
    kind = KernelKind.GEMM if flops else KernelKind.ELEMENTWISE
    return Kernel(kind, num_bytes, flops)


def _is_view(func: Any) -> bool:
    """Returns whether the outputs are the inputs' storages, unchanged."""
    if func._schema.is_mutable:
        return False
    return any(output.alias_info is not None for output in func._schema.returns)


def _by_name(
    func: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the arguments by the names of the operator's schema."""
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _nf4_kernel(given: Mapping[str, Any]) -> Kernel:
    """The packed weight is half a byte an element, with a scale of one byte for 64 elements."""
    outputs, inputs = given["shapeB"]
    rows = given["A"].numel() // inputs
    packed = outputs * inputs // 2 + outputs * inputs // 64
    activations = HALF_BYTES * rows * (inputs + outputs)
    return Kernel(
        KernelKind.NF4,
        packed + activations,
        2 * rows * outputs * inputs,
        (rows, outputs, inputs),
    )


def _attention_kernel(
    name: str,
    given: Mapping[str, Any],
    num_bytes: int,
) -> Kernel:
    """Two products over all pairs of a query and a key; flash attention skips the half that a causal mask hides."""
    batch, heads, queries, width = given["query"].shape
    keys = given["key"].shape[2]
    flops = 4 * batch * heads * queries * keys * width
    has_mask = given.get("attn_bias") is not None or given.get("attn_mask") is not None
    is_backward = name.endswith("backward")
    if given.get("is_causal") and not has_mask:
        flops //= 2
    if is_backward:
        flops = round(flops * BACKWARD_PRODUCTS)
    if has_mask:
        kind = KernelKind.MASKED_BACKWARD if is_backward else KernelKind.MASKED
    else:
        kind = KernelKind.FLASH_BACKWARD if is_backward else KernelKind.FLASH
    return Kernel(kind, num_bytes, flops)


def _product_flops(name: str, given: Mapping[str, Any]) -> int:
    """Returns 2 m n k of a matrix product, 0 for another operator. A product in place has the same arguments."""
    match name.removesuffix("_"):
        case "mm" | "addmm":
            left = given.get("mat1", given.get("self"))
            return 2 * int(left.numel()) * int(given["mat2"].shape[-1])
        case "bmm":
            return 2 * int(given["self"].numel()) * int(given["mat2"].shape[-1])
        case "baddbmm":
            return 2 * int(given["batch1"].numel()) * int(given["batch2"].shape[-1])
        case "linear":
            return 2 * int(given["input"].numel()) * int(given["weight"].shape[0])
    return 0


def _bytes_of(
    func: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    outputs: Any,
) -> int:
    """Returns the bytes that are read and written; nothing is assumed to stay in a cache."""
    written = sum(stored_bytes(tensor) for tensor in _tensors(outputs))
    if not func._schema.returns:
        written = sum(stored_bytes(tensor) for tensor in _tensors(_overwritten(func, args)))
    if func in GATHERS:
        return 2 * written
    if func in SCATTERS:
        return 2 * max(stored_bytes(tensor) for tensor in _tensors((args[1:], kwargs)))
    inputs = list(_tensors((args, kwargs)))
    if func is aten.copy_.default:
        return written + stored_bytes(args[1])
    return written + sum(stored_bytes(tensor) for tensor in inputs)


def _overwritten(func: Any, args: Sequence[Any]) -> list[Any]:
    """Returns the arguments that an operator without outputs writes to, as those for lists of tensors."""
    overwritten = []
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            overwritten.append(value)
    return overwritten


def _tensors(values: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            yield leaf


def stored_bytes(tensor: Tensor) -> int:
    """Returns the bytes of the elements that are stored: an expanded dimension is stored once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if stride or not size:
            elements *= size
    return elements * tensor.element_size()
