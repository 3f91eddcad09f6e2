"""The recipe's optimizer with its moments, as it is after a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowrank_tune.config import TrainingConfig
from lowrank_tune.model.optimizers import make_optimizer

MIN_8BIT_SIZE = 4096
"""bitsandbytes keeps 32-bit moments of tensors with fewer elements."""
MIN_PAGED_SIZE = 100_000
"""bitsandbytes does not page the moments of tensors with fewer elements."""
BLOCK = 256
"""Elements of an 8-bit moment that share a scale."""


class PlannedOptimizer(torch.optim.SGD):
    """An optimizer that stores `moments` and computes nothing: bitsandbytes' kernels need a GPU, and its steps allocate
    nothing."""

    def __init__(
        self,
        parameters: list[nn.Parameter],
        moments: list[Tensor],
    ) -> None:
        super().__init__(parameters, lr=0.0)
        self.moments = moments


def planned_optimizer(
    parameters: list[nn.Parameter],
    train: TrainingConfig,
    device: torch.device,
) -> Any:
    """Returns the recipe's optimizer after its first step, on meta tensors. Moments of bitsandbytes' optimizers have
    the shapes of its `optim/optimizer.py`."""
    if train.optim != "adamw" and device.type == "cuda":
        moments = []
        for parameter in parameters:
            moments += _moments(parameter.numel(), train.optim)
        return PlannedOptimizer(parameters, moments)
    optimizer = make_optimizer(parameters, train.model_copy(update={"optim": "adamw"}), device)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def _moments(size: int, optimizer: str) -> list[Tensor]:
    """Returns what a tensor with `size` elements adds to the device. Paged moments are in host memory."""
    is_8bit = "8bit" in optimizer and size >= MIN_8BIT_SIZE
    is_paged = "paged" in optimizer and size >= MIN_PAGED_SIZE
    tensors = []
    for _ in range(2):
        if is_8bit:
            tensors.append(torch.empty(-(-size // BLOCK), device="meta"))
        if not is_paged:
            tensors.append(
                torch.empty(
                    size,
                    dtype=torch.uint8 if is_8bit else torch.float32,
                    device="meta",
                )
            )
    return tensors
