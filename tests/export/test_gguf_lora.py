"""GGUF adapters: what llama.cpp computes from the file, worked out here from the file alone, is what PEFT computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from models import perturb, random_model, roles_over, unquantized_base
from peft import LoraConfig
from test_fold import MIXED, stack

from lowrank_tune import UserError
from lowrank_tune.export.combine_lora import LoraAdapter, as_lora_adapter, combine_adapters, saved_lora_adapter
from lowrank_tune.export.gguf.lora import gguf_tensors, shape_of, write_gguf_lora

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
SHORT = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def by_llama_cpp(file: Path) -> dict[str, torch.Tensor]:
    """The change of each module as llama.cpp computes it from the file, alpha over the rank of the tensor; by
    transformers' names, with the rows of q and k put back as transformers has them: 0, 2, 4, ... of a head, then 1, 3,
    5, ..."""
    reader = gguf.GGUFReader(file)
    alpha = float(reader.get_field("adapter.lora.alpha").contents())
    assert (
        reader.get_field("general.type").contents() == "adapter"
        and reader.get_field("adapter.type").contents() == "lora"
    )
    rotated = reader.get_field("general.architecture").contents() == "llama"
    tensors = {
        one.name: torch.tensor(gguf.quants.dequantize(one.data, one.tensor_type).copy()) for one in reader.tensors
    }
    found = {}
    for name, a in tensors.items():
        if name.endswith(".lora_a"):
            _, block, kind, *_ = name.split(".")
            b = tensors[name.removesuffix("a") + "b"]
            change = alpha / len(a) * b.double() @ a.double()
            if rotated and kind in ("attn_q", "attn_k"):
                change = torch.cat([part for head in change.split(16) for part in (head[0::2], head[1::2])])
            found[f"model.layers.{block}.{SHORT[kind]}"] = change
    return found


def by_peft(parts: list[LoraAdapter]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for part in parts:
        for name, scale in part.scalings.items():
            a, b = (part.tensors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
            found[name] = found.get(name, torch.tensor(0.0)) + scale * b @ a
    return found


def compared(file: Path, parts: list[LoraAdapter]) -> float:
    ours, theirs = by_llama_cpp(file), by_peft(parts)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in ours)


@pytest.mark.parametrize("kind", MIXED)
def test_rslora_patterns_and_stacks_become_one_alpha(kind: str, tmp_path: Path) -> None:
    names = ("below", "middle", "policy")[3 - len(MIXED[kind]) :]
    roles = stack(**dict(zip(names, MIXED[kind], strict=True)))
    parts = [as_lora_adapter(roles, name) for name in names]
    saved = [saved_lora_adapter(part.config, part.tensors) for part in parts]
    for read, loaded in zip(saved, parts, strict=True):
        assert read.scalings == pytest.approx({name: loaded.scalings[name] for name in read.scalings}), (
            "as PEFT scales them"
        )
    write_gguf_lora(tmp_path / "a.gguf", "mine", *combine_adapters(saved), shape_of(roles.base.model.config))
    assert compared(tmp_path / "a.gguf", parts) < 1e-6


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize(("type", "far"), [("f32", 1e-6), ("f16", 1e-3), ("bf16", 8e-3)])
def test_adapters_of_every_family_in_every_type_equal_the_trained_one(
    kind: str, type: str, far: float, tmp_path: Path
) -> None:
    roles = roles_over(unquantized_base(kind), lower=["sft"], use_rslora=True)
    perturb(roles, "sft", "policy")
    parts = [as_lora_adapter(roles, name) for name in ("sft", "policy")]
    write_gguf_lora(tmp_path / "a.gguf", "mine", *combine_adapters(parts), shape_of(roles.base.model.config), type)
    assert compared(tmp_path / "a.gguf", parts) < far
    sizes = {one.data.dtype for one in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert sizes == {np.dtype({"f32": np.float32, "f16": np.float16, "bf16": np.uint8}[type])}


def test_unsupported_families_and_modules_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="a GGUF adapter of a phi model is not supported.*Llama, Mistral, Qwen2, Qwen3 and Gemma3"
    ):
        shape_of(random_model("phi").config)
    config: dict[str, Any] = {"r": 1, "lora_alpha": 1}
    strange = {f"base_model.model.model.layers.0.mlp.strange.lora_{side}.weight": torch.zeros(1, 1) for side in "AB"}
    with pytest.raises(UserError, match=r"does not support an adapter on model\.layers\.0\.mlp\.strange"):
        gguf_tensors(config, strange, shape_of(random_model("llama").config))
    with pytest.raises(AssertionError):
        gguf_tensors(LoraConfig(use_rslora=True).to_dict(), {}, shape_of(random_model("llama").config))
