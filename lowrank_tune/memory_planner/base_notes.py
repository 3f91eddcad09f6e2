"""What a plan, and `lowrank-tune doctor RECIPE`, report about the architecture of a base."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import AutoModelForCausalLM

from lowrank_tune.config import BaseConfig
from lowrank_tune.memory_planner.fake_device import fake_device_mode
from lowrank_tune.memory_planner.meta_model import config_for, meta_base
from lowrank_tune.memory_planner.plan_report import Plan
from lowrank_tune.memory_planner.simulation import SimulationSpec
from lowrank_tune.model.architecture_notes import (
    architecture_notes,
    architecture_warnings,
    expert_bytes,
    experts_note,
    has_recurrent_layers,
    recurrent_note,
)
from lowrank_tune.model.base import base_dtype


def base_notes(
    spec: SimulationSpec,
    plan: Plan,
) -> Iterator[str]:
    """Yields experts that are not quantized, with their part of the planned weights, and layers that keep a state."""
    if spec.recipe.base.bits == 4:
        dtype = base_dtype(spec.recipe.base, spec.device)
        # All layers: those with experts need not be alike.
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(spec.config, dtype=dtype)
        experts = expert_bytes(model)
        if experts:
            yield experts_note(
                experts,
                plan.peak_phase.bytes["weights"],
                dtype,
            )
    if has_recurrent_layers(spec.config):
        yield recurrent_note(spec.config.get_text_config().model_type)


def notes_and_warnings(
    base_config: BaseConfig,
    device: torch.device,
) -> tuple[list[str], list[str]]:
    """Returns what a run on a device logs about the architecture of a base, from its configuration alone. Raises
    UserError."""
    config = config_for(base_config)
    with fake_device_mode(device):
        base = meta_base(config, base_config, device)
        return list(architecture_notes(base)), list(architecture_warnings(base))
