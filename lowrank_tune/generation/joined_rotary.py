"""Rotary embedding of query and key together in four operations, for a rollout on a GPU: transformers makes ten.

transformers' attention modules call a function of their Python module, so that function is replaced while a stretch of
forward passes runs. It rotates halves: x cos + (-x2, x1) sin, where x1 and x2 are the halves of x. (-x2, x1) sin is x
shifted by half its width, times sin with a negative first half, which all layers share.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

FUNCTION = "apply_rotary_pos_emb"
TOLERANCE = 1e-6
MAX_TABLES = 2
"""Tables of a step: some models have one for layers with a sliding window, and one for the others."""


class JoinedRotary(AbstractContextManager[None]):
    """The faster function in the place of those that the attention modules of a model call, where they compute the
    same."""

    def __init__(self, model: nn.Module) -> None:
        self.functions: list[tuple[Any, _Rotary]] = []
        for namespace in _namespaces(model):
            rotary = _Rotary(getattr(namespace, FUNCTION))
            if rotary.is_equal():
                self.functions.append((namespace, rotary))

    def __enter__(self) -> None:
        for namespace, rotary in self.functions:
            setattr(namespace, FUNCTION, rotary)

    def __exit__(self, *_: object) -> None:
        for namespace, rotary in self.functions:
            setattr(namespace, FUNCTION, rotary.plain)
            rotary.tables.clear()


class _Rotary:
    """The rotation of query (B, H, 1, D) and key (B, KV, 1, D) of a decoding step by cos and sin (B, 1, D). Other calls
    go to the plain function."""

    def __init__(self, plain: Any) -> None:
        self.plain = plain
        self.tables: list[tuple[Tensor, Tensor]] = []
        """sin as the layers get it, and with a negative first half."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        cos: Tensor,
        sin: Tensor,
        *others: Any,
        **named: Any,
    ) -> tuple[Tensor, Tensor]:
        if others or named or not _is_decoding_step(query, key, cos, sin):
            return self.plain(query, key, cos, sin, *others, **named)  # type: ignore[no-any-return]
        joined = torch.cat((query, key), dim=1)
        shifted = joined.roll(joined.shape[-1] // 2, -1)
        rotated = joined.mul_(cos[:, None]).addcmul_(shifted, self._signed(sin))
        query, key = torch.split(rotated, [query.shape[1], key.shape[1]], dim=1)
        return query, key

    def _signed(self, sin: Tensor) -> Tensor:
        for known, signed in self.tables:
            if known is sin:
                return signed
        first, second = sin.chunk(2, dim=-1)
        signed = torch.cat((-first, second), dim=-1)[:, None]
        self.tables = [*self.tables[1 - MAX_TABLES :], (sin, signed)]
        return signed

    @torch.no_grad()
    def is_equal(self) -> bool:
        """Compares both functions on made-up tensors of the CPU."""
        numbers = torch.linspace(-1.0, 1.0, 2 * 4 * 8).sin()
        query = numbers.view(2, 4, 1, 8)
        key = 1 - query[:, :2]
        cos = query[:, 2].cos()
        sin = query[:, 3].sin() + 1
        try:
            expected = self.plain(query, key, cos, sin)
        # Functions of the same name have other arguments in some models.
        except Exception:
            return False
        if not isinstance(expected, tuple) or len(expected) != 2:
            return False
        computed = self(query, key, cos, sin)
        self.tables.clear()
        return all(bool(((a - b).abs() <= TOLERANCE).all()) for a, b in zip(computed, expected, strict=True))


def _is_decoding_step(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> bool:
    if query.ndim != 4 or query.shape[2] != 1 or cos.shape != (query.shape[0], 1, query.shape[3]):
        return False
    return query.dtype == key.dtype == cos.dtype == sin.dtype


def _namespaces(model: nn.Module) -> Iterator[Any]:
    """Yields the Python modules of a model's attention modules that have the function."""
    names = {type(module).__module__ for module in model.modules() if type(module).__name__.endswith("Attention")}
    for name in sorted(names):
        namespace = sys.modules.get(name)
        if hasattr(namespace, FUNCTION):
            yield namespace
