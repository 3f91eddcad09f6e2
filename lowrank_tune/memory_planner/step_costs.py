"""The phases of a run with their kernels, and how many tokens each one reads or draws."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

from lowrank_tune.memory_planner.cached_simulation import cached_kernels
from lowrank_tune.memory_planner.extrapolation import extrapolate_counts
from lowrank_tune.memory_planner.kernel_costs import Kernel
from lowrank_tune.memory_planner.kernel_counter import KernelCounts
from lowrank_tune.memory_planner.meta_model import layers_of
from lowrank_tune.memory_planner.plan_report import KL_ESTIMATE, PHASE_SEPARATOR
from lowrank_tune.memory_planner.rollouts import TYPICAL_STEPS, DecodingSpec
from lowrank_tune.memory_planner.simulation import (
    MAX_SIMULATED_PASSES,
    PPO_UPDATE_PHASES,
    SimulationSpec,
    num_update_passes,
)

UPDATE = "update"
OPTIMIZER = "optimizer"
REFERENCE = "reference"
OLD_AND_REFERENCE = "old and reference"
REWARD_MODEL = "reward model"
VALIDATION = "validation"
READING = "reading"
PLACING = "placing"
AVERAGE_STEP, LONGEST_STEP = TYPICAL_STEPS


@dataclass(frozen=True)
class PhaseCost:
    """The kernels of a phase that reads or draws `tokens` tokens. An optimizer step has none."""

    name: str
    tokens: int
    kernels: Mapping[Kernel, float]


def step_costs(
    spec: SimulationSpec,
    recomputed: int,
    rollouts: Mapping[str, DecodingSpec],
) -> dict[str, PhaseCost]:
    """Returns the phases of a recipe on the whole model, by name; those of decoding as `rollout: reading`."""
    layers = layers_of(spec.config, recomputed)
    counts = extrapolate_counts(partial(cached_kernels, spec), layers)
    costs = {cost.name: cost for cost in _pass_costs(spec, counts)}
    if rollouts:
        decoding_spec = replace(spec, rollouts=rollouts)
        counts = extrapolate_counts(partial(cached_kernels, decoding_spec), layers)
        for phase, sizes in rollouts.items():
            costs |= {cost.name: cost for cost in _decoding_costs(phase, sizes, counts)}
    return costs


def update_kernels(spec: SimulationSpec, counts: KernelCounts) -> Mapping[Kernel, float]:
    """Returns the kernels of one pass of the update over a micro-batch, of those that a simulation counts."""
    parts = dict.fromkeys((UPDATE, *PPO_UPDATE_PHASES))
    return _mean(counts, parts, _simulated_passes(spec))


def _simulated_passes(spec: SimulationSpec) -> int:
    return min(MAX_SIMULATED_PASSES, num_update_passes(spec.recipe))


def _pass_costs(spec: SimulationSpec, counts: KernelCounts) -> Iterator[PhaseCost]:
    sizes = spec.sizes
    yield PhaseCost(UPDATE, sizes.tokens, update_kernels(spec, counts))
    yield PhaseCost(OPTIMIZER, 0, _mean(counts, [OPTIMIZER], _simulated_passes(spec)))
    no_grad_tokens = sizes.no_grad_rows * sizes.length
    for name in (REFERENCE, KL_ESTIMATE, REWARD_MODEL, VALIDATION):
        if name in counts:
            yield PhaseCost(name, no_grad_tokens, counts[name])
    if OLD_AND_REFERENCE in counts:
        yield PhaseCost(OLD_AND_REFERENCE, sizes.num_rollouts * sizes.length, counts[OLD_AND_REFERENCE])


def _decoding_costs(
    phase: str,
    sizes: DecodingSpec,
    counts: KernelCounts,
) -> Iterator[PhaseCost]:
    tokens = {
        READING: sizes.prefill_prompts * sizes.prompt_length,
        PLACING: 0,
        AVERAGE_STEP: sizes.slots,
        LONGEST_STEP: sizes.slots,
    }
    for part, num_tokens in tokens.items():
        name = phase + PHASE_SEPARATOR + part
        yield PhaseCost(name, num_tokens, counts[name])


def _mean(
    counts: KernelCounts,
    phases: Iterable[str],
    passes: int,
) -> Mapping[Kernel, float]:
    """Returns the kernels of one of the passes, in all of these phases."""
    total = Counter[Kernel]()
    for phase in phases:
        for kernel, count in counts.get(phase, {}).items():
            total[kernel] += count / passes  # type: ignore[assignment]
    return total
