"""A numeric check of attention over segments, on the device that trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank_tune.errors import first_line
from lowrank_tune.model.oom import is_out_of_memory
from lowrank_tune.model.rounding import relative_difference
from lowrank_tune.model.segment_attention import attend_to_segments
from lowrank_tune.model.sequence_packing import Segments

TOLERANCE = {torch.float32: 1e-4}
HALF_PRECISION_TOLERANCE = 3e-2
"""Relative difference of outputs and gradients from those in fp32 with a mask."""
NUM_FIRST, NUM_SHARED, NUM_OWN = 20, 12, 9
"""Tokens of the made-up segments: the first one, what the second one shares of it, and what else the second one has."""


def find_segment_fault(
    device: torch.device,
    dtype: torch.dtype,
    num_groups: int,
    head_dim: int,
) -> str | None:
    """Returns the fault of attention over segments on a device as a part of a sentence, None if there is none.

    Two segments, the second of which has more keys than queries, must have the outputs and gradients of attention with
    a mask in fp32: the device must align causal attention at the last key. Each head of keys has `num_groups` heads of
    queries.
    """
    num_heads = (2 * num_groups, 2, 2)
    inputs = [
        _made_up_values((NUM_FIRST + NUM_OWN, heads, head_dim), number, device).to(dtype)
        for number, heads in enumerate(num_heads)
    ]
    segments = _made_up_segments(device)
    attend = partial(
        attend_to_segments,
        segments=segments,
        scale=head_dim**-0.5,
    )
    expected = _output_and_gradients(_masked_attention, [tensor.float() for tensor in inputs])
    try:
        computed = _output_and_gradients(attend, inputs)
    # Kernels of a GPU raise errors of several classes for dtypes and sizes of heads that they do not support.
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return f"raises an error ({first_line(error)})"
    tolerance = TOLERANCE.get(dtype, HALF_PRECISION_TOLERANCE)
    if all(relative_difference(one, other) <= tolerance for one, other in zip(computed, expected, strict=True)):
        return None
    return "computes something else"


@torch.enable_grad()
def _output_and_gradients(attend: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Returns the output of attention, and the gradients of queries, keys and values."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = attend(*leaves)
    weights = _made_up_values(
        tuple(output.shape),
        len(inputs),
        output.device,
    )
    return [output.detach(), *torch.autograd.grad(output, leaves, weights.to(output.dtype))]


def _made_up_segments(device: torch.device) -> Segments:
    own = torch.arange(NUM_FIRST, NUM_FIRST + NUM_OWN)
    key_index = torch.cat([torch.arange(NUM_FIRST), torch.arange(NUM_SHARED), own])
    return Segments(
        torch.tensor([0, NUM_FIRST, NUM_FIRST + NUM_OWN], dtype=torch.int32, device=device),
        torch.tensor([0, NUM_FIRST, len(key_index)], dtype=torch.int32, device=device),
        NUM_FIRST,
        NUM_SHARED + NUM_OWN,
        key_index.to(device),
    )


def _made_up_values(
    shape: tuple[int, ...],
    number: int,
    device: torch.device,
) -> Tensor:
    """Returns values of about the size of a normal distribution, without random numbers."""
    places = torch.arange(torch.Size(shape).numel(), device=device, dtype=torch.float32)
    return ((places + 1) * (1.7 + 0.3 * number)).cos().view(shape) * 1.4


def _masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    """Returns attention over the made-up segments, computed with a mask."""
    slot = torch.arange(query.shape[0], device=query.device)
    is_second = slot >= NUM_FIRST
    same = is_second[:, None] == is_second
    shared = is_second[:, None] & (slot < NUM_SHARED)
    mask = (same | shared) & (slot <= slot[:, None])
    num_groups = query.shape[1] // key.shape[1]
    heads = [query, key.repeat_interleave(num_groups, dim=1), value.repeat_interleave(num_groups, dim=1)]
    queries, keys, values = (tensor.transpose(0, 1)[None] for tensor in heads)
    output = F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=mask,
    )
    return output[0].transpose(0, 1)
