"""Limits of the sizes in a model's `config.json`, checked before anything is built from them.

A list of 10^9 layers, or an embedding of 10^12 rows, would use all memory. The limits are far beyond published models.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from lowrank_tune.errors import UserError
from lowrank_tune.json_files import MAX_DEPTH, is_deeper_than

MAX_LAYERS = 1_000
MAX_WIDTH = 1_000_000
MAX_HEADS = 100_000
MAX_VOCAB = 100_000_000
MAX_POSITIONS = 1_000_000_000
MAX_EXPERTS = 10_000
MAX_EXPERTS_OF_ALL_LAYERS = 100_000
LAYER_KEYS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_decoder_layers",
    "decoder_layers",
    "depth",
)
WIDTH_KEYS = (
    "hidden_size",
    "n_embd",
    "d_model",
    "word_embed_proj_dim",
    "embedding_size",
)
HEAD_KEYS = (
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "num_key_value_heads",
    "head_dim",
)
VOCAB_KEYS = ("vocab_size",)
OTHER_WIDTH_KEYS = (
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "ffn_dim",
    "n_inner",
    "ffn_hidden_size",
    "d_ff",
)
POSITION_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "n_ctx",
)
EXPERT_KEYS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "n_shared_experts",
)
LIMITS = {
    **dict.fromkeys(LAYER_KEYS, (1, MAX_LAYERS)),
    **dict.fromkeys(WIDTH_KEYS, (1, MAX_WIDTH)),
    **dict.fromkeys(HEAD_KEYS, (1, MAX_HEADS)),
    **dict.fromkeys(VOCAB_KEYS, (1, MAX_VOCAB)),
    # A model without an MLP, or without experts, has 0.
    **dict.fromkeys(OTHER_WIDTH_KEYS, (0, MAX_WIDTH)),
    **dict.fromkeys(POSITION_KEYS, (1, MAX_POSITIONS)),
    **dict.fromkeys(EXPERT_KEYS, (0, MAX_EXPERTS)),
}
"""The smallest and the largest value of each key."""
OBJECT_KEYS = (
    "quantization_config",
    "rope_parameters",
    "rope_scaling",
    "text_config",
)


def check_config_limits(raw: Mapping[str, Any]) -> None:
    """Raises UserError, which begins with `config.json`, for sizes that no model has, NaN, and nesting deeper than
    `MAX_DEPTH`."""
    if is_deeper_than(raw, MAX_DEPTH):
        raise UserError(f"config.json: nested deeper than {MAX_DEPTH} levels")
    for section in _sections(raw):
        for key, value in section.items():
            _check_value(key, value)
        _check_products(section)


def sizes_of(raw: Mapping[str, Any]) -> str:
    """Returns the sizes in a configuration as text, such as `hidden_size 64, vocab_size 97`."""
    sizes = {key: value for section in _sections(raw) for key, value in section.items() if key in LIMITS}
    return ", ".join(f"{key} {sizes[key]}" for key in LIMITS if key in sizes)


def _sections(raw: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yields a configuration and those inside it, such as `text_config`."""
    yield raw
    for value in raw.values():
        if isinstance(value, Mapping):
            yield from _sections(value)


def _check_value(key: str, value: Any) -> None:
    if isinstance(value, float) and math.isnan(value):
        raise UserError(f"config.json: {key} is NaN")
    if key in OBJECT_KEYS and not isinstance(value, (Mapping, type(None))):
        raise UserError(f"config.json: {key} is {value!r:.40}, and must be an object")
    # Some models have one value for each layer. None is the default of many keys.
    for size in value if isinstance(value, list) else [value]:
        if key not in LIMITS or size is None:
            continue
        smallest, largest = LIMITS[key]
        if type(size) is not int or not smallest <= size <= largest:
            raise UserError(
                f"config.json: {key} is {size!r:.40}, and must be a whole number from {smallest} to {largest}"
            )


def _check_products(section: Mapping[str, Any]) -> None:
    experts = _largest(section, EXPERT_KEYS) * _largest(section, LAYER_KEYS)
    if experts > MAX_EXPERTS_OF_ALL_LAYERS:
        raise UserError(f"config.json: {experts} experts in all layers, and the limit is {MAX_EXPERTS_OF_ALL_LAYERS}")
    heads, kv_heads = section.get("num_attention_heads"), section.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads:
        raise UserError(
            f"config.json: num_attention_heads is {heads}, which is no multiple of num_key_value_heads, {kv_heads}"
        )


def _largest(section: Mapping[str, Any], keys: Collection[str]) -> int:
    return max((section[key] for key in keys if isinstance(section.get(key), int)), default=0)
