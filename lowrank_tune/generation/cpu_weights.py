"""Copies of weights for products of a few rows on the CPU.

oneDNN stores a weight in blocks, in the order in which its kernel reads them, which PyTorch's plain matrices do not
have. A product of 32 rows takes a third less time then. PyTorch's compiler uses the same operators for frozen weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from lowrank_tune.model.logprobs import Head
from lowrank_tune.model.rounding import relative_difference

BLOCKED_ROWS = 32
"""Rows of a product for which oneDNN selects the blocks. Products of other numbers of rows use the same ones."""
RTOL = 1e-5
"""Relative difference in fp32 that rounding explains."""


class Weight(Protocol):
    """A weight with its bias."""

    def product(self, rows: Tensor) -> Tensor:
        """(N, in) -> (N, out), a new tensor."""


class PlainWeight:
    """A weight (in, out), which products of a few rows read faster than (out, in)."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
    ) -> None:
        self.weight = weight
        self.bias = bias

    def product(self, rows: Tensor) -> Tensor:
        if self.bias is None:
            return rows @ self.weight
        return torch.addmm(self.bias, rows, self.weight)


class BlockedWeight:
    """A weight (out, in) in oneDNN's blocks."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
    ) -> None:
        # Private operators, so `has_blocked_weights` tries them first.
        operators: Any = torch.ops.mkldnn
        self.bias = bias
        self.blocks = operators._reorder_linear_weight(weight.contiguous(), BLOCKED_ROWS)
        self.linear = operators._linear_pointwise.default

    def product(self, rows: Tensor) -> Tensor:
        return self.linear(rows, self.blocks, self.bias, "none", [], "")  # type: ignore[no-any-return]


@torch.no_grad()
def copy_weight(weight: Tensor, bias: Tensor | None) -> Weight:
    """Returns a copy of a weight (out, in) fp32, in the layout that products of a few rows read fastest."""
    weight = weight.detach()
    if bias is not None:
        bias = bias.detach()
    # oneDNN's operators need values, which a planned weight does not have. Its copy has the same size.
    if not weight.is_meta and has_blocked_weights():
        return BlockedWeight(weight, bias)
    return PlainWeight(weight.T.contiguous(), bias)


@cache
def has_blocked_weights() -> bool:
    """Returns whether this PyTorch has oneDNN's operators and they compute products in fp32. Measured to be faster on
    x86 only."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    weight = torch.linspace(-1.0, 2.0, 24 * 40).sin().view(24, 40)
    bias = torch.linspace(-1.0, 1.0, 24)
    rows = torch.linspace(-3.0, 1.0, 3 * 40).view(3, 40)
    try:
        computed = BlockedWeight(weight, bias).product(rows)
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False
    expected = rows.double() @ weight.double().T + bias.double()
    return relative_difference(computed, expected) <= RTOL


@dataclass(frozen=True)
class CopiedHead(Head):
    """A head whose products read a copy of its weight."""

    copied: Weight | None = None

    def product(self, hidden: Tensor) -> Tensor:
        assert self.copied is not None
        return self.copied.product(hidden.float())


def copy_head(head: Head) -> CopiedHead:
    """Returns the head with a copy of its weight in fp32."""
    return CopiedHead(
        head.weight,
        head.bias,
        head.scale,
        head.softcap,
        copy_weight(head.weight.float(), None),
    )
