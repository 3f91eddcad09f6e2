"""Faster linear modules for the time of a rollout on the CPU, with the adapters beside their base as ever.

bitsandbytes unpacks a 4-bit weight on the CPU at every call: here that is done once, into a scratch of declared size. An adapter's two
matrices cost PEFT seven small operations; here they are two, the scaling being folded into a copy. Nothing that is stored changes: only the
`forward` of the modules is another one, while the context is entered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

Forward = Callable[[Tensor], Tensor]


@contextmanager
def fast_linears(model: Any, stack: Sequence[str], limit: int) -> Iterator[AbstractContextManager[None]]:
    """For the time of a rollout: what to enter for each stretch of forward passes. On CUDA nothing: bitsandbytes' own kernels are fast."""
    if model.device.type != "cpu":
        yield nullcontext()
        return
    linears = Linears(model, stack, limit)
    try:
        yield linears
    finally:
        linears.close()


class Linears(AbstractContextManager[None]):
    """The linear modules of a model with a stack of adapters, as the weights are now. `bytes` is the size of the scratch."""

    def __init__(self, model: nn.Module, stack: Sequence[str], limit: int) -> None:
        """`limit` bounds the bytes of the scratch: where the unpacked weights do not fit, bitsandbytes goes on unpacking."""
        packed = [module for module in model.modules() if type(module) is Linear4bit]
        self.bytes = sum(4 * module.in_features * module.out_features for module in packed)
        self.bytes *= self.bytes <= limit
        self.forwards: list[tuple[nn.Module, Forward]] = []
        wrapped = {id(module.base_layer) for module in model.modules() if hasattr(module, "base_layer")}
        for module in model.modules():
            if id(module) not in wrapped and (forward := _forward_of(module, stack, self.bytes > 0)) is not None:
                self.forwards.append((module, forward))

    def __enter__(self) -> None:
        for module, forward in self.forwards:
            module.__dict__["forward"] = forward

    def __exit__(self, *_: object) -> None:
        for module, _forward in self.forwards:
            del module.__dict__["forward"]

    def close(self) -> None:
        """Frees the scratch."""
        self.forwards.clear()
        self.bytes = 0


def _forward_of(module: Any, stack: Sequence[str], unpack: bool) -> Forward | None:
    """A faster forward, or None where there is none: other kinds of modules and of adapters, or hooks that must hear each call."""
    base = getattr(module, "base_layer", module)
    if (base is not module and not _is_plain_lora(module, stack)) or any(_is_watched(one) for one in {module, base}):
        return None
    adapters = _adapters(module, stack)
    if type(base) is Linear4bit and unpack and base.compute_dtype in (None, torch.float32):
        return _forward(dequantize_4bit(base.weight.data, base.weight.quant_state).float(), base.bias, adapters)
    if type(base) is nn.Linear and base.weight.dtype == torch.float32 and adapters is not None:
        return _forward(base.weight, base.bias, adapters)
    return None


def _is_watched(module: Any) -> bool:
    return "forward" in vars(module) or bool(module._forward_hooks or module._forward_pre_hooks)


def _is_plain_lora(module: Any, stack: Sequence[str]) -> bool:
    """Whether PEFT computes base(x) + scaling B A x for each adapter of the stack here, and nothing else."""
    if not all(hasattr(module, name) for name in ("lora_A", "lora_B", "scaling", "lora_variant")):
        return False
    mine = [name for name in stack if name in module.lora_A]
    plain = not (module.merged or module.disable_adapters or getattr(module, "fan_in_fan_out", False))
    return plain and all(name not in module.lora_variant and module.lora_B[name].bias is None for name in mine)


def _adapters(module: Any, stack: Sequence[str]) -> tuple[Tensor, Tensor] | None:
    """All adapters of the stack as one: down (in, r) and up (r, out), scaled; None where there is none."""
    mine = [name for name in stack if name in getattr(module, "lora_A", ())]
    if not mine:
        return None
    down = torch.cat([module.lora_A[name].weight.detach() for name in mine]).T
    return down, torch.cat([module.lora_B[name].weight.detach() * module.scaling[name] for name in mine], dim=1).T.contiguous()


def _forward(weight: Tensor, bias: Tensor | None, adapters: tuple[Tensor, Tensor] | None) -> Forward:
    def forward(x: Tensor) -> Tensor:
        return nn.functional.linear(x, weight, bias)

    def with_adapters(x: Tensor) -> Tensor:
        assert adapters is not None
        rows = x.reshape(-1, x.shape[-1])
        y = nn.functional.linear(rows, weight, bias).addmm_(rows @ adapters[0], adapters[1])
        return y.view(*x.shape[:-1], -1)

    return forward if adapters is None else with_adapters
