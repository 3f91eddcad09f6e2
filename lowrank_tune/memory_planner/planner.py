"""The plan of a recipe: its phases on the whole model, extrapolated from a few layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig

from lowrank_tune.config import RecipeConfig
from lowrank_tune.generation.cache_memory import device_memory, gpu_cache_bytes
from lowrank_tune.generation.decode_masks import needs_boolean_mask
from lowrank_tune.generation.kv_cache import slots_that_fit
from lowrank_tune.generation.paged_cache import paged_columns
from lowrank_tune.generation.slot_cache import layer_windows
from lowrank_tune.memory_planner.cached_simulation import cached_peaks
from lowrank_tune.memory_planner.compiled_layers import plans_compiled_layers
from lowrank_tune.memory_planner.extrapolation import Peaks, extrapolate_layers
from lowrank_tune.memory_planner.graph_pool import with_graph_pools
from lowrank_tune.memory_planner.meta_model import config_for, layers_of
from lowrank_tune.memory_planner.plan_report import GIB, PHASE_SEPARATOR, Phase, Plan, needed
from lowrank_tune.memory_planner.rollouts import DecodingSpec
from lowrank_tune.memory_planner.simulation import SimulationSpec
from lowrank_tune.memory_planner.sizes import sizes_of
from lowrank_tune.model.activation_checkpointing import num_checkpointed_layers
from lowrank_tune.model.base import base_dtype

MAX_HELDOUT_CONCURRENCY = 256
"""Held-out questions that are answered at once (`evaluation/heldout.py`)."""
HOST_MEMORY_DIVISOR = 4
"""Keys and values, and unpacked weights, may each take this part of host memory."""


def make_spec(
    recipe: RecipeConfig,
    device: torch.device,
    loaded: Mapping[str, LoraConfig],
    reward_base_adapters: Sequence[str] = (),
) -> SimulationSpec:
    """Returns what is simulated. Raises UserError if the base's configuration cannot be loaded."""
    config = config_for(recipe.base)
    return SimulationSpec(
        recipe,
        config,
        device,
        sizes_of(recipe),
        loaded,
        reward_base_adapters,
        compiled=plans_compiled_layers(recipe, device),
    )


def vram_bytes(spec: SimulationSpec, vram_gib: float) -> int:
    """Returns the bytes of a GPU of `vram_gib` that the recipe may use."""
    budget_gib = spec.recipe.train.memory_budget_gib or vram_gib
    return round(min(vram_gib, budget_gib) * GIB)


def recomputed_of(spec: SimulationSpec) -> int:
    """Returns the number of recomputed layers."""
    return num_checkpointed_layers(
        spec.recipe.train.gradient_checkpointing, spec.config.get_text_config().num_hidden_layers
    )


def peaks_of(
    spec: SimulationSpec,
    recomputed: int,
    only_update: bool = False,
) -> Peaks:
    """Returns the peaks of all program points of the whole model."""
    return extrapolate_layers(
        lambda layers: cached_peaks(spec, layers, only_update), layers_of(spec.config, recomputed)
    )


def phases_of(spec: SimulationSpec, vram: int = 0) -> tuple[Phase, ...]:
    """Returns each phase of the recipe at its peak. `vram` is the GPU's memory in bytes, which decides how many
    sequences are decoded at once."""
    recomputed = recomputed_of(spec)
    phases = phases_in(peaks_of(spec, recomputed))
    rollouts = decoding_of(spec, phases, vram)
    if not rollouts:
        return phases
    return (
        *decoding_phases(
            spec,
            rollouts,
            recomputed,
            vram,
        ),
        *phases,
    )


def decoding_of(
    spec: SimulationSpec,
    phases: Sequence[Phase],
    vram: int,
) -> dict[str, DecodingSpec]:
    """Returns the decoding of each phase that decodes, with the number of sequences with which the engine begins beside
    what stays in memory in the other phases."""
    resident = max(phase.static_bytes for phase in phases)
    return _decoding_specs(
        spec.recipe,
        spec.config,
        spec.device,
        _cache_bytes(spec, vram, resident),
    )


def decoding_phases(
    spec: SimulationSpec,
    rollouts: Mapping[str, DecodingSpec],
    recomputed: int,
    vram: int,
) -> tuple[Phase, ...]:
    """Returns the phases that decode, with the number of sequences with which the engine begins. If these are too many
    for the GPU, the engine continues with fewer, down to one."""
    rollouts = dict(rollouts)
    dtype = base_dtype(spec.recipe.base, spec.device)
    phases = _phases_of_decoding(spec, rollouts, recomputed)
    for is_last_try in (False, True):
        has_changed = False
        for phase in phases:
            decoding = rollouts[phase.name]
            excess = needed(phase.total, spec.device.type) - vram
            if not vram or excess <= 0 or decoding.slots == 1:
                continue
            slots = 1
            if not is_last_try:
                columns = decoding.prompt_length + decoding.max_new_tokens
                slots_over = -(-excess // bytes_per_sequence(spec.config, columns, dtype))
                slots = max(1, decoding.slots - slots_over)
            rollouts[phase.name] = replace(decoding, slots=slots, copies=False)
            has_changed = True
        if not has_changed:
            break
        phases = _phases_of_decoding(spec, rollouts, recomputed)
    return phases


def _phases_of_decoding(
    spec: SimulationSpec,
    rollouts: Mapping[str, DecodingSpec],
    recomputed: int,
) -> tuple[Phase, ...]:
    peaks = peaks_of(replace(spec, rollouts=rollouts), recomputed)
    return phases_in(with_graph_pools(peaks, rollouts))


def _cache_bytes(
    spec: SimulationSpec,
    vram: int,
    resident: int,
) -> int:
    """Returns the bytes for keys and values, as `generation.cache_memory.default_cache_bytes`."""
    budget = int((spec.recipe.train.memory_budget_gib or 0) * 2**30)
    if spec.device.type != "cuda":
        return budget or _host_memory_part()
    return gpu_cache_bytes(vram, resident)


def plan_of(
    spec: SimulationSpec,
    vram: int,
    name: str,
) -> Plan:
    """Returns the plan of the recipe with its own settings."""
    recipe = spec.recipe
    phases = phases_of(spec, vram)
    notes: tuple[str, ...] = ()
    if spec.programs.fault:
        notes = (f"layers are planned without the compiler: {spec.programs.fault}",)
    return Plan(
        name,
        recipe.algorithm,
        recipe.base.model,
        recipe.base.bits,
        spec.device.type,
        spec.config.get_text_config().num_hidden_layers,
        recomputed_of(spec),
        spec.sizes,
        phases,
        vram,
        notes,
    )


def phases_in(peaks: Peaks) -> tuple[Phase, ...]:
    """Returns each phase at its peak, in their order."""
    highest: dict[str, Phase] = {}
    for point, peak in peaks.items():
        name = point[0].partition(PHASE_SEPARATOR)[0]
        phase = Phase(name, peak, _where(point[1:]))
        if name not in highest or phase.total > highest[name].total:
            highest[name] = phase
    highest.pop("end", None)
    return tuple(highest.values())


def _where(point_suffix: Sequence[str]) -> str:
    match list(point_suffix):
        case ["after"]:
            return "output head"
        case [direction, "first" | "last" as which]:
            return f"{direction}, {which} layer"
        case [direction, _]:
            return direction
    return ""


def _decoding_specs(
    recipe: RecipeConfig,
    config: Any,
    device: torch.device,
    limit: int,
) -> dict[str, DecodingSpec]:
    """Returns the decoding of rollouts, and of answers to held-out questions, by name of the phase."""
    rollout = recipe.rollout
    evaluation = recipe.evaluate
    prompt_length = recipe.data.max_prompt_length
    specs: dict[str, DecodingSpec] = {}
    on_gpu = device.type == "cuda"
    dtype = base_dtype(recipe.base, device)
    scratch = 0 if on_gpu else _host_memory_part()
    windows = layer_windows(config)
    shares_prompts = on_gpu and rollout.prefix_caching and not any(windows)
    cuda_graphs = on_gpu and bool(rollout.cuda_graphs) and not needs_boolean_mask(config, windows)

    def decoding(max_slots: int, num_prompts: int, samples: int, max_new_tokens: int) -> DecodingSpec:
        columns = prompt_length + max_new_tokens
        max_slots = min(max_slots, num_prompts * samples)
        slots = slots_that_fit(max_slots, bytes_per_sequence(config, columns, dtype), limit)
        cache_columns = columns
        # Sequences that share a prompt are more than these, in the same bytes.
        if shares_prompts and samples > 1:
            token_bytes = bytes_per_sequence(config, 1, dtype)
            cache_columns = paged_columns(slots, max_slots, columns, token_bytes, limit)
        return DecodingSpec(
            "policy",
            slots,
            prompt_length,
            max_new_tokens,
            num_prompts,
            samples,
            limit,
            scratch,
            cuda_graphs,
            rollout.sync_every if on_gpu else 1,
            bytes_per_sequence(config, cache_columns, dtype),
            config.get_text_config().num_hidden_layers,
            cache_columns=cache_columns,
        )

    if recipe.is_online:
        specs["rollout"] = decoding(
            rollout.max_num_seqs,
            recipe.train.prompts_per_step,
            rollout.num_generations,
            rollout.max_new_tokens,
        )
    if evaluation.eval_dataset is not None and recipe.trained_adapter == "policy":
        specs["held-out answers"] = decoding(
            MAX_HELDOUT_CONCURRENCY,
            evaluation.num_prompts,
            evaluation.num_samples,
            evaluation.max_new_tokens,
        )
    return specs


def bytes_per_sequence(
    config: Any,
    columns: int,
    dtype: torch.dtype,
) -> int:
    """Returns the bytes of keys and values of one sequence with `columns` tokens."""
    text = config.get_text_config()
    numbers = 0
    for index, (layer, window) in enumerate(zip(layers_of(config, 0), layer_windows(config), strict=False)):
        if layer.has_keys:
            numbers += 2 * _key_width(text, index) * min(window or columns, columns)
    return int(numbers * dtype.itemsize)


def _key_width(text: Any, layer: int) -> int:
    """Returns the numbers of one token's keys in a layer."""
    if getattr(text, "is_heterogeneous", False):
        text = text.per_layer_config[layer]
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return int(heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads))


def _host_memory_part() -> int:
    return device_memory(torch.device("cpu")) // HOST_MEMORY_DIVISOR
