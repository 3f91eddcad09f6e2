"""The MLPs and norms of a model, computed in chunks of the sequence (`train.mlp_chunks`).

An MLP's intermediate activations are several times as wide as the hidden states, and the backward pass of a norm needs
seven fp32 copies of them: at long rows these are the peak of a recomputed layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lowrank_tune.errors import UserError
from lowrank_tune.model.chunked_forward import ContextFn, Recomputation, chunked_forward

MLP_NAMES = ("mlp", "feed_forward")
"""Names of the MLP in the decoder layers of transformers."""
MIN_DIMS = 3
"""Hidden states are (B, T, d), and queries and keys before a norm (B, T, H, D) or (B, H, T, D)."""
MIN_CHUNK_TOKENS = 1024
"""A shorter chunk saves little memory, and unpacking 4-bit weights for it takes a large share of the time."""


def chunk_mlps(
    model: Any,
    num_chunks: int,
    context_fn: ContextFn,
) -> Callable[[], None]:
    """Makes the MLP and the norms of each layer run in `num_chunks` chunks, fewer for short sequences. Returns a
    function that undoes it. Raises UserError for a model whose MLPs are unknown."""
    chunked: dict[nn.Module, type[_ChunkedNorm]] = {}
    if num_chunks > 1:
        decoder = model.get_decoder()
        chunked.update(dict.fromkeys(_norms_of(decoder), _ChunkedNorm))
        chunked.update(dict.fromkeys(_mlps_of(decoder), _ChunkedMlp))
    before = {module: vars(module).get("forward") for module in chunked}
    for module, kind in chunked.items():
        forward: Callable[..., Tensor] = module.forward
        if kind is _ChunkedMlp and _has_experts(module):
            forward = partial(_with_contiguous_input, forward)
        module.forward = kind(
            forward,
            num_chunks,
            Recomputation(context_fn, _has_dropout(module)),
            model.config.model_type,
        )

    def undo() -> None:
        for module, forward in before.items():
            del module.forward
            if forward is not None:
                module.forward = forward

    return undo


def _mlps_of(decoder: Any) -> list[nn.Module]:
    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    modules = []
    for layer in layers:
        for name in MLP_NAMES:
            module = getattr(layer, name, None)
            if isinstance(module, nn.Module):
                modules.append(module)
    if not layers or len(modules) != len(layers):
        raise _unknown_mlp(decoder.config.model_type)
    return modules


def _norms_of(decoder: Any) -> list[nn.Module]:
    """Returns the norms of the layers, those of queries and keys too, and the one after the last layer."""
    return [module for name, module in decoder.named_modules() if "norm" in name.rpartition(".")[2]]


def _has_experts(mlp: nn.Module) -> bool:
    """Returns whether the MLP is a mixture of experts, whose weights are one tensor."""
    return any(parameter.ndim == 3 for parameter in mlp.parameters())


def _with_contiguous_input(
    forward: Callable[[Tensor], Tensor],
    hidden: Tensor,
) -> Tensor:
    """Returns the output of a mixture of experts for a chunk of several rows: transformers views its input as one row
    of tokens, which a chunk of several rows is not in memory."""
    return forward(hidden.contiguous())


def _has_dropout(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.modules())


@dataclass(frozen=True)
class _ChunkedNorm:
    """The forward method of a norm, in chunks. A norm with more arguments than the hidden states runs as a whole."""

    plain: Callable[..., Tensor]
    num_chunks: int
    recomputation: Recomputation
    model_type: str

    def __call__(
        self,
        hidden: Tensor,
        *others: Any,
        **named: Any,
    ) -> Tensor:
        if others or named or hidden.ndim < MIN_DIMS:
            return self.plain(hidden, *others, **named)
        tokens = hidden.shape[:-1].numel()
        return chunked_forward(
            self.plain,
            hidden,
            min(self.num_chunks, tokens // MIN_CHUNK_TOKENS),
            self.recomputation,
        )


@dataclass(frozen=True)
class _ChunkedMlp(_ChunkedNorm):
    """The forward method of an MLP, in chunks. Raises UserError if it is more than a function of the hidden states."""

    def __call__(
        self,
        hidden: Tensor,
        *others: Any,
        **named: Any,
    ) -> Tensor:
        # Some MLPs add the residual, and some MLPs of experts return the router's logits too.
        if others or named:
            raise _unknown_mlp(self.model_type)
        output = super().__call__(hidden)
        if not isinstance(output, Tensor) or output.shape != hidden.shape:
            raise _unknown_mlp(self.model_type)
        return output


def _unknown_mlp(model_type: str) -> UserError:
    return UserError(
        f"train.mlp_chunks: the MLPs of {model_type} models cannot be computed in chunks; set it to 1, or leave it out"
    )
