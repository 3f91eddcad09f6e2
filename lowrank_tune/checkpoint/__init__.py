"""The run folder and its checkpoints. Whatever is written here is either whole or absent, whenever the process or the
machine dies.

A checkpoint is a folder of safetensors and JSON files, with `manifest.json`, which holds size and hash of each, written
last.
"""

from __future__ import annotations

from lowrank_tune.checkpoint.atomic_files import (
    as_user_error,
    clean_stale,
    replace_nonfinite,
    write_error,
    write_file,
    write_fully,
)
from lowrank_tune.checkpoint.checkpoint import (
    CorruptCheckpoint,
    Snapshot,
    broken_final_reason,
    latest_checkpoint,
    load,
    quarantine_broken_final,
    rotate,
    write_atomically,
)
from lowrank_tune.checkpoint.folder import RunFolder
from lowrank_tune.checkpoint.optimizer_state import flatten_optimizer, restore_optimizer, restore_rng, rng_state

__all__ = [
    "CorruptCheckpoint",
    "RunFolder",
    "Snapshot",
    "write_error",
    "replace_nonfinite",
    "flatten_optimizer",
    "load",
    "latest_checkpoint",
    "broken_final_reason",
    "quarantine_broken_final",
    "restore_optimizer",
    "restore_rng",
    "rng_state",
    "rotate",
    "as_user_error",
    "clean_stale",
    "write_fully",
    "write_atomically",
    "write_file",
]
