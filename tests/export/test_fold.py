"""A stack folded into one adapter is the same function, and `final/` answers in plain PEFT as the run did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, perturb, random_model, relative_error, roles_over, unquantized_base
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file

from lowrank_tune.export.combine_lora import (
    LoraAdapter,
    as_lora_adapter,
    cannot_combine_reason,
    combine_adapters,
    saved_lora_adapter,
)
from lowrank_tune.model.roles import Roles

IDS = torch.tensor([[5, 9, 33, 7, 21, 60, 3]])


def stack(kind: str = "llama", **configs: LoraConfig) -> Roles:
    """A stack of these adapters, lowest first, with weights that matter."""
    names = list(configs)
    roles = Roles(unquantized_base(kind), configs, trainable=names[-1:], stacks={"policy": names})
    for seed, name in enumerate(names):
        perturb(roles, name, seed=seed + 1)
    return roles


def lora(*targets: str, **more: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "lora_alpha": 16.0, "target_modules": sorted(targets), "task_type": "CAUSAL_LM"} | more
    )


def logits_of(roles: Roles, role: str = "policy") -> torch.Tensor:
    with roles.inference_mode(), roles.activate(role):
        return torch.as_tensor(roles.base.model(input_ids=IDS).logits).clone()


def in_plain_peft(
    folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], kind: str = "llama"
) -> torch.Tensor:
    """What software without this package computes from the two files."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    with torch.no_grad():
        return torch.as_tensor(PeftModel.from_pretrained(random_model(kind), folder).eval()(input_ids=IDS).logits)


MIXED = {
    "alike": (lora("q_proj", "v_proj"), lora("q_proj", "v_proj")),
    "rslora below": (lora("q_proj", "v_proj", use_rslora=True, r=3), lora("q_proj", "v_proj")),
    "rslora on top, other ranks": (lora("q_proj", r=2), lora("q_proj", "up_proj", use_rslora=True, r=7)),
    "patterns": (lora("q_proj", "v_proj", rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 5}), lora("o_proj")),
    "layers": (lora("q_proj", layers_to_transform=[1]), lora("v_proj")),
    "three": (lora("q_proj"), lora("k_proj", use_rslora=True), lora("q_proj", "k_proj", lora_alpha=3.0)),
    "alone with rslora": (lora("q_proj", use_rslora=True, r=5),),
    "alone with patterns": (lora("q_proj", "v_proj", rank_pattern={"v_proj": 9}, use_rslora=True),),
}


@pytest.mark.parametrize("kind", MIXED)
def test_a_combined_stack_is_the_same_function(kind: str, tmp_path: Path) -> None:
    names = ("below", "middle", "policy")[3 - len(MIXED[kind]) :]
    roles = stack(**dict(zip(names, MIXED[kind], strict=True)))
    config, tensors = combine_adapters([as_lora_adapter(roles, name) for name in names])
    tuned, bare = logits_of(roles), logits_of(roles, "base")
    assert (
        relative_error(in_plain_peft(tmp_path / "folded", config, tensors), tuned) < 2e-6
        and relative_error(bare, tuned) > 0.05
    )
    # llama.cpp uses alpha over the rank of each tensor and ignores the rest of the configuration. vLLM uses alpha over
    # r.
    assert not config["use_rslora"] and not config.get("rank_pattern") and not config.get("alpha_pattern")
    assert {len(tensor) for key, tensor in tensors.items() if "lora_A" in key} == {config["r"]}


@pytest.mark.parametrize("kind", ARCHITECTURES[1:6])
def test_a_combined_stack_of_every_family_is_the_same_function(kind: str, tmp_path: Path) -> None:
    roles = roles_over(unquantized_base(kind), lower=["sft"], use_rslora=True)
    perturb(roles, "sft", "policy")
    config, tensors = combine_adapters([as_lora_adapter(roles, name) for name in ("sft", "policy")])
    assert (
        config["r"] == 8
        and config["target_modules"] == sorted(config["target_modules"])
        and "q_proj" in config["target_modules"]
    )
    assert relative_error(in_plain_peft(tmp_path / "folded", config, tensors, kind), logits_of(roles)) < 2e-6


@pytest.mark.parametrize(
    "more",
    [
        {"alpha_pattern": {"q_proj|v_proj": 5}},
        {"alpha_pattern": {"up_proj|q_proj": 5, "v_proj": 3}, "rank_pattern": {"o_proj|v_proj": 2}},
        {"alpha_pattern": {r"layers\.1\.self_attn\.q_proj|o_proj": 7}, "use_rslora": True},
    ],
)
def test_saved_adapter_has_the_scales_of_peft(more: dict[str, Any]) -> None:
    """Read from its files alone, each module has the scale that PEFT gives it, for any patterns."""
    roles = stack(policy=lora("q_proj", "v_proj", "o_proj", "up_proj", **more))
    files = json.loads(json.dumps(roles.adapter_config("policy"))), roles.adapter_tensors("policy")
    scales = saved_lora_adapter(*files).scalings
    assert scales == pytest.approx(roles.scalings("policy")) and len(set(scales.values())) > 1


def test_the_top_adapter_alone_is_another_function(tmp_path: Path) -> None:
    roles = stack(sft=lora("q_proj"), policy=lora("q_proj"))
    config, tensors = combine_adapters([as_lora_adapter(roles, "policy")])
    assert relative_error(in_plain_peft(tmp_path / "top", config, tensors), logits_of(roles)) > 0.01


def test_cannot_combine_reason_names_the_tensor() -> None:
    part = LoraAdapter(
        {},
        {
            "base_model.model.lm_head.lora_A.weight": torch.zeros(1, 1),
            "base_model.model.x.lora_magnitude_vector": torch.zeros(1),
        },
        {},
    )
    assert (
        cannot_combine_reason([part]) == "base_model.model.x.lora_magnitude_vector is not a matrix of a linear module"
    )
    with pytest.raises(AssertionError):
        combine_adapters([part])
