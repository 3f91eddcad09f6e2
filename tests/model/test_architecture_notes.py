"""What a run reports about the architecture of its base."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import CPU
from support_matrix import CONFIG, FAMILIES, WINDOW, Case, Family
from torch import nn
from transformers import AutoConfig

from lowrank_tune.model import architecture_notes as notes
from lowrank_tune.model.base import Base

BF16, FP32 = 2, 4
RECURRENT = ("qwen3_5_text", "granitemoehybrid", "lfm2")


def family_of(model_type: str) -> Family:
    return next(family for family in FAMILIES if family.model_type == model_type)


def config_of(model_type: str) -> Any:
    return AutoConfig.for_model(model_type, **CONFIG | dict(family_of(model_type).changes))


@pytest.fixture(scope="module")
def bases() -> Iterator[dict[str, Base]]:
    """A base of each of these families, loaded in 4 bits."""
    cases = {name: Case(family_of(name)) for name in ("llama", "qwen3_moe", "mixtral", "gpt_oss", "lfm2")}
    yield {name: case.base() for name, case in cases.items()}


@pytest.mark.parametrize(
    ("model_type", "num_weights"),
    [
        # layers, experts, gate and up and down, width of an expert, hidden size
        ("qwen3_moe", 2 * 4 * 3 * 32 * 64),
        ("mixtral", 2 * 2 * 3 * 128 * 64),
        ("gpt_oss", 2 * 4 * 3 * 64 * 64),
        ("llama", 0),
        # its convolutions have three dimensions too
        ("lfm2", 0),
    ],
)
def test_the_bytes_of_experts(bases: dict[str, Base], model_type: str, num_weights: int) -> None:
    assert notes.expert_bytes(bases[model_type].model) == num_weights * FP32


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_experts_are_not_packed_and_attention_is(bases: dict[str, Base], model_type: str) -> None:
    packed = {
        name: getattr(parameter, "quant_state", None) is not None
        for name, parameter in bases[model_type].model.named_parameters()
    }
    experts = [
        name for name, one in bases[model_type].model.named_parameters() if ".experts." in name and one.ndim == 3
    ]
    attention = [name for name in packed if name.endswith("_proj.weight") and ".self_attn." in name]
    assert len(experts) == 4 and not any(packed[name] for name in experts)
    assert len(attention) == 8 and all(packed[name] for name in attention)
    parameters = dict(bases[model_type].model.named_parameters())
    assert {parameters[name].dtype for name in experts} == {torch.float32}


def test_the_note_about_experts(bases: dict[str, Base]) -> None:
    (note,) = notes.architecture_notes(bases["mixtral"])
    # On the CPU nothing is in 16 bits.
    assert note.startswith("the experts stay in 32 bits: 0.00 GiB, ") and "bitsandbytes" in note
    assert not list(notes.architecture_notes(bases["llama"]))
    # Nothing is quantized, so that there is nothing to report.
    assert not list(notes.architecture_notes(replace(bases["mixtral"], bits=16)))


def test_the_share_of_experts() -> None:
    note = notes.experts_note(3 << 30, 4 << 30, torch.bfloat16)
    assert note.startswith("the experts stay in 16 bits: 3.00 GiB, 75% of the base's bytes")


@pytest.mark.parametrize("family", FAMILIES, ids=[family.model_type for family in FAMILIES])
def test_recurrent_layers(family: Family) -> None:
    assert notes.has_recurrent_layers(config_of(family.model_type)) == (family.model_type in RECURRENT)


def test_layers_with_the_keys_of_another_layer_keep_no_state() -> None:
    changes = {"num_hidden_layers": 4, "layer_types": WINDOW["layer_types"] * 2, "num_kv_shared_layers": 2}
    config = AutoConfig.for_model("gemma4_text", **CONFIG | dict(family_of("gemma4_text").changes) | changes)
    assert not notes.has_recurrent_layers(config)


def test_the_note_about_recurrent_layers(bases: dict[str, Base]) -> None:
    (note,) = notes.architecture_notes(bases["lfm2"])
    assert note.startswith("lfm2 layers keep a state in place of keys and values: rows are padded")


def test_a_missing_kernel_is_named(monkeypatch: pytest.MonkeyPatch, bases: dict[str, Base]) -> None:
    monkeypatch.setattr(notes, "find_spec", {"fla": None}.__getitem__)
    config = config_of("qwen3_5_text")
    assert notes.missing_kernels(config) == "flash-linear-attention"
    assert notes.missing_kernels(config_of("llama")) is None
    base = replace(bases["llama"], model=_model_with(config), device=torch.device("cuda"))
    (message,) = notes.architecture_warnings(base)
    assert message.startswith("flash-linear-attention is not installed: qwen3_5_text layers run transformers' slow")
    assert message.endswith("pip install flash-linear-attention")
    # The kernels are for GPUs.
    assert not list(notes.architecture_warnings(replace(base, device=CPU)))
    monkeypatch.setattr(notes, "find_spec", {"fla": SimpleNamespace()}.__getitem__)
    assert notes.missing_kernels(config) is None


def test_activations_above_float16(bases: dict[str, Base]) -> None:
    base = replace(bases["llama"], model=_model_with(config_of("gemma2")), dtype=torch.float16)
    (message,) = notes.architecture_warnings(base)
    assert message.startswith("activations of gemma2 models are known to exceed float16") and "base.dtype" in message
    assert not list(notes.architecture_warnings(replace(base, dtype=torch.bfloat16)))
    assert not list(notes.architecture_warnings(replace(bases["llama"], dtype=torch.float16)))


def _model_with(config: Any) -> nn.Module:
    model = nn.Module()
    model.config = config
    return model
