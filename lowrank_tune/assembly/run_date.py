"""The date in the prompts of a run: the day on which the run began. It is stored in the recipe, and a resumed run uses
it too."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import TypeVar

from lowrank_tune.checkpoint import RunFolder
from lowrank_tune.config import Chain, RecipeConfig
from lowrank_tune.data.templates.backend import default_chat_template
from lowrank_tune.data.templates.date import calls_clock
from lowrank_tune.model.base import load_tokenizer

AnyRecipe = TypeVar("AnyRecipe", bound=RecipeConfig | Chain)


def with_template_date(recipe: AnyRecipe, path: Path) -> AnyRecipe:
    """Returns the recipe of a run in the folder `path`, with `data.template_date` set if its chat template uses the
    clock and the recipe has no date; the same date for all stages of a chain. Raises UserError if the base does not
    exist."""
    first = recipe.stages[0]
    if first.data.template_date is not None or not calls_clock(default_chat_template(load_tokenizer(first.base))):
        return recipe
    unfinished = RunFolder.unfinished(path)
    day = None if unfinished is None else _stored_date(unfinished)
    # A run of an older version has no date and continues without one.
    if day is None and unfinished is not None and unfinished.has_checkpoints():
        return recipe
    return _dated(recipe, day or date.today().isoformat())


def _stored_date(folder: RunFolder) -> str | None:
    with suppress(OSError, ValueError, KeyError, IndexError, TypeError):
        recipe = folder.stored_recipe()
        first = recipe["stages"][0] if "stages" in recipe else recipe
        return str(first["data"]["template_date"])
    return None


def _dated(recipe: AnyRecipe, day: str) -> AnyRecipe:
    if isinstance(recipe, Chain):
        return replace(recipe, stages=tuple(_dated(stage, day) for stage in recipe.stages))
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"template_date": day})})
