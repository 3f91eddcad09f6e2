"""Who holds how many bytes, at every moment of a program that runs on meta tensors: each storage is counted from its
birth to its death."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

MAX_FUSED_ROWS = 8
"""Up to so many rows bitsandbytes' CUDA kernels read a 4-bit weight as it is; for more, some unpack it first
(`backends/cuda/ops.py`)."""
aten = torch.ops.aten
bnb = torch.ops.bitsandbytes
ProgramPoint = tuple[str, ...]


class AllocationTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, counts the storages that operations make. `peaks` holds of each `moment` what was alive at
    its highest point.

    `block` is what the device's allocator rounds up to. A storage is booked under `purpose`, or under `logits` where it
    has a side as long as the vocabulary.
    """

    def __init__(self, device: str, vocabulary: int) -> None:
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
        """From here on it is this moment."""
        self.point = point
        if point in self.peaks:
            self._highest = sum(self.peaks[point].values())
        else:
            self._highest = -1
        self._update_peak()

    def set_purpose(self, tensors: Iterable[Tensor | None], purpose: str) -> None:
        """Books these under another purpose."""
        for tensor in tensors:
            if tensor is not None and (entry := self._alive.get(tensor.untyped_storage()._cdata)) is not None:
                ref, size, before = entry
                self._alive[tensor.untyped_storage()._cdata] = ref, size, purpose
                self.live[before] -= size
                self.live[purpose] += size

    @contextmanager
    def with_purpose(self, purpose: str) -> Iterator[None]:
        """What is made meanwhile is booked under this purpose."""
        before = self.purpose
        self.purpose = purpose
        try:
            yield
        finally:
            self.purpose = before

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunction():  # what torch does below must see meta tensors as they are
            return self._run_op(func, args, kwargs or {})

    def _run_op(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if func is bnb.gemm_4bit.default:
            with self:
                if (done := _dequantized_linear(self.device, *args, **kwargs)) is not None:
                    return done
        # in inference mode it comes whole, with the copies of expanded keys that it makes inside
        if func is aten.matmul.default:
            with self:
                return func.decompose(*args, **kwargs)
        leaves = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        if any(tensor.is_meta for tensor in leaves) and not all(tensor.is_meta for tensor in leaves):
            if func._schema.is_mutable and not leaves[0].is_meta:
                return leaves[0]  # numbers that there are none of, into real ones: they stay as they are
            args = _resolve_masks(func, args)
            kwargs = dict(kwargs)
            args, kwargs = tree_map_only(Tensor, _to_meta, (args, kwargs))
        if func is aten._to_copy.default and args[0].is_meta:
            # there is nothing to take elsewhere
            kwargs = {key: value for key, value in kwargs.items() if key != "device"}
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._record(tensor)
        return out

    def _record(self, tensor: Tensor) -> None:
        if self.device != "cpu" and not tensor.is_meta and tensor.is_floating_point():
            return  # it lies in the machine's memory
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = -(-storage.nbytes() // self.block) * self.block
        if self.purpose == "activations" and self.vocabulary in tensor.shape:
            purpose = "logits"
        else:
            purpose = self.purpose
        self._alive[key] = weakref.ref(storage, partial(self._on_free, key)), size, purpose
        self.live[purpose] += size
        self.total += size
        self._update_peak()

    def _update_peak(self) -> None:
        if self.total > self._highest:
            self._highest = self.total
            self.peaks[self.point] = dict(self.live)

    def _on_free(self, key: int, _: object) -> None:
        _, size, purpose = self._alive.pop(key)
        self.live[purpose] -= size
        self.total -= size


def _to_meta(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _resolve_masks(func: Any, args: Sequence[Any]) -> Sequence[Any]:
    """How many numbers a mask picks is known only while it is real."""
    if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default) and any(
        index is not None and index.dtype == torch.bool and not index.is_meta for index in args[1]
    ):
        indices = [
            part
            for index in args[1]
            for part in (index.nonzero(as_tuple=True) if index is not None and index.dtype == torch.bool else (index,))
        ]
        return [args[0], indices, *args[2:]]
    return args


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
    """The product as bitsandbytes' default kernel forms it, with the weight unpacked; None where a kernel reads it as
    it is."""
    if device == "cuda" and x.numel() // x.shape[-1] <= MAX_FUSED_ROWS:
        return None
    if absmax_8bit is not None:
        absmax = bnb.dequantize_blockwise.default(absmax_8bit, absmax, absmax_code, 256, torch.float32) + absmax_offset
    return torch.nn.functional.linear(
        x,
        bnb.dequantize_4bit.default(weight, absmax, blocksize, kind, shape, x.dtype),
        bias,
    )
