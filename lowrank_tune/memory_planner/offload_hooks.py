"""What waits in the machine's memory, on tensors without numbers: gone from the planned device, and made anew where it
is wanted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class OffloadedTensorHooks(saved_tensors_hooks):
    """Stands for torch's `save_on_cpu` on a GPU: what a graph keeps takes no bytes there until the backward pass asks
    for it."""

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
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
