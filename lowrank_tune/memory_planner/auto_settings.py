"""Chooses the values of the settings that are `auto`: the fastest with which the whole plan fits the GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lowrank_tune.memory_planner.cached_simulation import cached_peaks
from lowrank_tune.memory_planner.extrapolation import MIN_LAYERS, fit_linear_model
from lowrank_tune.memory_planner.fit import DEFAULT_STEP_UNITS, ENOUGH_TOKENS, Search
from lowrank_tune.memory_planner.gpu_specs import DEFAULT_GPU, GpuSpec
from lowrank_tune.memory_planner.meta_model import layers_of
from lowrank_tune.memory_planner.plan_report import DECODING_PHASES, Phase, Plan, needed
from lowrank_tune.memory_planner.planned_gpu import gpu_named
from lowrank_tune.memory_planner.planner import peaks_of, phases_in
from lowrank_tune.memory_planner.simulation import SimulationSpec
from lowrank_tune.memory_planner.sizes import step_units
from lowrank_tune.memory_planner.update_times import fit_update_times, seconds_with
from lowrank_tune.model.logprobs import CHUNK_LOGITS, LARGE_CHUNK_LOGITS

AUTO_MARGIN = 0.03
"""Share of the GPU's memory that a chosen value leaves free, because a plan is an estimate."""

FEWEST_TOKENS = 2048
"""Tokens of the smallest micro-batch that is tried to recompute fewer layers."""
AUTO_SETTINGS = ("micro_batch_size", "gradient_checkpointing", "logits_chunk")
"""Settings of `train` that may be `auto`."""


@dataclass(frozen=True)
class AutoChoice:
    """The values of the settings of `train` that are `auto`, and the plan with them. No values if none fits. `gain` is
    the speed of the update relative to one that recomputes all layers, in micro-batches of `compared_units`; 0 if it is
    unknown. With `default_rates` it is that on another GPU, because the rates of the planned one are unknown."""

    values: dict[str, int]
    plan: Plan
    gain: float = 0.0
    compared_units: int = 0
    default_rates: bool = False


def choose_auto_settings(spec: SimulationSpec, plan: Plan, gpu: GpuSpec | None = None) -> AutoChoice:
    """Returns the values of settings that are `auto`: units of a micro-batch, recomputed layers, and logits of a chunk.

    As few layers as possible are recomputed. If the micro-batch is `auto` too, it is the one with which the update is
    fastest on `gpu`: a smaller one may leave memory for the activations of more layers. A large chunk takes memory that
    is left. A plan with these values fits. `plan` is the plan of the recipe as it is written.
    """
    train = spec.recipe.train
    values = dict[str, int]()
    gain = 0.0
    sizes = [spec.sizes]
    if train.micro_batch_size == "auto":
        units = _micro_batch(spec, plan)
        if not units:
            return AutoChoice({}, plan)
        sizes = [Search(spec, plan).with_micro_batch(number) for number in _smaller_units(spec, plan, units)]
    if train.gradient_checkpointing == "auto":
        chosen, gain = _fastest([replace(spec, sizes=size) for size in sizes], plan, gpu)
        values["gradient_checkpointing"] = chosen.recomputed
    else:
        chosen = _plan_with(replace(spec, sizes=sizes[0]), plan, plan.recomputed)
    if not chosen.fits:
        return AutoChoice({}, plan)
    if train.micro_batch_size == "auto":
        values = {"micro_batch_size": chosen.sizes.units, **values}
    spec = replace(spec, sizes=chosen.sizes)
    if train.logits_chunk == "auto":
        larger = _with_large_chunk(spec, chosen)
        values["logits_chunk"] = CHUNK_LOGITS
        if fits_with_margin(larger):
            values["logits_chunk"] = LARGE_CHUNK_LOGITS
            chosen = larger
    return AutoChoice(
        values,
        chosen,
        gain,
        sizes[0].units,
        default_rates=gpu is None,
    )


def describe_values(values: Mapping[str, int]) -> str:
    """Returns chosen values as they are typed."""
    return " ".join(f"train.{key}={value}" for key, value in values.items())


def describe_gain(choice: AutoChoice) -> str:
    """Returns what a choice gains, in one line."""
    plan = choice.plan
    compared = "" if choice.compared_units == plan.sizes.units else f"a micro-batch of {choice.compared_units} "
    rates = f" with the rates of an {gpu_named(DEFAULT_GPU).device_name}" if choice.default_rates else ""
    return (
        f"a micro-batch of {plan.sizes.units}, {plan.recomputed} of {plan.layers} layers recomputed: the update is "
        f"{choice.gain:.2f}x as fast as {compared}with all recomputed, by count{rates}"
    )


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


def choice_of(spec: SimulationSpec, plan: Plan, gpu: GpuSpec | None = None) -> AutoChoice:
    """Returns the values that a run with this memory would choose; none if no memory is given, if the recipe has no
    such setting, or if the plan has advice because it does not fit."""
    if not plan.vram or plan.advice or not auto_settings_of(spec):
        return AutoChoice({}, plan)
    return choose_auto_settings(spec, plan, gpu)


def with_auto_advice(spec: SimulationSpec, plan: Plan, choice: AutoChoice) -> Plan:
    """Adds chosen values to a plan, if they are more than the chunk of logits, which is `auto` by default."""
    if not choice.values or auto_settings_of(spec) == ["logits_chunk"]:
        return plan
    plan = replace(plan, advice=f"auto: a run with this memory has {describe_values(choice.values)}")
    if choice.gain:
        return replace(plan, notes=(*plan.notes, describe_gain(choice)))
    return plan


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


def _smaller_units(spec: SimulationSpec, plan: Plan, units: int) -> list[int]:
    """Returns the micro-batches that are compared if layers are `auto` too: `units`, and its halves."""
    candidates = [units]
    tokens = plan.sizes.length * plan.sizes.rows_per_unit
    if spec.recipe.train.gradient_checkpointing == "auto":
        while candidates[-1] > 1 and candidates[-1] // 2 * tokens >= FEWEST_TOKENS:
            candidates.append(candidates[-1] // 2)
    return candidates


def _fastest(specs: Sequence[SimulationSpec], plan: Plan, gpu: GpuSpec | None) -> tuple[Plan, float]:
    """Returns the plan of the fastest of some micro-batches, the largest first, each with the fewest recomputed layers,
    and how much faster it is than the largest with all layers recomputed."""
    best = _fewest_layers(specs[0], _plan_with(specs[0], plan, plan.recomputed))
    if not best.fits or (best.recomputed == plan.layers and len(specs) == 1):
        return best, 0.0
    times = fit_update_times(specs[0], gpu)
    all_recomputed = seconds_with(times, specs[0], plan.layers)
    shortest = seconds_with(times, specs[0], best.recomputed)
    # A smaller micro-batch unpacks the weights more often.
    for spec in specs[1:]:
        if not best.recomputed:
            break
        smaller = _fewest_layers(spec, _plan_with(spec, plan, plan.recomputed))
        seconds = seconds_with(fit_update_times(spec, gpu), spec, smaller.recomputed)
        if smaller.fits and seconds < shortest:
            best, shortest = smaller, seconds
    return best, all_recomputed / shortest


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
