"""Linears with LoRA adapters as one autograd function.

PEFT computes base(x) + scaling B A x with passes over the output for a copy, a factor and a sum, for each adapter
again. Here all adapters of a linear are one product of their ranks together, which is added to the output in place:
y = base(x), then y += (scaling x A^T) B^T. Linears that read the same x share the product with A, and their gradient of
x is one tensor. The input is stored as it came in, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_tune.model import lora_product as product
from lowrank_tune.model.lora_product import Layout, Weights


@dataclass(frozen=True)
class Adapter:
    """The matrices A (r, in) and B (out, r) of one adapter of linear number `index`. `dropped` is the input of this
    adapter if dropout makes it another one."""

    index: int
    down: Tensor
    up: Tensor
    scaling: float
    dropped: Tensor | None = None


def lora_linears(
    bases: Sequence[Any],
    adapters: Sequence[Adapter],
    x: Tensor,
) -> tuple[Tensor, ...]:
    """Returns base(x) plus the products of its adapters, for each linear of a group that reads `x`. There is at least
    one adapter, and they are sorted by linear. All products are in the dtype of x."""
    layout = Layout(
        tuple(bases),
        tuple([adapter.index for adapter in adapters]),
        tuple([len(adapter.down) for adapter in adapters]),
        tuple([adapter.scaling for adapter in adapters]),
        tuple([adapter.dropped is not None for adapter in adapters]),
    )
    weights = Weights(
        [adapter.down for adapter in adapters],
        [adapter.up for adapter in adapters],
        [adapter.dropped for adapter in adapters if adapter.dropped is not None],
    )
    if not torch.is_grad_enabled():
        return product.outputs_of(layout, x, weights)[0]
    return _LoraLinears.apply(  # type: ignore[no-any-return, no-untyped-call]
        layout,
        x,
        *weights.downs,
        *weights.ups,
        *weights.dropped,
    )


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layout: Layout,
        x: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        outputs, low = product.outputs_of(layout, x, Weights.of(layout, tensors))
        ctx.layout = layout
        ctx.shape = x.shape
        ctx.set_materialize_grads(False)
        # Only the gradients of A and B need the inputs.
        is_trained = any(ctx.needs_input_grad[2:])
        ctx.save_for_backward(
            x if is_trained and not all(layout.dropped) else None,
            low if is_trained else None,
            *tensors,
        )
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        layout: Layout = ctx.layout
        x, low, *tensors = ctx.saved_tensors
        weights = Weights.of(layout, tensors)
        count = len(layout.ranks)
        _, needs_x, *needed = ctx.needs_input_grad
        rows = [None if gradient is None else product.rows_of(gradient) for gradient in gradients]
        of_low = product.low_rank_gradient(layout, weights, rows)
        of_x = None
        if needs_x:
            of_x = product.input_gradient(layout, weights, rows, of_low).view(ctx.shape)
        return (
            None,
            of_x,
            *product.down_gradients(layout, weights, x, of_low, needed[:count]),
            *product.up_gradients(layout, weights, low, rows, needed[count : 2 * count]),
            *product.dropped_gradients(layout, weights, of_low),
        )
