"""Rows -> one padded batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lowrank_tune.batch import Batch, Row
from lowrank_tune.data.token_store import TokenizedDataset


def collate(rows: Sequence[Row], pad_id: int) -> Batch:
    """Pads on the right. What is padding is told by `attention_mask`, never by an id, so that any id may pad."""
    width = max(len(row.input_ids) for row in rows)
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    attention_mask = np.zeros((len(rows), width), dtype=bool)
    completion_mask = np.zeros((len(rows), width), dtype=bool)
    for index, row in enumerate(rows):
        length = len(row.input_ids)
        input_ids[index, :length] = row.input_ids
        completion_mask[index, :length] = row.completion_mask
        attention_mask[index, :length] = True
    return Batch(torch.from_numpy(input_ids), torch.from_numpy(attention_mask), torch.from_numpy(completion_mask))


def collate_units(store: TokenizedDataset, units: Sequence[int], pad_id: int) -> Batch:
    """The rows of these units; pairs as [chosen, rejected, chosen, rejected, ...], with what `Batch` tells of them in
    `extra`.

    extra: margin (B,) fp32; row (B,) long, the row's number in the whole store, whatever part of it this is; shared
    (B,) long, how many leading tokens a row has in common with the first row of its pair: 0 on the first rows, and
    never all tokens of either row.
    """
    numbers = store.rows_of(np.asarray(units, dtype=np.int64))
    rows = [store[int(number)] for number in numbers]
    batch = collate(rows, pad_id)
    if store.rows_per_unit > 1:
        shared = [
            0
            if index % store.rows_per_unit == 0
            else _common_prefix_length(rows[index - index % store.rows_per_unit], row)
            for index, row in enumerate(rows)
        ]
        batch.extra = {
            "margin": torch.from_numpy(store.margins[numbers]),
            "shared": torch.tensor(shared, dtype=torch.long),
            "row": torch.from_numpy(store.indices[numbers]),
        }
    return batch


def _common_prefix_length(first: Row, row: Row) -> int:
    """The longest common beginning of two rows that leaves a token of each."""
    limit = min(len(first.input_ids), len(row.input_ids)) - 1
    differs = np.flatnonzero(np.asarray(first.input_ids[:limit]) != np.asarray(row.input_ids[:limit]))
    return int(differs[0]) if len(differs) else limit
