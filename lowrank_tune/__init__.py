"""lowrank_tune: QLoRA fine-tuning for one consumer GPU. `from lowrank_tune import Chain, Recipe, run`. Importing this
imports no torch."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Chain", "Recipe", "UserError", "run"]

# Said at its import, on CPUs whose fused kernel could be downloaded: this kit switches that kernel off (it has no
# gradient).
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

if TYPE_CHECKING:
    import torch

    from lowrank_tune.config import Chain, Recipe, RecipeConfig
    from lowrank_tune.errors import UserError
    from lowrank_tune.events import Event
    from lowrank_tune.runner import RunResult


def run(
    recipe: RecipeConfig | Chain | str | Path,
    *overrides: str,
    out: str | Path | None = None,
    ui: str = "auto",
    device: torch.device | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> RunResult:
    """Runs a recipe or a chain of them, a preset's name or a recipe file; continues it where an unfinished run of it
    lies in the folder.

    Raises UserError (a sentence for the person) and KeyboardInterrupt at a second Ctrl-C. `on_event` sees every event.
    The recipe is read before torch is imported: a backend that it names may have to come first.
    """
    from lowrank_tune.config import backends_of, load_any
    from lowrank_tune.unsloth_import import import_unsloth

    loaded = load_any(recipe, *overrides) if isinstance(recipe, (str, Path)) else recipe
    import_unsloth(backends_of(loaded))
    from lowrank_tune.runner import run as started

    return started(
        loaded,
        out=out,
        ui=ui,
        device=device,
        on_event=on_event,
    )


# Blocks of a GPU's memory that can grow lose little between phases of other sizes. Torch reads this once, before its
# first use of the GPU, so it is set before anything below imports torch; what the user has set stands.
if (
    sys.platform == "linux"
    and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"} & os.environ.keys()
):
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


# the heavy modules load at first use, so that `--help` and a faulty recipe take a second
def __getattr__(name: str) -> Any:
    if name in ("Chain", "Recipe"):
        from lowrank_tune import config as recipe

        return getattr(recipe, name)
    if name == "UserError":
        from lowrank_tune.errors import UserError

        return UserError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
