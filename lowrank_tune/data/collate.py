"""Batches: which units of a store are computed together, and rows padded to one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lowrank_tune.batch import Batch, LabeledBatch, PairBatch, Row
from lowrank_tune.data.token_store import IntArray, TokenizedDataset


def collate(rows: Sequence[Row], pad_id: int) -> Batch:
    """Returns the rows padded on the right, (B, T). `attention_mask` marks the padding, so that any id may pad."""
    shape = (len(rows), max(len(row.input_ids) for row in rows))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=bool)
    completion_mask = np.zeros(shape, dtype=bool)
    for index, row in enumerate(rows):
        length = len(row.input_ids)
        input_ids[index, :length] = row.input_ids
        completion_mask[index, :length] = row.completion_mask
        attention_mask[index, :length] = True
    return Batch(torch.from_numpy(input_ids), torch.from_numpy(attention_mask), torch.from_numpy(completion_mask))


def collate_units(
    store: TokenizedDataset,
    units: Sequence[int],
    pad_id: int,
) -> Batch:
    """Returns the rows of these units; those of pairs as a `PairBatch`: chosen, rejected, chosen, rejected, ...

    Row numbers are those of the whole store, even if `store` is a part of it. A shared prefix is 0 for the first row of
    a pair, and never all tokens of either row.
    """
    numbers = store.rows_of(np.asarray(units, dtype=np.int64))
    rows = [store[int(number)] for number in numbers]
    batch = collate(rows, pad_id)
    if store.rows_per_unit == 1:
        return batch
    shared_prefix: list[int] = []
    for index, row in enumerate(rows):
        offset = index % store.rows_per_unit
        shared_prefix.append(_common_prefix_length(rows[index - offset], row) if offset else 0)
    return PairBatch(
        batch.input_ids,
        batch.attention_mask,
        batch.completion_mask,
        shared_prefix=torch.tensor(shared_prefix, dtype=torch.long),
        margin=torch.from_numpy(store.margins[numbers]),
        row_indices=torch.from_numpy(store.indices[numbers]),
    )


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
