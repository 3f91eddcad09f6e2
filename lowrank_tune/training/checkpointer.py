"""Checkpoints of a stage: what is saved, and how each part is restored.

A checkpoint contains the trained adapters, the optimizer, and `state.json` with the state of the loop, of the algorithm
and of the evaluations, so that a resumed run equals one that was never interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lowrank_tune.assembly import RunComponents
from lowrank_tune.checkpoint import (
    CorruptCheckpoint,
    RunFolder,
    Snapshot,
    flatten_optimizer,
    load,
    restore_optimizer,
    rotate,
    write_atomically,
)
from lowrank_tune.config import RecipeConfig
from lowrank_tune.config.memory import memory_settings
from lowrank_tune.errors import UserError
from lowrank_tune.events import CheckpointSaved, Emit, LogMessage, warning
from lowrank_tune.model.adapters import CONFIG, WEIGHTS
from lowrank_tune.model.base import combined_hash, hash_of
from lowrank_tune.model.optimizers import load_optimizer
from lowrank_tune.training.machine import device_name, memory_total_gib
from lowrank_tune.training.reward_hacking import RewardHackingDetector
from lowrank_tune.training.schedule_change import schedule_change, schedule_length
from lowrank_tune.training.trainer import Trainer, TrainerState


@dataclass
class BestCheckpoint:
    """The best step so far and the held-out results, stored in each checkpoint. A higher `best_score` is better.

    For validation pairs, `pair_losses` are those of the best step, and `last` is the last evaluation with its
    difference to the best step.
    """

    best_step: int | None = None
    best_score: float | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)
    pair_losses: list[float] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)
    heldout: dict[str, dict[str, float]] = field(default_factory=dict)
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


@dataclass
class EvaluationState:
    """What the evaluations of a stage have found so far."""

    best: BestCheckpoint = field(default_factory=BestCheckpoint)
    hacking: RewardHackingDetector = field(default_factory=RewardHackingDetector)


@dataclass
class Checkpointer:
    """Saves a stage and restores it. `parameter_names` has the trained parameters in the order of the optimizer."""

    recipe: RecipeConfig
    folder: RunFolder
    built: RunComponents
    trainer: Trainer
    parameter_names: list[str]
    emit: Emit
    last_saved_step: int | None = None
    schedule_message: str = ""
    """After `restore`: what another end of the run does to its learning rate."""

    def __post_init__(self) -> None:
        self.base_hash = combined_hash(self.built.base_hashes)
        self.frozen_hashes = self.hash_frozen_adapters()

    def hash_frozen_adapters(self) -> dict[str, str]:
        """Returns a hash of the tensors of each adapter that is not trained."""
        hashes: dict[str, str] = {}
        for name in self.recipe.adapters:
            if name not in self.built.trained:
                hashes[name] = combined_hash(_tensor_hashes(self.built.roles.adapter_tensors(name)))
        return hashes

    def save(self, step: int, state: EvaluationState) -> None:
        """Writes the checkpoint of a step, removes old ones, and emits `CheckpointSaved`."""
        start_time = time.perf_counter()
        path = write_atomically(self.folder.checkpoint(step), self._snapshot(state))
        self.last_saved_step = step
        rotate(self.folder.checkpoints, self.recipe.train.save_total_limit, state.best.best_step)
        self.emit(
            CheckpointSaved(
                step=step,
                path=str(path),
                seconds=time.perf_counter() - start_time,
            )
        )

    def _snapshot(self, state: EvaluationState) -> Snapshot:
        roles = self.built.roles
        snapshot = Snapshot()
        for name in self.built.trained:
            snapshot.tensors[f"{name}/{WEIGHTS}"] = roles.adapter_tensors(name)
            snapshot.documents[f"{name}/{CONFIG}"] = roles.adapter_config(name)
        optimizer_tensors, optimizer_document = flatten_optimizer(
            self.trainer.optimizer.state_dict(), self.parameter_names
        )
        snapshot.tensors["optimizer.safetensors"] = optimizer_tensors
        snapshot.documents["optimizer.json"] = optimizer_document
        snapshot.documents["state.json"] = {
            "progress": self.trainer.state.to_dict(),
            "schedule": schedule_length(self.recipe.train, self.built.steps),
            "memory": vars(state.best),
            "algorithm": self.built.algorithm.state(),
            "loss_scaler": self.trainer.loss_scaler.state(),
            "base": self.base_hash,
            "adapters": self.frozen_hashes,
            "watch": vars(state.hacking),
            "limits": {"under": self._memory_settings(), **roles.limits.to_dict()},
        }
        return snapshot

    def restore(self, step: int, snapshot: Snapshot) -> EvaluationState:
        """Restores adapters, optimizer, loop and algorithm from a checkpoint, and returns the state of the evaluations.

        Raises UserError if the base or a frozen adapter is not the one that the run was started with.
        """
        document = snapshot.documents["state.json"]
        self._check_frozen(document)
        self._load_adapters(snapshot.tensors)
        optimizer_state = restore_optimizer(
            snapshot.tensors["optimizer.safetensors"],
            snapshot.documents["optimizer.json"],
            self.parameter_names,
        )
        load_optimizer(self.trainer.optimizer, optimizer_state)
        self.trainer.state = TrainerState(**document["progress"])
        self.built.algorithm.restore(document["algorithm"])
        self.trainer.loss_scaler.restore(document.get("loss_scaler", {}))
        self._restore_memory_limits(document.get("limits", {}))
        hacking = RewardHackingDetector(**document.get("watch", {}))
        self.trainer.should_stop = hacking.stopped_run
        self.last_saved_step = step
        self.schedule_message = schedule_change(
            document.get("schedule", {}),
            self.recipe.train,
            self.built.steps,
            step,
        )
        return EvaluationState(BestCheckpoint(**document["memory"]), hacking)

    def _check_frozen(self, document: Mapping[str, Any]) -> None:
        changed = ""
        if document["base"] != self.base_hash:
            changed = "base is"
        elif document["adapters"] != self.frozen_hashes:
            changed = "frozen adapters are"
        if changed:
            raise UserError(
                f"{self.folder.path}: the {changed} not what this run was started with; give another folder with --out"
            )

    def _restore_memory_limits(self, stored: Mapping[str, Any]) -> None:
        limits = dict(stored)
        # with other settings, or on another GPU, a batch that did not fit may fit
        if limits.pop("under", None) == self._memory_settings():
            self.built.roles.limits.restore(limits)

    def _memory_settings(self) -> dict[str, Any]:
        base = self.built.base
        return {
            **memory_settings(self.recipe),
            "device": device_name(base.device, base.dtype),
            "gib": round(memory_total_gib(base.device), 1),
        }

    def load_best(self, best_step: int, message: str) -> None:
        """Loads the adapters of the best step, which is not the last one, and logs `message`.

        A damaged checkpoint is not an error: the last step is kept, and a warning is emitted.
        """
        path = self.folder.checkpoint(best_step)
        try:
            tensors = load(path, path.name).tensors
        except CorruptCheckpoint as error:
            self.emit(warning(f"{error}; final/ is the adapter of the last step instead of the best"))
            return
        self._load_adapters(tensors)
        self.emit(LogMessage(message=message))

    def _load_adapters(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        for name in self.built.trained:
            self.built.roles.load_adapter_tensors(name, tensors[f"{name}/{WEIGHTS}"], str(self.folder.path))


def _tensor_hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: hash_of(tensor) for name, tensor in tensors.items()}
