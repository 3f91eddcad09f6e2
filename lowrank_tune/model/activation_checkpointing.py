"""Which activations are kept, which are computed again in the backward pass, and which wait in the machine's memory.

A layer that is recomputed keeps its input alone; the others keep all that their backward pass needs. The *first* N
layers are recomputed: backward comes to them last, when what the others kept has been let go. What a recomputed layer
keeps can be moved to pinned memory of the machine until then. None of this changes a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import torch
from torch.autograd.graph import save_on_cpu
from transformers.modeling_layers import GradientCheckpointingLayer

from lowrank_tune.errors import UserError

Checkpointing = bool | int | Literal["none", "all", "auto"]
"""Which layers are recomputed: none or all, the first N, or `auto`, which is all until something plans it."""


def num_checkpointed_layers(checkpointing: Checkpointing, layers: int) -> int:
    """How many of a model's `layers` are recomputed, counted from the first."""
    if isinstance(checkpointing, (bool, str)):
        if checkpointing in (True, "all", "auto"):
            return layers
        return 0
    return min(checkpointing, layers)


def checkpoint_layers(
    model: Any,
    checkpointing: Checkpointing,
    offload: bool,
    context_fn: Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]],
) -> bool:
    """Makes layers of a model recompute, and with `offload` keep their inputs in the machine's memory; `context_fn`
    gives what the forward pass and the recomputation run under. Returns whether any layer does. Raises UserError for a
    model whose layers cannot differ."""
    layers = [module for module in model.get_decoder().modules() if isinstance(module, GradientCheckpointingLayer)]
    count = num_checkpointed_layers(checkpointing, len(layers) or 1)
    if not count:
        return False
    if not layers and not isinstance(checkpointing, (bool, str)):
        raise UserError(
            f"train.gradient_checkpointing: {model.config.model_type} models recompute all layers or none; say all "
            f"or none"
        )
    # transformers renamed it and drops the old name in version 6; the defaults are replaced by what is passed, so both
    # stand here.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": context_fn})
    model.disable_input_require_grads()
    for layer in layers[count:]:
        layer.gradient_checkpointing = False
    if offload:
        for module in model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = partial(_offloaded, module._gradient_checkpointing_func)
    return True


def disable_checkpointing(model: Any) -> None:
    """The opposite of `checkpoint_layers`."""
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    disable()


def _offloaded(checkpoint: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    # Without a GPU there is nothing to pin, and the copy is a plain one: the same path, so that tests walk it.
    with save_on_cpu(pin_memory=True):
        return checkpoint(*arguments, **named)


def cap_cuda_memory(budget_gib: float | None) -> None:
    """Bounds what this process takes of the GPU. Raises UserError where the GPU has less than the budget."""
    if budget_gib is None or not torch.cuda.is_available():
        return
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    if budget_gib * 2**30 > total:
        raise UserError(f"train.memory_budget_gib: the GPU has {total / 2**30:.1f} GiB, not {budget_gib:g}")
    torch.cuda.set_per_process_memory_fraction(budget_gib * 2**30 / total)
