"""Whether the disk has room for the checkpoints and final adapters of all stages.

A checkpoint contains each trained adapter in fp32 and the states of its optimizer. `final/` contains the trained
adapter, and a copy of the adapters below it. A finished stage keeps its checkpoints.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import nn

from lowrank_tune.assembly.reward_model import REWARD_ROLE
from lowrank_tune.assembly.stacks import ROLES_WITH_HEAD, frozen_adapters
from lowrank_tune.checkpoint import as_user_error
from lowrank_tune.config.base import Finding
from lowrank_tune.errors import UserError
from lowrank_tune.full_disk import format_size
from lowrank_tune.model.adapters import lora_config
from lowrank_tune.paths import nearest_existing
from lowrank_tune.preflight.adapters import read_saved_adapter
from lowrank_tune.preflight.stages import PlannedStage
from lowrank_tune.training.stage import DEFAULT_NUM_SAVES

WEIGHT_BYTES = 4
STATE_BYTES = {
    "adamw": 8,
    "paged_adamw": 8,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
}
"""Bytes of optimizer state for each number of an adapter."""
LOG_BYTES = 64 << 20
"""Events, samples, report and tokenizer of a stage."""


@dataclass(frozen=True)
class DiskNeed:
    """Bytes that a stage writes and keeps: one checkpoint, all that are kept, and `final/`."""

    checkpoint: int
    checkpoints: int
    final: int

    @property
    def total(self) -> int:
        return self.checkpoints + self.final + LOG_BYTES


def disk_findings(
    stages: Sequence[PlannedStage],
    folder: Path,
    model: Any,
) -> Mapping[str, list[Finding]]:
    """Returns a finding of the stage that needs most, by its name, if the disk of the run's folder has too little room
    for all stages, or cannot be examined. `stages` are those that are to run."""
    needs = {stage.recipe.name: disk_need(stage, model) for stage in stages}
    largest = max(needs, key=lambda name: needs[name].total)
    try:
        with as_user_error(folder):
            written = sum(_bytes_in(stage.folder / part) for stage in stages for part in ("checkpoints", "final"))
            usage = shutil.disk_usage(nearest_existing(folder))
    except UserError as error:
        return {largest: [((), str(error))]}
    # One checkpoint more, because an old one is deleted only after the new one is complete.
    next_checkpoint = max(need.checkpoint for need in needs.values())
    needed = sum(need.total for need in needs.values()) + next_checkpoint - written
    if usage.free >= needed or not usage.total:
        return {}
    owner = f"all {len(needs)} stages" if len(needs) > 1 else "the run"
    message = (
        f"{folder}: the checkpoints and adapters of {owner} take {format_size(needed)}, and {format_size(usage.free)} "
        "are free on its disk: free some space, name another folder with --out, or lower train.save_total_limit"
    )
    return {largest: [(("train", "save_total_limit"), message)]}


def disk_need(stage: PlannedStage, model: Any) -> DiskNeed:
    """Returns what a stage writes, from the shapes of its base and its adapters."""
    recipe = stage.complete
    train = recipe.train
    own = _parameters_of(
        stage,
        recipe.trained_adapter,
        model,
    ) + _value_parameters(stage, model)
    below = sum(
        _parameters_of(
            stage,
            name,
            model,
        )
        for name in frozen_adapters(recipe)
    )
    # `combined` contains the trained adapter twice: in the adapter that combines all, and alone.
    copies = 2 if below and train.final_adapters == "combined" else 1
    checkpoint = own * (WEIGHT_BYTES + STATE_BYTES[train.optim])
    return DiskNeed(
        checkpoint,
        checkpoint * _num_kept(stage),
        WEIGHT_BYTES * (copies * own + below),
    )


def _num_kept(stage: PlannedStage) -> int:
    """Returns how many checkpoints are kept: the newest ones and the best one, or all if the run writes fewer."""
    train = stage.recipe.train
    kept = train.save_total_limit + 1
    if train.max_steps is None:
        return kept
    every = train.save_steps or max(1, train.max_steps // DEFAULT_NUM_SAVES)
    return min(kept, math.ceil(train.max_steps / every))


def _value_parameters(stage: PlannedStage, model: Any) -> int:
    """Returns the parameters of PPO's value: a head alone, a copy of the reward model's adapter, or an adapter of its
    own settings or of the policy's."""
    recipe = stage.complete
    if "value" not in recipe.extra_adapters:
        return 0
    if recipe.ppo.critic == "shared":
        return _head_parameters(model)
    if recipe.ppo.critic_init == "reward":
        return _parameters_of(stage, REWARD_ROLE, model)
    if "value" in recipe.adapters:
        return _parameters_of(stage, "value", model)
    return _parameters_of(stage, "policy", model) + _head_parameters(model)


def _parameters_of(
    stage: PlannedStage,
    name: str,
    model: Any,
) -> int:
    """Returns the parameters of one adapter, with its scalar head."""
    settings = stage.pending_adapter(name) or stage.complete.adapters[name]
    if settings.path is not None:
        saved = read_saved_adapter(stage, name)
        return sum(tensor.numel() for tensor in saved.tensors.values())
    parameters = lora_parameters(lora_config(settings, model), model)
    if name in ROLES_WITH_HEAD:
        parameters += _head_parameters(model)
    return parameters


def lora_parameters(config: LoraConfig, model: Any) -> int:
    """Returns the parameters of a LoRA over all layers of a model, which may be without weights."""
    targets = set(config.target_modules)
    head = model.get_output_embeddings()
    parameters = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and name.rpartition(".")[2] in targets:
            parameters += config.r * (module.in_features + module.out_features)
    return parameters


def _head_parameters(model: Any) -> int:
    return int(model.config.get_text_config().hidden_size)


def _bytes_in(folder: Path) -> int:
    """Returns the bytes of the files in a folder. Folders that cannot be listed, or are missing, count as empty."""
    total = 0
    for parent, _, names in os.walk(folder):
        files = [Path(parent, name) for name in names]
        total += sum(file.stat().st_size for file in files if file.is_file())
    return total
