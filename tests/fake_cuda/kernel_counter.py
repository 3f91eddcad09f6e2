"""Counts what a program would make a GPU do: kernel launches, bytes, FLOPs, copies, and the points where the host waits
for the GPU.

Tensors of the fake device have shapes, dtypes and a device, and no numbers (`FakeTensorMode`); tensors of the CPU stay
real. An operation on both raises, and so does a product of two dtypes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from argument_checks import check_devices, check_dtypes
from code_place import code_place
from integer_values import (
    attach_values,
    compute_values,
    forget_values,
    read_number,
    required_values,
    set_values,
    stand_in,
)
from kernel_times import seconds_of
from kernel_totals import Totals
from kernel_work import Work, work_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
VIEWS = {"_unsafe_view", "_reshape_alias", "lift_fresh"}
"""Operations that launch nothing although their schema may name no alias."""
PIN_OPS = {"_pin_memory", "pin_memory"}
PINNED = "is_in_pinned_memory"
"""The attribute of a CPU tensor that a GPU copies to and from while the host continues."""


class KernelCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, inside `FakeTensorMode`, counts into `totals`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.totals = Totals()
        self._replacements: dict[str, Callable[..., Any]] = {
            "_local_scalar_dense": self._read,
            "equal": self._equal,
            "nonzero": self._nonzero,
            "_to_copy": self._to_copy,
            "copy_": self._copy_into,
            "index": self._index,
            "index_put": self._index_put,
            "index_put_": self._index_put,
            "masked_select": self._refuse,
        }

    @contextlib.contextmanager
    def counting(self) -> Iterator[Totals]:
        """Yields totals of the block alone; they are not in the counter's own."""
        outer = self.totals
        self.totals = Totals()
        try:
            yield self.totals
        finally:
            self.totals = outer

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = func._schema.name.partition("::")[2]
        if not _uses_fake_device(tensors, kwargs):
            with _disable_current_modes():
                return _run_on_cpu(func, name, args, kwargs)
        check_devices(name, tensors)
        check_dtypes(name, tensors)
        replacement = self._replacements.get(name)
        if replacement is not None:
            return replacement(func, args, kwargs)
        return self._run(func, args, kwargs)

    def _run(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> Any:
        """Runs an operation on tensors without numbers, counts it, and computes integers and masks that are known."""
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        values = None
        if _is_of_integers(func, inputs, kwargs):
            with _disable_current_modes():
                values = compute_values(func, args, kwargs)
        results = func(*args, **kwargs)
        if values is not None:
            with _disable_current_modes():
                attach_values(results, values, inputs)
        elif func._schema.is_mutable:
            _forget_written(func, args, kwargs)
        self._count(func, args, kwargs, results)
        return results

    def _count(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        results: Any,
    ) -> None:
        name = func._schema.name.partition("::")[2]
        outputs = [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]
        if name in ALLOCATIONS or name == "device" or _is_view(func, outputs):
            return
        for work in work_of(name, args, kwargs, outputs):
            self.add(work.kind if name == "gemm_4bit" else name, work)

    def add(self, name: str, work: Work) -> None:
        """Counts work under this name."""
        totals = self.totals
        totals.launches += work.launches
        totals.gpu_seconds += seconds_of(work)
        totals.launches_by_op[name] += work.launches
        totals.bytes_by_kind[work.kind] += round(work.num_bytes)
        totals.flops_by_kind[work.kind] += round(work.flops)

    def wait(self) -> None:
        """Counts a point where the host waits for the GPU."""
        self.totals.host_syncs[code_place()] += 1

    def copy_to_device(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the copy of a CPU tensor on the fake device, and counts it."""
        self.totals.copies_to_device[code_place()] += 1
        result = torch.empty(
            values.shape,
            dtype=dtype or values.dtype,
            device=CUDA,
        )
        with _disable_current_modes():
            copied = values.detach().to(result.dtype, copy=True)
        return set_values(result, copied)

    def _read(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> Any:
        self.wait()
        with _disable_current_modes():
            return read_number(args[0])

    def _equal(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> bool:
        """Two tensors without known numbers are taken to be equal."""
        self.wait()
        self._count(torch.ops.aten.eq.Tensor, args, {}, [])
        with _disable_current_modes():
            result = compute_values(func, args, kwargs)
        return True if result is None else bool(result)

    def _nonzero(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> Tensor:
        self.wait()
        with _disable_current_modes():
            values = required_values(args[0], "nonzero").nonzero()
        result = set_values(torch.empty(values.shape, dtype=torch.long, device=CUDA), values)
        self._count(func, args, kwargs, result)
        return result

    def _to_copy(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> Tensor:
        source = args[0]
        target = kwargs.get("device")
        if target is None or torch.device(target).type == source.device.type:
            return self._run(func, args, kwargs)  # type: ignore[no-any-return]
        if torch.device(target).type == "cuda":
            with _disable_current_modes():
                values = _materialized(source)
            return self.copy_to_device(values, kwargs.get("dtype"))
        self.totals.copies_to_host[code_place()] += 1
        self.wait()
        with _disable_current_modes():
            return stand_in(source).to(kwargs.get("dtype") or source.dtype)

    def _copy_into(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> Tensor:
        target, source = args[:2]
        if source.device.type == target.device.type:
            return self._run(func, args, kwargs)  # type: ignore[no-any-return]
        if target.is_cuda:
            copied = self.copy_to_device(source, target.dtype)
            # The copy writes to its target directly.
            with self.counting():
                self._run(func, (target, copied), {})
            return target  # type: ignore[no-any-return]
        self.totals.copies_to_host[code_place()] += 1
        # Only a copy to pinned memory goes on without the host.
        is_non_blocking = bool(kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
        if not (is_non_blocking and getattr(target, PINNED, False)):
            self.wait()
        with _disable_current_modes():
            return target.copy_(stand_in(source))  # type: ignore[no-any-return]

    def _index(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """A mask becomes the indices of its True elements, which the host waits for."""
        indices: list[Any] = []
        for index in args[1]:
            indices += self._device_indices(index)
        return self._run(func, (args[0], indices), kwargs)  # type: ignore[no-any-return]

    def _index_put(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> Tensor:
        indices: list[Any] = []
        for index in args[1]:
            indices += self._device_indices(index)
        return self._run(func, (args[0], indices, *args[2:]), kwargs)  # type: ignore[no-any-return]

    def _device_indices(self, index: Tensor | None) -> list[Tensor | None]:
        if index is None:
            return [None]
        if not index.is_cuda:
            index = self.copy_to_device(index)
        if index.dtype != torch.bool:
            return [index]
        found = self._nonzero(torch.ops.aten.nonzero.default, (index,), {})
        with _disable_current_modes():
            columns = required_values(found, "a mask as an index").unbind(1)
        return [set_values(each, column) for each, column in zip(found.unbind(1), columns, strict=True)]

    def _refuse(self, func: Any, *_: Any) -> Any:
        raise NotImplementedError(f"{func}: the fake device does not know the shape of the result")


def _run_on_cpu(
    func: Any,
    name: str,
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> Any:
    """Runs an operation on real tensors. A CPU build has no pinned memory, so a tensor that should be in it is only
    marked."""
    if name in PIN_OPS:
        result = args[0].clone()
        setattr(result, PINNED, True)
        return result
    is_pinned = kwargs.pop("pin_memory", None)
    result = func(*args, **kwargs)
    if is_pinned:
        setattr(result, PINNED, True)
    return result


def _uses_fake_device(tensors: Sequence[Tensor], kwargs: Mapping[str, Any]) -> bool:
    device = kwargs.get("device")
    if device is not None and torch.device(device).type == "cuda":
        return True
    return any(tensor.is_cuda or isinstance(tensor, FakeTensor) for tensor in tensors)


def _is_of_integers(
    func: Any,
    inputs: Sequence[Tensor],
    kwargs: Mapping[str, Any],
) -> bool:
    """Returns whether an operation of torch has no floating-point argument and is not requested to return one."""
    dtype = kwargs.get("dtype")
    if func.namespace != "aten" or (dtype is not None and dtype.is_floating_point):
        return False
    return not any(tensor.is_floating_point() for tensor in inputs)


def _forget_written(
    func: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> None:
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        written = kwargs.get(argument.name)
        if position < len(args):
            written = args[position]
        for tensor in tree_leaves(written):
            if isinstance(tensor, Tensor):
                forget_values(tensor)


def _is_view(func: Any, outputs: Sequence[Tensor]) -> bool:
    if func._schema.is_mutable or not outputs:
        return False
    if func.overloadpacket.__name__ in VIEWS:
        return True
    returned = func._schema.returns
    return bool(returned) and returned[0].alias_info is not None


def _materialized(tensor: Tensor) -> Tensor:
    """Returns a CPU tensor, real also for one that `FakeTensorMode` has made."""
    if isinstance(tensor, FakeTensor):
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    return tensor
