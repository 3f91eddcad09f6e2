"""A prompt that several rows begin with goes through the model once.

A group of rows is laid out as one packed row: the first row whole, then of each other row only what follows its shared
beginning.

    rows        P P P a b            packed   P P P a b c d e
                P P P c d e          position 0 1 2 3 4 3 4 5

A token sees its own row's tokens up to itself, wherever they lie: those of the shared beginning and of its own tail,
and no other tail. Positions count within the rows, so hidden states are those of the rows apart, up to the order of
sums; `PackedBatch.unpack` puts them back where the rows have them, and a shared token's gradient is the sum of all
rows' gradients.

transformers hands a 4-D mask to every layer as it is (5.17 and 5.23, `masking_utils`), to sliding ones too: rows longer
than a window are never shared. Layers with a recurrent state see the order of the packed row, so models that have them
never share; `verify_packing` finds what this file has not heard of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_tune.batch import Batch, required
from lowrank_tune.model.oom import is_out_of_memory
from lowrank_tune.model.rounding import allowed_difference, relative_difference

MAX_RELATIVE_FLOPS = 0.9
"""A packed layout must need at most this share of the rows' own work."""
TOLERANCE = {torch.float32: 1e-4}
BF16_TOLERANCE = 5e-2  # half precision; more where another batch shape alone moves hidden states by more
DecoderFn = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""ids, attention mask, position ids -> last hidden states."""


@dataclass(frozen=True)
class PackedBatch:
    """Packed rows: ids and positions (G, W); mask (G, 1, W, W) bool, which key a query sees; place (B, T), where in G *
    W a token lies."""

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    slot_index: Tensor

    def unpack(self, hidden: Tensor) -> Tensor:
        """(G, W, d) -> (B, T, d); what stands in padding is some real token's state."""
        return hidden.flatten(0, 1).index_select(0, self.slot_index.flatten()).view(*self.slot_index.shape, -1)


def pack_shared_prefixes(batch: Batch, width: int) -> PackedBatch | None:
    """The packed layout of a batch with `shared_prefix`, or None where it saves too little of a model with hidden
    size `width`.

    Rows count as sharing only what their ids really have in common with the group's first row, so that a layout is
    right whatever `shared_prefix` says. One host sync. None for rows that are not padded on the right.
    """
    rows, columns = batch.input_ids.shape
    row = torch.arange(rows, device=batch.input_ids.device)
    shared_prefix = required(batch.shared_prefix)
    first = torch.where(shared_prefix == 0, row, 0).cummax(0).values
    alike = (batch.input_ids == batch.input_ids[first]) & batch.attention_mask & batch.attention_mask[first]
    shared = torch.minimum(shared_prefix, alike.long().cumprod(dim=1).sum(dim=1)).masked_fill(first == row, 0)
    lengths = batch.attention_mask.sum(dim=1)
    tails = lengths - shared
    start = tails.cumsum(0) - tails
    start = start - start[first]
    group = (first == row).cumsum(0) - 1
    right_padded = (batch.attention_mask[:, :-1] >= batch.attention_mask[:, 1:]).all()
    groups, needed, right = torch.stack([group[-1] + 1, (start + tails).max(), right_padded.long()]).tolist()
    packed = max(8, -(-needed // 8) * 8)  # CUDA's kernels copy a mask whose rows are not aligned
    if not right or estimate_flops(groups, packed, packed, width) > MAX_RELATIVE_FLOPS * estimate_flops(
        rows,
        columns,
        columns / 2,
        width,
    ):
        return None
    column = torch.arange(columns, device=row.device).expand(rows, -1)
    row_position = torch.minimum(column, lengths[:, None] - 1).clamp_min(0)
    slot_index = group[:, None] * packed + torch.where(
        row_position < shared[:, None],
        row_position,
        start[:, None] + row_position - shared[:, None],
    )
    is_tail = batch.attention_mask & (column >= shared[:, None])
    # tokens that lie elsewhere, and padding, go to one slot behind the end
    target = torch.where(is_tail, slot_index, groups * packed).flatten()

    def scatter(values: Tensor, fill_value: int) -> Tensor:
        flat = torch.full((groups * packed + 1,), fill_value, dtype=torch.long, device=row.device)
        return flat.scatter_(0, target, values.expand(rows, columns).flatten())[:-1].view(groups, packed)

    # empty slots are a branch of their own: a query that sees nothing is NaN
    branch = scatter(row[:, None], -1)
    position = scatter(column, 0)
    is_prefix = scatter((first == row).long()[:, None], 0).bool() & (branch >= 0)
    mask = (branch[:, :, None] == branch[:, None, :]) & (position[:, None, :] <= position[:, :, None])
    mask |= is_prefix[:, None, :] & (position[:, None, :] < scatter(shared[:, None], 0)[:, :, None])
    return PackedBatch(scatter(batch.input_ids, 0), position, mask[:, None], slot_index)


def estimate_flops(rows: int, columns: int, num_keys: float, width: int) -> float:
    """Relative cost of a forward pass: a layer's matrices (12 width^2 weights) and its attention to `num_keys` keys,
    per token."""
    return rows * columns * (6 * width + num_keys)


def longest_shareable(config: Any) -> int:
    """The longest row whose prompt a model of this configuration may share; 0 for never."""
    config = config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    by_mask = config._attn_implementation in ("sdpa", "eager") and kinds <= {"full_attention", "sliding_attention"}
    # GPT-Neo cuts its windows by columns, behind the mask
    if not by_mask or getattr(config, "attention_types", None) is not None:
        return 0
    window = getattr(config, "sliding_window", None)
    if not window or kinds == {"full_attention"}:
        return 1 << 40
    return int(window)


def mask_for(mask: Tensor, model: Any) -> Tensor:
    """As the model's attention takes it: SDPA a boolean one, eager attention one that is added."""
    if model.config.get_text_config()._attn_implementation == "sdpa":
        return mask
    return torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(
        ~mask, torch.finfo(model.dtype).min
    )


@torch.no_grad()
def verify_packing(decoder: DecoderFn, vocabulary: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a made-up pair gives the same hidden states packed as apart, but for the rounding that another batch
    shape causes."""
    ids = (torch.arange(3, 27, device=device).view(1, -1) * 7 % vocabulary).repeat(2, 1)
    ids[1, 16:] = (ids[1, 16:] + 1) % vocabulary
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    layout = pack_shared_prefixes(
        Batch(ids, everywhere, everywhere, shared_prefix=torch.tensor([0, 16], device=device)), 1 << 20
    )
    assert layout is not None, "a third less is worth it"
    apart = decoder(ids, None, None).float()
    try:
        packed = layout.unpack(decoder(layout.input_ids, layout.attention_mask, layout.position_ids)).float()
    # whatever a foreign model makes of a mask with four dimensions: its prompts are not shared
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return False
    rounding = 0.0
    if dtype not in TOLERANCE:
        singly = torch.cat([decoder(row[None], None, None).float() for row in ids])
        rounding = relative_difference(singly, apart)
    return relative_difference(packed, apart) <= allowed_difference(TOLERANCE.get(dtype, BF16_TOLERANCE), rounding)
