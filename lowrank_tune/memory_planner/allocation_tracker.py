"""Counts the bytes of all storages at every point of a program that runs on meta tensors, from their creation until
they are freed."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lowrank_tune.memory_planner.flash_backward import flash_backward_buffers

MAX_FUSED_ROWS = 8
"""bitsandbytes' CUDA kernels read a packed 4-bit weight for up to this number of rows; for more, some unpack it first
(`backends/cuda/ops.py`)."""
aten = torch.ops.aten
bnb = torch.ops.bitsandbytes
ProgramPoint = tuple[str, ...]


class AllocationTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, counts the storages that operations create. `peaks` contains, for each program point, the
    bytes by purpose when most were in use.

    `block` is the size to which the device's allocator rounds up. A new storage counts for `purpose`, or for `logits`
    if it has a dimension as long as the vocabulary.
    """

    def __init__(
        self,
        device: str,
        vocabulary: int,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.vocabulary = vocabulary
        self.block = 512 if device == "cuda" else 1
        self.live: Counter[str] = Counter()
        self.total = 0
        self.peaks: dict[ProgramPoint, dict[str, int]] = {}
        self.point: ProgramPoint = ("start",)
        self.purpose = "activations"
        self._highest = -1
        self._alive: dict[int, tuple[weakref.ref[Any], int, str]] = {}

    def move_to(self, *point: str) -> None:
        """Begins a program point, or continues it."""
        self.point = point
        self._highest = -1
        if point in self.peaks:
            self._highest = sum(self.peaks[point].values())
        self._update_peak()

    def set_purpose(
        self,
        tensors: Iterable[Tensor | None],
        purpose: str,
    ) -> None:
        """Counts the storages of these tensors for another purpose."""
        for tensor in tensors:
            if tensor is None:
                continue
            key = tensor.untyped_storage()._cdata
            if key in self._alive:
                ref, size, before = self._alive[key]
                self._alive[key] = ref, size, purpose
                self.live[before] -= size
                self.live[purpose] += size

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # The operations below must see meta tensors, not the planned device.
        with torch._C.DisableTorchFunction():
            return self._run_op(func, args, kwargs or {})

    def _run_op(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        if func is bnb.gemm_4bit.default:
            with self:
                output = _dequantized_linear(
                    self.device,
                    *args,
                    **kwargs,
                )
            if output is not None:
                return output
        # In inference mode a matmul is not decomposed, and the copies of expanded keys that it makes are not seen.
        if func is aten.matmul.default:
            with self:
                return func.decompose(*args, **kwargs)
        leaves = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        num_meta = sum(tensor.is_meta for tensor in leaves)
        if 0 < num_meta < len(leaves):
            if func._schema.is_mutable and not leaves[0].is_meta:
                # A write of meta values into a real tensor, which stays as it is.
                return leaves[0]
            args = _resolve_masks(func, args)
            kwargs = dict(kwargs)
            args, kwargs = tree_map_only(Tensor, _to_meta, (args, kwargs))
        if func is aten._to_copy.default and args[0].is_meta:
            # A meta tensor has no data to copy to another device.
            kwargs = {key: value for key, value in kwargs.items() if key != "device"}
        scratch = []
        if func is aten._scaled_dot_product_flash_attention_backward.default:
            with self:
                scratch = flash_backward_buffers(args[1], args[2])
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._record(tensor)
        scratch.clear()
        return out

    def _record(self, tensor: Tensor) -> None:
        if self.device != "cpu" and not tensor.is_meta and tensor.is_floating_point():
            # The tensor is in host memory.
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = -(-storage.nbytes() // self.block) * self.block
        purpose = self.purpose
        if purpose == "activations" and self.vocabulary in tensor.shape:
            purpose = "logits"
        self._alive[key] = weakref.ref(storage, partial(self._on_free, key)), size, purpose
        self.live[purpose] += size
        self.total += size
        self._update_peak()

    def _update_peak(self) -> None:
        if self.total > self._highest:
            self._highest = self.total
            self.peaks[self.point] = dict(self.live)

    def _on_free(
        self,
        key: int,
        _: object,
    ) -> None:
        _, size, purpose = self._alive.pop(key)
        self.live[purpose] -= size
        self.total -= size


def _to_meta(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(
        tensor.shape,
        tensor.stride(),
        dtype=tensor.dtype,
        device="meta",
    )


def _resolve_masks(func: Any, args: Sequence[Any]) -> Sequence[Any]:
    """Replaces real boolean masks by indices, because the number of True values of a meta mask is unknown."""
    if func not in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
        return args
    indices = []
    for index in args[1]:
        if index is not None and index.dtype == torch.bool and not index.is_meta:
            indices += index.nonzero(as_tuple=True)
        else:
            indices.append(index)
    return [args[0], indices, *args[2:]]


def _dequantized_linear(
    device: str,
    x: Tensor,
    weight: Tensor,
    shape: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    kind: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor | None:
    """Computes the product as bitsandbytes' default kernel, with an unpacked weight; returns None if a kernel reads the
    packed weight."""
    num_rows = x.numel() // x.shape[-1]
    if device == "cuda" and num_rows <= MAX_FUSED_ROWS:
        return None
    if absmax_8bit is not None:
        absmax = (
            bnb.dequantize_blockwise.default(
                absmax_8bit,
                absmax,
                absmax_code,
                256,
                torch.float32,
            )
            + absmax_offset
        )
    unpacked = bnb.dequantize_4bit.default(
        weight,
        absmax,
        blocksize,
        kind,
        shape,
        x.dtype,
    )
    return torch.nn.functional.linear(x, unpacked, bias)
