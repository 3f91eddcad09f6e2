"""`plan --max-length`: the longest row that fits, or the plan of rows of a given length."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console
from rich.status import Status

from lowrank_tune.cli.common import status_message
from lowrank_tune.errors import UserError

if TYPE_CHECKING:
    from lowrank_tune.config import RecipeConfig

AUTO = "auto"


def parse_max_length(text: str) -> int | None:
    """Returns the length, None for `auto`. Raises UserError for other texts."""
    if text == AUTO:
        return None
    digits = text.replace(",", "").replace("_", "")
    if not digits.isascii() or not digits.isdigit() or int(digits) == 0:
        raise UserError(f"--max-length: expected `{AUTO}` or a number of tokens, found {text!r}")
    return int(digits)


def print_max_length(
    recipe: str,
    overrides: Sequence[str],
    length: int | None,
    vram_gib: float,
    console: Console,
    as_json: bool,
) -> bool:
    """Prints the plan of rows of `length` tokens, or of the longest row. Returns whether it fits. Raises UserError."""
    from lowrank_tune.memory_planner.max_length import RowPlanner
    from lowrank_tune.ui.views.max_length import row_json, row_lines
    from lowrank_tune.ui.views.plan import show

    load = partial(_load_recipe, recipe, overrides)
    with status_message("planning") as status:
        planner = RowPlanner(load, vram_gib, partial(_show_try, status))
        row_plan = planner.longest() if length is None else planner.plan(length)
    is_longest = length is None
    if as_json:
        console.print(row_json(row_plan, is_longest), soft_wrap=True)
    else:
        show(row_plan.plan, console)
        for line in row_lines(row_plan, is_longest, [recipe, *overrides]):
            console.print(line, soft_wrap=True)
    return row_plan.plan.fits


def _load_recipe(
    recipe: str,
    overrides: Sequence[str],
    *settings: str,
) -> RecipeConfig:
    from lowrank_tune.config import Chain, load_any

    loaded = load_any(recipe, *overrides, *settings)
    if isinstance(loaded, Chain):
        raise UserError(f"--max-length: {recipe} is a chain; plan the recipe of one stage")
    return loaded


def _show_try(status: Status | None, length: int) -> None:
    if status is not None:
        status.update(f"planning rows of {length:,} tokens")
