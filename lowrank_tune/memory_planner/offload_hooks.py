"""Offloading of activations to host memory, on tensors without data: they take no bytes of the planned device until the
backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class OffloadedTensorHooks(saved_tensors_hooks):
    """Replaces torch's `save_on_cpu`: a saved tensor takes no bytes on the device until the backward pass reads it."""

    def __init__(self, pin_memory: bool = False) -> None:
        super().__init__(_pack, _unpack)


def _pack(tensor: Tensor) -> Any:
    if tensor.is_meta:
        return (tensor.shape, tensor.stride(), tensor.dtype)
    return tensor


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    shape, stride, dtype = packed
    return torch.empty_strided(
        shape,
        stride,
        dtype=dtype,
        device="meta",
    )
