"""Causal attention over segments of one packed row on the CPU, as a custom operator: torch.compile does not trace it.

Queries of a segment see the keys of their own segment up to themselves, and all keys of the beginning that the segment
shares with an earlier one. Both parts are computed without a mask by the kernel of PyTorch's SDPA, a shared beginning
once for all segments that are adjacent, and merged by their log-sum-exps. Its backward kernel reads the output and the
log-sum-exp of all keys, so that the gradients of both parts are exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

OPERATOR = "lowrank_tune::cpu_segment_attention"
_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Block(NamedTuple):
    """Queries that see the same range of keys, each up to itself if `is_causal`."""

    queries: slice
    keys: slice
    is_causal: bool


def _own_blocks(query_starts: list[int]) -> Iterator[_Block]:
    for start, end in zip(query_starts, query_starts[1:], strict=False):
        own = slice(start, end)
        yield _Block(own, own, True)


def _shared_blocks(
    query_starts: list[int],
    key_starts: list[int],
    key_index: Tensor,
) -> Iterator[_Block]:
    """Yields the shared beginnings. The keys of a segment are those of the shared beginning, then its own."""
    first_keys = key_index[key_starts[:-1]].tolist()
    block: _Block | None = None
    for number, first_key in enumerate(first_keys):
        start, end = query_starts[number : number + 2]
        num_shared = key_starts[number + 1] - key_starts[number] - (end - start)
        keys = slice(first_key, first_key + num_shared)
        if block is not None and block.keys == keys:
            block = block._replace(queries=slice(block.queries.start, end))
            continue
        if block is not None:
            yield block
        block = _Block(slice(start, end), keys, False) if num_shared else None
    if block is not None:
        yield block


def _blocks(
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    key_index: Tensor | None,
) -> Iterator[_Block]:
    query_starts = cu_seq_lens_q.tolist()
    yield from _own_blocks(query_starts)
    if key_index is not None:
        yield from _shared_blocks(query_starts, cu_seq_lens_k.tolist(), key_index)


@torch.library.custom_op(OPERATOR, mutates_args=(), device_types="cpu")
def _segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    key_index: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Returns the output (W, H, D) and the log-sum-exps (H, W)."""
    queries, keys, values = (_heads_first(tensor) for tensor in (query, key, value))
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    outputs = _heads_first(output)
    sums = torch.empty(
        (1, query.shape[1], query.shape[0]),
        dtype=_sum_dtype(query),
        device=query.device,
    )
    for block in _blocks(cu_seq_lens_q, cu_seq_lens_k, key_index):
        computed, computed_sums = _flash_forward(
            queries[:, :, block.queries],
            keys[:, :, block.keys],
            values[:, :, block.keys],
            0.0,
            block.is_causal,
            scale=scale,
        )
        if not block.is_causal:
            computed, computed_sums = _merge(
                outputs[:, :, block.queries],
                sums[:, :, block.queries],
                computed,
                computed_sums,
            )
        outputs[:, :, block.queries] = computed
        sums[:, :, block.queries] = computed_sums
    return output, sums[0]


def _merge(
    output: Tensor,
    sums: Tensor,
    other_output: Tensor,
    other_sums: Tensor,
) -> tuple[Tensor, Tensor]:
    """Returns attention over the keys of both, from attention over each."""
    both_sums = torch.logaddexp(sums, other_sums)
    weight = (other_sums - both_sums).exp().unsqueeze(-1).to(output.dtype)
    return output.lerp(other_output, weight), both_sums


@_segment_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    key_index: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    sums = query.new_empty((query.shape[1], query.shape[0]), dtype=_sum_dtype(query))
    return torch.empty_like(query, memory_format=torch.contiguous_format), sums


@torch.library.custom_op(f"{OPERATOR}_backward", mutates_args=(), device_types="cpu")
def _segment_attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    sums: Tensor,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    key_index: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key and value."""
    gradients = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value)]
    for block in _blocks(cu_seq_lens_q, cu_seq_lens_k, key_index):
        computed = _flash_backward(
            _heads_first(gradient)[:, :, block.queries],
            _heads_first(query)[:, :, block.queries],
            _heads_first(key)[:, :, block.keys],
            _heads_first(value)[:, :, block.keys],
            _heads_first(output)[:, :, block.queries],
            sums[None, :, block.queries],
            0.0,
            block.is_causal,
            scale=scale,
        )
        places = (block.queries, block.keys, block.keys)
        for total, part, place in zip(gradients, computed, places, strict=True):
            # The blocks of own keys come first and set all slots.
            if block.is_causal:
                _heads_first(total)[:, :, place] = part
            else:
                _heads_first(total)[:, :, place] += part
    return gradients[0], gradients[1], gradients[2]


@_segment_attention_backward.register_fake
def _(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(query, memory_format=contiguous),
        torch.empty_like(key, memory_format=contiguous),
        torch.empty_like(value, memory_format=contiguous),
    )


def _save(
    ctx: Any,
    inputs: tuple[Any, ...],
    output: tuple[Tensor, Tensor],
) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients(
    ctx: Any,
    gradient: Tensor,
    _: Tensor,
) -> tuple[Tensor | None, ...]:
    query, key, value, cu_seq_lens_q, cu_seq_lens_k, key_index, output, sums = ctx.saved_tensors
    computed = _segment_attention_backward(
        gradient,
        query,
        key,
        value,
        output,
        sums,
        cu_seq_lens_q,
        cu_seq_lens_k,
        key_index,
        ctx.scale,
    )
    return (*computed, None, None, None, None)


_segment_attention.register_autograd(_gradients, setup_context=_save)


def cpu_segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    key_index: Tensor | None,
    scale: float,
) -> Tensor:
    """Returns (W, H, D) from queries (W, H, D) and keys and values (W, KV, D)."""
    output, _ = _segment_attention(
        query,
        key,
        value,
        cu_seq_lens_q,
        cu_seq_lens_k,
        key_index,
        scale,
    )
    return output  # type: ignore[no-any-return]


def _heads_first(tensor: Tensor) -> Tensor:
    """(W, H, D) -> (1, H, W, D)"""
    return tensor.transpose(0, 1)[None]


def _sum_dtype(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)
