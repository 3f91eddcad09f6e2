"""lowrank_tune: QLoRA fine-tuning for one consumer GPU. `from lowrank_tune import Chain, Recipe, run`. Importing this
imports no torch."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Chain", "Recipe", "UserError", "run"]

# bitsandbytes logs at its import that a fused CPU kernel could be downloaded. It has no gradient and is not used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# In a notebook without ipywidgets, tqdm warns in red at its import that it draws bars of text.
warnings.filterwarnings("ignore", message="IProgress not found")

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
    """Runs a recipe or a chain, given as an object, a preset name or a file; resumes an unfinished run in its folder.

    `ui` is `auto` (curves below the cell of a notebook, the dashboard in a terminal, else lines), `tui`, `plain` or
    `none`. `on_event` is called with every event. Raises UserError, and KeyboardInterrupt at a second Ctrl-C. The
    recipe is read before torch is imported, because a backend in it may have to be imported first.
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


# Expandable segments reduce fragmentation between phases of different sizes. Torch reads this once, before its first
# use of the GPU, so it is set before anything imports torch. A value set by the user is kept.
if (
    sys.platform == "linux"
    and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"} & os.environ.keys()
):
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


# The heavy modules are imported at first use, so that `--help` and a faulty recipe take one second.
def __getattr__(name: str) -> Any:
    if name in ("Chain", "Recipe"):
        from lowrank_tune import config

        return getattr(config, name)
    if name == "UserError":
        from lowrank_tune.errors import UserError

        return UserError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
