"""Writes an adapter as a GGUF LoRA, which llama.cpp and software based on it load over a base model, with the `gguf`
package alone.

llama.cpp computes  W x + (alpha / r) B A x  and supports neither rsLoRA nor patterns, so the adapter must be combined
first (`combine_lora.py`). Its Llama rotates pairs of neighboring rows where transformers rotates halves: the rows of
the q and k projections are reordered, in B alone. The names are those of `gguf`'s own table. The tensors equal those of
llama.cpp's converter bit for bit (tests/export/test_llamacpp.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_tune.errors import UserError
from lowrank_tune.export.combine_lora import (
    LORA_A,
    LORA_B,
    PEFT_PREFIX,
    module_name,
)

GGUF_ARCHITECTURES = {
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "gemma3_text": "GEMMA3",
    "gemma3": "GEMMA3",
}
"""Supported model types, with llama.cpp's names of their architectures."""
PERMUTED_MODEL_TYPES = ("llama", "mistral")
TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


@dataclass(frozen=True)
class Shape:
    """The part of a base's configuration that names and row order depend on."""

    kind: str
    layers: int
    heads: int
    kv_heads: int


def gguf_module() -> Any:
    """Returns the package gguf. Raises UserError if it is not installed."""
    try:
        # an optional dependency of this export
        import gguf
    except ImportError as error:
        raise UserError("GGUF files need the package gguf: pip install 'lowrank-tune[export]'") from error
    return gguf


def shape_of(config: Any) -> Shape:
    """Returns the shape of a base. Raises UserError for a model type that is not supported."""
    if config.model_type not in GGUF_ARCHITECTURES:
        supported = "Llama, Mistral, Qwen2, Qwen3 and Gemma3"
        raise UserError(
            f"a GGUF adapter of a {config.model_type} model is not supported, only those of {supported}; `--to gguf` "
            "merges it into its base for llama.cpp's own converter, and `--to peft` copies it as it is"
        )
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    return Shape(
        config.model_type,
        int(text.num_hidden_layers),
        heads,
        kv_heads,
    )


def gguf_tensors(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    shape: Shape,
) -> dict[str, Tensor]:
    """Returns the matrices of a combined adapter under llama.cpp's names and in its row order, A (r, in) and B (out,
    r). Raises UserError for a module that llama.cpp's architecture does not have."""
    gguf = gguf_module()
    has_patterns = config.get("rank_pattern") or config.get("alpha_pattern")
    assert not config.get("use_rslora") and not has_patterns, "the adapter is not combined"
    architecture = GGUF_ARCHITECTURES[shape.kind]
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture), shape.layers)
    converted = {}
    for key in tensors:
        if not key.endswith(LORA_A):
            continue
        module = module_name(key)
        # the text model of a multimodal one
        text_module = module.replace("language_model.", "")
        is_text_module = text_module == module or module.startswith("model.language_model.")
        name = names.get_name(f"{text_module}.weight", try_suffixes=(".weight",))
        if name is None or not is_text_module:
            raise UserError(f"llama.cpp's {architecture} does not support an adapter on {module}")
        b = tensors[PEFT_PREFIX + module + LORA_B]
        if shape.kind in PERMUTED_MODEL_TYPES and module.endswith("q_proj"):
            b = permute_rope(b, shape.heads)
        elif shape.kind in PERMUTED_MODEL_TYPES and module.endswith("k_proj"):
            b = permute_rope(b, shape.kv_heads)
        converted[f"{name}.lora_a"] = tensors[key].contiguous()
        converted[f"{name}.lora_b"] = b.contiguous()
    return converted


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


def write_gguf_lora(
    file: Path,
    name: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    shape: Shape,
    kind: str = "f32",
) -> None:
    """Writes a combined adapter, from its configuration and its tensors under PEFT's names; `kind` is one of `TYPES`.
    Raises UserError."""
    gguf = gguf_module()
    converted = gguf_tensors(config, tensors, shape)
    architecture = getattr(gguf.MODEL_ARCH, GGUF_ARCHITECTURES[shape.kind])
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_string(gguf.Keys.General.NAME, name)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
    dtype = getattr(gguf.GGMLQuantizationType, TYPES[kind])
    file_type = "ALL_F32" if kind == "f32" else f"MOSTLY_{TYPES[kind]}"
    writer.add_file_type(getattr(gguf.LlamaFileType, file_type))
    for key, tensor in converted.items():
        data = tensor.to(torch.float32).numpy()
        writer.add_tensor(
            key,
            gguf.quants.quantize(data, dtype),
            raw_dtype=dtype,
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
