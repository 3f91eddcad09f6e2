"""The saved adapters that a recipe loads."""

from __future__ import annotations

from lowrank_tune.assembly.reward_model import REWARD_ROLE, content_hash
from lowrank_tune.config import RecipeConfig
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit, LogMessage
from lowrank_tune.model.adapters import SavedAdapter, read_adapter


def read_adapters(recipe: RecipeConfig) -> dict[str, SavedAdapter]:
    """Returns the adapters of the recipe that have a path, by name. Raises UserError if one cannot be read."""
    return {
        name: read_recipe_adapter(recipe, name, adapter.path)
        for name, adapter in recipe.adapters.items()
        if adapter.path
    }


def read_recipe_adapter(
    recipe: RecipeConfig,
    name: str,
    path: str,
) -> SavedAdapter:
    """Returns the saved adapter of this name, with its head if its role has one. Raises UserError if it cannot be
    read."""
    return read_adapter(
        path,
        f"adapters.{name}.path",
        head=adapter_has_head(recipe, name),
    )


def adapter_has_head(recipe: RecipeConfig, name: str) -> bool:
    """Returns whether the role of an adapter has a head: the reward model, and the value of PPO."""
    return name == REWARD_ROLE or name in recipe.extra_adapters


def check_adapter_lineage(
    recipe: RecipeConfig,
    saved: dict[str, SavedAdapter],
    emit: Emit,
) -> None:
    """Checks that the adapters below a saved one are those that it was trained over, compared by content.

    If the recipe loads none of them, the adapter is replaced in `saved` by a copy with all of them combined into it.
    Raises UserError if the recipe loads some of them and not others. A reward model that is not trained has a stack of
    its own and is not checked here.
    """
    unchecked = set(recipe.extra_adapters)
    if recipe.trained_adapter != REWARD_ROLE:
        unchecked.add(REWARD_ROLE)
    loaded_hashes: set[str] = set()
    for name in recipe.adapters:
        if name not in saved or name in unchecked:
            continue
        below = saved[name].frozen_adapters
        key = f"adapters.{name}.path"
        path = str(recipe.adapters[name].path)
        loaded = [other for other, content in below.items() if content in loaded_hashes]
        missing = [other for other in below if other not in loaded]
        if loaded and missing:
            raise UserError(
                f"{key}: the adapter in {path} was trained over {', '.join(below)}, and this recipe loads only "
                f"{', '.join(loaded)} below it: add `adapters.{missing[0]}.path`, or leave all of them out and it is "
                "taken with them folded into it"
            )
        if missing:
            saved[name] = read_adapter(
                path,
                key,
                head=saved[name].head is not None,
                combined=True,
            )
            emit(LogMessage(message=f"{key}: taken with {', '.join(below)} folded into it, which it was trained over"))
        loaded_hashes.add(content_hash(saved[name]))
