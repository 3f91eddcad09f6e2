"""Log-probs of the reference for a whole dataset: computed once, cached under a hash of everything that they depend on,
and compared with new ones at every start (`reference_check.py`)."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lowrank_tune.batch import Batch
from lowrank_tune.data import TokenizedDataset
from lowrank_tune.errors import TrainingError
from lowrank_tune.events import Emit, LogMessage, ProgressBar
from lowrank_tune.full_disk import CACHE_CURE, describe_full_disk, full_disk_reason
from lowrank_tune.model.roles import Roles

CACHE_VERSION = 1
"""Version of the computation. A change of it needs a higher number."""
NUM_PROGRESS_UPDATES = 50
SCALE_KEYS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
"""Keys of an adapter's configuration that determine its scales."""
LABEL = "log-probs of the reference"


def reference_logps(
    roles: Roles,
    rows: TokenizedDataset,
    collate: Callable[[Sequence[int]], Batch],
    micro_tokens: int,
    base_hash: str,
    cache: Path,
    emit: Emit,
) -> Tensor:
    """Returns log ref(y | x) of every row of the store, (rows,) fp32 on the CPU, in the order of the store; from the
    cache if it has them.

    `collate(units)` returns a batch of some units; `base_hash` is the hash of all tensors of the base. Raises
    TrainingError if a log-prob is not finite or the cache cannot be written.
    """
    file = cache / "reference" / f"{_cache_key(roles, rows, base_hash)}.safetensors"
    cached = _read_cache(file, len(rows))
    if cached is not None:
        emit(LogMessage(message=f"{LABEL}: {len(rows)} rows, computed before"))
        return cached
    sums = _compute(
        roles,
        rows,
        collate,
        micro_tokens,
        emit,
    )
    is_finite = sums.isfinite()
    if not bool(is_finite.all()):
        faulty_rows = (~is_finite).nonzero()
        raise TrainingError(
            f"the reference gives {len(faulty_rows)} of {len(rows)} answers no finite log-prob, "
            f"{rows.row_location(int(faulty_rows[0]))} for one"
        )
    _write_cache(file, sums)
    return sums


def _compute(
    roles: Roles,
    rows: TokenizedDataset,
    collate: Callable[[Sequence[int]], Batch],
    micro_tokens: int,
    emit: Emit,
) -> Tensor:
    sums = torch.full((len(rows),), float("nan"))

    def compute_batch(units: Sequence[int]) -> Tensor:
        batch = collate(units).to(roles.base.device)
        with roles.inference_mode():
            return roles.logps("reference", batch).logps.sum(dim=1).cpu()

    bar = ProgressBar(
        LABEL,
        rows.units,
        emit,
        NUM_PROGRESS_UPDATES,
    )
    batches = roles.limits.forward_batches(
        rows.padded_unit_lengths,
        micro_tokens,
        compute_batch,
        rows.rows_per_unit,
    )
    for units, logps in batches:
        sums[torch.from_numpy(rows.rows_of(np.asarray(units)))] = logps
        bar.advance(len(units))
    return sums


def _cache_key(
    roles: Roles,
    rows: TokenizedDataset,
    base_hash: str,
) -> str:
    """Returns a hash of everything that the log-probs depend on. The chat template is part of the ids of the rows."""
    digest = hashlib.blake2b(digest_size=16)
    for part in _cache_key_parts(roles, rows, base_hash):
        digest.update(part)
    return digest.hexdigest()


def _cache_key_parts(
    roles: Roles,
    rows: TokenizedDataset,
    base_hash: str,
) -> Iterator[bytes]:
    base = roles.base
    for part in (
        CACHE_VERSION,
        rows.content_hash(),
        base_hash,
        base.model.config.to_json_string(),
        base.device.type,
        base.bits,
        base.dtype,
        torch.__version__,
    ):
        yield f"{part}\n".encode()
    for prefixed_name in roles.stacks["reference"]:
        name = prefixed_name.removeprefix("lt_")
        config = roles.adapter_config(name)
        scales = " ".join(str(config[key]) for key in SCALE_KEYS)
        yield f"{scales}\n".encode()
        yield save(roles.adapter_tensors(name))


def _read_cache(file: Path, count: int) -> Tensor | None:
    """Returns the log-probs of an earlier run; None if the file is absent or damaged."""
    try:
        tensors = load(file.read_bytes())
        sums: Tensor = tensors["sums"]
        has_right_form = sums.shape == (count,) and sums.dtype == torch.float32
        if has_right_form and torch.equal(_checksum(sums), tensors["checksum"]):
            return sums
    except (OSError, KeyError, SafetensorError):
        pass
    return None


def _write_cache(file: Path, sums: Tensor) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(
            prefix=f"{file.stem}.",
            suffix=".tmp",
            dir=file.parent,
        )
        try:
            with os.fdopen(handle, "wb") as opened:
                opened.write(save({"sums": sums, "checksum": _checksum(sums)}))
            Path(temporary).replace(file)
        except BaseException:
            with suppress(OSError):
                Path(temporary).unlink()
            raise
    except OSError as error:
        raise _write_error(file, error, sums.nbytes) from error


def _write_error(file: Path, error: OSError, needed: int) -> TrainingError:
    fault = f"{file.parent}: the log-probs of the reference cannot be written"
    reason = full_disk_reason(error)
    if reason:
        return TrainingError(f"{fault}: {describe_full_disk(file, reason, CACHE_CURE, needed)}")
    return TrainingError(
        f"{fault} ({error.strerror or error}); free some space, or name another folder in LOWRANK_TUNE_CACHE"
    )


def _checksum(sums: Tensor) -> Tensor:
    digest = hashlib.blake2b(sums.contiguous().numpy().tobytes(), digest_size=16).digest()
    return torch.tensor(list(digest), dtype=torch.uint8)
