"""Memory that CUDA graphs of decoding steps keep: temporaries of their own, while prompts are read and while a step
runs plain, and what the driver needs for each graph."""

from __future__ import annotations

from collections.abc import Mapping

from lowrank_tune.generation.cuda_graphs import GRAPH_BYTES, MAX_GRAPHS
from lowrank_tune.memory_planner.allocation_tracker import ProgramPoint
from lowrank_tune.memory_planner.extrapolation import Peaks
from lowrank_tune.memory_planner.plan_report import GRAPHS, PHASE_SEPARATOR
from lowrank_tune.memory_planner.rollouts import STEP, DecodingSpec

TEMPORARIES = ("activations", "logits")
"""Purposes of what a step allocates and frees."""


def with_graph_pools(peaks: Peaks, rollouts: Mapping[str, DecodingSpec]) -> Peaks:
    """Returns the peaks of phases that decode, with the memory of graphs at each point after the start. All graphs
    share one pool, which is as large as the largest of them needs."""
    pools = {name: _pool_bytes(peaks, name) for name, decoding in rollouts.items() if decoding.cuda_graphs}
    result = dict[ProgramPoint, Mapping[str, int]]()
    for point, peak in peaks.items():
        name = point[0].partition(PHASE_SEPARATOR)[0]
        result[point] = peak
        if name in pools:
            result[point] = {**peak, GRAPHS: pools[name] + MAX_GRAPHS * GRAPH_BYTES}
    return result


def _pool_bytes(peaks: Peaks, phase: str) -> int:
    """Returns by how much the temporaries grow within a step."""
    step = phase + PHASE_SEPARATOR + STEP
    sizes = {point: _temporaries(peak) for point, peak in peaks.items() if point[0] == step}
    return max(sizes.values()) - sizes[step, "before"]


def _temporaries(peak: Mapping[str, int]) -> int:
    return sum(peak.get(purpose, 0) for purpose in TEMPORARIES)
