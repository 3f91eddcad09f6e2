"""The peak of the same recipe over its base in the other precision: 16 bits for one of 4, and 4 for one of 16."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lowrank_tune.memory_planner.compiled_layers import LayerPrograms
from lowrank_tune.memory_planner.plan_report import DECODING_PHASES, OtherBits, Phase, Plan, needed
from lowrank_tune.memory_planner.planner import bytes_per_sequence, peaks_of, phases_in
from lowrank_tune.memory_planner.simulation import SimulationSpec
from lowrank_tune.model.base import base_dtype

KEYS_AND_VALUES = "KV cache"


def with_other_bits(
    spec: SimulationSpec,
    plan: Plan,
) -> Plan:
    """Adds to a plan for a GPU what it needs over the base in the other precision. A base that is published in 4 bits
    has no other."""
    if plan.device != "cuda" or getattr(spec.config, "quantization_config", None) is not None:
        return plan
    bits = 16 if plan.bits == 4 else 4
    base = spec.recipe.base.model_copy(update={"bits": bits})
    recipe = spec.recipe.model_copy(update={"base": base})
    phases = _phases(replace(spec, recipe=recipe, programs=LayerPrograms()), plan)
    other = replace(plan, bits=bits, phases=phases)
    return replace(plan, other_bits=OtherBits(bits, other.needed, other.fits))


def _phases(
    spec: SimulationSpec,
    plan: Plan,
) -> tuple[Phase, ...]:
    """Returns the phases over another base. Only the update is simulated; in the others the weights are replaced."""
    update = phases_in(peaks_of(spec, plan.recomputed, only_update=True))
    weights = max(phase.bytes.get("weights", 0) for phase in update)
    names = {phase.name for phase in update}
    others = [phase for phase in plan.phases if phase.name not in names]
    return (*update, *_with_weights(spec, plan, others, weights))


def _with_weights(
    spec: SimulationSpec,
    plan: Plan,
    phases: list[Phase],
    weights: int,
) -> Iterator[Phase]:
    """Yields phases with other weights. Those that decode have fewer sequences at once if they do not fit, and no more
    than in the plan if they do."""
    for phase in phases:
        sizes = {**phase.bytes, "weights": weights}
        excess = needed(sum(sizes.values()), plan.device) - plan.vram
        if phase.name in DECODING_PHASES and plan.vram and excess > 0:
            sizes[KEYS_AND_VALUES] = max(_one_sequence(spec, phase.name), sizes.get(KEYS_AND_VALUES, 0) - excess)
        yield replace(phase, bytes=sizes)


def _one_sequence(
    spec: SimulationSpec,
    phase: str,
) -> int:
    """Returns the bytes of the keys and values of one sequence."""
    recipe = spec.recipe
    new_tokens = recipe.rollout.max_new_tokens
    if phase != DECODING_PHASES[0]:
        new_tokens = recipe.evaluate.max_new_tokens
    dtype = base_dtype(recipe.base, spec.device)
    return bytes_per_sequence(spec.config, recipe.data.max_prompt_length + new_tokens, dtype)
