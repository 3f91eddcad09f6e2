"""Walking through a whole store in batches, where every row is wanted once and the order does not matter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from lowrank_tune.data.token_store import TokenizedDataset
from lowrank_tune.model.oom import MemoryLimits

T = TypeVar("T")


def token_budget_batches(rows: TokenizedDataset, micro_tokens: int) -> Iterator[list[int]]:
    """Units (rows, or pairs) of similar length, longest first, as many as fit `micro_tokens` with padding, at least
    one."""
    widest = rows.lengths.reshape(-1, rows.rows_per_unit).max(axis=1)
    yield from batches_by_length([int(width) * rows.rows_per_unit for width in widest], micro_tokens)


def batches_by_length(num_tokens: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Yields batches of the indices of `num_tokens`, largest first, with at most `max_tokens` tokens including padding;
    at least one index each."""
    batch: list[int] = []
    for index in sorted(range(len(num_tokens)), key=lambda index: -num_tokens[index]):
        if batch and num_tokens[batch[0]] * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def chunked(
    limits: MemoryLimits,
    rows: TokenizedDataset,
    micro_tokens: int,
    work: Callable[[Sequence[int]], T],
) -> Iterator[tuple[Sequence[int], T]]:
    """What `work`, which keeps no gradient, makes of all units of a store, as many at once as fit `micro_tokens` and
    the memory."""
    for units in token_budget_batches(rows, micro_tokens):
        width = int(rows.lengths.reshape(-1, rows.rows_per_unit)[units].max())
        yield from limits.split_on_oom("forward_tokens", units, width * rows.rows_per_unit, work, rows.rows_per_unit)
