"""lowrank_tune: QLoRA fine-tuning for one consumer GPU. `from lowrank_tune import Chain, Recipe, run`. Importing this imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Chain", "Recipe", "UserError", "run"]

if TYPE_CHECKING:
    from lowrank_tune.errors import UserError
    from lowrank_tune.recipe import Chain, Recipe
    from lowrank_tune.runner import run


def __getattr__(name: str) -> Any:  # the heavy modules load at first use, so that `--help` and a faulty recipe take a second
    if name == "run":
        from lowrank_tune.runner import run

        return run
    if name in ("Chain", "Recipe"):
        from lowrank_tune import recipe

        return getattr(recipe, name)
    if name == "UserError":
        from lowrank_tune.errors import UserError

        return UserError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
