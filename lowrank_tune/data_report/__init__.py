"""What will be trained on, before training: from recipe, tokenizer and rows alone, without the weights of the base.

`inspect_data` reads it for `lowrank-tune data`; `report_rows` and `report_prompts` return the same for data that a run
has loaded, for its `data.json`. `ui.views.data` prints it.
"""

from __future__ import annotations

from pathlib import Path

from lowrank_tune.assembly.rl import make_row_check
from lowrank_tune.config import RecipeConfig
from lowrank_tune.data import ChatTemplate, load, recipe_heldout_prompts
from lowrank_tune.data.prompts import load_prompts
from lowrank_tune.data_report.labels import LabelBalance
from lowrank_tune.data_report.prompts import report_prompts
from lowrank_tune.data_report.report import (
    DataIssue,
    DataReport,
    EosStats,
    Example,
    Lengths,
    MixturePart,
)
from lowrank_tune.data_report.rows import report_rows
from lowrank_tune.events import Emit
from lowrank_tune.model.base import load_tokenizer

__all__ = [
    "EosStats",
    "Example",
    "LabelBalance",
    "Lengths",
    "MixturePart",
    "DataReport",
    "DataIssue",
    "inspect_data",
    "report_rows",
    "report_prompts",
]


def inspect_data(
    recipe: RecipeConfig,
    emit: Emit,
    cache: Path | None = None,
) -> DataReport:
    """Reads and tokenizes all data of a recipe. Raises UserError only if there is nothing to report."""
    template = ChatTemplate.from_config(load_tokenizer(recipe.base), recipe.data)
    heldout = recipe_heldout_prompts(recipe)
    if recipe.is_online:
        dataset = load_prompts(
            recipe.data,
            template,
            recipe.seed,
            emit,
            raise_on_invalid=False,
            needs_ground_truth=recipe.needs_ground_truth,
            unusable=make_row_check(recipe),
        )
        return report_prompts(
            recipe,
            dataset,
            template,
            heldout,
        )
    splits = load(
        recipe.data,
        template,
        recipe.seed,
        emit,
        cache,
        raise_on_invalid=False,
        pairs=recipe.uses_pairs,
        labels=recipe.uses_labels,
    )
    return report_rows(recipe, splits, template, heldout)
