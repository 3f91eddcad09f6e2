"""The context of every forward pass of a rollout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lowrank_tune.generation.attention import batched_attention
from lowrank_tune.model.roles import Roles


class GenerationMode:
    """What every forward pass of a rollout runs in: the role's adapters, eval mode, no autograd, autocast,
    transformers' own forward, and the attention of `generation/attention.py`."""

    def __init__(
        self,
        roles: Roles,
        role: str,
    ) -> None:
        self.roles = roles
        self.role = role
        # Collected once: a walk over all modules before and after every few steps costs as much as a step.
        self.module_attributes = [vars(module) for module in roles.base.model.modules()]

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Enters the mode; on exit everything is as it was. Can be entered again."""
        base = self.roles.base
        with (
            _inference_mode(self.module_attributes, base.device.type),
            self.roles.activate(self.role),
            base.autocast(),
            base.transformers_forward(),
            batched_attention(base.model),
        ):
            yield


@contextmanager
def _inference_mode(module_attributes: Sequence[dict[str, Any]], device: str) -> Iterator[None]:
    """As `Roles.inference_mode`, for the attributes of all modules.

    On the CPU, where a step is hundreds of small operations, PyTorch does not count the versions of tensors either,
    which saves an eighth of the time.
    """
    training = [attributes for attributes in module_attributes if attributes["training"]]
    for attributes in training:
        attributes["training"] = False
    try:
        with torch.inference_mode() if device == "cpu" else torch.no_grad():
            yield
    finally:
        for attributes in training:
            attributes["training"] = True
