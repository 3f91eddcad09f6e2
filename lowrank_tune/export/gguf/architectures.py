"""Architectures of llama.cpp for the model types of transformers: their names, and the linear layers whose rows its
files have in another order or in several tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lowrank_tune.errors import UserError


@dataclass(frozen=True)
class Heads:
    """Numbers of attention heads of a base."""

    queries: int
    keys: int


@dataclass(frozen=True)
class Architecture:
    """An architecture by its name in `gguf.MODEL_ARCH`. The other fields have module names as keys, without the path
    before them."""

    name: str
    reordered: Mapping[str, Callable[[Tensor, Heads], Tensor]] = field(default_factory=dict)
    """Modules with another order of rows, each with the function that returns rows in llama.cpp's order."""
    split: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Modules that `gguf`'s table of names does not contain: the tensors (`gguf.MODEL_TENSOR`) with equal shares of
    their rows."""
    without_lora: tuple[str, ...] = ()
    """Modules that llama.cpp computes without the adapter, although it loads the adapter's tensors."""


def permute_rope(rows: Tensor, heads: int) -> Tensor:
    """Returns rows (out, r) in which, within each head, row i of the second half follows row i of the first."""
    return (
        rows.reshape(
            heads,
            2,
            len(rows) // heads // 2,
            -1,
        )
        .transpose(1, 2)
        .reshape(rows.shape)
    )


def permute_queries(rows: Tensor, heads: Heads) -> Tensor:
    """Returns the rows of `q_proj` as llama.cpp's Llama rotates them: pairs of neighbors, where transformers rotates
    halves."""
    return permute_rope(rows, heads.queries)


def permute_keys(rows: Tensor, heads: Heads) -> Tensor:
    """Returns the rows of `k_proj` in the same order."""
    return permute_rope(rows, heads.keys)


def separate_query_key_value(rows: Tensor, heads: Heads) -> Tensor:
    """Returns rows (out, r) with the queries of all heads first, then the keys and the values: from rows with query,
    key and value of each head together."""
    return (
        rows.reshape(
            heads.queries,
            3,
            len(rows) // heads.queries // 3,
            -1,
        )
        .transpose(0, 1)
        .reshape(rows.shape)
    )


ROTATED_PAIRS = {"q_proj": permute_queries, "k_proj": permute_keys}
LLAMA = Architecture("LLAMA", ROTATED_PAIRS)
ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": LLAMA,
    "ministral3": Architecture("MISTRAL3", ROTATED_PAIRS),
    "qwen2": Architecture("QWEN2"),
    "qwen3": Architecture("QWEN3"),
    "qwen3_moe": Architecture("QWEN3MOE"),
    "qwen3_5_text": Architecture("QWEN35"),
    "smollm3": Architecture("SMOLLM3", ROTATED_PAIRS),
    "granite": Architecture("GRANITE", ROTATED_PAIRS),
    "granitemoehybrid": Architecture("GRANITE_HYBRID", ROTATED_PAIRS),
    "olmo2": Architecture("OLMO2"),
    "olmo3": Architecture("OLMO2"),
    "glm4": Architecture("GLM4"),
    "exaone4": Architecture("EXAONE4"),
    "phi": Architecture("PHI2"),
    "phi3": Architecture("PHI3"),
    "gemma": Architecture("GEMMA"),
    "gemma2": Architecture("GEMMA2"),
    "gemma3": Architecture("GEMMA3"),
    "gemma3_text": Architecture("GEMMA3"),
    "gemma4_text": Architecture("GEMMA4", without_lora=("per_layer_model_projection",)),
    "gpt_oss": Architecture("GPT_OSS"),
    "lfm2": Architecture("LFM2"),
    "cohere": Architecture("COMMAND_R"),
    "stablelm": Architecture("STABLELM"),
    "starcoder2": Architecture("STARCODER2"),
    "gpt_neox": Architecture(
        "GPTNEOX",
        {"query_key_value": separate_query_key_value},
    ),
}
"""Supported model types, with llama.cpp's architectures."""
SUPPORTED_FAMILIES = (
    "Llama, Mistral, Mixtral, Qwen, SmolLM3, Granite, OLMo, GLM-4, EXAONE 4, Phi, Gemma, gpt-oss, LFM2, Cohere, "
    "StableLM, StarCoder 2 and GPT-NeoX"
)
MAMBA_LAYERS = frozenset({"mamba", "linear_attention"})
"""Names of Granite 4's Mamba layers, in published configurations and in those of newer transformers."""
OTHER_FORMATS = "`--to gguf` merges it into its base for llama.cpp's own converter, and `--to peft` copies it as it is"


def architecture_of(config: Any) -> Architecture:
    """Returns the architecture for a base's configuration. Raises UserError for one that is not supported."""
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise UserError(
            f"a GGUF adapter of a model of type {config.model_type} is not supported, only those of "
            f"{SUPPORTED_FAMILIES}; {OTHER_FORMATS}"
        )
    if config.model_type == "qwen3_5_text" and config.linear_num_key_heads != config.linear_num_value_heads:
        raise UserError(
            "a GGUF adapter of a Qwen3.5 model whose linear attention has more value heads than key heads is not "
            f"supported, because llama.cpp stores the columns of its out_proj in another order; {OTHER_FORMATS}"
        )
    if config.model_type == "granitemoehybrid":
        return _granite_4(config)
    return architecture


def _granite_4(config: Any) -> Architecture:
    """Returns the architecture of a Granite 4, by whether it has Mamba layers and experts."""
    suffix = "_SHEXP" if config.num_local_experts else ""
    split: dict[str, tuple[str, ...]] = {"input_linear": (f"FFN_GATE{suffix}", f"FFN_UP{suffix}")}
    split["output_linear"] = (f"FFN_DOWN{suffix}",)
    if MAMBA_LAYERS.intersection(config.layer_types):
        name = "GRANITE_HYBRID"
    elif config.num_experts_per_tok:
        name = "GRANITE_MOE"
    else:
        name = "GRANITE"
    return Architecture(name, ROTATED_PAIRS, split)
