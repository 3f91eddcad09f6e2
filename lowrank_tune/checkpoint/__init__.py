"""The run folder and its checkpoints. Whatever is written here is either whole or absent, whenever the process or the
machine dies.

A checkpoint is a folder of safetensors and JSON files, with `manifest.json`, which holds size and hash of each, written
last.
"""

from __future__ import annotations

from lowrank_tune.checkpoint.files import cannot_write, finite, telling, tidy, write_all, write_file
from lowrank_tune.checkpoint.folder import RunFolder
from lowrank_tune.checkpoint.states import flatten_optimizer, restore_optimizer, restore_rng, rng_state
from lowrank_tune.checkpoint.store import Broken, Snapshot, load, newest, rotate, write_atomically

__all__ = [
    "Broken",
    "RunFolder",
    "Snapshot",
    "cannot_write",
    "finite",
    "flatten_optimizer",
    "load",
    "newest",
    "restore_optimizer",
    "restore_rng",
    "rng_state",
    "rotate",
    "telling",
    "tidy",
    "write_all",
    "write_atomically",
    "write_file",
]
