"""Rows of a tensor by index, with a gradient that is summed in a fixed order on every device.

On a GPU the gradient of `index_select` is summed in any order, and so is that of an index in a graph that torch's
compiler makes for a GPU of compute capability 9.0 or higher. A custom operator is not traced, and its backward pass
sorts the index.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

OPERATOR = "lowrank_tune::gather_rows"


def gather_rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Returns `tensor[index]` for an index (N,)."""
    if tensor.device.type == "cpu":
        return tensor.index_select(0, index)
    return _gather_rows(tensor, index)  # type: ignore[no-any-return]


@torch.library.custom_op(OPERATOR, mutates_args=())
def _gather_rows(tensor: Tensor, index: Tensor) -> Tensor:
    return tensor.index_select(0, index)


@_gather_rows.register_fake
def _(tensor: Tensor, index: Tensor) -> Tensor:
    return tensor.new_empty((index.shape[0], *tensor.shape[1:]))


@torch.library.custom_op(f"{OPERATOR}_backward", mutates_args=())
def _sum_rows(
    gradient: Tensor,
    index: Tensor,
    num_rows: int,
) -> Tensor:
    """Returns (num_rows, ...): the sums of the rows of a gradient (N, ...) with the same index."""
    sums = gradient.new_zeros((num_rows, *gradient.shape[1:]))
    return sums.index_put_((index,), gradient, accumulate=True)


@_sum_rows.register_fake
def _(
    gradient: Tensor,
    index: Tensor,
    num_rows: int,
) -> Tensor:
    return gradient.new_empty((num_rows, *gradient.shape[1:]))


def _save(
    ctx: Any,
    inputs: tuple[Tensor, Tensor],
    output: Tensor,
) -> None:
    tensor, index = inputs
    ctx.num_rows = tensor.shape[0]
    ctx.save_for_backward(index)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    (index,) = ctx.saved_tensors
    return _sum_rows(gradient, index, ctx.num_rows), None


_gather_rows.register_autograd(_gradients, setup_context=_save)
