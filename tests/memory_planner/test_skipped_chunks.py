"""Chunks of an MLP that are not simulated count like those that are."""

from __future__ import annotations

from functools import cache

import pytest

from lowrank_tune.config import load_any
from lowrank_tune.memory_planner.meta_model import layers_of
from lowrank_tune.memory_planner.simulation import count_kernels
from lowrank_tune.memory_planner.specs import simulation_specs


@cache
def flops_of(num_chunks: int, phase: str) -> float:
    changes = [f"train.mlp_chunks={num_chunks}", "train.torch_compile=false", "train.micro_batch_tokens=8192"]
    (spec,) = simulation_specs(load_any("llama-3.1-8b-sft", *changes), "cuda")
    counts = count_kernels(spec, layers_of(spec.config, 1)[:1])
    return sum(kernel.flops * times for kernel, times in counts[phase].items())


@pytest.mark.slow
def test_skipped_chunks_have_the_flops_of_the_first() -> None:
    """Two chunks are both simulated. The recomputation of the layer stops before its last chunk, so each chunk but
    one is computed once more: 1/2 of the MLP with two chunks, 7/8 with eight."""
    more = {chunks: flops_of(chunks, "update") - flops_of(1, "update") for chunks in (2, 8)}
    assert more[2] > 0
    assert more[8] * 4 == more[2] * 7


@pytest.mark.slow
def test_a_forward_pass_has_the_same_flops_in_chunks() -> None:
    assert flops_of(8, "validation") == flops_of(1, "validation") > 0
