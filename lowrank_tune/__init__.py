"""lowrank_tune: QLoRA fine-tuning for one consumer GPU. `from lowrank_tune import Recipe, run`. Importing this imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Recipe", "UserError", "run"]

if TYPE_CHECKING:
    from lowrank_tune.errors import UserError
    from lowrank_tune.recipe import Recipe
    from lowrank_tune.runner import run


def __getattr__(name: str) -> Any:  # the heavy modules load at first use, so that `--help` and a faulty recipe take a second
    if name == "run":
        from lowrank_tune.runner import run

        return run
    if name == "Recipe":
        from lowrank_tune.recipe import Recipe

        return Recipe
    if name == "UserError":
        from lowrank_tune.errors import UserError

        return UserError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
