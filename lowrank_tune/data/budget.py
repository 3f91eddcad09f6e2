"""Walking through a whole store in batches, where every row is wanted once and the order does not matter."""

from __future__ import annotations

from collections.abc import Iterator

from lowrank_tune.data.store import TokenStore


def by_tokens(rows: TokenStore, micro_tokens: int) -> Iterator[list[int]]:
    """Units (rows, or pairs) of similar length, longest first, as many as fit `micro_tokens` with padding, at least one."""
    widest = rows.lengths.reshape(-1, rows.together).max(axis=1)
    part: list[int] = []
    for unit in sorted(range(rows.units), key=lambda unit: -int(widest[unit])):
        if part and int(widest[part[0]]) * (len(part) + 1) * rows.together > micro_tokens:
            yield part
            part = []
        part.append(unit)
    if part:
        yield part
