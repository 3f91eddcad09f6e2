"""Families of the support matrix whose adapters are exported for llama.cpp, and further shapes of some of them."""

from __future__ import annotations

from support_matrix import FAMILIES, GGUF, LINEAR_ATTENTION, WINDOW, Family

GRANITE_4 = {
    "layer_types": ["attention", "attention"],
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "shared_intermediate_size": 128,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}
VARIANTS = (
    Family("Qwen3.5, equal heads", "qwen3_5_text", LINEAR_ATTENTION | {"linear_num_value_heads": 2}),
    Family("Gemma 4, no inputs per layer", "gemma4_text", WINDOW | {"hidden_size_per_layer_input": 0}),
    Family("Granite 4, attention", "granitemoehybrid", GRANITE_4),
    Family("Granite 4, attention and experts", "granitemoehybrid", GRANITE_4 | EXPERTS),
    Family(
        "Granite 4, experts", "granitemoehybrid", GRANITE_4 | MAMBA | EXPERTS | {"layer_types": ["mamba", "attention"]}
    ),
)
EXPORTED = (*(family for family in FAMILIES if GGUF not in family.refused), *VARIANTS)
