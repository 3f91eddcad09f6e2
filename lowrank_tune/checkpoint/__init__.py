"""The run folder and its checkpoints. A file or folder is complete or absent after a crash of process or machine.

A checkpoint is a folder of safetensors and JSON files. Its `manifest.json`, written last, contains size and hash of
each file.
"""

from __future__ import annotations

from lowrank_tune.checkpoint.atomic_files import (
    as_user_error,
    atomic_folder,
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
from lowrank_tune.checkpoint.optimizer_state import flatten_optimizer, restore_optimizer

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
    "rotate",
    "as_user_error",
    "atomic_folder",
    "clean_stale",
    "write_fully",
    "write_atomically",
    "write_file",
]
