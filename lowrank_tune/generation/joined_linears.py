"""Linears that read the same tensor, with all their adapters, in few products.

PEFT computes base(x) + scaling B A x with seven operations for each adapter of each linear. Here the A of all adapters
of a group are one matrix, and each linear adds one product with its B, which contains the scaling. If the group has a
copy of its 4-bit weights in half precision, the weights are one matrix too, and so are all B. The adapters are never
added to a copy: half precision would lose small updates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor

from lowrank_tune.generation.packed_products import reads_packed_weight
from lowrank_tune.model.lora_modules import base_layer_of, joined_adapters

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Copy:
    """Weights (in, out of all linears), their bias (out), and the B of all adapters (r, out)."""

    weight: Tensor
    bias: Tensor | None
    up: Tensor | None


class JoinedLinears:
    """Linears with plain LoRA adapters, or none, that read the same tensor one after another. All products are in
    `dtype`; for an input in another dtype each module computes its own forward."""

    def __init__(
        self,
        modules: Sequence[Any],
        stack: Sequence[str],
        dtype: torch.dtype,
    ) -> None:
        self.modules = modules
        self.bases = [base_layer_of(module) for module in modules]
        self.dtype = dtype
        self.sizes = [base.out_features for base in self.bases]
        self.copy: _Copy | None = None
        self.last_input: Tensor | None = None
        self.outputs: Sequence[Tensor] = ()
        self.down: Tensor | None = None
        self.ups: list[Tensor] = []
        downs = []
        for module, base in zip(modules, self.bases, strict=True):
            zero = torch.zeros((), dtype=dtype, device=base.weight.device)
            down, up = joined_adapters(module, stack, zero.expand(base.in_features, base.out_features))
            if len(up):
                downs.append(down)
            self.ups.append(up.to(dtype))
        if downs:
            self.down = torch.cat(downs, dim=1).to(dtype)

    @property
    def copied_bytes(self) -> int:
        """Bytes of a copy of the weights, with the joined B."""
        inputs: int = self.bases[0].in_features
        ranks = 0 if self.down is None else self.down.shape[1]
        num_values: int = (inputs + ranks) * sum(self.sizes)
        return self.dtype.itemsize * num_values

    def gains_from_copy(self, rows: int, device: torch.device) -> bool:
        """Returns whether a product of `rows` rows unpacks one of the weights."""
        return not all(
            reads_packed_weight(
                rows,
                base.out_features,
                base.in_features,
                self.dtype,
                device,
            )
            for base in self.bases
        )

    def make_copy(self) -> None:
        """Unpacks the weights, which must be those of `Linear4bit` modules, into one matrix."""
        weights = []
        for base in self.bases:
            packed = base.weight
            weights.append(dequantize_4bit(packed.data.view(-1, 1), packed.quant_state).to(self.dtype))
        weight = torch.cat(weights)
        up = None
        if self.down is not None:
            up = torch.block_diag(*self.ups)  # type: ignore[no-untyped-call]
        self.copy = _Copy(weight.T, self._joined_bias(weight), up)

    def _joined_bias(self, weight: Tensor) -> Tensor | None:
        if all(base.bias is None for base in self.bases):
            return None
        biases = []
        for base, size in zip(self.bases, self.sizes, strict=True):
            biases.append(weight.new_zeros(size) if base.bias is None else base.bias.detach().to(self.dtype))
        return torch.cat(biases)

    def forward(
        self,
        index: int,
        x: Tensor,
    ) -> Tensor:
        """Returns the output of module number `index`."""
        if x.dtype != self.dtype:
            module = self.modules[index]
            return type(module).forward(module, x)  # type: ignore[no-any-return]
        if x is not self.last_input:
            self.outputs = self._compute(x)
            self.last_input = x
        output = self.outputs[index]
        if index == len(self.modules) - 1:
            self.clear()
        return output

    def clear(self) -> None:
        """Frees outputs that are not needed any more."""
        self.last_input = None
        self.outputs = ()

    def _compute(self, x: Tensor) -> Sequence[Tensor]:
        rows = x.reshape(-1, x.shape[-1])
        low = None if self.down is None else rows @ self.down
        copy = self.copy
        if copy is not None and not self.gains_from_copy(len(rows), x.device):
            copy = None
        if copy is not None and x.shape[-2] == 1:
            product = _product(copy.weight, copy.bias, rows)
            if low is not None and copy.up is not None:
                product.addmm_(low, copy.up)
            return torch.split(product.view(*x.shape[:-1], -1), self.sizes, dim=-1)
        # The values of prompts are kept until their slots are filled. As a part of one product they would keep it all.
        outputs = []
        first_column = first_rank = 0
        for base, up, size in zip(self.bases, self.ups, self.sizes, strict=True):
            if copy is None:
                output = type(base).forward(base, x)
            else:
                columns = slice(first_column, first_column + size)
                bias = None if copy.bias is None else copy.bias[columns]
                output = _product(copy.weight[:, columns], bias, rows).view(*x.shape[:-1], -1)
            if low is not None and len(up):
                output.view(-1, size).addmm_(low[:, first_rank : first_rank + len(up)], up)
            outputs.append(output)
            first_column += size
            first_rank += len(up)
        return outputs


def _product(
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
) -> Tensor:
    if bias is None:
        return rows @ weight
    return torch.addmm(bias, rows, weight)
