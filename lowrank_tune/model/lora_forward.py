"""Replaces PEFT's forward of linears with plain LoRA adapters by one autograd function (`model/lora_linear.py`).

Other kinds of adapters and layers, and other dtypes than those of training, run PEFT's own forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners import lora
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from torch import Tensor, nn

from lowrank_tune.model.lora_linear import Adapter, lora_linears
from lowrank_tune.model.lora_modules import groups_of_same_input, has_forward_hooks, is_plain_lora

Stack = tuple[str, ...]


@dataclass(eq=False)
class _Group:
    """Modules that read the same input, in the order in which they are called, as long as they are."""

    modules: list[Any]
    in_order: bool = True


@dataclass
class _Outputs:
    """Outputs of a group for `x` that its later modules return, by their index, and the context in which they are
    valid."""

    group: _Group
    x: Tensor
    context: object
    outputs: dict[int, Tensor]


@dataclass(eq=False)
class LoraLinears:
    """The linears of a model as a fast path. `active` is the list of active adapters. `wider` has the stacks whose
    products are as wide as those of another stack (`wider_stacks`)."""

    active: list[str]
    wider: Mapping[Stack, Stack] = field(default_factory=dict)
    name: str = "LoRA linears as one function"
    enabled: bool = True
    replaced: list[tuple[Any, type]] = field(default_factory=list)
    pending: _Outputs | None = None

    def install(self, model: nn.Module) -> None:
        """Replaces the forward of the linears of a model."""
        for modules in groups_of_same_input(model.modules()):
            group = _Group([module for module in modules if _replacement_of(module) is not None])
            for index, module in enumerate(group.modules):
                self.replaced.append((module, type(module)))
                module.__class__ = _replacement_of(module)
                module.place = _Place(self, group, index)

    def remove(self) -> None:
        """Restores PEFT's forward."""
        self.clear()
        for module, kind in self.replaced:
            module.__class__ = kind
            del module.place
        self.replaced.clear()

    def clear(self) -> None:
        """Frees outputs that no module returned, because a pass ended early."""
        self.pending = None

    def pop_output(
        self,
        group: _Group,
        index: int,
        x: Tensor,
    ) -> Tensor | None:
        """Returns the output that the first module of the group computed, once, or None if there is none."""
        pending = self.pending
        if pending is None or pending.group is not group or pending.x is not x:
            return None
        if pending.context != self.context():
            return None
        output = pending.outputs.pop(index, None)
        if not pending.outputs:
            self.pending = None
        return output

    def store_outputs(
        self,
        group: _Group,
        x: Tensor,
        outputs: Sequence[Tensor],
    ) -> Tensor:
        """Returns the first of the outputs of a group, and stores the others until they are popped."""
        later = dict(enumerate(outputs))
        first = later.pop(0)
        self.pending = _Outputs(group, x, self.context(), later)
        return first

    def check_order(self) -> None:
        """Stops joining a group whose outputs were computed and not popped: its modules are called in another order."""
        if self.pending is not None:
            self.pending.group.in_order = False
            self.clear()

    def context(self) -> object:
        """Returns what an output depends on besides the input and the weights."""
        return self.active[:], torch.is_grad_enabled()


@dataclass(eq=False)
class _Place:
    """Where a module belongs: module number `index` of a group, on a path."""

    path: LoraLinears
    group: _Group
    index: int


class _OneFunction:
    """The forward method of a linear with LoRA adapters. A class, not an attribute of the module, so that compiled code
    of one layer is valid for all layers."""

    place: _Place

    def forward(
        self,
        x: Tensor,
        *others: Any,
        **named: Any,
    ) -> Tensor:
        path = self.place.path
        group = self.place.group
        if others or named or not path.enabled:
            return super().forward(x, *others, **named)  # type: ignore[misc, no-any-return]
        if self.place.index == 0:
            path.check_order()
        output = path.pop_output(group, self.place.index, x)
        if output is not None:
            return output
        active = path.active
        stack = path.wider.get(tuple(active), active)
        if not _is_computable(self, stack, x):
            return super().forward(x)  # type: ignore[misc, no-any-return]
        if self.place.index or not _is_joinable(group, stack, x):
            return _linears([self], active, stack, x)[0]
        return path.store_outputs(group, x, _linears(group.modules, active, stack, x))


class _Linear(_OneFunction, lora.Linear):  # type: ignore[misc]
    pass


class _Linear4bit(_OneFunction, LoraLinear4bit):  # type: ignore[misc]
    pass


REPLACEMENTS = {(lora.Linear, nn.Linear): _Linear, (LoraLinear4bit, Linear4bit): _Linear4bit}
"""The classes with the faster forward, by PEFT's class and that of the linear below it."""


def _is_joinable(
    group: _Group,
    stack: Sequence[str],
    x: Tensor,
) -> bool:
    """Returns whether the first module of a group computes the outputs of all."""
    if len(group.modules) == 1 or not group.in_order:
        return False
    return all(_is_computable(module, stack, x) for module in group.modules[1:])


def wider_stacks(stacks: Iterable[Sequence[str]], trainable: Iterable[str]) -> dict[Stack, Stack]:
    """Returns, for each stack of frozen adapters that trained ones are above in another, that other stack.

    Both have products of the same shape then, with zeros in place of the trained adapters: a reference is equal to a
    policy before its first step, bit for bit, which kernels for two shapes do not guarantee.
    """
    trained = set(trainable)
    wider: dict[Stack, Stack] = {}
    for stack in stacks:
        frozen = [name for name in stack if name not in trained]
        if 0 < len(frozen) < len(stack) and frozen == list(stack[: len(frozen)]):
            wider.setdefault(tuple(frozen), tuple(stack))
    return wider


def _replacement_of(module: Any) -> type | None:
    if "forward" in vars(module) or not hasattr(module, "base_layer"):
        return None
    return REPLACEMENTS.get((type(module), type(module.base_layer)))


def _is_computable(
    module: Any,
    stack: Sequence[str],
    x: Tensor,
) -> bool:
    """Returns whether the module computes base(x) + scaling B A x, with all products in the dtype of x."""
    base = module.base_layer
    if not is_plain_lora(module, stack) or has_forward_hooks(base) or "forward" in vars(base):
        return False
    stored = base.compute_dtype if isinstance(base, Linear4bit) else base.weight.dtype
    if stored != x.dtype:
        return False
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device) == x.dtype
    names = [name for name in stack if name in module.lora_A]
    return all(module.lora_A[name].weight.dtype == x.dtype for name in names)


def _linears(
    modules: Sequence[Any],
    active: Sequence[str],
    stack: Sequence[str],
    x: Tensor,
) -> Sequence[Tensor]:
    """Returns the outputs of modules that read `x`. The adapters of `stack` that are not active have zeros as B."""
    bases = [module.base_layer for module in modules]
    adapters: list[Adapter] = []
    changed = False
    for index, module in enumerate(modules):
        for name in stack:
            if name not in module.lora_A:
                continue
            down = module.lora_A[name].weight
            up = module.lora_B[name].weight
            scaling = module.scaling[name]
            if name in active:
                changed = True
                adapters.append(Adapter(index, down, up, scaling, _dropped(module, name, x)))
            else:
                adapters.append(Adapter(index, down.detach(), torch.zeros_like(up), scaling))
    if not changed:
        return [base(x) for base in bases]
    return lora_linears(bases, adapters, x)


def _dropped(
    module: Any,
    name: str,
    x: Tensor,
) -> Tensor | None:
    """Returns the input of an adapter after dropout, with the random numbers that PEFT draws; None
    without dropout."""
    dropout = module.lora_dropout[name]
    if not dropout.training or getattr(dropout, "p", 0.0) == 0:
        return None
    return dropout(x)  # type: ignore[no-any-return]
