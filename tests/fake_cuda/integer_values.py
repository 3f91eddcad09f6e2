"""Integers and masks on the fake device keep their real values, so that code that reads ids, masks and lengths takes
the branches that it takes in a run.

Each operation whose arguments are all known is computed a second time, on CPU tensors. Floating-point numbers have no
values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

ATTRIBUTE = "integer_values"


@dataclass
class StorageState:
    """Whether the values in a storage, and in all its views, are known."""

    known: bool = True


@dataclass(frozen=True)
class IntegerValues:
    """A CPU tensor that is equal to one on the fake device."""

    tensor: Tensor
    storage: StorageState = field(default_factory=StorageState)


class UnknownValues(RuntimeError):
    """The shape of a result depends on numbers that the fake device does not have."""


def values_of(tensor: Tensor) -> Tensor | None:
    """Returns the values of a tensor: itself on the CPU, what is known of one on the fake device, or None."""
    if not tensor.is_cuda:
        return tensor
    values: IntegerValues | None = getattr(tensor, ATTRIBUTE, None)
    if values is None or not values.storage.known:
        return None
    return values.tensor


def set_values(tensor: Tensor, values: Tensor, storage: StorageState | None = None) -> Tensor:
    """Stores the values of a tensor on the fake device, if they are integers or truth values. Returns the tensor."""
    if not values.is_floating_point():
        setattr(tensor, ATTRIBUTE, IntegerValues(values, storage or StorageState()))
    return tensor


def compute_values(
    func: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> Any:
    """Returns what an operation returns on the CPU for the values of its arguments, or None if one of them is unknown.
    No mode may be active."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if any(values_of(tensor) is None for tensor in tensors):
        return None
    cpu_args, cpu_kwargs = tree_map_only(Tensor, values_of, (tuple(args), kwargs))
    if cpu_kwargs.get("device") is not None:
        cpu_kwargs["device"] = torch.device("cpu")
    return func(*cpu_args, **cpu_kwargs)


def attach_values(
    results: Any,
    values: Any,
    inputs: Sequence[Tensor],
) -> None:
    """Stores computed values with the results of the operation. A view shares its state with what it is a view of."""
    states: dict[int, StorageState] = {}
    for tensor in inputs:
        known: IntegerValues | None = getattr(tensor, ATTRIBUTE, None)
        if known is not None:
            states[known.tensor.untyped_storage().data_ptr()] = known.storage
    for result, value in zip(tree_leaves(results), tree_leaves(values), strict=True):
        if isinstance(result, Tensor) and result.is_cuda:
            set_values(result, value, states.get(value.untyped_storage().data_ptr()))


def forget_values(tensor: Tensor) -> None:
    """Marks the values of a tensor and of all its views as unknown: something unknown was written to it."""
    values: IntegerValues | None = getattr(tensor, ATTRIBUTE, None)
    if values is not None:
        values.storage.known = False


def required_values(tensor: Tensor, purpose: str) -> Tensor:
    """Returns the values of a tensor. Raises UnknownValues if there are none."""
    values = values_of(tensor)
    if values is None:
        raise UnknownValues(f"{purpose} of a tensor without known values, {tensor.dtype} {tuple(tensor.shape)}")
    return values


def read_number(tensor: Tensor) -> Any:
    """Returns the only element of a tensor; 0, or True, if it is not known."""
    values = values_of(tensor)
    if values is not None:
        return values.item()
    return stand_in(tensor).item()


def stand_in(tensor: Tensor) -> Tensor:
    """Returns a CPU tensor of the same shape for values that are read: what is known, else zeros, or True."""
    values = values_of(tensor)
    if values is not None:
        return values.clone()
    if tensor.dtype == torch.bool:
        return torch.ones(tensor.shape, dtype=torch.bool)
    return torch.zeros(tensor.shape, dtype=tensor.dtype)
