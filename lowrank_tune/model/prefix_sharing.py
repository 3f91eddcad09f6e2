"""A prompt that several rows begin with is computed once.

A group of rows becomes one packed row: the whole first row, then of each other row only what follows the shared
beginning.

    rows        P P P a b            packed   P P P a b c d e
                P P P c d e          position 0 1 2 3 4 3 4 5

A token sees the tokens of its own row up to itself: those of the shared beginning and of its own tail, and no other
tail. Positions count within the rows, so hidden states equal those of separate rows, up to the order of sums.
`PackedBatch.unpack` restores the layout of the rows, and a shared token's gradient is the sum of all rows' gradients.

transformers passes a 4-D mask to every layer unchanged (5.17 and 5.23, `masking_utils`), to sliding-window layers too,
so rows longer than a window are never shared. Models with recurrent layers never share either, because a state would
contain all tokens of the packed row. `verify_packing` finds other models that compute something else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_tune.batch import Batch, copy_to, required
from lowrank_tune.model.causal_attention import SDPA_NAMES
from lowrank_tune.model.gather_rows import gather_rows
from lowrank_tune.model.oom import is_out_of_memory
from lowrank_tune.model.rounding import allowed_difference, relative_difference

MAX_RELATIVE_FLOPS = 0.9
"""A packed layout must need at most this share of the FLOPs of separate rows."""
MASKED_ATTENTION_COST = 2.0
"""On a GPU a mask excludes flash attention: the kernel with a mask computes all pairs of tokens, at a lower rate, and
reads a copy of keys and values for each query head. Estimated from counts, not measured."""
TOLERANCE = {torch.float32: 1e-4}
BF16_TOLERANCE = 5e-2
"""Relative differences of hidden states that are always allowed, in fp32 and in half precision."""
CPU = torch.device("cpu")
MASKED_ATTENTION_NAMES = SDPA_NAMES | {"eager"}
"""Attention functions that apply a 4-D mask."""
DecoderFn = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""Input ids, attention mask, position ids -> last hidden states."""


@dataclass(frozen=True)
class PackedBatch:
    """G packed rows of W slots: ids and positions (G, W), attention mask (G, 1, W, W) bool (True: the query sees the
    key), and slot_index (B, T): which of the G * W slots contains a token."""

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    slot_index: Tensor

    def unpack(self, hidden: Tensor) -> Tensor:
        """(G, W, d) -> (B, T, d). Padding gets the state of some real token."""
        states = gather_rows(hidden.flatten(0, 1), self.slot_index.flatten())
        return states.view(*self.slot_index.shape, -1)


@dataclass(frozen=True)
class RowGroups:
    """Rows (B,) that share their beginning with the first row of their group. All tensors are (B,).

    row  tokens       first  shared_lengths  lengths  tail_starts
    0    P P P a b    0      0               5        0
    1    P P P c d e  0      3               6        5            (the tail of row 1 follows the 5 tokens of row 0)
    2    Q f          2      0               2        0            (a group of its own)
    """

    first: Tensor
    shared_lengths: Tensor
    lengths: Tensor
    tail_starts: Tensor

    @property
    def is_first(self) -> Tensor:
        return self.first == torch.arange(len(self.first), device=self.first.device)

    @property
    def group(self) -> Tensor:
        """The number of each row's group."""
        return self.is_first.cumsum(0) - 1

    @property
    def ends(self) -> Tensor:
        """The slot after the last token of each row."""
        return self.tail_starts + self.lengths - self.shared_lengths


def pack_shared_prefixes(
    batch: Batch,
    width: int,
    device: torch.device = CPU,
) -> PackedBatch | None:
    """Returns the packed layout of a batch with `shared_prefix`, or None if it saves too little of a model with
    hidden size `width` on `device`, and for rows that are not padded on the right.

    The layout is right whatever `shared_prefix` is: rows share only tokens that are equal. It is computed from the rows
    on the CPU and copied to the device of the batch, without a host sync.
    """
    rows = batch.on_cpu
    if not rows.is_right_padded:
        return None
    groups = shared_groups(rows)
    num_groups, packed_width = _packed_size(groups)
    if not _is_worthwhile(rows, num_groups, packed_width, width, device):
        return None
    slot_index = _slot_index(groups, rows.input_ids.shape[1], packed_width)
    return _pack(
        rows,
        groups,
        slot_index,
        (num_groups, packed_width),
        batch.input_ids.device,
    )


def _is_worthwhile(
    rows: Batch,
    num_groups: int,
    packed_width: int,
    width: int,
    device: torch.device,
) -> bool:
    """Returns whether the packed layout costs clearly less than separate rows."""
    num_rows, columns = rows.input_ids.shape
    packed = estimate_flops(
        num_groups,
        packed_width,
        packed_width * masked_attention_cost(device),
        width,
    )
    separate = estimate_flops(
        num_rows,
        columns,
        columns / 2,
        width,
    )
    return packed <= MAX_RELATIVE_FLOPS * separate


def masked_attention_cost(device: torch.device) -> float:
    """Returns the time of attention with a mask, relative to that of its FLOPs at the rate of the matrices."""
    if device.type == "cuda":
        return MASKED_ATTENTION_COST
    return 1.0


def _pack(
    batch: Batch,
    groups: RowGroups,
    slot_index: Tensor,
    size: tuple[int, int],
    device: torch.device,
) -> PackedBatch:
    """Returns the layout on a device, with `size` groups and slots for each of them."""
    rows, columns = batch.input_ids.shape
    num_slots = size[0] * size[1]
    # Each slot gets the values of the token that it contains. Tokens of a shared beginning that another row stores,
    # and padding, go to one more slot behind the end.
    column = torch.arange(columns).expand(rows, -1)
    is_stored = batch.attention_mask & (column >= groups.shared_lengths[:, None])
    target = torch.where(is_stored, slot_index, num_slots).flatten()

    def pack(values: Tensor, empty: int) -> Tensor:
        """(B, T) or (B, 1) -> (G, W), `empty` in slots without a token."""
        flat = torch.full((num_slots + 1,), empty, dtype=torch.long)
        flat.scatter_(0, target, values.expand(rows, columns).flatten())
        return copy_to(flat[:-1].view(size), device)

    row = torch.arange(rows)[:, None]
    position_ids = pack(column, 0)
    attention_mask = _attention_mask(
        pack(row, -1),
        position_ids,
        pack(groups.is_first.long()[:, None], 0).bool(),
        pack(groups.shared_lengths[:, None], 0),
    )
    return PackedBatch(
        pack(batch.input_ids, 0),
        position_ids,
        attention_mask[:, None],
        copy_to(slot_index, device),
    )


def shared_groups(batch: Batch) -> RowGroups:
    """Returns the groups of rows on the CPU with `shared_prefix`, and how many tokens each row really shares with the
    first row of its group."""
    shared = required(batch.shared_prefix)
    mask = batch.attention_mask
    row = torch.arange(len(shared), device=shared.device)
    # A row that shares nothing begins a group.
    first = torch.where(shared == 0, row, 0).cummax(0).values
    equal = (batch.input_ids == batch.input_ids[first]) & mask & mask[first]
    num_equal = equal.long().cumprod(dim=1).sum(dim=1)
    shared_lengths = torch.minimum(shared, num_equal).masked_fill(first == row, 0)
    lengths = mask.sum(dim=1)
    tails = lengths - shared_lengths
    starts = tails.cumsum(0) - tails
    return RowGroups(
        first,
        shared_lengths,
        lengths,
        starts - starts[first],
    )


def _packed_size(groups: RowGroups) -> tuple[int, int]:
    """Returns the number of groups, and the slots that each needs."""
    num_groups = int(groups.group[-1]) + 1
    width = int(groups.ends.max())
    # A multiple of 8, because CUDA's kernels copy a mask whose rows are not aligned.
    return num_groups, max(8, -(-width // 8) * 8)


def _slot_index(
    groups: RowGroups,
    columns: int,
    packed_width: int,
) -> Tensor:
    """Returns (B, T): the slot of each token, for padding that of the row's last token. A shared beginning is in the
    slots of the group's first row."""
    column = torch.arange(columns, device=groups.first.device)
    column = torch.minimum(column, groups.lengths[:, None] - 1).clamp_min(0)
    shared_lengths = groups.shared_lengths[:, None]
    in_tail = groups.tail_starts[:, None] + column - shared_lengths
    return groups.group[:, None] * packed_width + torch.where(column < shared_lengths, column, in_tail)


def _attention_mask(
    row: Tensor,
    position: Tensor,
    is_first: Tensor,
    shared_lengths: Tensor,
) -> Tensor:
    """Returns (G, W, W) bool: a token sees its own row up to itself, and the beginning that its row shares.

                  key   P P P a b c d e
        query a         x x x x
        query d         x x x     x x      (its row is c d e, its shared beginning P P P)

    All arguments are (G, W). `row` is -1 in empty slots: they see each other, because a query that sees no key is NaN.
    """
    key_position = position[:, None, :]
    same_row = row[:, :, None] == row[:, None, :]
    own = same_row & (key_position <= position[:, :, None])
    is_first_key = (is_first & (row >= 0))[:, None, :]
    shared = is_first_key & (key_position < shared_lengths[:, :, None])
    return own | shared


def estimate_flops(
    rows: int,
    columns: int,
    num_keys: float,
    width: int,
) -> float:
    """Returns the relative cost of a forward pass: for each token a layer's matrices (12 width^2 weights), and
    attention to `num_keys` keys."""
    return rows * columns * (6 * width + num_keys)


def longest_shareable(config: Any) -> int:
    """Returns the tokens of the longest row whose prompt a model with this configuration may share, 0 for none."""
    config = config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    by_mask = config._attn_implementation in MASKED_ATTENTION_NAMES and kinds <= {"full_attention", "sliding_attention"}
    # GPT-Neo applies its windows by column, after the mask.
    if not by_mask or getattr(config, "attention_types", None) is not None:
        return 0
    window = getattr(config, "sliding_window", None)
    if not window or kinds == {"full_attention"}:
        return 1 << 40
    return int(window)


def mask_for(mask: Tensor, model: Any) -> Tensor:
    """Returns the mask as the model's attention reads it: an additive one for eager attention, and for SDPA on a GPU,
    which would otherwise convert a boolean mask in every layer; else the boolean one."""
    is_sdpa = model.config.get_text_config()._attn_implementation in SDPA_NAMES
    if not is_sdpa:
        return additive_mask(mask, model, torch.finfo(model.dtype).min)
    if model.device.type == "cuda":
        return additive_mask(mask, model, -torch.inf)
    return mask


def additive_mask(
    mask: Tensor,
    model: Any,
    hidden_value: float,
) -> Tensor:
    """Returns a mask in the model's dtype: 0 for visible keys, `hidden_value` for the others."""
    zeros = torch.zeros(
        mask.shape,
        dtype=model.dtype,
        device=model.device,
    )
    return zeros.masked_fill(~mask, hidden_value)


@torch.no_grad()
def verify_packing(
    decoder: DecoderFn,
    packed_decoder: Callable[[Batch], Tensor],
    vocabulary: int,
    dtype: torch.dtype,
    device: torch.device,
) -> bool:
    """Returns whether a made-up pair of rows has the same hidden states packed (`packed_decoder`) and separate, up to
    the rounding that another batch shape causes."""
    ids = (torch.arange(3, 27, device=device).view(1, -1) * 7 % vocabulary).repeat(2, 1)
    ids[1, 16:] = (ids[1, 16:] + 1) % vocabulary
    mask = torch.ones_like(ids, dtype=torch.bool)
    pair = Batch(
        ids,
        mask,
        mask,
        shared_prefix=torch.tensor([0, 16], device=device),
    )
    separate = decoder(ids, None, None).float()
    try:
        packed = packed_decoder(pair).float()
    # The errors that models raise for a 4-D mask: their prompts are not shared.
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return False
    rounding = 0.0
    if dtype not in TOLERANCE:
        alone = torch.cat([decoder(row[None], None, None).float() for row in ids])
        rounding = relative_difference(alone, separate)
    allowed = allowed_difference(TOLERANCE.get(dtype, BF16_TOLERANCE), rounding)
    return relative_difference(packed, separate) <= allowed
