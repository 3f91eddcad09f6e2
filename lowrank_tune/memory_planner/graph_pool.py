"""Memory that CUDA graphs of decoding steps keep: a graph has its own temporaries, also while prompts are read."""

from __future__ import annotations

from collections.abc import Mapping

from lowrank_tune.memory_planner.allocation_tracker import ProgramPoint
from lowrank_tune.memory_planner.extrapolation import Peaks
from lowrank_tune.memory_planner.plan_report import GRAPHS, PHASE_SEPARATOR
from lowrank_tune.memory_planner.rollouts import STEP, DecodingSpec

TEMPORARIES = ("activations", "logits")
"""Purposes of what a step allocates and frees."""


def with_graph_pools(peaks: Peaks, rollouts: Mapping[str, DecodingSpec]) -> Peaks:
    """Returns the peaks of phases that decode, with the temporaries of a step at the points of other passes. All graphs
    share one pool, which is as large as the largest of them needs."""
    pools = {name: _pool_bytes(peaks, name) for name, decoding in rollouts.items() if decoding.cuda_graphs}
    result = dict[ProgramPoint, Mapping[str, int]]()
    for point, peak in peaks.items():
        name, _, pass_name = point[0].partition(PHASE_SEPARATOR)
        result[point] = peak
        if name in pools and pass_name != STEP:
            result[point] = {**peak, GRAPHS: pools[name]}
    return result


def _pool_bytes(peaks: Peaks, phase: str) -> int:
    """Returns by how much the temporaries grow within a step."""
    step = phase + PHASE_SEPARATOR + STEP
    sizes = {point: _temporaries(peak) for point, peak in peaks.items() if point[0] == step}
    return max(sizes.values()) - sizes[step, "before"]


def _temporaries(peak: Mapping[str, int]) -> int:
    return sum(peak.get(purpose, 0) for purpose in TEMPORARIES)
