"""GGUF adapters: what llama.cpp computes from the file, worked out here from the file alone, is what PEFT computes."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_families import EXPORTED
from models import perturb, random_model, roles_over, unquantized_base
from peft import LoraConfig
from support_matrix import CONFIG, GGUF, Family, is_in_transformers
from support_matrix import FAMILIES as FAMILIES_OF_MATRIX
from test_fold import MIXED, stack
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

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


# ---- names and rows of every family, without weights

NAMES = {kind: name for name, kind in SHORT.items()} | {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.out_proj": "attn_output",
    "self_attn.dense": "attn_output",
    "attention.query_key_value": "attn_qkv",
    "attention.dense": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
    "conv.in_proj": "shortconv.in_proj",
    "conv.out_proj": "shortconv.out_proj",
    "mamba.in_proj": "ssm_in",
    "mamba.out_proj": "ssm_out",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.out_proj": "ssm_out",
    "shared_mlp.output_linear": "ffn_down",
}
"""llama.cpp's names of the linear layers in a decoder layer."""
PAIRED = ("llama", "mistral", "mixtral", "ministral3", "smollm3", "granite", "granitemoehybrid")
"""Model types whose q and k have rows in pairs."""


def linear_layers(family: Family) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The configuration, and the rows and columns of each linear layer except the head."""
    options = copy.deepcopy(CONFIG | dict(family.changes))
    config = AutoConfig.for_model(family.model_type, **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head = model.get_output_embeddings()
    return config, {name: tuple(module.weight.shape) for name, module in found.items() if module is not head}


def expected_rows(family: Family, module: str, rows: int) -> dict[str, list[int]]:
    """llama.cpp's tensors of a linear layer, each with the rows that it has of transformers' tensor."""
    _, layer, kind = re.split(r"\.layers\.(\d+)\.", module)
    order = list(range(rows))
    if kind == "shared_mlp.input_linear":
        parts = {"ffn_gate": order[: rows // 2], "ffn_up": order[rows // 2 :]}
    elif kind == "attention.query_key_value":
        # (head, query or key or value, 16), of 4 heads
        parts = {
            NAMES[kind]: [head * 48 + part * 16 + row for part in range(3) for head in range(4) for row in range(16)]
        }
    elif family.model_type in PAIRED and kind in ("self_attn.q_proj", "self_attn.k_proj"):
        # (head, half, 8)
        parts = {NAMES[kind]: [start + half * 8 + row for start in order[::16] for row in range(8) for half in (0, 1)]}
    else:
        parts = {NAMES[kind]: order}
    is_shared = kind.startswith("shared_mlp") and family.changes["num_local_experts"] > 0
    return {f"blk.{layer}.{name}{'_shexp' if is_shared else ''}.weight": rows for name, rows in parts.items()}


@pytest.mark.parametrize("family", EXPORTED, ids=lambda family: family.title)
def test_every_linear_layer_has_its_name_and_its_rows_in_llama_cpp(family: Family) -> None:
    if not is_in_transformers(family):
        pytest.skip(f"the installed transformers has no {family.model_type}")
    config, layers = linear_layers(family)
    tensors, expected = {}, {}
    for module, (rows, columns) in layers.items():
        a = torch.arange(columns, dtype=torch.float32).view(1, -1)
        b = torch.arange(rows, dtype=torch.float32).view(-1, 1)
        tensors |= {f"base_model.model.{module}.lora_{side}.weight": one for side, one in (("A", a), ("B", b))}
        for name, order in expected_rows(family, module, rows).items():
            expected |= {f"{name}.lora_a": a.tolist(), f"{name}.lora_b": [[row] for row in order]}
    found = gguf_tensors({"r": 1, "lora_alpha": 1}, tensors, shape_of(config))
    assert {name: tensor.tolist() for name, tensor in found.items()} == expected


@pytest.mark.parametrize(
    "family", [one for one in FAMILIES_OF_MATRIX if GGUF in one.refused], ids=lambda family: family.title
)
def test_a_refused_family_is_refused(family: Family) -> None:
    if not is_in_transformers(family):
        pytest.skip(f"the installed transformers has no {family.model_type}")
    config, layers = linear_layers(family)
    tensors = {f"base_model.model.{module}.lora_{side}.weight": torch.zeros(1, 1) for module in layers for side in "AB"}
    with pytest.raises(UserError, match="per_layer_model_projection|more value heads than key heads|is not supported"):
        gguf_tensors({"r": 1, "lora_alpha": 1}, tensors, shape_of(config))


def test_unsupported_families_and_modules_are_named() -> None:
    with pytest.raises(UserError, match="a model of type gpt2 is not supported.*Llama, .* and GPT-NeoX; `--to gguf`"):
        shape_of(random_model("gpt2").config)
    config: dict[str, Any] = {"r": 1, "lora_alpha": 1}
    strange = {f"base_model.model.model.layers.0.mlp.strange.lora_{side}.weight": torch.zeros(1, 1) for side in "AB"}
    with pytest.raises(UserError, match=r"does not support an adapter on model\.layers\.0\.mlp\.strange"):
        gguf_tensors(config, strange, shape_of(random_model("llama").config))
    with pytest.raises(AssertionError):
        gguf_tensors(LoraConfig(use_rslora=True).to_dict(), {}, shape_of(random_model("llama").config))
