"""Refuses operations whose arguments no kernel of a GPU takes together."""

from __future__ import annotations

from collections.abc import Sequence

from kernel_work import PRODUCTS
from torch import Tensor

SAME_DTYPE = {*PRODUCTS, "index_copy", "index_copy_", "index_put", "index_put_", "scatter", "scatter_"}
"""Operations whose floating-point arguments must have one dtype on a GPU; attention too."""
COPIES = {"copy_", "_to_copy"}
INDEXING = {"index", "index_put", "index_put_"}


class MismatchError(RuntimeError):
    """An operation has arguments that no kernel takes together."""


def check_devices(name: str, tensors: Sequence[Tensor]) -> None:
    """Raises MismatchError for tensors of two devices. A number (a tensor without dimensions), the source or target
    of a copy, and the indices of a tensor on the GPU may be on the CPU."""
    if name in COPIES:
        return
    if name in INDEXING:
        tensors = [tensor for tensor in tensors if tensor is tensors[0] or tensor.is_cuda or tensor.is_floating_point()]
    devices = {tensor.device for tensor in tensors if tensor.is_cuda or tensor.ndim}
    if len(devices) > 1:
        raise MismatchError(f"{name}: tensors on {', '.join(sorted(map(str, devices)))}: {_describe(tensors)}")


def check_dtypes(name: str, tensors: Sequence[Tensor]) -> None:
    """Raises MismatchError for floating-point arguments of two dtypes, where a kernel takes only one."""
    if name not in SAME_DTYPE and "attention" not in name:
        return
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    if "attention" in name:
        # The saved logarithms of the sums are fp32.
        floating = [tensor for tensor in floating if tensor.ndim == 4]
    if len({tensor.dtype for tensor in floating}) > 1:
        raise MismatchError(f"{name}: arguments of several dtypes: {_describe(floating)}")


def _describe(tensors: Sequence[Tensor]) -> str:
    return ", ".join(f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}" for tensor in tensors)
