"""The linear modules of a rollout on the CPU as plain tensors: which weights are copied, and the products with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from lowrank_tune.generation.cpu_weights import copy_weight
from lowrank_tune.model.logprobs import Head
from lowrank_tune.model.lora_modules import (
    base_layer_of,
    groups_of_same_input,
    has_forward_hooks,
    is_plain_lora,
    joined_adapters,
)

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ScratchLimits:
    """Which copies of weights may be made: at most `num_bytes`, and of weights in fp32 only if `copies_fp32`."""

    num_bytes: int
    copies_fp32: bool = True


@dataclass(frozen=True)
class ScratchPlan:
    """What is copied into the scratch: weights of these types of modules in `groups`, and the head."""

    groups: list[list[Any]]
    """The linear modules, with their adapters; those that read the same input together."""
    copied: frozenset[type] = frozenset()
    copies_head: bool = False
    num_bytes: int = 0


def scratch_plan(
    model: Any,
    head: Head,
    limits: ScratchLimits,
) -> ScratchPlan:
    """Returns the plan with the most copies within the limits. Weights in 4 bits come first."""
    groups = _linear_groups(model)
    bytes_4bit = _fp32_bytes(groups, Linear4bit)
    bytes_all = bytes_4bit + _fp32_bytes(groups, nn.Linear) + 4 * head.weight.numel()
    if limits.copies_fp32 and bytes_all <= limits.num_bytes:
        return ScratchPlan(
            groups,
            frozenset((Linear4bit, nn.Linear)),
            copies_head=True,
            num_bytes=bytes_all,
        )
    if bytes_4bit <= limits.num_bytes:
        return ScratchPlan(groups, frozenset((Linear4bit,)), num_bytes=bytes_4bit)
    return ScratchPlan(groups)


def _linear_groups(model: Any) -> list[list[Any]]:
    """Returns the linear modules of the decoder that read the same input together. A module with adapters counts as
    one: what is inside of it is left out."""
    decoder = model.get_decoder()
    inside = set[int]()
    for module in decoder.modules():
        if hasattr(module, "base_layer"):
            inside.update(id(part) for part in module.modules() if part is not module)
    kinds = (nn.Linear, Linear4bit)
    groups = groups_of_same_input(module for module in decoder.modules() if id(module) not in inside)
    return [group for group in groups if all(isinstance(base_layer_of(module), kinds) for module in group)]


def _fp32_bytes(groups: Sequence[Sequence[Any]], kind: Any) -> int:
    bases: list[Any] = [base_layer_of(module) for module in chain.from_iterable(groups)]
    return sum(4 * base.in_features * base.out_features for base in bases if type(base) is kind)


@dataclass(frozen=True)
class LinearWeights:
    """A linear module as plain tensors: weight (out, in), bias (out,), adapters down (in, r) and up (r, out). r is 0 if
    the adapters are added to the weight, or if there are none."""

    module: Any
    weight: Tensor
    bias: Tensor | None
    down: Tensor
    up: Tensor
    is_copied: bool
    """Whether the weight may be copied, and joined with others."""

    def product(self) -> Forward:
        """Returns the product of rows (N, in), with the bias."""
        if self.is_copied:
            return copy_weight(self.weight, self.bias).product
        return partial(
            _with_adapter,
            self.weight.T,
            self.bias,
            self.down,
            self.up,
        )


def linear_weights(
    module: Any,
    stack: Sequence[str],
    copied: frozenset[type],
) -> LinearWeights | None:
    """Returns the module's weights, or None if no faster forward is possible: for other kinds of modules and adapters,
    and for modules with hooks that must run at each call."""
    base = base_layer_of(module)
    if base is not module and not is_plain_lora(module, stack):
        return None
    if _has_hooks(module) or _has_hooks(base):
        return None
    is_copied = type(base) in copied
    if type(base) is Linear4bit and is_copied and base.compute_dtype in (None, torch.float32):
        packed = base.weight
        weight = dequantize_4bit(packed.data, packed.quant_state).float()
    elif type(base) is nn.Linear and base.weight.dtype == torch.float32:
        weight = base.weight.detach()
    else:
        return None
    down, up = joined_adapters(module, stack, weight.T)
    if not is_copied:
        return LinearWeights(
            module,
            weight,
            base.bias,
            down,
            up,
            is_copied=False,
        )
    if len(up):
        weight = torch.addmm(weight, up.T, down.T)
    return LinearWeights(
        module,
        weight,
        base.bias,
        down[:, :0],
        up[:0],
        is_copied=True,
    )


def join_weights(parts: Sequence[LinearWeights]) -> Forward:
    """Returns the product of rows (N, in) with all weights, (N, sum of out)."""
    bias: Tensor | None = None
    if any(part.bias is not None for part in parts):
        bias = torch.cat([_bias_or_zeros(part) for part in parts])
    return copy_weight(torch.cat([part.weight for part in parts]), bias).product


def _bias_or_zeros(part: LinearWeights) -> Tensor:
    if part.bias is None:
        return part.weight.new_zeros(len(part.weight))
    return part.bias


def module_forward(product: Forward, x: Tensor) -> Tensor:
    """Computes the forward of a linear module, (..., in) -> (..., out), from the product of rows."""
    return product(_as_rows(x)).view(*x.shape[:-1], -1)


class JoinedForward:
    """The forwards of several modules that read the same tensor one after another, from one product."""

    def __init__(
        self,
        product: Forward,
        sizes: Sequence[int],
    ) -> None:
        self.product = product
        self.sizes = list(sizes)
        self.last_input: Tensor | None = None
        self.outputs: tuple[Tensor, ...] = ()

    def forward(
        self,
        index: int,
        x: Tensor,
    ) -> Tensor:
        if x is not self.last_input:
            self.outputs = torch.split(module_forward(self.product, x), self.sizes, dim=-1)
            self.last_input = x
        output = self.outputs[index]
        if index == len(self.sizes) - 1:
            # Nothing is kept after the last module.
            self.last_input = None
            self.outputs = ()
        return output


def _with_adapter(
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    rows: Tensor,
) -> Tensor:
    if bias is None:
        product = rows @ weight
    else:
        product = torch.addmm(bias, rows, weight)
    if not len(up):
        return product
    return product.addmm_(rows @ down, up)


def _as_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _has_hooks(module: Any) -> bool:
    return "forward" in vars(module) or has_forward_hooks(module)
