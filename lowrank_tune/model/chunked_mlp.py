"""The MLPs of a model, computed in chunks of the sequence (`train.mlp_chunks`).

An MLP's intermediate activations are several times as wide as the hidden states, and at long rows they are the peak of
a recomputed layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lowrank_tune.errors import UserError
from lowrank_tune.model.chunked_forward import ContextFn, Forward, chunked_forward

MLP_NAMES = ("mlp", "feed_forward")
"""Names of the MLP in the decoder layers of transformers."""
MIN_CHUNK_TOKENS = 1024
"""A shorter chunk saves little memory, and unpacking 4-bit weights for it takes a large share of the time."""


def chunk_mlps(
    model: Any,
    num_chunks: int,
    context_fn: ContextFn,
) -> Callable[[], None]:
    """Makes the MLP of each layer run in `num_chunks` chunks, fewer for short sequences. Returns a function that undoes
    it. Raises UserError for a model whose MLPs are unknown."""
    modules: list[nn.Module] = []
    if num_chunks > 1:
        modules = _mlps_of(model)
    before = [vars(module).get("forward") for module in modules]
    for module in modules:
        module.forward = _ChunkedForward(
            module.forward,
            num_chunks,
            context_fn,
            model.config.model_type,
        )

    def undo() -> None:
        for module, forward in zip(modules, before, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward

    return undo


def _mlps_of(model: Any) -> list[nn.Module]:
    layers = [module for module in model.get_decoder().modules() if isinstance(module, GradientCheckpointingLayer)]
    modules = []
    for layer in layers:
        for name in MLP_NAMES:
            module = getattr(layer, name, None)
            if isinstance(module, nn.Module):
                modules.append(module)
    if not layers or len(modules) != len(layers):
        raise _unknown_mlp(model.config.model_type)
    return modules


@dataclass(frozen=True)
class _ChunkedForward:
    """The forward method of an MLP, in chunks."""

    plain: Forward
    num_chunks: int
    context_fn: ContextFn
    model_type: str

    def __call__(
        self,
        hidden: Tensor,
        *others: Any,
        **named: Any,
    ) -> Tensor:
        if others or named:
            raise _unknown_mlp(self.model_type)
        tokens = hidden.shape[:-1].numel()
        return chunked_forward(
            self._checked,
            hidden,
            min(self.num_chunks, tokens // MIN_CHUNK_TOKENS),
            self.context_fn,
        )

    def _checked(self, chunk: Tensor) -> Tensor:
        output = self.plain(chunk)
        # Some MLPs of experts return the router's logits too.
        if not isinstance(output, Tensor) or output.shape != chunk.shape:
            raise _unknown_mlp(self.model_type)
        return output


def _unknown_mlp(model_type: str) -> UserError:
    return UserError(
        f"train.mlp_chunks: the MLPs of {model_type} models cannot be computed in chunks; set it to 1, or leave it out"
    )
