"""Rows of a batch as one row of their real tokens, without padding: each row is a segment of its own.

A beginning that rows share (`model/prefix_sharing.py`) is stored once, and is a part of the keys of each of them:

    rows      P P P a b      packed    P P P a b c d e Q f      segment   queries      keys
              P P P c d e    position  0 1 2 3 4 3 4 5 0 1      0         P P P a b    P P P a b
              Q f                                               1         c d e        P P P c d e
                                                                2         Q f          Q f

A query sees the keys of its segment up to itself: causal attention aligned at the last query and the last key. So a
token computes what it computes in its own row, up to the order of sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_tune.batch import Batch, copy_to
from lowrank_tune.model.gather_rows import gather_rows
from lowrank_tune.model.prefix_sharing import estimate_flops, shared_groups

MAX_RELATIVE_FLOPS = 0.97
"""A packed row must need at most this share of the FLOPs of padded rows."""


@dataclass(frozen=True)
class Segments:
    """Which queries see which keys of a packed row of W tokens, for N segments. The fields are arguments of attention
    functions, with the names of transformers if it has one.

    Segment i has the queries from `cu_seq_lens_q[i]` to `cu_seq_lens_q[i + 1]`, and so the keys, both (N + 1,) int32;
    `max_length_q` and `max_length_k` are their largest numbers. `key_index` (K,) contains the slots of all keys; None
    if the keys of each segment are at its queries.
    """

    cu_seq_lens_q: Tensor
    cu_seq_lens_k: Tensor
    max_length_q: int
    max_length_k: int
    key_index: Tensor | None

    def as_arguments(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class PackedRow:
    """One row of W tokens: ids and positions (1, W), its segments, and slot_index (B, T): which slot contains a
    token."""

    input_ids: Tensor
    position_ids: Tensor
    segments: Segments
    slot_index: Tensor

    def unpack(self, hidden: Tensor) -> Tensor:
        """(1, W, d) -> (B, T, d). Padding gets the state of some real token."""
        states = gather_rows(hidden[0], self.slot_index.flatten())
        return states.view(*self.slot_index.shape, -1)


def pack_rows(
    batch: Batch,
    width: int,
    share: bool,
    always: bool = False,
) -> PackedRow | None:
    """Returns the layout of rows that are padded on the right, or None if it saves too little of a model with hidden
    size `width`. With `share`, the beginnings that rows share by `shared_prefix` are stored once.

    With `always`, rows with a token get a layout even if it saves nothing, and each layout has a `key_index`, so that a
    compiled layer needs no graph for other kinds of rows.

    It is computed from the rows on the CPU and copied to the device of the batch, without a host sync.
    """
    rows = batch.on_cpu
    lengths = rows.attention_mask.sum(dim=1)
    first = torch.arange(len(rows))
    shared = torch.zeros_like(lengths)
    if share and rows.shared_prefix is not None:
        groups = shared_groups(rows)
        first, shared = groups.first, groups.shared_lengths
    own = lengths - shared
    if not own.any() or not (always or _is_worthwhile(rows, own, lengths, width)):
        return None
    slot_index = _slot_index(
        first,
        shared,
        own,
        rows.input_ids.shape[1],
    )
    column = torch.arange(rows.input_ids.shape[1]).expand_as(rows.input_ids)
    is_stored = rows.attention_mask & (column >= shared[:, None])
    device = batch.input_ids.device
    has_queries = own > 0
    key_index = None
    if always or bool(shared.any()):
        key_index = copy_to(slot_index[rows.attention_mask & has_queries[:, None]], device)
    return PackedRow(
        copy_to(rows.input_ids[is_stored][None], device),
        copy_to(column[is_stored][None], device),
        Segments(
            _cumulative(own[has_queries], device),
            _cumulative(lengths[has_queries], device),
            int(own.max()),
            int(lengths[has_queries].max()),
            key_index,
        ),
        copy_to(slot_index, device),
    )


def _is_worthwhile(
    rows: Batch,
    own: Tensor,
    lengths: Tensor,
    width: int,
) -> bool:
    """Returns whether the packed row costs less than padded rows."""
    num_rows, columns = rows.input_ids.shape
    num_tokens = int(own.sum())
    num_pairs = int((own * (lengths - own / 2)).sum())
    packed = estimate_flops(
        1,
        num_tokens,
        num_pairs / num_tokens,
        width,
    )
    padded = estimate_flops(
        num_rows,
        columns,
        columns / 2,
        width,
    )
    return packed <= MAX_RELATIVE_FLOPS * padded


def _slot_index(
    first: Tensor,
    shared: Tensor,
    own: Tensor,
    columns: int,
) -> Tensor:
    """Returns (B, T): the slot of each token, for padding that of a real token. A shared beginning is in the slots of
    the group's first row."""
    starts = own.cumsum(0) - own
    last = (own + shared - 1).clamp_min(0)
    column = torch.minimum(torch.arange(columns), last[:, None])
    in_first = starts[first][:, None] + column
    in_own = starts[:, None] + column - shared[:, None]
    return torch.where(column < shared[:, None], in_first, in_own).clamp_max(int(own.sum()) - 1)


def _cumulative(lengths: Tensor, device: torch.device) -> Tensor:
    """Returns 0 and the sums of the first lengths, (N + 1,) int32."""
    sums = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    return copy_to(sums.int(), device)
