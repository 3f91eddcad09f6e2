"""RMS norms of a rollout on a GPU as PyTorch's fused kernel, where transformers' modules start six to ten kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_tune.model.lora_modules import has_forward_hooks

Forward = Callable[[Tensor], Tensor]
Formula = Callable[[Any, Tensor, float], Forward]
"""Makes the forward of a norm from the module, its weight and its epsilon."""
RTOL = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Relative differences that rounding explains: the modules round twice, the kernel once."""


_FORMULAS: WeakKeyDictionary[nn.Module, dict[type, Formula | None]] = WeakKeyDictionary()
"""The formula of each class of norms, for each model: comparing it waits for the GPU, which is done once."""


def fused_norms(model: nn.Module) -> Iterator[tuple[nn.Module, Forward]]:
    """Yields the RMS norms of a model, each with a faster forward. The first norm of each class is compared with its
    own forward; classes with another formula are left out."""
    formulas = _FORMULAS.setdefault(model, {})
    for module in model.modules():
        kind = type(module)
        if not kind.__name__.endswith("RMSNorm") or "forward" in vars(module) or has_forward_hooks(module):
            continue
        weight, eps = _parameters_of(module)
        if weight is None or eps is None:
            continue
        if kind not in formulas:
            formulas[kind] = _formula_of(module, weight, eps)
        formula = formulas[kind]
        if formula is not None:
            yield module, formula(module, weight, eps)


def _parameters_of(module: Any) -> tuple[Tensor | None, float | None]:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.dtype not in RTOL:
        return None, None
    return weight.detach(), eps


@torch.no_grad()
def _formula_of(
    module: Any,
    weight: Tensor,
    eps: float,
) -> Formula | None:
    # The second row is so small that eps matters.
    numbers = torch.linspace(-2.0, 3.0, 2 * len(weight), device=weight.device).view(2, -1)
    probe = (numbers * torch.tensor([[1.0], [1e-3]], device=weight.device)).to(weight.dtype)
    expected = module(probe)
    for formula in (_weight_times, _one_plus_weight_times):
        computed = formula(module, weight, eps)(probe)
        is_close = (computed - expected).abs() <= RTOL[weight.dtype] * expected.abs()
        if computed.dtype == expected.dtype and bool(is_close.all()):
            return formula
    return None


def _weight_times(
    module: Any,
    weight: Tensor,
    eps: float,
) -> Forward:
    """Llama and most others."""
    return partial(_norm, module, weight, eps, weight.dtype)


def _one_plus_weight_times(
    module: Any,
    weight: Tensor,
    eps: float,
) -> Forward:
    """Gemma, in fp32: 1 + weight would be rounded in half precision."""
    return partial(_norm, module, 1.0 + weight.float(), eps, weight.dtype)


def _norm(
    module: Any,
    gain: Tensor,
    eps: float,
    dtype: torch.dtype,
    x: Tensor,
) -> Tensor:
    if x.dtype != dtype:
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    # Under autocast the result would be in fp32.
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x.to(gain.dtype), gain.shape, gain, eps).to(dtype)
