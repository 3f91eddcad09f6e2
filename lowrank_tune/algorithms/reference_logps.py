"""Log-probs of the reference belong to the data: computed once, found again by the content of all that they depend on,
and compared with fresh ones at every start (`reference_check.py`).
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lowrank_tune.data import TokenizedDataset
from lowrank_tune.data.collate import chunked
from lowrank_tune.errors import TrainingError
from lowrank_tune.events import Emit, LogMessage, Progress
from lowrank_tune.model.roles import Roles
from lowrank_tune.types import Batch

CACHE_VERSION = 1  # of how the log-probs are computed: raise it when that changes
NUM_PROGRESS_UPDATES = 50  # times that a long computation tells how far it is


def reference_logps(
    roles: Roles,
    rows: TokenizedDataset,
    collate: Callable[[Sequence[int]], Batch],
    micro_tokens: int,
    base_hash: str,
    cache: Path,
    emit: Emit,
) -> Tensor:
    """log ref(y | x) of every row of the store, (rows,) fp32 on the CPU, in the store's order; from the cache where it
    has them.

    `collate(units)` makes a batch of some units; `base_hash` is that of all tensors of the base. Raises TrainingError
    where the cache cannot be written.
    """
    file = cache / "reference" / f"{_cache_key(roles, rows, base_hash)}.safetensors"
    cached = _read_cache(file, len(rows))
    if cached is not None:
        emit(LogMessage(message=f"log-probs of the reference: {len(rows)} rows, computed before"))
        return cached
    sums = torch.full((len(rows),), float("nan"))
    label = "log-probs of the reference"
    done = 0

    def read(units: Sequence[int]) -> Tensor:
        with roles.inference_mode():
            return roles.logps("reference", collate(units).to(roles.base.device)).logps.sum(dim=1).cpu()

    for units, logps in chunked(roles.limits, rows, micro_tokens, read):
        sums[torch.tensor([unit * rows.rows_per_unit + i for unit in units for i in range(rows.rows_per_unit)])] = logps
        before = done
        done = done + len(units)
        if done * NUM_PROGRESS_UPDATES // rows.units != before * NUM_PROGRESS_UPDATES // rows.units:
            emit(Progress(description=label, done=done, total=rows.units))
    if not bool(sums.isfinite().all()):
        raise TrainingError(
            f"the reference gives {int((~sums.isfinite()).sum())} of {len(rows)} answers no finite log-prob, "
            f"{rows.row_location(int((~sums.isfinite()).nonzero()[0]))} for one"
        )
    _write_cache(file, sums)
    return sums


def _cache_key(roles: Roles, rows: TokenizedDataset, base_hash: str) -> str:
    """Of all that the log-probs depend on: rows, base, frozen adapters with their scales, precision. The template is in
    the rows' ids."""
    digest = hashlib.blake2b(digest_size=16)
    lower = [name.removeprefix("lt_") for name in roles.stacks["reference"]]
    base = roles.base
    for part in (
        CACHE_VERSION,
        rows.content_hash(),
        base_hash,
        base.model.config.to_json_string(),
        base.device.type,
        base.bits,
        torch.__version__,
    ):
        digest.update(f"{part}\n".encode())
    for name in lower:
        config = roles.adapter_config(name)
        scales = (config[key] for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"))
        digest.update((" ".join(map(str, scales)) + "\n").encode())
        digest.update(save(roles.adapter_tensors(name)))
    return digest.hexdigest()


def _read_cache(file: Path, count: int) -> Tensor | None:
    """What an earlier run computed; None where it is absent or broken."""
    try:
        tensors = load(file.read_bytes())
        sums = tensors["sums"]
        is_valid = (
            sums.shape == (count,) and sums.dtype == torch.float32 and torch.equal(_checksum(sums), tensors["checksum"])
        )
    except (OSError, KeyError, SafetensorError):
        return None
    return sums if is_valid else None


def _write_cache(file: Path, sums: Tensor) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f"{file.stem}.", suffix=".tmp", dir=file.parent)
        try:
            with os.fdopen(handle, "wb") as opened:
                opened.write(save({"sums": sums, "checksum": _checksum(sums)}))
            Path(temporary).replace(file)
        except BaseException:
            with suppress(OSError):
                Path(temporary).unlink()
            raise
    except OSError as error:
        raise TrainingError(
            f"{file.parent}: the log-probs of the reference cannot be written ({error.strerror or error}); "
            "free some space, or name another folder in LOWRANK_TUNE_CACHE"
        ) from error


def _checksum(sums: Tensor) -> Tensor:
    digest = hashlib.blake2b(sums.contiguous().numpy().tobytes(), digest_size=16).digest()
    return torch.tensor(list(digest), dtype=torch.uint8)
