"""Saved adapters: read as the run will read them, and stacked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lowrank_tune.assembly import check_adapter_lineage
from lowrank_tune.assembly.reward_model import REWARD_ROLE, reward_model_base
from lowrank_tune.assembly.stacks import frozen_adapters
from lowrank_tune.config.base import Finding
from lowrank_tune.errors import UserError
from lowrank_tune.events import Event
from lowrank_tune.model.adapters import SavedAdapter, read_adapter
from lowrank_tune.preflight.findings import findings_of
from lowrank_tune.preflight.stages import PlannedStage


def adapter_findings(stage: PlannedStage) -> Iterator[Finding]:
    """Adapters that are not there, are none, or lack what they were trained over. Of a stage that has ended only those
    that later stages stack below theirs; those that an earlier stage names are its own findings."""
    kept = frozen_adapters(stage.recipe)
    names = [name for name, _ in stage.saved_adapters() if name in kept or not stage.is_finished]
    saved: dict[str, SavedAdapter] = {}
    for name in names:
        try:
            saved[name] = read_saved_adapter(stage, name)
        except UserError as error:
            if name not in stage.inherited:
                yield from findings_of(error, ("adapters", name, "path"))
    if stage.is_finished or stage.waits_for_others or len(saved) < len(names):
        return
    try:
        _check_stack(stage, saved)
    except UserError as error:
        yield from findings_of(error, ("adapters",))


def read_saved_adapter(stage: PlannedStage, name: str) -> SavedAdapter:
    """Reads a saved adapter of a stage, or the one that an earlier stage trains on from; each once for all stages.
    Raises UserError."""
    path = str((stage.pending_adapter(name) or stage.complete.adapters[name]).path)
    has_head = name == REWARD_ROLE or name in stage.complete.extra_adapters
    key = Path(path).expanduser().resolve(), has_head
    if key not in stage.loaded:
        stage.loaded[key] = read_adapter(path, f"adapters.{name}.path", head=has_head)
    return stage.loaded[key]


def _check_stack(stage: PlannedStage, saved: dict[str, SavedAdapter]) -> None:
    recipe = stage.complete
    if any(adapter.frozen_adapters for adapter in saved.values()):
        check_adapter_lineage(recipe, saved, _ignore_event)
    if REWARD_ROLE in saved and recipe.trained_adapter != REWARD_ROLE:
        reward_model_base(saved, [name for name in frozen_adapters(recipe) if name in saved])


def _ignore_event(event: Event) -> None:
    """Drops the event. The run emits it again when it loads its adapters."""
