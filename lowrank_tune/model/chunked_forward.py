"""A module that treats every token alone, run on a sequence in chunks.

Each chunk is recomputed in the backward pass under its own checkpoint, so that the intermediate activations of only one
chunk exist at once. Inside a recomputed layer this is one more forward pass of the module.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Forward = Callable[[Tensor], Tensor]
ContextFn = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
"""Returns the contexts of a forward pass and of its recomputation."""
SEQUENCE_DIM = 1


@dataclass(frozen=True)
class Recomputation:
    """How a chunk is recomputed: in which contexts, and whether with the same random numbers, as dropout needs."""

    context_fn: ContextFn
    with_dropout: bool = False


def chunked_forward(
    forward: Forward,
    hidden: Tensor,
    num_chunks: int,
    recomputation: Recomputation,
) -> Tensor:
    """Returns `forward(hidden)` for hidden states (B, T, d), computed in up to `num_chunks` chunks of the sequence."""
    sizes = chunk_sizes(hidden.shape[SEQUENCE_DIM], num_chunks)
    if len(sizes) == 1:
        return forward(hidden)
    outputs = []
    # The gradient of one split is one tensor. Each slice would have a gradient of the whole size.
    for number, chunk in enumerate(torch.split(hidden, sizes, dim=SEQUENCE_DIM)):
        outputs.append(
            run_chunk(
                forward,
                chunk,
                number,
                len(sizes),
                recomputation,
            )
        )
    return torch.cat(outputs, dim=SEQUENCE_DIM)


def chunk_sizes(length: int, num_chunks: int) -> list[int]:
    """Returns the lengths of the chunks of a sequence, which differ by at most 1; fewer chunks for a sequence with
    fewer tokens."""
    count = max(1, min(num_chunks, length))
    size, num_longer = divmod(length, count)
    return [size + 1] * num_longer + [size] * (count - num_longer)


def run_chunk(
    forward: Forward,
    chunk: Tensor,
    number: int,
    count: int,
    recomputation: Recomputation,
) -> Tensor:
    """Returns the output of chunk `number` of `count`. The memory planner replaces this function to skip chunks."""
    if not torch.is_grad_enabled():
        return forward(chunk)
    return checkpoint(  # type: ignore[no-any-return]
        forward,
        chunk,
        use_reentrant=False,
        context_fn=recomputation.context_fn,
        preserve_rng_state=recomputation.with_dropout,
    )
