"""What will be trained on, before anything is: from recipe, tokenizer and rows alone, without the weights of the base.

`examine` reads it for `lowrank-tune data`; `survey` is the same of data that a run has loaded, for its `data.json`.
Nothing is drawn here.
"""

from __future__ import annotations

from pathlib import Path

from lowrank_tune import settings
from lowrank_tune.build.online import judged_rows
from lowrank_tune.data import Template, load, prompts
from lowrank_tune.data.asked import load_asked
from lowrank_tune.events import Emit
from lowrank_tune.model.base import load_tokenizer
from lowrank_tune.preflight.asked import survey_asked
from lowrank_tune.preflight.picture import Ends, Epoch, Example, Lengths, Part, Preflight, Trouble
from lowrank_tune.preflight.rows import survey

__all__ = ["Ends", "Epoch", "Example", "Lengths", "Part", "Preflight", "Trouble", "examine", "survey", "survey_asked"]


def examine(recipe: settings.Recipe, emit: Emit, cache: Path | None = None) -> Preflight:
    """Reads and tokenises everything. Raises `UserError` only where there is nothing to show."""
    template = Template.of(load_tokenizer(recipe.base))
    wanted = recipe.evaluate
    heldout = prompts(wanted.heldout, wanted.prompts, recipe.seed, recipe.data.system) if wanted.heldout else []
    if recipe.algorithm in ("grpo", "ppo"):
        asked = load_asked(
            recipe.data,
            template,
            recipe.seed,
            emit,
            judge=False,
            needs_gold=recipe.needs_gold,
            unusable=judged_rows(recipe),
        )
        return survey_asked(recipe, asked, template, heldout)
    return survey(
        recipe,
        load(recipe.data, template, recipe.seed, emit, cache, judge=False, pairs=recipe.pairs),
        template,
        heldout,
    )
