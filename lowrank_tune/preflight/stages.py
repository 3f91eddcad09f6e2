"""The stages of a recipe for the checks: what each loads, and what another stage has still to write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lowrank_tune.config import AdapterConfig, Chain, RecipeConfig
from lowrank_tune.config.adapter_stack import frozen_adapters_of
from lowrank_tune.config.chain import stage_folder
from lowrank_tune.model.adapters import SavedAdapter


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a run; a single recipe is a chain of one."""

    recipe: RecipeConfig
    """As the user wrote it."""
    complete: RecipeConfig
    """With the adapters that earlier stages stack below it."""
    folder: Path
    """The folder that the stage writes."""
    is_finished: bool
    inherited: frozenset[str] = frozenset()
    """Saved adapters that an earlier stage names, and this one does not."""
    pending: Mapping[Path, AdapterConfig] = field(default_factory=dict)
    """Folders of earlier stages that have not ended, and the adapters that they train."""
    loaded: dict[tuple[Path, bool], SavedAdapter] = field(default_factory=dict)
    """Adapters that were read, by folder and whether with a head. All stages of a run share it, so that each is read
    once."""

    def pending_adapter(self, name: str) -> AdapterConfig | None:
        """Returns the settings of an adapter that an earlier stage has still to train; None for any other. A `path` in
        them is the saved adapter from which the earlier stage continues."""
        path = self.complete.adapters[name].path
        if path is None:
            return None
        resolved = Path(path).expanduser().resolve()
        return self.pending.get(resolved.parent if resolved.name == "final" else resolved)

    def saved_adapters(self) -> Iterator[tuple[str, str]]:
        """Yields name and path of the adapters that are already written."""
        for name, adapter in self.complete.adapters.items():
            if adapter.path is not None and self.pending_adapter(name) is None:
                yield name, adapter.path

    @property
    def waits_for_others(self) -> bool:
        """Whether one of its adapters has still to be trained."""
        return any(self.pending_adapter(name) is not None for name in self.complete.adapters)


def stages_of(
    loaded: RecipeConfig | Chain,
    folder: Path,
    finished: frozenset[str] = frozenset(),
) -> list[PlannedStage]:
    """Returns the stages of a recipe that is run in a folder where the stages `finished` have ended."""
    if not isinstance(loaded, Chain):
        return [
            PlannedStage(
                loaded,
                loaded,
                folder,
                is_finished=False,
            )
        ]
    folders: dict[str, Path] = {}
    for number, recipe in enumerate(loaded.stages, start=1):
        folders[recipe.name] = (folder / stage_folder(number, recipe.name)).resolve()
    paths = {name: str(path) for name, path in folders.items()}
    stages: list[PlannedStage] = []
    pending: dict[Path, AdapterConfig] = {}
    saved: dict[tuple[Path, bool], SavedAdapter] = {}
    for index, recipe in enumerate(loaded.stages):
        stage = PlannedStage(
            recipe,
            loaded.recipe_of(index, paths),
            folders[recipe.name],
            is_finished=recipe.name in finished,
            inherited=frozenset(frozen_adapters_of(loaded.stages, index)) - recipe.adapters.keys(),
            pending=dict(pending),
            loaded=saved,
        )
        stages.append(stage)
        if not stage.is_finished:
            trained = recipe.trained_adapter
            pending[stage.folder] = stage.pending_adapter(trained) or recipe.adapters[trained]
    return stages
