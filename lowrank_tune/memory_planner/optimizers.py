"""An optimizer with its moments, before anything was learned."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lowrank_tune.config import TrainingConfig
from lowrank_tune.model.optimizers import make_optimizer

MIN_8BIT_SIZE = 4096  # elements of a tensor up to which bitsandbytes keeps 32 bits
MIN_PAGED_SIZE = 100_000
BLOCK = 256


def planned_optimizer(parameters: list[nn.Parameter], train: TrainingConfig, device: torch.device) -> Any:
    """The recipe's optimizer after its first step, on meta tensors. Those of bitsandbytes have kernels for cards alone:
    their moments are made as it makes them (`optim/optimizer.py`), and the step of another one stands for theirs, which
    all happen in place."""
    if train.optim == "adamw" or device.type != "cuda":
        optimizer = make_optimizer(parameters, train.model_copy(update={"optim": "adamw"}), device)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return optimizer
    stand_in = torch.optim.SGD(parameters, lr=0.0)
    stand_in.kept = [moment for parameter in parameters for moment in _moments(parameter, train.optim)]  # type: ignore[attr-defined]
    return stand_in


def _moments(parameter: nn.Parameter, kind: str) -> list[torch.Tensor]:
    """Paged moments live in the machine's memory and visit the card by pages."""
    count = parameter.numel()
    if "8bit" in kind and count >= MIN_8BIT_SIZE:
        scales = [torch.empty(-(-count // BLOCK), device="meta") for _ in range(2)]
        paged = "paged" in kind and count >= MIN_PAGED_SIZE
        if paged:
            return scales
        return [*scales, *(torch.empty(count, dtype=torch.uint8, device="meta") for _ in range(2))]
    if "paged" in kind and count >= MIN_PAGED_SIZE:
        return []
    return [torch.empty(count, device="meta") for _ in range(2)]
