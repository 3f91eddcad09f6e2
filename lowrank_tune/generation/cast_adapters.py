"""The adapters of a rollout in the dtype of autocast.

Autocast casts fp32 weights when a product reads them, and keeps the copies until its outermost context ends: at every
yield of a rollout, which is every token of a chat. It keeps none of frozen weights. Here the matrices of the adapters
are cast once for the whole rollout, and only the references to them are exchanged at a yield. The values are those that
autocast computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

Parameters = dict[str, nn.Parameter | None]
"""The parameters of a module by name, as `torch.nn.Module` stores them."""


@contextmanager
def cast_adapters(
    model: nn.Module,
    stack: Sequence[str],
    dtype: torch.dtype,
) -> Iterator[AbstractContextManager[None]]:
    """Yields the context to enter for each stretch of forward passes of a rollout. In it the adapters of `stack` are in
    `dtype`, with the weights that they have now; outside they are the parameters that are trained."""
    adapters = CastAdapters(model.modules(), stack, dtype)
    try:
        yield adapters
    finally:
        adapters.close()


class CastAdapters(AbstractContextManager[None]):
    """Copies of the matrices of a stack of adapters in another dtype, of those of `modules` that have adapters."""

    def __init__(
        self,
        modules: Iterable[nn.Module],
        stack: Sequence[str],
        dtype: torch.dtype,
    ) -> None:
        self.originals: list[tuple[Parameters, str, nn.Parameter]] = []
        self.copies: list[nn.Parameter] = []
        for module in _matrices(modules, stack):
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.dtype != dtype:
                    self.originals.append((module._parameters, name, parameter))
                    copy = parameter.detach().to(dtype)
                    self.copies.append(nn.Parameter(copy, requires_grad=False))

    def __enter__(self) -> None:
        for (parameters, name, _), copy in zip(self.originals, self.copies, strict=True):
            parameters[name] = copy

    def __exit__(self, *_: object) -> None:
        for parameters, name, original in self.originals:
            parameters[name] = original

    def close(self) -> None:
        """Frees the copies."""
        self.originals.clear()
        self.copies.clear()


def _matrices(modules: Iterable[nn.Module], stack: Sequence[str]) -> Iterator[Any]:
    """Yields the modules of A and B of all adapters of the stack."""
    for layer in modules:
        if isinstance(layer, LoraLayer):
            for matrices in (layer.lora_A, layer.lora_B):
                for name in stack:
                    if name in matrices:
                        yield matrices[name]
