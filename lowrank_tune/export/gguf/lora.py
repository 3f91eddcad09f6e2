"""An adapter as a GGUF LoRA, the file that llama.cpp and what is built on it load beside a base model, written with the
`gguf` package alone.

llama.cpp computes  W x + (alpha / r) B A x  and knows no rsLoRA and no patterns, so the adapter comes folded. Its Llama
rotates pairs that lie side by side where transformers' rotates halves: the rows of the q and k projections are put in
that order, in B alone. Names are those of `gguf`'s own table. The tensors equal those of llama.cpp's converter bit for
bit (tests/export/test_llamacpp.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_tune.errors import UserError
from lowrank_tune.export.combine_lora import LORA_A, LORA_B, PEFT_PREFIX

GGUF_ARCHITECTURES = {
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "gemma3_text": "GEMMA3",
    "gemma3": "GEMMA3",
}
"""Model types that are known here, with llama.cpp's names of their architectures."""
PERMUTED_MODEL_TYPES = ("llama", "mistral")
TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


@dataclass(frozen=True)
class Shape:
    """What the names and the order of the rows depend on, of a base's configuration."""

    kind: str
    layers: int
    heads: int
    kv_heads: int


def gguf_module() -> Any:
    """The optional package. Raises UserError where it is missing."""
    try:
        import gguf  # an optional extra: only this export needs it
    except ImportError as error:
        raise UserError("GGUF files need the package gguf: pip install 'lowrank-tune[export]'") from error
    return gguf


def shape_of(config: Any) -> Shape:
    """Of a base's configuration. Raises UserError for a family that is not known here."""
    if config.model_type not in GGUF_ARCHITECTURES:
        supported = "Llama, Mistral, Qwen2, Qwen3 and Gemma3"
        raise UserError(
            f"a GGUF adapter of a {config.model_type} model is not known here, only those of {supported}; `--to gguf` "
            f"merges it into "
            "its base for llama.cpp's own converter, and `--to peft` copies it as it is"
        )
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    return Shape(
        config.model_type,
        int(text.num_hidden_layers),
        heads,
        int(getattr(text, "num_key_value_heads", None) or heads),
    )


def gguf_tensors(config: Mapping[str, Any], tensors: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """Of a folded adapter, its matrices under llama.cpp's names, A (r, in) and B (out, r), in their order. Raises
    UserError for a module that llama.cpp's architecture has not."""
    gguf = gguf_module()
    assert not config.get("use_rslora") and not config.get("rank_pattern") and not config.get("alpha_pattern"), (
        "not folded"
    )
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, GGUF_ARCHITECTURES[shape.kind]), shape.layers)
    converted = {}
    for key in tensors:
        if not key.endswith(LORA_A):
            continue
        module = key.removeprefix(PEFT_PREFIX).removesuffix(LORA_A)
        plain = module.replace("language_model.", "")  # the text part of a model that also sees
        name = names.get_name(f"{plain}.weight", try_suffixes=(".weight",))
        if name is None or (plain != module and not module.startswith("model.language_model.")):
            raise UserError(f"llama.cpp's {GGUF_ARCHITECTURES[shape.kind]} has no place for an adapter on {module}")
        a = tensors[key]
        b = tensors[PEFT_PREFIX + module + LORA_B]
        if shape.kind in PERMUTED_MODEL_TYPES and module.endswith(("q_proj", "k_proj")):
            b = permute_rope(b, shape.heads if module.endswith("q_proj") else shape.kv_heads)
        converted[f"{name}.lora_a"] = a.contiguous()
        converted[f"{name}.lora_b"] = b.contiguous()
    return converted


def permute_rope(rows: Tensor, heads: int) -> Tensor:
    """(out, r): within each head, row i of the first half and row i of the second come to lie side by side."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, -1).transpose(1, 2).reshape(rows.shape)


def write_gguf_lora(
    file: Path,
    name: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    shape: Shape,
    kind: str = "f32",
) -> None:
    """Writes a folded adapter: its configuration, its tensors under PEFT's names; `kind` is one of `TYPES`. Raises
    UserError."""
    gguf = gguf_module()
    converted = gguf_tensors(config, tensors, shape)
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[getattr(gguf.MODEL_ARCH, GGUF_ARCHITECTURES[shape.kind])])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_string(gguf.Keys.General.NAME, name)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
    dtype = getattr(gguf.GGMLQuantizationType, TYPES[kind])
    writer.add_file_type(getattr(gguf.LlamaFileType, "ALL_F32" if kind == "f32" else f"MOSTLY_{TYPES[kind]}"))
    for key, tensor in converted.items():
        data = tensor.to(torch.float32).numpy()
        writer.add_tensor(key, gguf.quants.quantize(data, dtype), raw_dtype=dtype)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
