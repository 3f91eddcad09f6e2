"""The forward method of decoder layers in training: recomputed in the backward pass or not, compiled or plain.

It replaces `forward` in the attributes of a layer. Recomputation is outside of the compiled function, and both passes
over a layer call the same function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

Forward = Callable[..., Any]


class CompiledForward(Protocol):
    """The compiled version of the forward methods of layers."""

    @property
    def is_used(self) -> bool:
        """Whether the passes that begin now are compiled."""

    def of(self, layer: Any) -> Forward:
        """Returns the compiled forward method of a layer."""

    def attempt(self, work: Callable[[], Any]) -> tuple[Any] | None:
        """Returns the result of `work`, which calls compiled functions, in a tuple, or None if they cannot be
        compiled. Nothing was computed then."""


@dataclass
class LayerForward:
    """The forward method of `layer`. `recompute` calls a function so that the backward pass computes it again."""

    layer: Any
    recompute: Callable[..., Any] | None = None
    compiled: CompiledForward | None = None

    def __call__(self, *args: Any, **named: Any) -> Any:
        if self.compiled is not None and self.compiled.is_used:
            work = partial(
                self._run,
                self.compiled.of(self.layer),
                _with_gradient(args),
                named,
            )
            result = self.compiled.attempt(work)
            if result is not None:
                return result[0]
        return self._run(self.plain, args, named)

    def plain(self, *args: Any, **named: Any) -> Any:
        """Calls the method of the layer's class."""
        return type(self.layer).forward(self.layer, *args, **named)

    def _run(
        self,
        forward: Forward,
        args: tuple[Any, ...],
        named: dict[str, Any],
    ) -> Any:
        # With a cache, a second pass would store its keys and values twice.
        has_cache = named.get("past_key_values") is not None
        if self.recompute is None or has_cache or not (self.layer.training and torch.is_grad_enabled()):
            return forward(*args, **named)
        return self.recompute(partial(forward, **named), *args)


def layer_forward(layer: Any) -> LayerForward:
    """Returns the replaced forward method of a layer; replaces it if it is not."""
    forward = vars(layer).get("forward")
    if not isinstance(forward, LayerForward):
        assert forward is None, f"the forward method of a {type(layer).__name__} is replaced by something else"
        forward = LayerForward(layer)
        layer.forward = forward
    return forward


def restore_layers(model: Any) -> None:
    """Undoes `layer_forward` for all layers."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), LayerForward):
            del module.forward


def _with_gradient(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Makes the hidden states have a gradient if autograd is enabled. Those of the first layer have none, which is
    another graph to compile: this takes longer than computing a gradient that is not used."""
    if not args or not torch.is_grad_enabled() or args[0].requires_grad:
        return args
    return (args[0].detach().requires_grad_(), *args[1:])
