"""Which activations are stored, which are recomputed in the backward pass, and which are offloaded to host memory.

A recomputed layer stores only its input; the others store all that their backward pass needs. The *first* N layers are
recomputed, because the backward pass reaches them last, when the activations of the others are freed. The input of a
recomputed layer can be moved to pinned host memory until then. Gradients do not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lowrank_tune.errors import UserError
from lowrank_tune.model.chunked_forward import ContextFn
from lowrank_tune.model.decoder_layers import layer_forward, restore_layers

Checkpointing = bool | int | Literal["none", "all", "auto"]
"""Which layers are recomputed: none or all, the first N, or `auto`, which is all until the memory planner replaces
it."""


def num_checkpointed_layers(checkpointing: Checkpointing, layers: int) -> int:
    """Returns how many of a model's `layers` are recomputed, counted from the first."""
    if isinstance(checkpointing, (bool, str)):
        if checkpointing in (True, "all", "auto"):
            return layers
        return 0
    return min(checkpointing, layers)


def checkpoint_layers(
    model: Any,
    checkpointing: Checkpointing,
    offload: bool,
    context_fn: ContextFn,
    keep_forwards: bool = False,
) -> Callable[[], None]:
    """Makes layers of a model recompute in the backward pass, and with `offload` keep their inputs in host memory.

    `context_fn` returns the contexts of the forward pass and of the recomputation. With `keep_forwards`, and for models
    whose layers are unknown, transformers recomputes. Returns a function that undoes it. Raises UserError for a model
    that recomputes all layers or none.
    """
    layers = [module for module in model.get_decoder().modules() if isinstance(module, GradientCheckpointingLayer)]
    count = num_checkpointed_layers(checkpointing, len(layers) or 1)
    if not count:
        return _do_nothing
    if not layers and not isinstance(checkpointing, (bool, str)):
        raise UserError(
            f"train.gradient_checkpointing: {model.config.model_type} models recompute all layers or none; use `all` "
            f"or `none`",
        )
    if keep_forwards or not layers:
        return _checkpoint_by_transformers(
            model,
            layers[count:],
            offload,
            context_fn,
        )
    recompute = partial(
        checkpoint,
        use_reentrant=False,
        context_fn=context_fn,
    )
    if offload:
        recompute = partial(_offloaded, recompute)
    for layer in layers[:count]:
        layer_forward(layer).recompute = recompute
    return partial(restore_layers, model)


def _do_nothing() -> None:
    pass


def _checkpoint_by_transformers(
    model: Any,
    plain_layers: Iterable[Any],
    offload: bool,
    context_fn: ContextFn,
) -> Callable[[], None]:
    """Makes transformers recompute all layers but the plain ones. Returns a function that undoes it."""
    # transformers renamed these methods, and removes the old names in version 6. Both options must be passed, because
    # they replace the defaults.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": context_fn})
    model.disable_input_require_grads()
    for layer in plain_layers:
        layer.gradient_checkpointing = False
    if offload:
        for module in model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = partial(_offloaded, module._gradient_checkpointing_func)
    disable = getattr(model, "activation_checkpointing_disable", None)
    return disable or model.gradient_checkpointing_disable  # type: ignore[no-any-return]


def _offloaded(
    recompute: Callable[..., Any],
    *arguments: Any,
    **named: Any,
) -> Any:
    # Without a GPU this is a plain copy, so that tests run the same code.
    with save_on_cpu(pin_memory=True):
        return recompute(*arguments, **named)
