"""The product of linears with all their LoRA adapters, and its gradients, as plain operations in one dtype.

Each adapter has its columns in one low-rank product x A^T. The low-rank tensors and the matrices A and B are small next
to the inputs and outputs, so factors, casts and copies are applied to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor

Gradient = Tensor | None


@dataclass(frozen=True)
class Layout:
    """Frozen linears that read the same x, and their adapters: adapter number i belongs to linear `indices[i]`, has
    rank `ranks[i]`, and reads x unless it is `dropped[i]`. Adapters are sorted by linear."""

    bases: tuple[Any, ...]
    indices: tuple[int, ...]
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    dropped: tuple[bool, ...]

    def adapters_of(self, index: int) -> list[int]:
        """Returns the numbers of a linear's adapters."""
        return [number for number, owner in enumerate(self.indices) if owner == index]

    @property
    def dropped_numbers(self) -> list[int]:
        """The numbers of the adapters with dropout."""
        return [number for number, is_dropped in enumerate(self.dropped) if is_dropped]

    def columns(
        self,
        low: Tensor,
        numbers: Sequence[int],
        first: int = 0,
    ) -> Tensor:
        """Returns the columns from the first to the last of these adapters of a tensor that begins with adapter
        `first`."""
        start = sum(self.ranks[first : numbers[0]])
        stop = sum(self.ranks[first : numbers[-1] + 1])
        return low[:, start:stop]

    def scale(self, low: Tensor) -> Tensor:
        """Multiplies the columns of each adapter by its scaling, in place."""
        if len(set(self.scalings)) == 1:
            return low.mul_(self.scalings[0])
        for number, scaling in enumerate(self.scalings):
            self.columns(low, [number]).mul_(scaling)
        return low


@dataclass(frozen=True)
class Weights:
    """A (r, in) and B (out, r) of all adapters, and the inputs of those that have dropout."""

    downs: Sequence[Tensor]
    ups: Sequence[Tensor]
    dropped: Sequence[Tensor]

    @classmethod
    def of(cls, layout: Layout, tensors: Sequence[Tensor]) -> Weights:
        """Returns the weights from one list of all."""
        count = len(layout.ranks)
        return cls(tensors[:count], tensors[count : 2 * count], tensors[2 * count :])


def outputs_of(
    layout: Layout,
    x: Tensor,
    weights: Weights,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Returns the outputs (..., out) of the linears, and the scaled x A^T of all adapters, (N, sum of r)."""
    low = layout.scale(_low_rank_product(layout, x, weights))
    outputs = []
    for index, base in enumerate(layout.bases):
        output = base(x)
        numbers = layout.adapters_of(index)
        if numbers:
            up = _joined(weights.ups, numbers, 1, x.dtype)
            # A B of zeros leaves the output as it is, bit for bit, whatever kernel adds it: the product of the base is
            # complete, and zeros are added to it.
            output.view(-1, output.shape[-1]).addmm_(layout.columns(low, numbers), up.T)
        outputs.append(output)
    return tuple(outputs), low


def rows_of(x: Tensor) -> Tensor:
    """Returns a tensor (..., d) as (N, d)."""
    return x.reshape(-1, x.shape[-1])


def _low_rank_product(
    layout: Layout,
    x: Tensor,
    weights: Weights,
) -> Tensor:
    rows = rows_of(x)
    if all(layout.dropped):
        low = rows.new_empty(len(rows), sum(layout.ranks))
    else:
        # Computed for the adapters with dropout too: the columns of the others are then the same as without dropout,
        # bit for bit, which a product of another shape does not guarantee.
        low = rows @ _joined(weights.downs, range(len(layout.ranks)), 0, x.dtype).T
    for number, source in zip(layout.dropped_numbers, weights.dropped, strict=True):
        layout.columns(low, [number]).copy_(rows_of(source) @ weights.downs[number].to(x.dtype).T)
    return low


def low_rank_gradient(
    layout: Layout,
    weights: Weights,
    gradients: Sequence[Gradient],
) -> Tensor:
    """Returns the scaled gradient of x A^T, (N, sum of r), from the gradients (N, out) of the outputs, at least one of
    which is not None."""
    given = next(gradient for gradient in gradients if gradient is not None)
    parts = []
    for index, gradient in enumerate(gradients):
        numbers = layout.adapters_of(index)
        if not numbers:
            continue
        if gradient is None:
            parts.append(given.new_zeros(len(given), sum(layout.ranks[number] for number in numbers)))
        else:
            parts.append(gradient @ _joined(weights.ups, numbers, 1, gradient.dtype))
    if len(parts) == 1:
        return layout.scale(parts[0])
    return layout.scale(torch.cat(parts, dim=1))


def input_gradient(
    layout: Layout,
    weights: Weights,
    gradients: Sequence[Gradient],
    of_low: Tensor,
) -> Tensor:
    """Returns the gradient (N, in) of x, without that of the inputs after dropout: all parts are added to one
    tensor."""
    total: Gradient = None
    for base, gradient in zip(layout.bases, gradients, strict=True):
        if gradient is not None:
            weight = _plain_weight(base, gradient.dtype)
            total = gradient @ weight if total is None else total.addmm_(gradient, weight)
    assert total is not None, "a backward pass without a gradient"
    if not any(layout.dropped):
        return total.addmm_(of_low, _joined(weights.downs, range(len(layout.ranks)), 0, total.dtype))
    for number, is_dropped in enumerate(layout.dropped):
        if not is_dropped:
            total.addmm_(layout.columns(of_low, [number]), weights.downs[number].to(total.dtype))
    return total


def down_gradients(
    layout: Layout,
    weights: Weights,
    x: Tensor | None,
    of_low: Tensor,
    needed: Sequence[bool],
) -> list[Gradient]:
    """Returns the gradients of all A that need one, in the dtype of A."""
    gradients: list[Gradient] = [None] * len(needed)
    sources = dict(zip(layout.dropped_numbers, weights.dropped, strict=True))
    for number, source in sources.items():
        if needed[number]:
            gradients[number] = layout.columns(of_low, [number]).T @ rows_of(source)
    numbers = [number for number, is_needed in enumerate(needed) if is_needed and number not in sources]
    if numbers:
        assert x is not None, "the input is saved for adapters that are trained"
        joined = layout.columns(of_low, numbers).T @ rows_of(x)
        for number in numbers:
            gradients[number] = layout.columns(joined.T, [number], numbers[0]).T
    return _cast_like(gradients, weights.downs)


def up_gradients(
    layout: Layout,
    weights: Weights,
    low: Tensor | None,
    gradients: Sequence[Gradient],
    needed: Sequence[bool],
) -> list[Gradient]:
    """Returns the gradients of all B that need one, in the dtype of B."""
    of_ups: list[Gradient] = []
    for number, is_needed in enumerate(needed):
        gradient = gradients[layout.indices[number]]
        if not is_needed or gradient is None:
            of_ups.append(None)
            continue
        assert low is not None, "the low-rank product is saved for adapters that are trained"
        # On the CPU the product (out, N) (N, r) takes 2 to 10 times as long as this one, which has the same sums.
        of_ups.append((layout.columns(low, [number]).T @ gradient).T)
    return _cast_like(of_ups, weights.ups)


def dropped_gradients(
    layout: Layout,
    weights: Weights,
    of_low: Tensor,
) -> list[Tensor]:
    """Returns the gradients of the inputs after dropout."""
    gradients = []
    for number, source in zip(layout.dropped_numbers, weights.dropped, strict=True):
        columns = layout.columns(of_low, [number])
        gradients.append((columns @ weights.downs[number].to(columns.dtype)).view(source.shape))
    return gradients


def _joined(
    matrices: Sequence[Tensor],
    numbers: Sequence[int],
    dim: int,
    dtype: torch.dtype,
) -> Tensor:
    cast = [matrices[number].to(dtype) for number in numbers]
    if len(cast) == 1:
        return cast[0]
    return torch.cat(cast, dim=dim)


def _plain_weight(base: Any, dtype: torch.dtype) -> Tensor:
    """Returns the weight (out, in) of a frozen linear, unpacked if it is stored in 4 bits."""
    if isinstance(base, Linear4bit):
        packed = base.weight.view(-1, 1)
        return dequantize_4bit(packed, base.weight.quant_state).to(dtype)  # type: ignore[no-any-return]
    return base.weight.to(dtype)  # type: ignore[no-any-return]


def _cast_like(gradients: Sequence[Gradient], weights: Sequence[Tensor]) -> list[Gradient]:
    cast: list[Gradient] = []
    for gradient, weight in zip(gradients, weights, strict=True):
        cast.append(None if gradient is None else gradient.to(weight.dtype))
    return cast
