"""Saved adapters: read and stacked as in the run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lowrank_tune.assembly import check_adapter_lineage
from lowrank_tune.assembly.adapters import adapter_has_head, read_recipe_adapter
from lowrank_tune.assembly.reward_model import REWARD_ROLE, reward_model_base
from lowrank_tune.assembly.stacks import frozen_adapters
from lowrank_tune.config.base import Finding
from lowrank_tune.errors import UserError
from lowrank_tune.events import ignore_event
from lowrank_tune.model.adapters import SavedAdapter
from lowrank_tune.preflight.findings import findings_of
from lowrank_tune.preflight.stages import PlannedStage


def adapter_findings(stage: PlannedStage) -> Iterator[Finding]:
    """Yields the adapters that are missing, are not adapters, or lack the adapters they were trained over.

    Of a finished stage only those are read that later stages stack below theirs. Faults of adapters that an earlier
    stage names are findings of that stage.
    """
    names = [name for name, _ in stage.saved_adapters()]
    if stage.is_finished:
        kept = frozen_adapters(stage.recipe)
        names = [name for name in names if name in kept]
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
    """Reads a saved adapter of a stage, or the one from which an earlier stage continues; each once for all stages.
    Raises UserError."""
    settings = stage.pending_adapter(name) or stage.complete.adapters[name]
    path = str(settings.path)
    key = (Path(path).expanduser().resolve(), adapter_has_head(stage.complete, name))
    if key not in stage.loaded:
        stage.loaded[key] = read_recipe_adapter(stage.complete, name, path)
    return stage.loaded[key]


def _check_stack(stage: PlannedStage, saved: dict[str, SavedAdapter]) -> None:
    recipe = stage.complete
    if any(adapter.frozen_adapters for adapter in saved.values()):
        check_adapter_lineage(recipe, saved, ignore_event)
    if REWARD_ROLE in saved and recipe.trained_adapter != REWARD_ROLE:
        frozen = [name for name in frozen_adapters(recipe) if name in saved]
        reward_model_base(saved, frozen)
