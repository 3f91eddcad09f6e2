"""Chunks of MLPs (`train.mlp_chunks`) are planned as a run has them, although most of them are not simulated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_plan import CLOSE, llama, off

from lowrank_tune.config import load_any
from lowrank_tune.memory_planner import simulation
from lowrank_tune.memory_planner.extrapolation import Peaks
from lowrank_tune.memory_planner.meta_model import Layer
from lowrank_tune.memory_planner.specs import simulation_specs

LENGTH = 6144 + 128
"""Tokens of a row, with the prompt."""


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["llama", "qwen3"])
def test_chunks_are_planned_as_measured(shape: str) -> None:
    found = off(shape, ["sft", "grpo"], ["all", "none"], ["--mlp-chunks", "8"])
    assert len(found) == 4 and all(abs(one) < CLOSE for one in found.values()), found


def update_peaks(tmp_path: Path, chunks: int) -> Peaks:
    recipe = llama(tmp_path, num_hidden_layers=2, max_position_embeddings=LENGTH)
    changes = [
        f"train.mlp_chunks={chunks}",
        f"rollout.max_new_tokens={LENGTH - 128}",
        "train.torch_compile=false",
    ]
    (spec,) = simulation_specs(load_any(recipe, *changes), "cuda")
    return simulation.simulate(spec, [Layer(), Layer(recomputed=False)], only_update=True)


def skip_nothing(run_chunk: Any, mode: Any, counter: Any) -> Any:
    def every_chunk(*arguments: Any) -> Any:
        with mode.active():
            return run_chunk(*arguments)

    return every_chunk


def test_skipped_chunks_count_as_if_they_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """6 chunks, of which 4 are skipped; a recomputed layer and one that is not."""
    skipped = update_peaks(tmp_path, 6)
    monkeypatch.setattr(simulation, "skip_middle_chunks", skip_nothing)
    assert update_peaks(tmp_path, 6) == skipped


@pytest.mark.slow
def test_chunks_need_less_memory(tmp_path: Path) -> None:
    """At 6,272 tokens the MLP's activations are 512 wide, twice the hidden states."""
    whole, chunked = (max(sum(peak.values()) for peak in update_peaks(tmp_path, chunks).values()) for chunks in (1, 6))
    assert chunked < 0.9 * whole
