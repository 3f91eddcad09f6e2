"""Documents packed into units of at most `max_length` tokens.

A pack is a unit of several rows, one for each document. Each of them is a segment of its own (`model/
sequence_packing.py`) or a padded row, so that no document is computed in the context of another one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from lowrank_tune.data.report import Packing
from lowrank_tune.data.token_store import IntArray, TokenizedDataset

PACKING_SEED_TAG = 3
"""Differs from the tags of the sampler, so that both use different random numbers."""


def pack_documents(
    store: TokenizedDataset,
    max_length: int,
    seed: int,
) -> tuple[TokenizedDataset, Packing | None]:
    """Returns the store with the documents of each source in packs, and their counts; the same store and None if it has
    no documents. Other units do not change."""
    is_document = store.is_document
    if not is_document.any():
        return store, None
    rows: list[IntArray] = []
    counts: list[IntArray] = []
    num_packs = 0
    for source in np.unique(store.source_of).tolist():
        units = np.flatnonzero(store.unit_source_of == source)
        own_rows = store.rows_of(units)
        own_counts = np.diff(store.unit_starts)[units]
        if is_document[own_rows[0]]:
            rng = np.random.default_rng([seed, PACKING_SEED_TAG, source])
            packs = _packs(store.lengths[own_rows], max_length, rng)
            num_packs += len(packs)
            own_rows = own_rows[np.concatenate(packs)]
            own_counts = np.array([len(pack) for pack in packs])
        rows.append(own_rows)
        counts.append(own_counts)
    unit_starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.concatenate(counts))])
    return store.regroup(np.concatenate(rows), unit_starts), Packing(
        num_packs,
        int(is_document.sum()),
        int(store.lengths[is_document].sum()),
        max_length,
    )


def _packs(
    lengths: IntArray,
    max_length: int,
    rng: np.random.Generator,
) -> list[IntArray]:
    """Returns the indices of each pack. Rows of one length are in random order, so that neighbors are not packed
    together."""
    order = rng.permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    return [order[pack] for pack in best_fit_decreasing(lengths[order].tolist(), max_length)]


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Returns the indices of each bin. Every length, the longest first, goes into the fullest bin with room for it."""
    bins: list[list[int]] = []
    bins_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for index, length in enumerate(lengths):
        assert length <= capacity, "a row longer than a pack"
        place = bisect_left(rooms, length)
        if place == len(rooms):
            number = len(bins)
            bins.append([index])
            room = capacity - length
        else:
            room = rooms[place]
            number = bins_by_room[room].pop()
            if not bins_by_room[room]:
                del bins_by_room[room]
                rooms.pop(place)
            bins[number].append(index)
            room -= length
        if room not in bins_by_room:
            bins_by_room[room] = []
            insort(rooms, room)
        bins_by_room[room].append(number)
    return bins
