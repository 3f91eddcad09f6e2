"""Rows -> one padded batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lowrank_tune.data.store import TokenStore
from lowrank_tune.types import Batch, Row


def collate(rows: Sequence[Row], pad_id: int) -> Batch:
    """Pads on the right. What is padding is told by `attended`, never by an id, so that any id may pad."""
    width = max(len(row.ids) for row in rows)
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    attended, says = np.zeros((len(rows), width), dtype=bool), np.zeros((len(rows), width), dtype=bool)
    for place, row in enumerate(rows):
        length = len(row.ids)
        ids[place, :length], says[place, :length], attended[place, :length] = row.ids, row.says, True
    return Batch(torch.from_numpy(ids), torch.from_numpy(attended), torch.from_numpy(says))


def collate_units(store: TokenStore, units: Sequence[int], pad_id: int) -> Batch:
    """The rows of these units; pairs as [chosen, rejected, chosen, rejected, ...], with what `Batch` tells of them in
    `extra`.

    extra: margin (B,) fp32; row (B,) long, the row's number in the whole store, whatever part of it this is; shared
    (B,) long, how many leading tokens a row has in common with the first row of its pair: 0 on the first rows, and
    never all tokens of either row.
    """
    numbers = store.rows_of(np.asarray(units, dtype=np.int64))
    rows = [store[int(number)] for number in numbers]
    batch = collate(rows, pad_id)
    if store.together > 1:
        shared = [
            0 if place % store.together == 0 else _shared(rows[place - place % store.together], row)
            for place, row in enumerate(rows)
        ]
        batch.extra = {
            "margin": torch.from_numpy(store.margins[numbers]),
            "shared": torch.tensor(shared, dtype=torch.long),
            "row": torch.from_numpy(store.picked[numbers]),
        }
    return batch


def _shared(first: Row, row: Row) -> int:
    """The longest common beginning of two rows that leaves a token of each."""
    most = min(len(first.ids), len(row.ids)) - 1
    differs = np.flatnonzero(np.asarray(first.ids[:most]) != np.asarray(row.ids[:most]))
    return int(differs[0]) if len(differs) else most
