"""Writes an adapter as a GGUF LoRA, which llama.cpp and software based on it load over a base model, with the `gguf`
package alone.

llama.cpp computes  W x + (alpha / r) B A x  and supports neither rsLoRA nor patterns, so the adapter must be combined
first (`combine_lora.py`). Where its files have other rows (`architectures.py`), those of B are reordered or split, and
A stays as it is. The names are those of `gguf`'s own table. The tensors equal those of llama.cpp's converter bit for
bit (tests/export/test_llamacpp.py).
"""

from __future__ import annotations

import re
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
from lowrank_tune.export.gguf.architectures import OTHER_FORMATS, Architecture, Heads, architecture_of

TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


@dataclass(frozen=True)
class Shape:
    """The part of a base's configuration that names and row order depend on."""

    architecture: Architecture
    layers: int
    heads: Heads


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
    architecture = architecture_of(config)
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    return Shape(
        architecture,
        int(text.num_hidden_layers),
        Heads(heads, kv_heads),
    )


def gguf_tensors(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    shape: Shape,
) -> dict[str, Tensor]:
    """Returns the matrices of a combined adapter under llama.cpp's names and in its row order, A (r, in) and B (out,
    r). Raises UserError for a module that llama.cpp's architecture does not have."""
    has_patterns = config.get("rank_pattern") or config.get("alpha_pattern")
    assert not config.get("use_rslora") and not has_patterns, "the adapter is not combined"
    names = TensorNames(shape)
    converted = {}
    for key in tensors:
        if not key.endswith(LORA_A):
            continue
        module = module_name(key)
        b = tensors[PEFT_PREFIX + module + LORA_B]
        reorder = shape.architecture.reordered.get(last_part(module))
        if reorder is not None:
            b = reorder(b, shape.heads)
        targets = names.of(module)
        for name, rows in zip(targets, b.chunk(len(targets)), strict=True):
            converted[f"{name}.lora_a"] = tensors[key].contiguous()
            converted[f"{name}.lora_b"] = rows.contiguous()
    return converted


def last_part(module: str) -> str:
    """Returns the name of a module without the path before it."""
    return module.rpartition(".")[2]


class TensorNames:
    """llama.cpp's names of the tensors of an architecture."""

    def __init__(self, shape: Shape) -> None:
        self.gguf = gguf_module()
        self.architecture = shape.architecture
        architecture = getattr(self.gguf.MODEL_ARCH, shape.architecture.name)
        self.table = self.gguf.get_tensor_name_map(architecture, shape.layers)

    def of(self, module: str) -> list[str]:
        """Returns the names for a linear layer: several if its rows are in several tensors. Raises UserError if
        llama.cpp has none, or would not compute the adapter."""
        # the text model of a multimodal one
        text_module = module.replace("language_model.", "")
        is_text_module = text_module == module or module.startswith("model.language_model.")
        layer = re.search(r"\.layers\.(\d+)\.", text_module)
        parts = self.architecture.split.get(last_part(module))
        if parts is not None and layer is not None and is_text_module:
            return [self._name(part, layer[1]) for part in parts]
        name = self.table.get_name(f"{text_module}.weight", try_suffixes=(".weight",))
        if last_part(module) in self.architecture.without_lora:
            raise UserError(
                f"llama.cpp computes {module} without adapters: leave it out of `target_modules` before training; "
                f"{OTHER_FORMATS}"
            )
        if name is None or not is_text_module:
            raise UserError(f"llama.cpp's {self.architecture.name} does not support an adapter on {module}")
        return [name]

    def _name(self, part: str, layer: str) -> str:
        template: str = self.gguf.TENSOR_NAMES[getattr(self.gguf.MODEL_TENSOR, part)]
        return f"{template.format(bid=layer)}.weight"


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
    architecture = getattr(gguf.MODEL_ARCH, shape.architecture.name)
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
