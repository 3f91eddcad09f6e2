"""Whether the disk has room for the checkpoints and final adapters of all stages.

A checkpoint holds each trained adapter in fp32 and the states of its optimizer. `final/` holds the trained adapter, and
the adapters below it once more. A stage that has ended keeps its checkpoints.
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
from lowrank_tune.model.adapters import lora_config
from lowrank_tune.paths import nearest_existing
from lowrank_tune.preflight.adapters import read_saved_adapter
from lowrank_tune.preflight.stages import PlannedStage
from lowrank_tune.training.stage import DEFAULT_NUM_SAVES

GIB = 1 << 30
WEIGHT_BYTES = 4
STATE_BYTES = {"adamw": 8, "paged_adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2}
"""Bytes of optimizer state for each number of an adapter."""
LOG_BYTES = 64 << 20  # events, samples, report and tokenizer of a stage


@dataclass(frozen=True)
class DiskNeed:
    """Bytes that a stage writes and leaves: a checkpoint, all that are kept, and `final/`."""

    checkpoint: int
    checkpoints: int
    final: int

    @property
    def total(self) -> int:
        return self.checkpoints + self.final + LOG_BYTES


def disk_findings(stages: Sequence[PlannedStage], folder: Path, model: Any) -> Mapping[str, list[Finding]]:
    """By stage: the one that needs most, where the disk of the run's folder has too little room for all of them, or
    cannot be examined."""
    needs = {stage.recipe.name: disk_need(stage, model) for stage in stages if not stage.is_finished}
    largest = max(needs, key=lambda name: needs[name].total)
    parts = [stage.folder / part for stage in stages if not stage.is_finished for part in ("checkpoints", "final")]
    try:
        with as_user_error(folder):
            written = sum(map(_bytes_in, parts))
            usage = shutil.disk_usage(nearest_existing(folder))
    except UserError as error:
        return {largest: [((), str(error))]}
    # one checkpoint more, as an old one goes only when the new one is complete
    needed = sum(need.total for need in needs.values()) + max(need.checkpoint for need in needs.values()) - written
    if usage.free >= needed or not usage.total:
        return {}
    whose = f"all {len(needs)} stages" if len(needs) > 1 else "the run"
    message = (
        f"{folder}: the checkpoints and adapters of {whose} take {needed / GIB:.2f} GiB, and {usage.free / GIB:.2f} "
        "GiB are free on its disk: free some space, name another folder with --out, or lower train.save_total_limit"
    )
    return {largest: [(("train", "save_total_limit"), message)]}


def disk_need(stage: PlannedStage, model: Any) -> DiskNeed:
    """What a stage writes, from the shapes of its base and its adapters."""
    recipe = stage.complete
    train = stage.complete.train
    trained = recipe.trained_adapter
    own = _numbers_of(stage, trained, model) + _value_numbers(stage, model)
    checkpoint = own * (WEIGHT_BYTES + STATE_BYTES[train.optim])
    below = _numbers_below(stage, model)
    # `combined` holds the trained adapter twice: within the one that all are folded into, and alone
    copies = 2 if below and train.final_adapters == "combined" else 1
    return DiskNeed(checkpoint, checkpoint * _num_kept(stage), WEIGHT_BYTES * (copies * own + below))


def _num_kept(stage: PlannedStage) -> int:
    """The newest checkpoints and the best one, or all where the run is too short to write so many."""
    train = stage.recipe.train
    kept = train.save_total_limit + 1
    if train.max_steps is None:
        return kept
    every = train.save_steps or max(1, train.max_steps // DEFAULT_NUM_SAVES)
    return min(kept, math.ceil(train.max_steps / every))


def _numbers_below(stage: PlannedStage, model: Any) -> int:
    return sum(_numbers_of(stage, name, model) for name in frozen_adapters(stage.complete))


def _value_numbers(stage: PlannedStage, model: Any) -> int:
    """Of PPO's value, which begins as a copy of the reward model's adapter, or in the shape of its own settings or of
    the policy's; or is a head alone."""
    recipe = stage.complete
    if "value" not in recipe.extra_adapters:
        return 0
    if recipe.ppo.critic == "shared":
        return _head_numbers(model)
    if recipe.ppo.critic_init == "reward":
        return _numbers_of(stage, REWARD_ROLE, model)
    name = "value" if "value" in recipe.adapters else "policy"
    return _numbers_of(stage, name, model) + (_head_numbers(model) if name == "policy" else 0)


def _numbers_of(stage: PlannedStage, name: str, model: Any) -> int:
    """Numbers of one adapter, its scalar head included."""
    settings = stage.pending_adapter(name) or stage.complete.adapters[name]
    if settings.path is not None:
        return sum(tensor.numel() for tensor in read_saved_adapter(stage, name).tensors.values())
    return lora_numbers(lora_config(settings, model), model) + (_head_numbers(model) if name in ROLES_WITH_HEAD else 0)


def lora_numbers(config: LoraConfig, model: Any) -> int:
    """Numbers of a LoRA over all layers of a model, which may be without weights."""
    targets = set(config.target_modules)
    head = model.get_output_embeddings()
    return sum(
        config.r * (module.in_features + module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and name.rpartition(".")[2] in targets
    )


def _head_numbers(model: Any) -> int:
    return int(model.config.get_text_config().hidden_size)


def _bytes_in(folder: Path) -> int:
    """Bytes of the files in a folder. Folders that cannot be listed, or are not there, count as empty."""
    files = (Path(path, name) for path, _, names in os.walk(folder) for name in names)
    return sum(file.stat().st_size for file in files if file.is_file())
