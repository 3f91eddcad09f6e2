"""Chooses the values of the settings that are `auto`: the fastest with which the whole plan fits the GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from lowrank_tune.memory_planner.cached_simulation import cached_peaks
from lowrank_tune.memory_planner.extrapolation import MIN_LAYERS, fit_linear_model
from lowrank_tune.memory_planner.fit import DEFAULT_STEP_UNITS, ENOUGH_TOKENS, Search
from lowrank_tune.memory_planner.meta_model import layers_of
from lowrank_tune.memory_planner.plan_report import DECODING_PHASES, Phase, Plan, needed
from lowrank_tune.memory_planner.planner import peaks_of, phases_in
from lowrank_tune.memory_planner.simulation import SimulationSpec
from lowrank_tune.memory_planner.sizes import step_units
from lowrank_tune.model.logprobs import CHUNK_LOGITS, LARGE_CHUNK_LOGITS

AUTO_MARGIN = 0.03
"""Share of the GPU's memory that a chosen value leaves free, because a plan is an estimate."""

AUTO_SETTINGS = ("micro_batch_size", "gradient_checkpointing", "logits_chunk")
"""Settings of `train` that may be `auto`."""


@dataclass(frozen=True)
class AutoChoice:
    """The values of the settings of `train` that are `auto`, and the plan with them. No values if none fits."""

    values: dict[str, int]
    plan: Plan


def choose_auto_settings(spec: SimulationSpec, plan: Plan) -> AutoChoice:
    """Returns the values of settings that are `auto`: units of a micro-batch, recomputed layers, and logits of a chunk.
    The micro-batch is only as large as speed needs if layers are `auto` too, then as few layers as possible are
    recomputed, and a large chunk takes memory that is left. A plan with these values fits. `plan` is the plan of the
    recipe as it is written."""
    train = spec.recipe.train
    values = dict[str, int]()
    if train.micro_batch_size == "auto":
        units = _micro_batch(spec, plan)
        if not units:
            return AutoChoice({}, plan)
        values["micro_batch_size"] = units
        spec = replace(spec, sizes=Search(spec, plan).with_micro_batch(units))
    chosen = _plan_with(spec, plan, plan.recomputed)
    if train.gradient_checkpointing == "auto":
        chosen = _fewest_layers(spec, chosen)
        values["gradient_checkpointing"] = chosen.recomputed
    if not chosen.fits:
        return AutoChoice({}, plan)
    if train.logits_chunk == "auto":
        larger = _with_large_chunk(spec, chosen)
        values["logits_chunk"] = CHUNK_LOGITS
        if fits_with_margin(larger):
            values["logits_chunk"] = LARGE_CHUNK_LOGITS
            chosen = larger
    return AutoChoice(values, chosen)


def describe_values(values: Mapping[str, int]) -> str:
    """Returns chosen values as they are typed."""
    return " ".join(f"train.{key}={value}" for key, value in values.items())


def auto_settings_of(spec: SimulationSpec) -> list[str]:
    """Returns the settings of `train` that are `auto` in the recipe."""
    return [key for key in AUTO_SETTINGS if getattr(spec.recipe.train, key) == "auto"]


def kept_values(spec: SimulationSpec, chosen: Mapping[str, int]) -> dict[str, int]:
    """Returns the values that an earlier start of a run has chosen for the settings that are `auto`; empty unless it
    has chosen all of them."""
    keys = auto_settings_of(spec)
    if not all(key in chosen for key in keys):
        return {}
    return {key: chosen[key] for key in keys}


def choice_of(spec: SimulationSpec, plan: Plan) -> AutoChoice:
    """Returns the values that a run with this memory would choose; none if no memory is given, if the recipe has no
    such setting, or if the plan has advice because it does not fit."""
    if not plan.vram or plan.advice or not auto_settings_of(spec):
        return AutoChoice({}, plan)
    return choose_auto_settings(spec, plan)


def with_auto_advice(spec: SimulationSpec, plan: Plan, values: Mapping[str, int]) -> Plan:
    """Adds chosen values to a plan, if they are more than the chunk of logits, which is `auto` by default."""
    if not values or auto_settings_of(spec) == ["logits_chunk"]:
        return plan
    return replace(plan, advice=f"auto: a run with this memory has {describe_values(values)}")


def with_auto_values(spec: SimulationSpec, choice: AutoChoice) -> SimulationSpec:
    """Returns the simulation of the recipe with chosen values."""
    train = spec.recipe.train.model_copy(update=choice.values)
    return replace(
        spec,
        recipe=spec.recipe.model_copy(update={"train": train}),
        sizes=choice.plan.sizes,
    )


def _micro_batch(spec: SimulationSpec, plan: Plan) -> int:
    """Returns the largest micro-batch that fits with the margin, or else without; 0 if one row does not fit."""
    recipe = spec.recipe
    max_units = step_units(recipe, DEFAULT_STEP_UNITS)
    if recipe.train.gradient_checkpointing == "auto":
        enough_units = max(1, ENOUGH_TOKENS // (plan.sizes.length * plan.sizes.rows_per_unit))
        max_units = min(max_units, enough_units)
    units = 0
    for room in (_room(plan), plan.vram):
        units = units or Search(spec, replace(plan, vram=room)).units(max_units)
    return units


def _fewest_layers(spec: SimulationSpec, all_recomputed: Plan) -> Plan:
    """Returns the plan with the fewest recomputed layers that fits with the margin, else the one that recomputes all
    layers."""
    plans = list(_plans_by_layers(spec, all_recomputed))
    fitting = [plan for plan in plans if fits_with_margin(plan)]
    if len(fitting) == len(plans):
        # Only then can none be recomputed, which is simulated by itself.
        none_recomputed = _plan_with(spec, all_recomputed, 0)
        if fits_with_margin(none_recomputed):
            return none_recomputed
    return fitting[0] if fitting else all_recomputed


def _plans_by_layers(spec: SimulationSpec, all_recomputed: Plan) -> Iterator[Plan]:
    """Yields plans with more and more recomputed layers, counted from the first, but not none or all. Numbers for which
    too few layers of a kind are left to extrapolate from are left out."""
    layers = all_recomputed.layers
    kinds = Counter(layers_of(spec.config, 0)) | Counter(layers_of(spec.config, layers))
    if min(kinds.values()) < 2 * MIN_LAYERS:
        return
    model = fit_linear_model(lambda few_layers: cached_peaks(spec, few_layers), kinds)
    for count in range(1, layers):
        counts = Counter(layers_of(spec.config, count))
        if all(counts[kind] >= MIN_LAYERS for kind in kinds):
            phases = phases_in(model.at_depth(counts))
            yield _with_phases(
                spec,
                all_recomputed,
                count,
                phases,
            )


def _with_large_chunk(spec: SimulationSpec, plan: Plan) -> Plan:
    """Returns the plan with more logits at once."""
    spec = with_auto_values(spec, AutoChoice({"logits_chunk": LARGE_CHUNK_LOGITS}, plan))
    phases = phases_in(peaks_of(spec, plan.recomputed))
    return _with_phases(
        spec,
        plan,
        plan.recomputed,
        phases,
    )


def _plan_with(
    spec: SimulationSpec,
    plan: Plan,
    recomputed: int,
) -> Plan:
    """Returns the plan with other sizes or another number of recomputed layers."""
    if spec.sizes == plan.sizes and recomputed == plan.recomputed:
        return plan
    return _with_phases(
        spec,
        plan,
        recomputed,
        phases_in(peaks_of(spec, recomputed)),
    )


def _with_phases(
    spec: SimulationSpec,
    plan: Plan,
    recomputed: int,
    phases: tuple[Phase, ...],
) -> Plan:
    """Returns the plan with other phases. Those that decode stay, because they need no activations of the update."""
    decoding = [phase for phase in plan.phases if phase.name in DECODING_PHASES]
    return replace(
        plan,
        sizes=spec.sizes,
        recomputed=recomputed,
        phases=(*decoding, *phases),
    )


def fits_with_margin(plan: Plan) -> bool:
    """Returns whether a plan fits, and its phases that do not decode leave `AUTO_MARGIN` of the memory free. Decoding
    takes the memory that is left, so that it has no margin."""
    ignored = {phase.name for phase in plan.split_phases}
    ignored.update(DECODING_PHASES)
    peak = max(phase.total for phase in plan.phases if phase.name not in ignored)
    return plan.fits and needed(peak, plan.device) <= _room(plan)


def _room(plan: Plan) -> int:
    return int(plan.vram * (1 - AUTO_MARGIN))
