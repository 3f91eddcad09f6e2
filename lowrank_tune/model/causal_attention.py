"""Causal attention without a mask, and the names of the attention functions that compute PyTorch's SDPA.

Rows that are padded on the right need no mask: SDPA has a causal kernel, and no token sees what follows it. Without a
mask transformers looks for packed rows among the positions and reads the answer back from the GPU, once in each forward
pass. It creates no mask and reads nothing for an attention function that has no mask function (5.17 and 5.23,
`masking_utils._preprocess_mask_arguments`), so the pass runs under such a name. The function is transformers' own
`sdpa`. A layer that the backward pass computes again uses the name of its forward pass (`AttentionName`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lowrank_tune.model.rounding import relative_difference

ATTENTION_KEY = "_attn_implementation_internal"
"""The attribute of a configuration that contains the name of the attention function."""
SDPA_NAME = "sdpa"
CAUSAL_NAME = "lowrank_tune_causal"
DECODE_ATTENTION_NAME = "lowrank_tune_one_query"
GROUPED_SDPA_NAME = "lowrank_tune_grouped_sdpa"
SDPA_NAMES = frozenset((SDPA_NAME, CAUSAL_NAME, DECODE_ATTENTION_NAME, GROUPED_SDPA_NAME))
"""transformers' `sdpa`, and this package's functions that a model with `sdpa` uses meanwhile."""
CAUSAL_MODEL_TYPES = frozenset(
    (
        "cohere",
        "gemma",
        "gemma3_text",
        "granite",
        "llama",
        "mistral",
        "olmo2",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
    )
)
"""Models whose decoder uses its mask in nothing but the attention function, read in transformers 5.17 and 5.23."""
VERIFIED_COLUMNS = 24
"""Tokens of the made-up rows on which both ways are compared."""
MAX_DIFFERENCE = 1e-3
"""Relative difference of hidden states: both ways call the same kernels, so that they differ by rounding at most."""

AttentionInterface.register(CAUSAL_NAME, sdpa_attention_forward)


@contextmanager
def causal_attention(model: Any, columns: int) -> Iterator[None]:
    """Makes a pass over rows of `columns` tokens, padded on the right, compute causal attention without a mask. Does
    nothing for models and rows that need one."""
    config = model.config.get_text_config()
    if not needs_no_mask(config, columns):
        yield
        return
    with AttentionName(config, CAUSAL_NAME):
        yield


@torch.no_grad()
def verify_causal_attention(
    decoder: Callable[[Tensor], Tensor],
    model: Any,
    vocabulary: int,
) -> bool:
    """Returns whether the hidden states (B, T, d) of made-up rows are the same with and without transformers' masks."""
    ids = torch.arange(3, 3 + 2 * VERIFIED_COLUMNS, device=model.device) * 7 % vocabulary
    rows = ids.view(2, VERIFIED_COLUMNS)
    expected = decoder(rows)
    with AttentionName(model.config.get_text_config(), CAUSAL_NAME):
        computed = decoder(rows)
    return relative_difference(computed, expected) <= MAX_DIFFERENCE


def needs_no_mask(config: Any, columns: int) -> bool:
    """Returns whether every layer of the model is causal over `columns` tokens: no sliding window is shorter."""
    is_known = config.model_type in CAUSAL_MODEL_TYPES and vars(config).get(ATTENTION_KEY) == SDPA_NAME
    is_causal = getattr(config, "is_causal", True) and not getattr(config, "use_bidirectional_attention", False)
    window = getattr(config, "sliding_window", None)
    return is_known and bool(is_causal) and (not window or columns < window)


class AttentionName(AbstractContextManager[None]):
    """Makes a model with this configuration use another attention function. Can be entered again."""

    def __init__(self, config: Any, name: str) -> None:
        # The attribute dictionary, because the configuration's own setter checks all its fields.
        self.attributes = vars(config)
        self.name = name
        self.before = list[str]()

    def __enter__(self) -> None:
        self.before.append(self.attributes[ATTENTION_KEY])
        self.attributes[ATTENTION_KEY] = self.name

    def __exit__(self, *_: object) -> None:
        self.attributes[ATTENTION_KEY] = self.before.pop()
