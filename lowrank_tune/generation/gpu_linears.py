"""The modules of a model with few kernel launches, for the time of a rollout on a GPU.

Linears that read the same tensor share products (`generation/joined_linears.py`). Where memory has room, query, key,
value and output have copies in half precision, because bitsandbytes unpacks their weights in each step of many rows.
Norms and the rotary embedding are fused. While the context is entered, only the `forward` of modules and the function
of the rotary embedding are replaced. Modules with hooks and with other kinds of adapters keep their own forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from lowrank_tune.generation.cast_adapters import CastAdapters
from lowrank_tune.generation.gpu_norms import fused_norms
from lowrank_tune.generation.joined_linears import Forward, JoinedLinears
from lowrank_tune.generation.joined_rotary import JoinedRotary
from lowrank_tune.model.lora_modules import base_layer_of, groups_of_same_input, has_forward_hooks, is_plain_lora

ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")


@contextmanager
def gpu_linears(
    model: nn.Module,
    stack: Sequence[str],
    dtype: torch.dtype,
    rows: int = 1,
    copy_limit: int = 0,
) -> Iterator[AbstractContextManager[None]]:
    """Yields the context to enter for each stretch of forward passes of a rollout, with steps of up to `rows` rows.
    Copies of weights are made if all of them together fit `copy_limit` bytes."""
    linears = GpuLinears(model, stack, dtype)
    linears.make_copies(rows, copy_limit)
    try:
        yield linears
    finally:
        linears.close()


class GpuLinears(AbstractContextManager[None]):
    """The modules of a model with a stack of adapters, with their current weights. Products are in `dtype`.
    `copied_bytes` is the size of the copies of weights."""

    def __init__(
        self,
        model: nn.Module,
        stack: Sequence[str],
        dtype: torch.dtype,
    ) -> None:
        self.copied_bytes = 0
        self.groups = [JoinedLinears(modules, stack, dtype) for modules in _joinable_groups(model, stack, dtype)]
        self.forwards: list[tuple[nn.Module, Forward]] = []
        for group in self.groups:
            for index, module in enumerate(group.modules):
                self.forwards.append((module, partial(group.forward, index)))
        self.forwards += fused_norms(model)
        replaced = {id(module) for module, _ in self.forwards}
        # The adapters of the other modules are cast as autocast casts them.
        others = [module for module in model.modules() if id(module) not in replaced]
        self.other_adapters = CastAdapters(others, stack, dtype)
        self.rotary = JoinedRotary(model)
        self._attention = _attention_linears(model)

    def __enter__(self) -> None:
        self.other_adapters.__enter__()
        self.rotary.__enter__()
        for module, forward in self.forwards:
            module.__dict__["forward"] = forward

    def __exit__(self, *_: object) -> None:
        for module, _forward in self.forwards:
            del module.__dict__["forward"]
        for group in self.groups:
            group.clear()
        self.rotary.__exit__()
        self.other_adapters.__exit__()

    def make_copies(self, rows: int, limit: int) -> None:
        """Copies the attention's weights that a step of `rows` rows unpacks, if they fit `limit` bytes together."""
        groups = self.copied_groups(rows)
        num_bytes = sum(group.copied_bytes for group in groups)
        if num_bytes <= limit:
            for group in groups:
                group.make_copy()
            self.copied_bytes = num_bytes

    def copied_groups(self, rows: int) -> list[JoinedLinears]:
        """Returns the groups that gain from a copy."""
        groups = []
        for group in self.groups:
            if not all(type(base) is Linear4bit for base in group.bases):
                continue
            is_attention = all(id(module) in self._attention for module in group.modules)
            if is_attention and group.gains_from_copy(rows, group.bases[0].weight.device):
                groups.append(group)
        return groups

    def close(self) -> None:
        """Frees the copies."""
        self.forwards.clear()
        self.groups.clear()
        self.other_adapters.close()
        self.copied_bytes = 0


def _joinable_groups(
    model: nn.Module,
    stack: Sequence[str],
    dtype: torch.dtype,
) -> Iterator[list[Any]]:
    """Yields the linears that have adapters or 4-bit weights, those that read the same tensor together."""
    wrapped = {id(module.base_layer) for module in model.modules() if hasattr(module, "base_layer")}
    for group in groups_of_same_input(module for module in model.modules() if id(module) not in wrapped):
        linears = [module for module in group if _is_joinable(module, stack, dtype)]
        if all(type(module) is nn.Linear for module in linears):
            continue
        widths = {base_layer_of(module).in_features for module in linears}
        if len(widths) <= 1:
            yield linears
        else:
            yield from ([module] for module in linears)


def _is_joinable(
    module: Any,
    stack: Sequence[str],
    dtype: torch.dtype,
) -> bool:
    """Returns whether a module computes base(x) + scaling B A x in `dtype`, and nothing else."""
    base = base_layer_of(module)
    if base is not module and not is_plain_lora(module, stack):
        return False
    if any("forward" in vars(each) or has_forward_hooks(each) for each in (module, base)):
        return False
    if type(base) is Linear4bit:
        return base.compute_dtype in (None, dtype)
    return type(base) is nn.Linear and base.weight.dtype == dtype


def _attention_linears(model: nn.Module) -> set[int]:
    found = set()
    for module in model.modules():
        if hasattr(module, ATTENTION_LINEARS[0]):
            found |= {id(getattr(module, name)) for name in ATTENTION_LINEARS if hasattr(module, name)}
    return found
