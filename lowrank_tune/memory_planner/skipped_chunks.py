"""Chunks of an MLP that are not simulated: between the first and the last all use the same memory.

The forward pass has its peak in the last chunk, when the outputs of all others exist, and the backward pass in the
first, when the gradients of all others exist. The kernels of the first chunk count for the skipped ones too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from lowrank_tune.memory_planner.fake_device import FakeDeviceMode
from lowrank_tune.memory_planner.kernel_counter import KernelCounter
from lowrank_tune.model.chunked_forward import Recomputation

RunChunk = Callable[..., Tensor]
"""The type of `model.chunked_forward.run_chunk`."""


def skip_middle_chunks(
    run_chunk: RunChunk,
    mode: FakeDeviceMode,
    counter: KernelCounter | None = None,
) -> RunChunk:
    """Returns `run_chunk` for the first and the last chunk, and a function that only allocates for the others.
    `counter` counts the kernels of the first chunk once for each chunk but the last."""
    dtypes: list[torch.dtype] = []

    def first_and_last(
        forward: Callable[[Tensor], Tensor],
        chunk: Tensor,
        number: int,
        count: int,
        recomputation: Recomputation,
    ) -> Tensor:
        if 0 < number < count - 1:
            return skipped_chunk(chunk, dtypes[-1])
        times = max(1, count - 1) if number == 0 else 1
        with mode.active(), nullcontext() if counter is None else counter.repeated(times):
            output = run_chunk(
                forward,
                chunk if counter is None else _end_of_repeated_backward(chunk, counter, times),
                number,
                count,
                recomputation,
            )
        dtypes[:] = [output.dtype]
        return output if counter is None else _start_of_repeated_backward(output, counter, times)

    return first_and_last


def skipped_chunk(chunk: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a tensor like the output of a chunk that is not computed. Its gradient for `chunk` is of the chunk's
    size, and is not computed either."""
    return _SkippedChunk.apply(chunk, dtype)  # type: ignore[no-any-return,no-untyped-call]


class _SkippedChunk(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        chunk: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.dtype = chunk.dtype
        return chunk.new_empty(chunk.shape, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_empty(grad.shape, dtype=ctx.dtype), None


def _start_of_repeated_backward(output: Tensor, counter: KernelCounter, times: int) -> Tensor:
    """Returns `output`; from here on the backward pass counts each kernel `times` times."""
    return _ChangeWeight.apply(output, counter, times, 1)  # type: ignore[no-any-return,no-untyped-call]


def _end_of_repeated_backward(chunk: Tensor, counter: KernelCounter, times: int) -> Tensor:
    """Returns `chunk`; the backward pass that arrives here counts each kernel once again."""
    return _ChangeWeight.apply(chunk, counter, 1, times)  # type: ignore[no-any-return,no-untyped-call]


class _ChangeWeight(torch.autograd.Function):
    """The identity. Its backward pass multiplies the counter's weight by `factor` / `divisor`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        counter: KernelCounter,
        factor: int,
        divisor: int,
    ) -> Tensor:
        ctx.counter = counter
        ctx.factor = factor
        ctx.divisor = divisor
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.counter.weight = ctx.counter.weight * ctx.factor // ctx.divisor
        return grad, None, None, None
