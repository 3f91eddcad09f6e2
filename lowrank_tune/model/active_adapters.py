"""Contexts that decide which adapters, and which attention function, a forward pass uses."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

from lowrank_tune.model.causal_attention import AttentionName
from lowrank_tune.model.lora_forward import LoraLinears


class ActiveAdapters(AbstractContextManager[None]):
    """Activates a stack, and restores the previous one on exit. Can be entered again, as a second backward pass
    does."""

    def __init__(self, linears: LoraLinears, stack: Iterable[str]) -> None:
        self.linears = linears
        self.active = linears.active
        self.stack = list(stack)
        self.before = list[list[str]]()

    def __enter__(self) -> None:
        self.before.append(self.active[:])
        self.active[:] = self.stack

    def __exit__(self, *_: object) -> None:
        self.active[:] = self.before.pop()
        self.linears.clear()


class Recomputation(ActiveAdapters):
    """Activates the adapters and the attention function of a forward pass again."""

    def __init__(self, linears: LoraLinears, attention: AttentionName) -> None:
        super().__init__(linears, linears.active)
        self.attention = attention

    def __enter__(self) -> None:
        super().__enter__()
        self.attention.__enter__()

    def __exit__(self, *_: object) -> None:
        self.attention.__exit__()
        super().__exit__()
