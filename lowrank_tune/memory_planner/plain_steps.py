"""Makes a simulated step start the kernels of a plain step on a GPU, for counting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lowrank_tune.memory_planner.fake_device import replaced
from lowrank_tune.stats import Stats
from lowrank_tune.training import trainer


@contextmanager
def plain_steps() -> Iterator[None]:
    """While it is entered, gradients are clipped in a few kernels for all of them, as torch does on a GPU and not on
    meta tensors, and the size of an update is not measured, as in most steps."""
    with (
        replaced(nn.utils, "clip_grad_norm_", _clip_together),
        replaced(trainer, "update_stats", _no_stats),
    ):
        yield


def _clip_together(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms: list[Tensor] = list(torch._foreach_norm(gradients))
    total: Tensor = torch.stack(norms).norm()
    torch._foreach_mul_(gradients, max_norm / total)
    return total


def _no_stats(parameters: list[nn.Parameter], before: list[Tensor]) -> Stats:
    return {}
