"""Runs over the text model of a multimodal checkpoint: their adapters fit the class that serves the whole one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from models import CPU, relative_error
from multimodal import random_multimodal_model
from peft import PeftModel
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

import lowrank_tune
from lowrank_tune import Recipe
from lowrank_tune.assembly.finished_run import adapters_in, load_finished_run, roles_of
from lowrank_tune.cli import app
from lowrank_tune.config import BaseConfig, load_any
from lowrank_tune.export.merge import merge
from lowrank_tune.model.base import load_base, load_tokenizer

TINY_BASE = Path(lowrank_tune.__file__).parent / "toy" / "base"
IDS = torch.arange(3, 43).view(2, 20)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma 3 in bf16, as published, with the tokenizer of the tiny base."""
    folder = tmp_path_factory.mktemp("multimodal") / "base"
    model = random_multimodal_model("gemma3", vocab_size=915, max_position_embeddings=512)
    model.to(torch.bfloat16).save_pretrained(folder)
    for file in TINY_BASE.iterdir():
        if file.name.startswith("tokenizer") or file.suffix == ".jinja":
            shutil.copy(file, folder)
    return folder


def run(checkpoint: Path, preset: str, out: Path, below: Path | None = None) -> Path:
    recipe = load_any(
        preset,
        f"base.model={checkpoint}",
        "train.max_steps=2",
        "train.global_batch_size=4",
        "train.micro_batch_size=4",
        "data.train.0.max_samples=16",
        "evaluate={}",
    ).to_dict()
    if below is not None:
        recipe["adapters"] = {"sft": {"path": str(below)}, **recipe["adapters"]}
    lowrank_tune.run(Recipe.from_dict(recipe), out=out, ui="none", device=CPU)
    return out


def test_a_stack_of_adapters_is_served_by_the_whole_model(checkpoint: Path, tmp_path: Path) -> None:
    sft = run(checkpoint, "tiny-sft", tmp_path / "sft")
    dpo = run(checkpoint, "tiny-dpo", tmp_path / "dpo", below=sft)
    for folder in (sft / "final", dpo / "final", dpo / "final" / "policy"):
        modules = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
        assert all(name.startswith("model.language_model.layers.") for name in modules), folder
    assert "AutoModelForImageTextToText.from_pretrained" in (sft / "final" / "README.md").read_text()

    base_config = BaseConfig(model=str(checkpoint), bits=16)
    roles = roles_of(adapters_in(load_finished_run(dpo)), load_base(base_config, load_tokenizer(base_config), CPU))
    with roles.inference_mode(), roles.activate("policy"):
        expected = roles.base.model(input_ids=IDS).logits
    whole = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        plain = whole(input_ids=IDS).logits
        served = PeftModel.from_pretrained(whole, str(dpo / "final"))(input_ids=IDS).logits
    assert relative_error(served, expected) < 1e-5 < relative_error(plain, expected)
    merge(dpo, tmp_path / "merged", "dequantized", lambda event: None, lambda report: None, CPU)


def test_a_reward_model_scores_answers(checkpoint: Path, tmp_path: Path) -> None:
    reward = run(checkpoint, "tiny-reward", tmp_path / "reward")
    config = json.loads((reward / "final" / "adapter_config.json").read_text())
    assert all(name.startswith("model.language_model.layers.") for name in config["target_modules"])
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "2 + 2?", "completion": "4"}) + "\n")
    result = CliRunner().invoke(app, ["score", str(reward), "--file", str(rows)])
    assert result.exit_code == 0, result.output
