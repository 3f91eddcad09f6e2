"""Faster linear modules, and norms, for the time of a rollout on the CPU.

bitsandbytes unpacks a 4-bit weight on the CPU at every call: here that is done once, into a scratch of declared size,
in fp32, to which the adapters are added; query, key and value are one product, and so are gate and up. A weight that is
stored in fp32 is not copied: its adapter stays beside it, two small products where PEFT makes seven operations. Nothing
that is stored changes, and no sum goes back into the base: only the `forward` of the modules is another one, while the
context is entered, and the scratch dies with the rollout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from lowrank_tune.generation.cpu_norms import fused_norms

Forward = Callable[[Tensor], Tensor]
FUSABLE_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@contextmanager
def fast_linears(model: Any, stack: Sequence[str], limit: int) -> Iterator[AbstractContextManager[None]]:
    """For the time of a rollout: what to enter for each stretch of forward passes. On CUDA nothing: bitsandbytes' own
    kernels are fast."""
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
    """A linear module as plain tensors: weight (in, out), bias (out,), adapters down (in, r) and up (r, out); r is 0
    where they are added.

    The scratch lies in memory as (in, out), which the products of a few rows read faster; a weight that is stored is a
    view.
    """

    module: Any
    weight: Tensor
    bias: Tensor | None
    down: Tensor
    up: Tensor


class FastLinears(AbstractContextManager[None]):
    """The linear modules of a model with a stack of adapters, as the weights are now. `scratch_bytes` is the size of
    the scratch."""

    def __init__(self, model: nn.Module, stack: Sequence[str], limit: int) -> None:
        """`limit` bounds the bytes of the scratch: where the unpacked weights do not fit, bitsandbytes goes on
        unpacking."""
        packed: list[Any] = [module for module in model.modules() if type(module) is Linear4bit]
        size = sum(4 * module.in_features * module.out_features for module in packed)
        self.scratch_bytes = size if size <= limit else 0
        self.forwards: list[tuple[nn.Module, Forward]] = []
        wrapped = {id(module.base_layer) for module in model.modules() if hasattr(module, "base_layer")}
        for family in _fusable_groups(module for module in model.modules() if id(module) not in wrapped):
            self._add(
                [
                    part
                    for module in family
                    if (part := _linear_weights(module, stack, self.scratch_bytes > 0)) is not None
                ]
            )
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
        # to join weights that are stored would double them
        own = all(type(_base_layer(part.module)) is Linear4bit for part in parts)
        if len(parts) > 1 and own and len({len(part.weight) for part in parts}) == 1:
            joint = _FusedLinear(parts)
            self.forwards += [(part.module, partial(joint.forward, index)) for index, part in enumerate(parts)]
        else:
            self.forwards += [(part.module, _forward_of(part)) for part in parts]


class _FusedLinear:
    """Modules with their adapters added that one after another read the very same tensor: one product for all."""

    def __init__(self, parts: Sequence[_LinearWeights]) -> None:
        self.sizes = [part.weight.shape[1] for part in parts]
        self.weight = torch.cat([part.weight for part in parts], dim=1)
        biases = [
            part.weight.new_zeros(size) if part.bias is None else part.bias
            for part, size in zip(parts, self.sizes, strict=True)
        ]
        if all(part.bias is None for part in parts):
            self.bias = None
        else:
            self.bias = torch.cat(biases)
        self.last_input: Tensor | None = None
        self.outputs: tuple[Tensor, ...] = ()

    def forward(self, index: int, x: Tensor) -> Tensor:
        if x is not self.last_input:
            self.outputs = torch.split(_linear(self.weight, self.bias, x), self.sizes, dim=-1)
            self.last_input = x
        output = self.outputs[index]
        if index == len(self.sizes) - 1:  # nothing is kept beyond the last one
            self.last_input = None
            self.outputs = ()
        return output


def _forward_of(part: _LinearWeights) -> Forward:
    if not len(part.up):
        return partial(_linear, part.weight, part.bias)
    return partial(_with_adapter, part.weight, part.bias, part.down, part.up)


def _linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return _product(weight, bias, x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


def _with_adapter(
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    x: Tensor,
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return _product(weight, bias, rows).addmm_(rows @ down, up).view(*x.shape[:-1], -1)


def _product(weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    if bias is None:
        return rows @ weight
    return torch.addmm(bias, rows, weight)


def _fusable_groups(modules: Iterable[Any]) -> list[list[Any]]:
    """Modules, those together that models have for query, key and value, and for gate and up."""
    families = list[list[Any]]()
    seen = set[int]()
    for module in modules:
        for names in FUSABLE_GROUPS:
            family = [getattr(module, name) for name in names if hasattr(module, name)]
            if len(family) == len(names) and seen.isdisjoint(map(id, family)):
                families.append(family)
                seen.update(map(id, family))
        if id(module) not in seen:
            families.append([module])
    return families


def _base_layer(module: Any) -> Any:
    return getattr(module, "base_layer", module)


def _linear_weights(module: Any, stack: Sequence[str], unpack: bool) -> _LinearWeights | None:
    """None where there is no faster way: other kinds of modules and of adapters, or hooks that must hear each call."""
    base = _base_layer(module)
    if (base is not module and not _is_plain_lora(module, stack)) or any(_has_hooks(one) for one in {module, base}):
        return None
    packed = type(base) is Linear4bit and unpack and base.compute_dtype in (None, torch.float32)
    if not packed and not (type(base) is nn.Linear and base.weight.dtype == torch.float32):
        return None
    if packed:
        weight = dequantize_4bit(base.weight.data, base.weight.quant_state).float().T.contiguous()
    else:
        weight = base.weight.detach().T
    down, up = _adapters(module, stack, weight)
    if packed:
        weight = weight.addmm_(down, up)
        down = down[:, :0]
        up = up[:0]
    if packed or len(up):
        return _LinearWeights(module, weight, base.bias, down, up)
    return None


def _has_hooks(module: Any) -> bool:
    return "forward" in vars(module) or bool(module._forward_hooks or module._forward_pre_hooks)


def _is_plain_lora(module: Any, stack: Sequence[str]) -> bool:
    """Whether PEFT computes base(x) + scaling B A x for each adapter of the stack here, and nothing else."""
    if not all(hasattr(module, name) for name in ("lora_A", "lora_B", "scaling", "lora_variant")):
        return False
    adapter_names = [name for name in stack if name in module.lora_A]
    plain = not (module.merged or module.disable_adapters or getattr(module, "fan_in_fan_out", False))
    return plain and all(name not in module.lora_variant and module.lora_B[name].bias is None for name in adapter_names)


def _adapters(module: Any, stack: Sequence[str], like: Tensor) -> tuple[Tensor, Tensor]:
    """All adapters of the stack as one, for a weight (in, out): down (in, r) and up (r, out), scaled; r is 0 where
    there is none."""
    adapter_names = [name for name in stack if name in getattr(module, "lora_A", ())]
    downs = [module.lora_A[name].weight.detach() for name in adapter_names] or [like.new_zeros(0, like.shape[0])]
    ups = [module.lora_B[name].weight.detach() * module.scaling[name] for name in adapter_names] or [
        like.new_zeros(like.shape[1], 0)
    ]
    return torch.cat(downs).T.contiguous(), torch.cat(ups, dim=1).T.contiguous()
