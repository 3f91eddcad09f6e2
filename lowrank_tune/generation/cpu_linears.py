"""Faster linear modules, norms and decoding steps for the time of a rollout on the CPU.

On the CPU bitsandbytes unpacks a 4-bit weight at every call. Here each weight is copied once, in fp32, into a scratch
of limited size, and the adapters are added to it (`cpu_weights`). Query, key and value are computed as one product, and
so are gate and up. A weight in fp32 for which the scratch has no room is not copied: its adapter is applied beside it,
with two small products. The stored weights do not change: while the context is entered, only the `forward` of modules
is replaced, and the scratch is freed after the rollout.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import nn

from lowrank_tune.events import Emit, ignore_event
from lowrank_tune.generation.cpu_comparison import passes_comparison
from lowrank_tune.generation.cpu_norms import fused_norms
from lowrank_tune.generation.cpu_weights import copy_head
from lowrank_tune.generation.decoder_step import DecoderStep, has_decoder_step
from lowrank_tune.generation.linear_weights import (
    Forward,
    JoinedForward,
    ScratchLimits,
    join_weights,
    linear_weights,
    module_forward,
    scratch_plan,
)
from lowrank_tune.model.logprobs import Head


class FastLinears(AbstractContextManager[None]):
    """The linear modules, norms and head of a model with a stack of adapters, with their current weights.
    `scratch_bytes` is the size of the scratch."""

    def __init__(
        self,
        model: Any,
        stack: Sequence[str],
        head: Head,
        limits: ScratchLimits,
        emit: Emit = ignore_event,
    ) -> None:
        """If the copies exceed the limits, weights in fp32 are read where they are, and bitsandbytes unpacks 4-bit
        weights at every call."""
        self.model = model
        self.emit = emit
        self.stored_head = self.head = head
        plan = scratch_plan(model, head, limits)
        self.scratch_bytes = plan.num_bytes
        self.products: dict[tuple[Any, ...], Forward] = {}
        """Products of rows (N, in), by the modules that are computed as one."""
        self.forwards: list[tuple[nn.Module, Forward]] = []
        for group in plan.groups:
            self._add(group, stack, plan.copied)
        norms = dict(fused_norms(model))
        self.forwards += norms.items()
        if plan.copies_head:
            self.head = copy_head(head)
        if has_decoder_step(model):
            decoder = model.get_decoder()
            self.forwards.append((decoder, DecoderStep(decoder, self.products, norms).forward))

    def __enter__(self) -> None:
        heads = self.stored_head, self.head
        if self.forwards and not passes_comparison(self.model, self.forwards, heads, self.emit):
            self.close()
        for module, forward in self.forwards:
            module.__dict__["forward"] = forward

    def __exit__(self, *_: object) -> None:
        for module, _forward in self.forwards:
            del module.__dict__["forward"]

    def close(self) -> None:
        """Frees the scratch."""
        self.head = self.stored_head
        self.forwards.clear()
        self.products.clear()
        self.scratch_bytes = 0

    def _add(
        self,
        group: Sequence[Any],
        stack: Sequence[str],
        copied: frozenset[type],
    ) -> None:
        """Adds the forwards of modules that read the same input."""
        parts = []
        for module in group:
            part = linear_weights(module, stack, copied)
            if part is not None:
                parts.append(part)
        # Weights that are not copied are not joined: that would store them twice.
        if len(parts) == len(group) > 1 and all(part.is_copied for part in parts):
            product = join_weights(parts)
            self.products[tuple(group)] = product
            joined = JoinedForward(product, [len(part.weight) for part in parts])
            for index, module in enumerate(group):
                self.forwards.append((module, partial(joined.forward, index)))
            return
        for part in parts:
            product = part.product()
            self.products[part.module,] = product
            self.forwards.append((part.module, partial(module_forward, product)))
