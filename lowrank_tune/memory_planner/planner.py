"""A recipe's plan: its phases on the whole model, from rehearsals on a few layers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig

from lowrank_tune.assembly import ONLINE_ALGORITHMS
from lowrank_tune.config import RecipeConfig
from lowrank_tune.generation.engine import gpu_cache_bytes
from lowrank_tune.generation.slot_cache import layer_windows
from lowrank_tune.memory_planner.extrapolation import Peaks, extrapolate_layers
from lowrank_tune.memory_planner.meta_model import config_for, layers_of
from lowrank_tune.memory_planner.plan_report import PHASE_SEPARATOR, Phase, Plan, needed
from lowrank_tune.memory_planner.rollouts import DecodingSpec
from lowrank_tune.memory_planner.simulation import SimulationSpec, simulate
from lowrank_tune.memory_planner.sizes import Sizes, sizes_of
from lowrank_tune.model.activation_checkpointing import num_checkpointed_layers

MAX_HELDOUT_CONCURRENCY = 256  # held-out questions that are answered at once (`evaluate.answer`)
HOST_MEMORY_DIVISOR = 4  # of the machine's memory: what keys and values may take, and unpacked weights


def make_spec(
    recipe: RecipeConfig,
    device: torch.device,
    loaded: Mapping[str, LoraConfig],
    reward_base_adapters: Sequence[str] = (),
    sizes: Sizes | None = None,
) -> SimulationSpec:
    """All that is to be rehearsed. Raises UserError for a base whose configuration cannot be had."""
    return SimulationSpec(
        recipe,
        config_for(recipe.base),
        device,
        sizes or sizes_of(recipe),
        loaded,
        reward_base_adapters,
    )


def recomputed_of(spec: SimulationSpec) -> int:
    """Layers that are recomputed."""
    return num_checkpointed_layers(
        spec.recipe.train.gradient_checkpointing, spec.config.get_text_config().num_hidden_layers
    )


def peaks_of(spec: SimulationSpec, recomputed: int, only_update: bool = False) -> Peaks:
    """Of all moments of the whole model."""
    return extrapolate_layers(lambda layers: simulate(spec, layers, only_update), layers_of(spec.config, recomputed))


def phases_of(spec: SimulationSpec, vram: int = 0) -> tuple[Phase, ...]:
    """Each phase of the recipe as it stands, at its highest moment. `vram` are the bytes of the card: they decide how
    many sequences are decoded at once."""
    recomputed = recomputed_of(spec)
    phases = phases_in(peaks_of(spec, recomputed))
    resident = max(
        sum(phase.bytes.get(purpose, 0) for purpose in ("weights", "adapters", "optimizer")) for phase in phases
    )
    rollouts = _decoding_specs(spec.recipe, spec.config, spec.device, _cache_bytes(spec, vram, resident))
    if not rollouts:
        return phases
    return (*decoding_phases(spec, rollouts, recomputed, vram), *phases)


def decoding_phases(
    spec: SimulationSpec,
    rollouts: Mapping[str, DecodingSpec],
    recomputed: int,
    vram: int,
) -> tuple[Phase, ...]:
    """Phases that decode, with as many sequences at once as the engine begins with; where these are too many for the
    card it goes on with fewer, down to one."""
    phases = phases_in(peaks_of(replace(spec, rollouts=rollouts), recomputed))
    for last in (False, True):
        over = {phase.name: needed(phase.total, spec.device.type) - vram for phase in phases}
        short = {
            name: decoding_spec
            for name, decoding_spec in rollouts.items()
            if vram and over[name] > 0 and decoding_spec.slots > 1
        }
        if not short:
            break
        bytes_per_slot = {
            name: _bytes_of(spec.config, decoding_spec.prompt_length + decoding_spec.max_new_tokens, spec.device)
            for name, decoding_spec in short.items()
        }
        fewer = {
            name: 1 if last else max(1, decoding_spec.slots - -(-over[name] // bytes_per_slot[name]))
            for name, decoding_spec in short.items()
        }
        rollouts = {
            name: replace(decoding_spec, slots=fewer.get(name, decoding_spec.slots))
            for name, decoding_spec in rollouts.items()
        }
        phases = phases_in(peaks_of(replace(spec, rollouts=rollouts), recomputed))
    return phases


def _cache_bytes(spec: SimulationSpec, vram: int, resident: int) -> int:
    """Bytes for keys and values, as the engine has it (`generation.engine.gpu_cache_bytes`)."""
    budget = int((spec.recipe.train.memory_budget_gib or 0) * 2**30)
    if spec.device.type != "cuda":
        return budget or host_memory() // HOST_MEMORY_DIVISOR
    return gpu_cache_bytes(vram, resident)


def plan_of(spec: SimulationSpec, vram: int, name: str) -> Plan:
    """The plan as the recipe stands."""
    recipe = spec.recipe
    recomputed = recomputed_of(spec)
    phases = phases_of(spec, vram)
    layers = spec.config.get_text_config().num_hidden_layers
    return Plan(
        name,
        recipe.algorithm,
        recipe.base.model,
        recipe.base.bits,
        spec.device.type,
        layers,
        recomputed,
        spec.sizes,
        phases,
        vram,
    )


def phases_in(peaks: Peaks) -> tuple[Phase, ...]:
    """Each phase at its highest moment, in their order."""
    highest: dict[str, Phase] = {}
    for point, peak in peaks.items():
        name = point[0].partition(PHASE_SEPARATOR)[0]
        phase = Phase(name, peak, _where(point[1:]))
        if phase.total > (highest[name].total if name in highest else -1):
            highest[name] = phase
    return tuple(phase for name, phase in highest.items() if name != "end")


def _where(point_suffix: Sequence[str]) -> str:
    match list(point_suffix):
        case ["after"]:
            return "output head"
        case [direction, "first" | "last" as which]:
            return f"{direction}, {which} layer"
        case [direction, _]:
            return direction
    return ""


def _decoding_specs(recipe: RecipeConfig, config: Any, device: torch.device, limit: int) -> dict[str, DecodingSpec]:
    """Completions of training, and answers to held-out questions."""
    train = recipe.train
    rollout = recipe.rollout
    evaluation = recipe.evaluate
    specs: dict[str, DecodingSpec] = {}
    if device.type == "cuda":
        scratch = 0
    else:
        scratch = host_memory() // HOST_MEMORY_DIVISOR

    def decoding(slots: int, num_prompts: int, samples: int, new: int) -> DecodingSpec:
        columns = recipe.data.max_prompt_length + new
        fit = max(1, min(slots, limit * 4 // 5 // _bytes_of(config, columns, device)))
        return DecodingSpec("policy", fit, recipe.data.max_prompt_length, new, num_prompts, samples, limit, scratch)

    if recipe.algorithm in ONLINE_ALGORITHMS:
        count = train.prompts_per_step * rollout.num_generations
        specs["rollout"] = decoding(
            min(rollout.max_num_seqs, count),
            train.prompts_per_step,
            rollout.num_generations,
            rollout.max_new_tokens,
        )
    if evaluation.eval_dataset is not None and recipe.trained_adapter == "policy":
        num_answers = min(MAX_HELDOUT_CONCURRENCY, evaluation.num_prompts * evaluation.num_samples)
        specs["held-out answers"] = decoding(
            num_answers,
            evaluation.num_prompts,
            evaluation.num_samples,
            evaluation.max_new_tokens,
        )
    return specs


def _bytes_of(config: Any, columns: int, device: torch.device) -> int:
    """Keys and values of one sequence of so many tokens."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    size = 2 if device.type == "cuda" else 4
    return sum(2 * size * heads * width * min(window or columns, columns) for window in layer_windows(config))


def host_memory() -> int:
    """Bytes of the machine, used or not."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def with_units(spec: SimulationSpec, units: int) -> SimulationSpec:
    """The same with another micro-batch."""
    return replace(spec, sizes=sizes_of(spec.recipe, units))
