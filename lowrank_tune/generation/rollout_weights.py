"""The weights of a rollout on a GPU: modules with few launches, or PEFT's own with cast adapters.

The modules with few launches are compared with the plain ones before they are used, on made-up rows of the user's own
base, once for each stack of adapters. If they compute something else, the plain ones are used, with one warning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from lowrank_tune.errors import first_line
from lowrank_tune.events import warning
from lowrank_tune.generation.cast_adapters import cast_adapters
from lowrank_tune.generation.gpu_linears import gpu_linears
from lowrank_tune.model.fast_paths import HALF_PRECISION_TOLERANCE, TOLERANCE, fixed_values
from lowrank_tune.model.oom import free_traceback, is_out_of_memory
from lowrank_tune.model.roles import Roles
from lowrank_tune.model.rounding import allowed_difference, relative_difference

NAME = "decoding with few launches"
ROWS = ((3, 40), (2, 2))
"""Rows and columns that are compared: with more rows than bitsandbytes reads packed weights for, and with fewer."""

Weights = AbstractContextManager[AbstractContextManager[None]]
Hidden = Callable[[Tensor], Tensor]
"""Token ids (B, T) -> hidden states (B, T, d), in the mode of a rollout."""


def rollout_weights(
    roles: Roles,
    stack: Sequence[str],
    dtype: torch.dtype,
    rows: int = 1,
    copy_limit: int = 0,
) -> Weights:
    """Returns the context of a rollout with steps of up to `rows` rows, which yields the context of each stretch of its
    forward passes."""
    model = roles.base.model
    if not roles.decoding.few_launches:
        return cast_adapters(model, stack, dtype)
    return gpu_linears(model, stack, dtype, rows, copy_limit)


def verify_rollout_weights(
    roles: Roles,
    stack: Sequence[str],
    dtype: torch.dtype,
    hidden: Hidden,
    rows: int = 1,
    copy_limit: int = 0,
) -> None:
    """Compares both kinds of modules, once for each stack, with the copies that a rollout of `rows` rows makes."""
    options = roles.decoding
    if not options.few_launches or tuple(stack) in options.compared_stacks:
        return
    options.compared_stacks.add(tuple(stack))
    try:
        reason = _reason_to_refuse(roles, stack, dtype, hidden, rows, copy_limit)
    # Kernels raise errors of many classes. The warning contains the message.
    except Exception as error:
        reason = f"an error ({first_line(error)})"
        if is_out_of_memory(error):
            reason = "memory ran out while it was compared with the plain modules"
            free_traceback(error)
    if reason:
        options.few_launches = False
        roles.limits.emit(warning(f"{NAME}: {reason}; the plain modules are used"))


def _reason_to_refuse(
    roles: Roles,
    stack: Sequence[str],
    dtype: torch.dtype,
    hidden: Hidden,
    rows: int,
    copy_limit: int,
) -> str:
    model = roles.base.model
    vocabulary = len(roles.head.weight)
    batches = [_made_up_ids(vocabulary, shape, roles.base.device) for shape in ROWS]
    with fixed_values(_trained(model, stack)):
        with cast_adapters(model, stack, dtype) as plain, plain:
            expected = [hidden(ids) for ids in batches]
            # Another batch shape alone changes the rounding.
            rounding = relative_difference(hidden(batches[0][:1]), expected[0][:1])
        tolerance = TOLERANCE.get(dtype, allowed_difference(HALF_PRECISION_TOLERANCE, rounding))
        with gpu_linears(model, stack, dtype, rows, copy_limit) as fast, fast:
            computed = [hidden(ids) for ids in batches]
    for one, other in zip(computed, expected, strict=True):
        difference = relative_difference(one, other)
        # False for NaN.
        if not difference <= tolerance:
            return f"other hidden states than on the plain path, by {difference:.1e} ({tolerance:.0e} is allowed)"
    return ""


def _trained(model: nn.Module, stack: Sequence[str]) -> list[nn.Parameter]:
    """Returns the parameters of the stack that are trained. Before the first step their product is 0."""
    names = [f".{name}." for name in stack]
    return [
        parameter
        for key, parameter in model.named_parameters()
        if parameter.requires_grad and any(name in key for name in names)
    ]


def _made_up_ids(
    vocabulary: int,
    shape: tuple[int, int],
    device: torch.device,
) -> Tensor:
    rows, columns = shape
    numbers = torch.arange(3, 3 + rows * columns, device=device).view(shape)
    return numbers * 7 % vocabulary
