"""Counts the kernels that a simulated program would start, by phase."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_tune.memory_planner.allocation_tracker import AllocationTracker
from lowrank_tune.memory_planner.kernel_costs import Kernel, kernel_of

KernelCounts = Mapping[str, Mapping[Kernel, float]]
"""How often each kernel is started, by phase."""
aten = torch.ops.aten


class KernelCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, counts kernels for the phase of the allocation tracker's program point. Enter it after the
    tracker, which would replace a 4-bit product by its parts."""

    def __init__(self, tracker: AllocationTracker) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracker = tracker
        self.counts: dict[str, Counter[Kernel]] = {}
        self.weight = 1

    @contextmanager
    def repeated(self, times: int) -> Iterator[None]:
        """Counts each kernel `times` times: for a part of a program that runs once in place of several equal ones."""
        before = self.weight
        self.weight = before * times
        try:
            yield
        finally:
            self.weight = before

    def add(self, kernel: Kernel) -> None:
        """Counts a kernel for the phase of the tracker's program point."""
        self.counts.setdefault(self.tracker.point[0], Counter())[kernel] += self.weight

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # Devices and sizes must be those of the meta tensors, not of the planned device.
        with torch._C.DisableTorchFunction():
            return self._count(func, args, kwargs or {})

    def _count(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        if func is aten.matmul.default:
            with self:
                return func.decompose(*args, **kwargs)
        outputs = func(*args, **kwargs)
        kernel = kernel_of(
            func,
            args,
            kwargs,
            outputs,
        )
        if kernel is not None:
            self.add(kernel)
        return outputs
