"""Batches: the rows of units of a store, padded to one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lowrank_tune.batch import Batch, LabeledBatch, PairBatch, Row, collate
from lowrank_tune.data.token_store import IntArray, TokenizedDataset

__all__ = [
    "collate",
    "collate_rows",
    "collate_units",
    "with_labels",
]


def collate_units(
    store: TokenizedDataset,
    units: Sequence[int],
    pad_id: int,
) -> Batch:
    """Returns the rows of these units, those of a unit adjacent, by `collate_rows`."""
    return collate_rows(store, store.rows_of(np.asarray(units, dtype=np.int64)), pad_id)


def collate_rows(
    store: TokenizedDataset,
    rows: IntArray,
    pad_id: int,
) -> Batch:
    """Returns these rows; those of pairs as a `PairBatch`: chosen, rejected, chosen, rejected, ...

    `row_indices` are numbers of the whole store, even if `store` is a part of it. A shared prefix is 0 for the first
    row of a unit, and never all tokens of either row. Documents share nothing.
    """
    collated = [store[int(row)] for row in rows]
    batch = collate(collated, pad_id)
    batch.shared_prefix = _shared_prefixes(store, rows, collated)
    if store.rows_per_unit == 1:
        return batch
    return PairBatch(
        **batch.tensors(),
        margin=torch.from_numpy(store.margins[rows]),
        row_indices=torch.from_numpy(store.indices[rows]),
    )


def _shared_prefixes(
    store: TokenizedDataset,
    rows: IntArray,
    collated: Sequence[Row],
) -> Tensor | None:
    """Returns the tokens that each row has in common with the first of the adjacent rows of its family; None if no
    family has several rows."""
    families = store.families[rows]
    is_first = np.ones(len(rows), dtype=bool)
    is_first[1:] = families[1:] != families[:-1]
    # A unit that is drawn twice in succession has its first row twice.
    is_first |= store.unit_starts[store.units_of(rows)] == rows
    if is_first.all():
        return None
    shared: list[int] = []
    first = collated[0]
    for begins, row in zip(is_first.tolist(), collated, strict=True):
        if begins:
            first = row
            shared.append(0)
        else:
            shared.append(_common_prefix_length(first, row))
    return torch.tensor(shared, dtype=torch.long)


def with_labels(
    batch: Batch,
    store: TokenizedDataset,
    rows: IntArray,
) -> LabeledBatch:
    """Returns a batch of these rows of a store with their labels."""
    return LabeledBatch(
        **batch.tensors(),
        labels=torch.from_numpy(store.labels[rows] == 1),
        row_indices=torch.from_numpy(store.indices[rows]),
    )


def _common_prefix_length(first: Row, row: Row) -> int:
    """Returns the length of the longest common beginning of two rows that leaves a token of each."""
    limit = min(len(first.input_ids), len(row.input_ids)) - 1
    ids = np.asarray(first.input_ids[:limit])
    other_ids = np.asarray(row.input_ids[:limit])
    differences = np.flatnonzero(ids != other_ids)
    return int(differences[0]) if len(differences) else limit
