"""A recipe's plan: its phases on the whole model, from rehearsals on a few layers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig

from lowrank_tune import settings
from lowrank_tune.build import ONLINE
from lowrank_tune.model.memory import layers_recomputed
from lowrank_tune.plan.base import config_for, layers_of
from lowrank_tune.plan.depth import Peaks, deep
from lowrank_tune.plan.figures import PASS, Phase, Plan, needed
from lowrank_tune.plan.rehearsal import Scene, rehearse
from lowrank_tune.plan.rollouts import Decoding
from lowrank_tune.plan.rows import Sizes, sizes_of
from lowrank_tune.rollout.engine import room_on_card

ASKED_AT_ONCE = 256  # held-out questions that are answered at once (`evaluate.answer`)
SHARE = 4  # of the machine's memory: what keys and values may take, and unpacked weights


def scene_of(
    recipe: settings.Recipe,
    device: torch.device,
    loaded: Mapping[str, LoraConfig],
    below_reward: Sequence[str] = (),
    sizes: Sizes | None = None,
) -> Scene:
    """All that is to be rehearsed. Raises UserError for a base whose configuration cannot be had."""
    return Scene(recipe, config_for(recipe.base), device, sizes or sizes_of(recipe), loaded, below_reward)


def recomputed_of(scene: Scene) -> int:
    """Layers that are recomputed."""
    return layers_recomputed(
        scene.recipe.train.gradient_checkpointing, scene.config.get_text_config().num_hidden_layers
    )


def peaks_of(scene: Scene, recomputed: int, only_update: bool = False) -> Peaks:
    """Of all moments of the whole model."""
    return deep(lambda layers: rehearse(scene, layers, only_update), layers_of(scene.config, recomputed))


def phases_of(scene: Scene, vram: int = 0) -> tuple[Phase, ...]:
    """Each phase of the recipe as it stands, at its highest moment. `vram` are the bytes of the card: they decide how
    many sequences are decoded at once."""
    recomputed = recomputed_of(scene)
    phases = phases_in(peaks_of(scene, recomputed))
    stays = max(
        sum(phase.bytes.get(purpose, 0) for purpose in ("weights", "adapters", "optimizer")) for phase in phases
    )
    rollouts = _rollouts(scene.recipe, scene.config, scene.device, _room(scene, vram, stays))
    if not rollouts:
        return phases
    return (*decoding_phases(scene, rollouts, recomputed, vram), *phases)


def decoding_phases(scene: Scene, rollouts: Mapping[str, Decoding], recomputed: int, vram: int) -> tuple[Phase, ...]:
    """Phases that decode, with as many sequences at once as the engine begins with; where these are too many for the
    card it goes on with fewer, down to one."""
    found = phases_in(peaks_of(replace(scene, rollouts=rollouts), recomputed))
    for last in (False, True):
        over = {phase.name: needed(phase.total, scene.device.type) - vram for phase in found}
        short = {name: one for name, one in rollouts.items() if vram and over[name] > 0 and one.slots > 1}
        if not short:
            break
        each = {
            name: _bytes_of(scene.config, one.prompt + one.max_new_tokens, scene.device) for name, one in short.items()
        }
        fewer = {name: 1 if last else max(1, one.slots - -(-over[name] // each[name])) for name, one in short.items()}
        rollouts = {name: replace(one, slots=fewer.get(name, one.slots)) for name, one in rollouts.items()}
        found = phases_in(peaks_of(replace(scene, rollouts=rollouts), recomputed))
    return found


def _room(scene: Scene, vram: int, stays: int) -> int:
    """Bytes for keys and values, as the engine has it (`rollout.engine.cache_room`)."""
    budget = int((scene.recipe.train.memory_budget_gib or 0) * 2**30)
    if scene.device.type != "cuda":
        return budget or machine_memory() // SHARE
    return room_on_card(vram, stays)


def plan_of(scene: Scene, vram: int, name: str) -> Plan:
    """The plan as the recipe stands."""
    recipe, recomputed = scene.recipe, recomputed_of(scene)
    phases = phases_of(scene, vram)
    layers = scene.config.get_text_config().num_hidden_layers
    return Plan(
        name,
        recipe.algorithm,
        recipe.base.model,
        recipe.base.bits,
        scene.device.type,
        layers,
        recomputed,
        scene.sizes,
        phases,
        vram,
    )


def phases_in(peaks: Peaks) -> tuple[Phase, ...]:
    """Each phase at its highest moment, in their order."""
    found: dict[str, Phase] = {}
    for moment, peak in peaks.items():
        name = moment[0].partition(PASS)[0]
        phase = Phase(name, peak, _where(moment[1:]))
        if phase.total > (found[name].total if name in found else -1):
            found[name] = phase
    return tuple(phase for name, phase in found.items() if name != "end")


def _where(place: Sequence[str]) -> str:
    match list(place):
        case ["after"]:
            return "output head"
        case [direction, "first" | "last" as which]:
            return f"{direction}, {which} layer"
        case [direction, _]:
            return direction
    return ""


def _rollouts(recipe: settings.Recipe, config: Any, device: torch.device, limit: int) -> dict[str, Decoding]:
    """Completions of training, and answers to held-out questions."""
    train, rollout, wanted = recipe.train, recipe.rollout, recipe.evaluate
    found: dict[str, Decoding] = {}
    scratch = 0 if device.type == "cuda" else machine_memory() // SHARE

    def decoding(slots: int, prompts: int, samples: int, new: int) -> Decoding:
        columns = recipe.data.max_prompt_length + new
        fit = max(1, min(slots, limit * 4 // 5 // _bytes_of(config, columns, device)))
        return Decoding("policy", fit, recipe.data.max_prompt_length, new, prompts, samples, limit, scratch)

    if recipe.algorithm in ONLINE:
        count = train.prompts_per_step * rollout.num_generations
        found["rollout"] = decoding(
            min(rollout.slots, count), train.prompts_per_step, rollout.num_generations, rollout.max_new_tokens
        )
    if wanted.heldout is not None and recipe.trained == "policy":
        asked = min(ASKED_AT_ONCE, wanted.prompts * wanted.samples)
        found["held-out answers"] = decoding(asked, wanted.prompts, wanted.samples, wanted.max_new_tokens)
    return found


def _bytes_of(config: Any, columns: int, device: torch.device) -> int:
    """Keys and values of one sequence of so many tokens."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    size = 2 if device.type == "cuda" else 4
    window = getattr(text, "sliding_window", None) or columns
    return sum(
        2 * size * heads * width * (min(window, columns) if "sliding" in layer.kind else columns)
        for layer in layers_of(config, 0)
    )


def machine_memory() -> int:
    """Bytes of the machine, used or not."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def with_units(scene: Scene, units: int) -> Scene:
    """The same with another micro-batch."""
    return replace(scene, sizes=sizes_of(scene.recipe, units))
