"""The mask of a decoding step: which cached keys the token of each row sees.

A token at position p sees the first p + 1 columns of the cache. transformers passes a 4-D mask to the layers as it is,
and creates one from a 2-D mask, for which it reads values back from the GPU. SDPA on a GPU converts a boolean mask in
every layer, so it gets an additive one in the model's dtype there. Rows that all see every column need none.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from lowrank_tune.model.causal_attention import SDPA_NAMES

Mask = Tensor | dict[str, Tensor] | None


class MaskFunction(Protocol):
    """Returns the argument `attention_mask` of a decoder for a step over `width` columns with positions (B, 1), all
    below the width. `is_full` states that every row sees every column. Reads no value of the positions."""

    def __call__(
        self,
        width: int,
        position_ids: Tensor,
        is_full: bool,
    ) -> Mask: ...


ALIGNMENT = 8
"""CUDA's kernels copy a mask whose rows do not begin at a multiple of this number of elements."""
MODELS_WITH_MASK_FOR_EACH_LAYER_TYPE = frozenset(("gemma3_text", "ministral", "qwen2", "qwen3", "smollm3"))
"""Models whose decoder accepts a mask for each type of layer, read in transformers 5.17 and 5.23."""


def select_mask_function(model: Any, windows: Sequence[int | None]) -> MaskFunction:
    """Returns the function for a model whose layers have these sliding windows, None for full attention."""
    config = model.config.get_text_config()
    has_windows = any(windows)
    if uses_additive_mask(model.device, config._attn_implementation):
        return partial(
            additive_mask,
            model.dtype,
            windows,
            config.model_type in MODELS_WITH_MASK_FOR_EACH_LAYER_TYPE,
        )
    # With sliding windows transformers must cut a 2-D mask to the width of each layer.
    if model.device.type == "cpu" and model.dtype == torch.float32 and not has_windows:
        return additive_mask_on_cpu
    return boolean_mask


def reads_masks_back(model: Any, windows: Sequence[int | None]) -> bool:
    """Returns whether transformers reads the values of masks in a step."""
    config = model.config.get_text_config()
    return needs_boolean_mask(config, windows) or not uses_additive_mask(model.device, config._attn_implementation)


def needs_boolean_mask(config: Any, windows: Sequence[int | None]) -> bool:
    """Returns whether a decoder makes the masks of its layers, which have several windows, from a 2-D one alone."""
    model_type = config.get_text_config().model_type
    return len(set(windows)) > 1 and model_type not in MODELS_WITH_MASK_FOR_EACH_LAYER_TYPE


def uses_additive_mask(device: torch.device, attention: str) -> bool:
    """Returns whether the attention function reads an additive mask in the model's dtype fastest."""
    return device.type == "cuda" and attention in SDPA_NAMES


def boolean_mask(
    width: int,
    position_ids: Tensor,
    is_full: bool = False,
) -> Tensor:
    """Returns (B, W) bool: the columns that each row sees."""
    return torch.arange(width, device=position_ids.device) <= position_ids


def additive_mask_on_cpu(
    width: int,
    position_ids: Tensor,
    is_full: bool = False,
) -> Tensor:
    """Returns (B, 1, 1, W) fp32."""
    visible = boolean_mask(width, position_ids)
    additive = torch.zeros(visible.shape).masked_fill_(~visible, -torch.inf)
    return additive[:, None, None]


def additive_mask(
    dtype: torch.dtype,
    windows: Sequence[int | None],
    can_differ_by_layer: bool,
    width: int,
    position_ids: Tensor,
    is_full: bool,
) -> Mask:
    """Returns (B, 1, 1, W) in this dtype, None if no row needs one, or a mask for each type of layer. W is the number
    of columns that the layer has for the step; a layer with a sliding window has at most as many as the window."""
    widths = {min(width, window or width) for window in windows}
    if widths == {width} and is_full and width not in windows:
        return None
    if len(widths) == 1:
        return aligned_mask(dtype, widths.pop(), position_ids)
    if not can_differ_by_layer:
        return boolean_mask(width, position_ids)
    return {
        "full_attention": aligned_mask(dtype, width, position_ids),
        "sliding_attention": aligned_mask(dtype, min(widths), position_ids),
    }


def aligned_mask(
    dtype: torch.dtype,
    width: int,
    position_ids: Tensor,
) -> Tensor:
    """Returns (B, 1, 1, width): 0 for visible columns, else minus infinity. Its rows are stored aligned."""
    rows = len(position_ids)
    stored_width = -(-width // ALIGNMENT) * ALIGNMENT
    device = position_ids.device
    hidden = torch.arange(stored_width, device=device) > position_ids
    stored = torch.zeros(
        (rows, 1, 1, stored_width),
        dtype=dtype,
        device=device,
    )
    return stored.masked_fill_(hidden[:, None, None], -torch.inf)[..., :width]
