"""`plan --max-length`: the longest row fits, and a longer one does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_plan import llama
from typer.testing import CliRunner, Result

from lowrank_tune.cli import app
from lowrank_tune.config import load_any
from lowrank_tune.config.memory import num_mlp_chunks
from lowrank_tune.memory_planner import offload_hooks
from lowrank_tune.memory_planner.max_length import LENGTH_STEP, longest_fitting, offloaded_bytes
from lowrank_tune.memory_planner.meta_model import layers_of
from lowrank_tune.memory_planner.row_settings import long_row_settings
from lowrank_tune.memory_planner.simulation import simulate
from lowrank_tune.memory_planner.specs import simulation_specs

MIB = 1 << 20


@given(
    shortest=st.integers(1, 2000),
    longest=st.integers(4000, 200_000),
    fixed=st.integers(0, 10_000),
    each=st.integers(1, 200),
    bend=st.integers(1, 200_000),
    room=st.integers(0, 30_000_000),
)
def test_the_longest_is_found(shortest: int, longest: int, fixed: int, each: int, bend: int, room: int) -> None:
    """Two lines: above `bend` a token needs three times as much."""
    tried = []

    def needed_at(length: int) -> int:
        tried.append(length)
        return fixed + each * length + 2 * each * max(0, length - bend)

    found = longest_fitting(needed_at, room, shortest, longest)
    assert len(tried) == len(set(tried)) <= 24 and all(shortest <= length <= longest for length in tried)
    if not found:
        assert needed_at(shortest) > room
        return
    assert needed_at(found) <= room and (found in (shortest, longest) or found % LENGTH_STEP == 0)
    longer = (found // LENGTH_STEP + 1) * LENGTH_STEP
    assert found == longest or longer >= longest or needed_at(longer) > room


@pytest.mark.parametrize(
    ("length", "count"), [(1, 1), (4096, 1), (4097, 2), (8192, 2), (8193, 4), (60_000, 16), (131_072, 32)]
)
def test_a_chunk_has_at_most_4096_tokens(length: int, count: int) -> None:
    assert num_mlp_chunks(length) == count


def test_completions_get_longer_and_prompts_do_not() -> None:
    online = long_row_settings(load_any("llama-3.1-8b-grpo"), 20_000)  # type: ignore[arg-type]
    assert online[0] == "rollout.max_new_tokens=19488" and online[-1] == "train.mlp_chunks=8"
    assert long_row_settings(load_any("llama-3.1-8b-sft"), 4000) == [  # type: ignore[arg-type]
        "data.max_length=4000",
        "train.micro_batch_size=1",
        "train.gradient_checkpointing=all",
        "train.activation_offloading=true",
    ]


def test_host_memory_is_that_of_the_offloaded_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch allocates each input with a power of two bytes."""
    packed: dict[tuple[int, ...], int] = {}
    pack = offload_hooks._pack

    def counting_pack(tensor: Any) -> Any:
        packed[tuple(tensor.shape)] = packed.get(tuple(tensor.shape), 0) + 1
        return pack(tensor)

    monkeypatch.setattr(offload_hooks, "_pack", counting_pack)
    changes = ["train.activation_offloading=true", "rollout.max_new_tokens=372"]
    (spec,) = simulation_specs(load_any(llama(tmp_path, num_hidden_layers=3), *changes), "cuda")
    simulate(spec, layers_of(spec.config, 3), only_update=True)
    assert {shape: count for shape, count in packed.items() if len(shape) == 3} == {(1, 500, 256): 3}
    assert offloaded_bytes(spec.config, 500, 3, torch.bfloat16) == 3 * 256 * 1024


def plan_command(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


def test_the_longest_row_of_a_small_base_is_that_of_its_positions(tmp_path: Path) -> None:
    recipe = llama(tmp_path, num_hidden_layers=2, max_position_embeddings=5000)
    done = plan_command(recipe, "--vram", "24", "--max-length", "auto", "train.learning_rate=1e-5")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[-3:] == [
        "longest row: 5,000 tokens, the longest that the base was made for",
        "host memory for the inputs of 2 layers, pinned: 0.0 GiB",
        f"lowrank-tune run {recipe} train.learning_rate=1e-5 rollout.max_new_tokens=4872 train.micro_batch_size=1 "
        "train.gradient_checkpointing=all train.activation_offloading=true train.mlp_chunks=2",
    ]


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (
            ("--max-length", "auto", "--device", "cpu"),
            "--max-length auto is for a GPU, and --device cpu plans for the CPU: leave one of them out",
        ),
        (("--max-length", "long"), "--max-length: expected `auto` or a number of tokens, found 'long'"),
        (("--max-length", "0"), "--max-length: expected `auto` or a number of tokens, found '0'"),
        (("--max-length", "8"), "--max-length: the shortest row of this recipe has 32 tokens"),
        (
            ("--max-length", "131,073"),
            "--max-length: meta-llama/Llama-3.1-8B-Instruct is for rows of at most 131,072 tokens",
        ),
    ],
)
def test_wrong_lengths_are_refused(arguments: tuple[str, ...], fault: str) -> None:
    done = plan_command("llama-3.1-8b-sft", *arguments)
    assert done.exit_code == 2 and " ".join(done.output.split()) == fault


def test_a_chain_has_no_longest_row() -> None:
    done = plan_command("llama-3.1-8b-rlhf", "--max-length", "auto")
    assert done.exit_code == 2 and "is a chain; plan the recipe of one stage" in done.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "vram", "at_least"),
    [("llama-3.1-8b-sft", "16", 60_000), ("qwen3-8b-sft", "10", 20_000), ("llama-3.1-8b-grpo", "16", 60_000)],
)
def test_the_longest_row_of_a_preset_fits_and_five_percent_more_does_not(preset: str, vram: str, at_least: int) -> None:
    found = json.loads(plan_command(preset, "--vram", vram, "--max-length", "auto", "--json").output)
    length = found["max_length"]
    assert found["fits"] and found["limited_by"] == "memory" and length >= at_least
    assert plan_command(preset, "--vram", vram, "--max-length", str(length)).exit_code == 0
    longer = plan_command(preset, "--vram", vram, "--max-length", str(round(1.05 * length)))
    assert longer.exit_code == 2 and "does not fit" in longer.output


@pytest.mark.slow
def test_an_8b_base_reaches_60k_tokens_on_24_gib() -> None:
    done = plan_command("llama-3.1-8b-sft", "--vram", "24", "--max-length", "auto", "--json")
    found = json.loads(done.output)
    assert done.exit_code == 0 and found["max_length"] == 131_072 and found["limited_by"] == "base"


@pytest.mark.slow
def test_no_row_fits_a_gpu_that_is_too_small(tmp_path: Path) -> None:
    recipe = llama(tmp_path, num_hidden_layers=2, max_position_embeddings=500)
    done = plan_command(recipe, "--vram", "0.1", "--max-length", "auto")
    assert done.exit_code == 2 and done.output.splitlines()[-1] == "no row fits, not even one of 160 tokens"
