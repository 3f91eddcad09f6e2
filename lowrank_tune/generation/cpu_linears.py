"""Faster linear modules, and norms, for the time of a rollout on the CPU.

On the CPU bitsandbytes unpacks a 4-bit weight at every call. Here each weight is unpacked once, in fp32, into a scratch
of limited size, and the adapters are added to it. Query, key and value are computed as one product, and so are gate and
up. A weight that is stored in fp32 is not copied: its adapter is applied beside it, with two small products where PEFT
makes seven operations. The stored weights do not change: while the context is entered, only the `forward` of the
modules is replaced, and the scratch is freed after the rollout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from lowrank_tune.generation.cpu_norms import fused_norms
from lowrank_tune.model.lora_modules import (
    base_layer_of,
    groups_of_same_input,
    has_forward_hooks,
    is_plain_lora,
    joined_adapters,
)

Forward = Callable[[Tensor], Tensor]


@contextmanager
def fast_linears(
    model: Any,
    stack: Sequence[str],
    limit: int,
) -> Iterator[AbstractContextManager[None]]:
    """Yields the context to enter for each stretch of forward passes of a rollout. On CUDA it does nothing, because
    bitsandbytes' own kernels are fast."""
    if model.device.type != "cpu":
        yield nullcontext()
        return
    linears = FastLinears(model, stack, limit)
    try:
        yield linears
    finally:
        linears.close()


@dataclass(frozen=True)
class _LinearWeights:
    """A linear module as plain tensors: weight (in, out), bias (out,), adapters down (in, r) and up (r, out). r is 0 if
    the adapters are added to the weight.

    The scratch is stored as (in, out), which products of a few rows read faster. A stored weight is a view.
    """

    module: Any
    weight: Tensor
    bias: Tensor | None
    down: Tensor
    up: Tensor

    @property
    def is_unpacked(self) -> bool:
        """Whether the weight is a copy of a 4-bit weight, which can be joined with others."""
        return type(base_layer_of(self.module)) is Linear4bit

    @property
    def forward(self) -> Forward:
        if not len(self.up):
            return partial(_linear, self.weight, self.bias)
        return partial(
            _with_adapter,
            self.weight,
            self.bias,
            self.down,
            self.up,
        )


class FastLinears(AbstractContextManager[None]):
    """The linear modules of a model with a stack of adapters, with their current weights. `scratch_bytes` is the size
    of the scratch."""

    def __init__(
        self,
        model: nn.Module,
        stack: Sequence[str],
        limit: int,
    ) -> None:
        """`limit` bounds the bytes of the scratch: if the unpacked weights do not fit, bitsandbytes unpacks them at
        every call."""
        self.scratch_bytes = _unpacked_bytes(model)
        if self.scratch_bytes > limit:
            self.scratch_bytes = 0
        self.forwards: list[tuple[nn.Module, Forward]] = []
        wrapped = {id(module.base_layer) for module in model.modules() if hasattr(module, "base_layer")}
        for group in groups_of_same_input(module for module in model.modules() if id(module) not in wrapped):
            parts = []
            for module in group:
                part = _linear_weights(module, stack, self.scratch_bytes > 0)
                if part is not None:
                    parts.append(part)
            self._add(parts)
        self.forwards += fused_norms(model)

    def __enter__(self) -> None:
        for module, forward in self.forwards:
            module.__dict__["forward"] = forward

    def __exit__(self, *_: object) -> None:
        for module, _forward in self.forwards:
            del module.__dict__["forward"]

    def close(self) -> None:
        """Frees the scratch."""
        self.forwards.clear()
        self.scratch_bytes = 0

    def _add(self, parts: Sequence[_LinearWeights]) -> None:
        # Stored weights are not joined: that would store them twice.
        joinable = len(parts) > 1 and all(part.is_unpacked for part in parts)
        if joinable and len({len(part.weight) for part in parts}) == 1:
            fused = _FusedLinear(parts)
            for index, part in enumerate(parts):
                self.forwards.append((part.module, partial(fused.forward, index)))
        else:
            self.forwards += [(part.module, part.forward) for part in parts]


class _FusedLinear:
    """One product for several modules that read the same tensor one after another, with their adapters added."""

    def __init__(self, parts: Sequence[_LinearWeights]) -> None:
        weights = [part.weight for part in parts]
        self.sizes = [weight.shape[1] for weight in weights]
        self.weight = torch.cat(weights, dim=1)
        self.bias: Tensor | None = None
        if any(part.bias is not None for part in parts):
            biases = []
            for part, size in zip(parts, self.sizes, strict=True):
                if part.bias is None:
                    biases.append(part.weight.new_zeros(size))
                else:
                    biases.append(part.bias)
            self.bias = torch.cat(biases)
        self.last_input: Tensor | None = None
        self.outputs: tuple[Tensor, ...] = ()

    def forward(
        self,
        index: int,
        x: Tensor,
    ) -> Tensor:
        if x is not self.last_input:
            joined = _linear(self.weight, self.bias, x)
            self.outputs = torch.split(joined, self.sizes, dim=-1)
            self.last_input = x
        output = self.outputs[index]
        if index == len(self.sizes) - 1:
            # Nothing is kept after the last module.
            self.last_input = None
            self.outputs = ()
        return output


def _linear(
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
) -> Tensor:
    product = _product(weight, bias, _as_rows(x))
    return product.view(*x.shape[:-1], -1)


def _with_adapter(
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    x: Tensor,
) -> Tensor:
    rows = _as_rows(x)
    product = _product(weight, bias, rows).addmm_(rows @ down, up)
    return product.view(*x.shape[:-1], -1)


def _as_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _product(
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
) -> Tensor:
    if bias is None:
        return rows @ weight
    return torch.addmm(bias, rows, weight)


def _unpacked_bytes(model: nn.Module) -> int:
    """Returns the bytes of all 4-bit weights in fp32."""
    packed: list[Any] = [module for module in model.modules() if type(module) is Linear4bit]
    return sum(4 * module.in_features * module.out_features for module in packed)


def _linear_weights(
    module: Any,
    stack: Sequence[str],
    unpack: bool,
) -> _LinearWeights | None:
    """Returns the module's weights, or None if no faster forward is possible: for other kinds of modules and adapters,
    and for modules with hooks that must run at each call."""
    base = base_layer_of(module)
    if base is not module and not is_plain_lora(module, stack):
        return None
    if _has_hooks(module) or _has_hooks(base):
        return None
    if type(base) is Linear4bit and unpack and base.compute_dtype in (None, torch.float32):
        packed = base.weight
        weight = dequantize_4bit(packed.data, packed.quant_state).float().T.contiguous()
        down, up = joined_adapters(module, stack, weight)
        return _LinearWeights(
            module,
            weight.addmm_(down, up),
            base.bias,
            down[:, :0],
            up[:0],
        )
    if type(base) is nn.Linear and base.weight.dtype == torch.float32:
        weight = base.weight.detach().T
        down, up = joined_adapters(module, stack, weight)
        if len(up):
            return _LinearWeights(
                module,
                weight,
                base.bias,
                down,
                up,
            )
    return None


def _has_hooks(module: Any) -> bool:
    return "forward" in vars(module) or has_forward_hooks(module)
