"""The ways to save memory: each gives the same gradient and needs less; and each optimizer changes all adapters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpu_proof.checks import CheckResult
from gpu_proof.factories import make_roles, randomize_b, sft
from gpu_proof.machine import peak_gib, release_unused, reset_peak
from gpu_proof.oom import GRADIENT_ERROR
from gpu_proof.synthetic import Size, TrainSettings, ragged_rows
from lowrank_tune.errors import UserError
from lowrank_tune.model.activation_checkpointing import Checkpointing
from lowrank_tune.model.base import Base
from lowrank_tune.model.rounding import relative_difference
from lowrank_tune.training.trainer import make_optimizer


def check_memory_modes(base: Base, size: Size) -> CheckResult:
    """Compare recomputation of no layer, of half, of all, and of all with their inputs offloaded to the host."""
    result, layers = CheckResult("memory"), len(base.model.get_decoder().layers)
    modes: dict[str, tuple[Checkpointing, bool]] = {
        "none recomputed": ("none", False),
        "half recomputed": (layers // 2, False),
        "all recomputed": ("all", False),
        "all recomputed, inputs offloaded": ("all", True),
    }
    gradients: dict[str, Tensor] = {}
    peaks = []
    for name, (checkpointing, offload) in modes.items():
        gradients[name], peak = one_update(base, size, checkpointing, offload)
        peaks.append(peak)
        result.figures[f"update_gib, {name}"] = peak
    expected = gradients.pop("none recomputed")
    for name, gradient in gradients.items():
        difference = relative_difference(gradient, expected)
        result.figures[f"gradient_difference, {name}"] = difference
        result.checks[f"the same gradient, {name}"] = difference <= GRADIENT_ERROR[base.model.dtype]
    if base.device.type == "cuda":
        ordered = peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks)
        result.checks["each mode needs less memory"] = ordered
    return result


def one_update(base: Base, size: Size, checkpointing: Checkpointing, offload: bool) -> tuple[Tensor, float]:
    """Return the gradient of one micro-batch, on the CPU, and the peak memory in GiB (0 without a GPU)."""
    roles = make_roles(base, ("policy",), checkpointing, offload=offload)
    batch = ragged_rows(size, base.model.config.vocab_size).select_rows(torch.arange(min(2, size.rows)))
    algorithm = sft(roles, lambda step: batch, size)
    randomize_b(roles, "policy")
    batch.token_weights = algorithm.token_weights(batch)
    release_unused(base.device)
    reset_peak(base.device)
    for term in algorithm.compute_losses(batch.to(base.device)):
        term.loss.backward()  # type: ignore[no-untyped-call]
    peak = peak_gib(base.device) if base.device.type == "cuda" else 0.0
    kept = [parameter.grad for parameter in roles.parameters("policy") if parameter.grad is not None]
    gradient = torch.cat([grad.flatten().float().cpu() for grad in kept])
    roles.unload_adapters()
    return gradient, peak


def check_optimizers(base: Base, names: Sequence[str]) -> CheckResult:
    """A step of each optimizer changes every adapter, to finite numbers. Optimizers that need a GPU are left out on
    a CPU."""
    result = CheckResult("optimizers")
    for name in names:
        changed = optimizer_changes(base, name)
        if changed is not None:
            result.checks[f"{name} changes all adapters"] = changed
    return result


def optimizer_changes(base: Base, name: str) -> bool | None:
    """Return whether a step changes every adapter to finite numbers, or None where this optimizer needs a GPU and
    there is none."""
    roles = make_roles(base, ("policy",), True)
    parameters = roles.parameters("policy")
    try:
        optimizer = make_optimizer(parameters, TrainSettings(1, optim=name), base.device)  # type: ignore[arg-type]
    except UserError:
        roles.unload_adapters()
        return None
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
        parameter.grad = noise.to(parameter.device)
    optimizer.step()
    changed = []
    for now, then in zip(parameters, before, strict=True):
        changed.append(bool((now != then).any()) and bool(now.isfinite().all()))
    roles.unload_adapters()
    release_unused(base.device)
    return all(changed)
