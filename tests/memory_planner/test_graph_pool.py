"""Graphs of decoding steps in plans: their memory while prompts are read, and the time of a step that the host starts
at once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lowrank_tune.config import load_any
from lowrank_tune.generation import cpu_weights
from lowrank_tune.memory_planner.gpu_specs import LAUNCH_SECONDS
from lowrank_tune.memory_planner.graph_pool import with_graph_pools
from lowrank_tune.memory_planner.plan_report import GRAPHS
from lowrank_tune.memory_planner.planner import phases_of
from lowrank_tune.memory_planner.rollouts import DecodingSpec
from lowrank_tune.memory_planner.roofline import PhaseTime
from lowrank_tune.memory_planner.specs import simulation_specs

DECODING = DecodingSpec("policy", 4, 8, 8, 2, 2, 1 << 20, cuda_graphs=True)
PEAKS = {
    ("rollout: reading", "before"): {"weights": 100, "activations": 7},
    ("rollout: reading", "after"): {"weights": 100, "activations": 20, "logits": 5},
    ("rollout: placing", "before"): {"weights": 100, "activations": 9, "KV cache": 50},
    # Prompts that were read, 9 bytes, are in use before the step begins.
    ("rollout: step", "before"): {"weights": 100, "activations": 9, "KV cache": 50},
    ("rollout: step", "forward", "last"): {"weights": 100, "activations": 15, "KV cache": 50},
    ("rollout: step", "after"): {"weights": 100, "activations": 11, "logits": 30, "KV cache": 50},
}


def test_temporaries_of_a_step_and_graphs_are_kept() -> None:
    """11 + 30 - 9 bytes by hand, and 8 graphs of 32 MiB in the driver; of another phase none."""
    other = {("old and reference", "before"): {"weights": 100}}
    found = with_graph_pools({**PEAKS, **other}, {"rollout": DECODING})
    assert {peak.get(GRAPHS) for point, peak in found.items() if point not in other} == {32 + (256 << 20)}
    assert found["old and reference", "before"] == {"weights": 100}
    assert with_graph_pools(PEAKS, {"rollout": replace(DECODING, cuda_graphs=False)}) == PEAKS


@pytest.mark.parametrize(
    ("setting", "device", "has_graphs"),
    [
        ("auto", "cuda", True),
        pytest.param("auto", "cpu", False, marks=pytest.mark.slow),
        pytest.param("false", "cuda", False, marks=pytest.mark.slow),
    ],
)
def test_a_plan_has_graphs_on_a_gpu_unless_they_are_off(setting: str, device: str, has_graphs: bool) -> None:
    (spec,) = simulation_specs(load_any("tiny-grpo", f"rollout.cuda_graphs={setting}"), device)
    rollout = phases_of(spec, 24 << 30)[0]
    assert rollout.name == "rollout"
    assert (rollout.bytes.get(GRAPHS, 0) > 0) == has_graphs, rollout


@pytest.mark.slow
def test_weights_in_blocks_are_planned_after_a_rollout() -> None:
    """On the CPU a rollout copies weights by operators that need values."""
    has_blocks = cpu_weights.has_blocked_weights()
    (spec,) = simulation_specs(load_any("tiny-grpo"), "cpu")
    assert phases_of(spec)[0].name == "rollout"
    cpu_weights.has_blocked_weights.cache_clear()
    # A plan that is not in the cache.
    (spec,) = simulation_specs(load_any("tiny-grpo", "rollout.max_num_seqs=3"), "cpu")
    assert phases_of(spec)[0].name == "rollout"
    assert cpu_weights.has_blocked_weights() == has_blocks, "planning must not decide it"


def test_a_captured_step_takes_the_time_of_its_kernels() -> None:
    step = PhaseTime(gpu_seconds=0.010, host_seconds=0.036, seconds=0.036)
    assert step.captured() == PhaseTime(0.010, LAUNCH_SECONDS, 0.010)
