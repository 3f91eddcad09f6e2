"""Chunks of an MLP that are not simulated: between the first and the last all use the same memory.

The forward pass has its peak in the last chunk, when the outputs of all others exist, and the backward pass in the
first, when the gradients of all others exist.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowrank_tune.memory_planner.fake_device import FakeDeviceMode
from lowrank_tune.model.chunked_forward import Recomputation

RunChunk = Callable[..., Tensor]
"""The type of `model.chunked_forward.run_chunk`."""


def skip_middle_chunks(run_chunk: RunChunk, mode: FakeDeviceMode) -> RunChunk:
    """Returns `run_chunk` for the first and the last chunk, and a function that only allocates for the others."""
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
        with mode.active():
            output = run_chunk(
                forward,
                chunk,
                number,
                count,
                recomputation,
            )
        dtypes[:] = [output.dtype]
        return output

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
