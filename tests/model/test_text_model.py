"""The text model of multimodal checkpoints: loaded alone, and adapters that fit the class that serves the whole one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import CPU, TOKENIZER, perturb, roles_over
from multimodal import CONFIGS, saved_multimodal_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from lowrank_tune.config import BaseConfig
from lowrank_tune.model.adapters import CONFIG, WEIGHTS, read_adapter
from lowrank_tune.model.base import load_base
from lowrank_tune.model.roles import Roles
from lowrank_tune.model.text_model import serving_adapter

IDS = torch.arange(3, 23).view(2, 10)


def whole_model(kind: str) -> AutoModelForImageTextToText:
    return AutoModelForImageTextToText.from_pretrained(saved_multimodal_model(kind), dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_text_model_alone_computes_what_the_whole_model_does(kind: str) -> None:
    base = load_base(BaseConfig(model=saved_multimodal_model(kind), bits=16), TOKENIZER, CPU)  # type: ignore[arg-type]
    whole = whole_model(kind)
    assert base.is_multimodal
    with base.inference_mode():
        assert torch.equal(logits(base.model), logits(whole))
    assert not any("vis" in name for name, _ in base.model.named_parameters())
    assert sum(one.numel() for one in base.model.parameters()) < sum(one.numel() for one in whole.parameters())


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_of_the_text_model_is_loaded_over_the_whole_model(kind: str, tmp_path: Path) -> None:
    base = load_base(BaseConfig(model=saved_multimodal_model(kind), bits=16), TOKENIZER, CPU)  # type: ignore[arg-type]
    roles = roles_over(base)
    perturb(roles, "policy")
    config, tensors = serving_adapter(roles.adapter_config("policy"), roles.adapter_tensors("policy"))
    (tmp_path / CONFIG).write_text(json.dumps(config))
    save_file(tensors, tmp_path / WEIGHTS)
    with roles.inference_mode(), roles.activate("policy"):
        expected = logits(base.model)
    plain = whole_model(kind)
    assert (logits(plain) - expected).abs().max() > 0.1
    tuned = PeftModel.from_pretrained(plain, str(tmp_path))
    assert (logits(tuned) - expected).abs().max() < 1e-5
    assert not any("vision" in name or "visual" in name for name, _ in tuned.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_of_the_whole_model_is_loaded_over_the_text_model(kind: str, tmp_path: Path) -> None:
    """Made by PEFT with a pattern that selects the language model, as other software writes it."""
    pattern = r".*language_model.*\.(q_proj|o_proj|down_proj)"
    config = LoraConfig(r=4, target_modules=pattern, rank_pattern={r".*q_proj": 2}, task_type="CAUSAL_LM")
    tuned = get_peft_model(whole_model(kind), config)
    torch.manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    tuned.save_pretrained(tmp_path)
    assert any("language_model" in key for key in load_file(tmp_path / WEIGHTS))
    saved = read_adapter(str(tmp_path), "adapters.policy.path")
    base = load_base(BaseConfig(model=saved_multimodal_model(kind), bits=16), TOKENIZER, CPU)  # type: ignore[arg-type]
    roles = Roles(base, {"policy": saved.config}, ["policy"], {"policy": ["policy"], "reference": []})
    roles.load_adapter_tensors("policy", saved.tensors, "test")
    with roles.inference_mode(), roles.activate("policy"):
        assert (logits(base.model) - logits(tuned)).abs().max() < 1e-5
