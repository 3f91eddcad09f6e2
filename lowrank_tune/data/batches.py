"""Rows -> one padded batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

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
