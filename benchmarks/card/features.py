"""What saves memory, on a card: each way gives the same gradient, and takes less."""

from __future__ import annotations

import torch
from torch import Tensor

from card.machine import free, peak_gib, reset_peak
from card.made import Size, Train, random_rows
from card.makers import make_roles, sft
from card.shortage import shortage
from card.smoke import Result
from lowrank_tune.errors import UserError
from lowrank_tune.model.base import Base
from lowrank_tune.model.memory import Checkpointing
from lowrank_tune.train import make_optimizer

EQUAL = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Relative difference of gradients of the same arithmetic; on a card the backward of attention adds up in any order."""
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit")


def features(base: Base, size: Size, cap_gib: float | None = None) -> Result:
    """Recomputation of all layers, of half of them, of none; inputs in the machine's memory; the optimizers; and memory that runs short."""
    result, layers = Result("memory"), len(base.model.get_decoder().layers)
    ways: dict[str, tuple[Checkpointing, bool]] = {
        "none recomputed": ("none", False), "half recomputed": (layers // 2, False), "all recomputed": ("all", False),
        "all, inputs offloaded": ("all", True)}  # fmt: skip
    gradients: dict[str, Tensor] = {}
    for name, (checkpointing, offload) in ways.items():
        gradients[name], result.figures[f"GiB of an update, {name}"] = one_update(base, size, checkpointing, offload)
    whole = gradients["none recomputed"]
    for name, gradient in list(gradients.items())[1:]:
        apart = float(torch.linalg.vector_norm(gradient - whole) / torch.linalg.vector_norm(whole))
        result.figures[f"gradient, {name}: relative difference"] = apart
        result.checks[f"the same gradient, {name}"] = apart <= EQUAL[base.model.dtype]
    peaks = [result.figures[f"GiB of an update, {name}"] for name in ways]
    if base.device.type == "cuda":
        result.checks["each way takes less"] = peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks)
    for name in OPTIMIZERS:
        moved = optimizer_moves(base, size, name)
        if moved is not None:
            result.checks[f"{name} moves all adapters"] = moved
    shortage(base, size, cap_gib, EQUAL[base.model.dtype], result)
    return result


def one_update(base: Base, size: Size, checkpointing: Checkpointing, offload: bool) -> tuple[Tensor, float]:
    """The gradient of one micro-batch, on the CPU, and the most memory meanwhile in GiB (0 without a card)."""
    roles = make_roles(base, ("policy",), checkpointing, offload=offload)
    micro = random_rows(size, base.model.config.vocab_size).take(torch.arange(min(2, size.rows)))
    algorithm = sft(roles, lambda step: micro, size)
    with torch.no_grad():  # a fresh B is zero, and A then has no gradient
        for name, parameter in roles.named_parameters("policy").items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 1e-2)
    micro.weight = algorithm.weigh(micro)
    free(base.device)
    reset_peak(base.device)
    for term in algorithm.terms(micro.to(base.device)):
        term.loss.backward()  # type: ignore[no-untyped-call]
    peak = peak_gib(base.device) if base.device.type == "cuda" else 0.0
    gradient = torch.cat([parameter.grad.flatten().float().cpu() for parameter in roles.parameters("policy") if parameter.grad is not None])
    roles.release()
    return gradient, peak


def optimizer_moves(base: Base, size: Size, kind: str) -> bool | None:
    """Whether a step moves every adapter, and to finite numbers. None where this optimizer needs a card and there is none."""
    roles = make_roles(base, ("policy",), True)
    parameters = roles.parameters("policy")
    try:
        optimizer = make_optimizer(parameters, Train(1, optimizer=kind), base.device)  # type: ignore[arg-type]
    except UserError:
        roles.release()
        return None
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)).to(parameter.device)
    optimizer.step()
    moved = all(bool((now != then).any()) and bool(now.isfinite().all()) for now, then in zip(parameters, before, strict=True))
    roles.release()
    free(base.device)
    return moved
