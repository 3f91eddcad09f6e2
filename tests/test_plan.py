"""Laws of the memory planner: what it says is what torch's allocator records, whatever the model, the algorithm, and what is recomputed."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from lowrank_tune.cli import app
from lowrank_tune.errors import UserError
from lowrank_tune.events import Event, Note
from lowrank_tune.model import shapes
from lowrank_tune.plan import fitted, plan
from lowrank_tune.plan.fit import largest
from lowrank_tune.plan.planner import plan_of
from lowrank_tune.plan.scenes import scenes
from lowrank_tune.recipe import load_any

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "plan.py"
CLOSE = 0.03


def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("planned_and_measured", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def off(shape: str, algorithms: list[str], layers: list[bool | int]) -> dict[tuple[str, ...], float]:
    """By how much the planner is off, of each cell."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {tuple(cell[:3]): cell[4] / cell[3] - 1 for cell in benchmark().cells([shape], algorithms, layers)}


@pytest.mark.parametrize(("shape", "algorithm", "layers"), [("qwen2", "sft", False), ("llama", "grpo", 2)])
def test_what_is_planned_is_what_is_measured(shape: str, algorithm: str, layers: bool | int) -> None:
    found = off(shape, [algorithm], [layers])
    assert len(found) == 1 and all(abs(one) < CLOSE for one in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["llama", "mistral", "qwen2", "qwen3", "gemma2"])
def test_what_is_planned_is_what_is_measured_everywhere(shape: str) -> None:
    found = off(shape, ["sft", "reward", "dpo", "grpo", "ppo", "rollout"], [True, False, 2])
    assert len(found) == 16 and all(abs(one) < CLOSE for one in found.values()), found


def test_a_plan_needs_neither_weights_nor_a_card() -> None:
    (scene,) = scenes(load_any("qwen2.5-7b-sft"), "cuda")
    found = plan_of(scene, 24 << 30, "sft")
    config = shapes.config_of("Qwen/Qwen2.5-7B-Instruct")
    assert config is not None and found.layers == config["num_hidden_layers"] and found.fits
    embeddings = 2 * 2 * config["vocab_size"] * config["hidden_size"]
    linear = config["num_hidden_layers"] * config["hidden_size"] * (2 * config["hidden_size"] + 2 * 512 + 3 * config["intermediate_size"])
    expected = embeddings + linear * (0.5 + 1 / 64 + 4 / 64 / 256)  # NF4 with double quantisation: arXiv:2305.14314
    weights = found.binding.bytes["weights"]
    assert abs(weights / expected - 1) < 0.001
    lora = 16 * config["num_hidden_layers"] * (4 * config["hidden_size"] + 2 * (config["hidden_size"] + 512) + 3 * (
        config["hidden_size"] + config["intermediate_size"]))  # fmt: skip
    assert abs(found.binding.bytes["adapters"] / (4 * lora) - 1) < 0.01 and abs(found.binding.bytes["optimizer"] / (8 * lora) - 1) < 0.01


def test_what_is_offloaded_is_not_on_the_card() -> None:
    """Of each layer the input of its rows waits elsewhere, all but the one that is being computed again. The highest point is then at the
    first layer, when all others have their gradients."""
    rows = ["data.max_length=2048", "train.micro_batch_size=2"]
    plans = {kept: next(plan(load_any("qwen2.5-7b-sft", *rows, f"train.activation_offloading={kept}"), 24.0)) for kept in ("false", "true")}
    config = shapes.config_of("Qwen/Qwen2.5-7B-Instruct")
    assert config is not None
    inputs = (config["num_hidden_layers"] - 1) * 2 * 2048 * config["hidden_size"] * 2
    assert inputs - plans["true"].binding.bytes["gradients"] <= plans["false"].peak - plans["true"].peak <= inputs


def test_the_command_says_whether_it_fits() -> None:
    done = CliRunner().invoke(app, ["plan", "tiny-sft", "--vram", "0.9"])
    assert done.exit_code == 2 and "does not fit" in done.output
    unknown = CliRunner().invoke(app, ["plan", "qwen2.5-7b-sft", "base.model=./nowhere"])
    assert unknown.exit_code == 2 and unknown.output.strip().count("\n") == 0 and "there is no folder ./nowhere" in unknown.output


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 1000), st.integers(1, 50), st.integers(0, 20000))
def test_the_largest_that_fits_is_found(start: int, most: int, fixed: int, each: int, room: int) -> None:
    found = largest(lambda count: fixed + each * count, start, most, room)
    assert found == max(0, min(most, (room - fixed) // each))


def test_what_cannot_fit_is_refused_before_anything_is_loaded_and_auto_becomes_numbers() -> None:
    with pytest.raises(UserError, match=r"does not fit the card.*fits with .*train.memory_check=warn"):
        fitted(load_any("tiny-sft"), 0.9, lambda event: None)
    told: list[Event] = []
    assert fitted(load_any("tiny-sft", "train.memory_check=warn"), 0.9, told.append) == {"tiny-sft": {}}
    assert [event.level for event in told if isinstance(event, Note)] == ["warning"]
    own = {"train.micro_batch_size=auto", "train.gradient_checkpointing=auto"}
    (changes,) = fitted(load_any("tiny-sft", *own), 24.0, lambda event: None).values()
    assert changes["gradient_checkpointing"] == 0 and changes["micro_batch_size"] > 4


def test_nothing_is_left_as_the_planner_made_it() -> None:
    before = torch.clear_autocast_cache
    list(plan(load_any("tiny-sft"), 24.0))
    assert torch.clear_autocast_cache is before and torch.ones(1).device.type == "cpu" and not torch.is_autocast_enabled("cuda")
