"""Walking through a whole store in batches, where every row is wanted once and the order does not matter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from lowrank_tune.data.store import TokenStore
from lowrank_tune.model.recovery import Limits

T = TypeVar("T")


def by_tokens(rows: TokenStore, micro_tokens: int) -> Iterator[list[int]]:
    """Units (rows, or pairs) of similar length, longest first, as many as fit `micro_tokens` with padding, at least
    one."""
    widest = rows.lengths.reshape(-1, rows.together).max(axis=1)
    part: list[int] = []
    for unit in sorted(range(rows.units), key=lambda unit: -int(widest[unit])):
        if part and int(widest[part[0]]) * (len(part) + 1) * rows.together > micro_tokens:
            yield part
            part = []
        part.append(unit)
    if part:
        yield part


def in_pieces(
    limits: Limits, rows: TokenStore, micro_tokens: int, work: Callable[[Sequence[int]], T]
) -> Iterator[tuple[Sequence[int], T]]:
    """What `work`, which keeps no gradient, makes of all units of a store, as many at once as fit `micro_tokens` and
    the memory."""
    for units in by_tokens(rows, micro_tokens):
        width = int(rows.lengths.reshape(-1, rows.together)[units].max())
        yield from limits.pieces("forward_tokens", units, width * rows.together, work, rows.together)
