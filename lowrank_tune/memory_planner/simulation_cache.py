"""Stores results of simulations in the cache folder. A file that is damaged counts as missing."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from lowrank_tune.checkpoint.atomic_files import temporary_path, write_new
from lowrank_tune.json_files import parse_json
from lowrank_tune.manifest import manifest_bytes
from lowrank_tune.memory_planner.allocation_tracker import ProgramPoint
from lowrank_tune.memory_planner.extrapolation import Peaks
from lowrank_tune.memory_planner.kernel_costs import Kernel, KernelKind
from lowrank_tune.memory_planner.kernel_counter import KernelCounts
from lowrank_tune.paths import cache_folder

FOLDER = "simulations"
MAX_FILES = 2000
"""Files that are kept; a plan has about ten. The oldest are removed."""


@dataclass(frozen=True)
class SimulationResult:
    """What a simulation of a few layers finds: the bytes by purpose at the peak of each program point, in the order of
    the program, or how often each kernel is started, by phase. `fault` is why a layer that a run compiles was simulated
    plain."""

    peaks: Peaks = field(default_factory=dict)
    kernels: KernelCounts = field(default_factory=dict)
    fault: str = ""

    def to_json(self) -> dict[str, Any]:
        """Returns the result as JSON values."""
        return {
            "peaks": [[list(point), list(peak.items())] for point, peak in self.peaks.items()],
            "kernels": [[phase, _kernels_to_json(counts)] for phase, counts in self.kernels.items()],
            "fault": self.fault,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SimulationResult:
        """Returns the result of `to_json`. Raises KeyError, TypeError or ValueError for other values."""
        peaks = dict[ProgramPoint, dict[str, int]]()
        for point, peak in data["peaks"]:
            peaks[tuple(point)] = {purpose: int(count) for purpose, count in peak}
        kernels = {str(phase): _kernels_from_json(counts) for phase, counts in data["kernels"]}
        return cls(peaks, kernels, str(data["fault"]))


def _kernels_to_json(counts: Mapping[Kernel, float]) -> list[list[Any]]:
    return [[*astuple(kernel), count] for kernel, count in counts.items()]


def _kernels_from_json(rows: list[list[Any]]) -> dict[Kernel, float]:
    counts = dict[Kernel, float]()
    for kind, num_bytes, flops, (rows_m, outputs_n, inputs_k), count in rows:
        kernel = Kernel(
            KernelKind(kind),
            int(num_bytes),
            int(flops),
            (int(rows_m), int(outputs_n), int(inputs_k)),
        )
        counts[kernel] = count
    return counts


def read_result(key: str) -> SimulationResult | None:
    """Returns the result that is stored under a key, None if there is none or its file is damaged."""
    try:
        raw = _file_of(key).read_bytes()
        data = parse_json(raw)
        if manifest_bytes(data) != raw:
            return None
        return SimulationResult.from_json(data)
    except (
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ):
        return None


def write_result(key: str, result: SimulationResult) -> None:
    """Stores a result under a key, atomically. Warns if the cache cannot be written."""
    try:
        file = _file_of(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = temporary_path(file)
        try:
            write_new(fresh, manifest_bytes(result.to_json()))
            fresh.replace(file)
        finally:
            fresh.unlink(missing_ok=True)
        _remove_oldest(file.parent)
    except (OSError, RuntimeError) as error:
        warnings.warn(
            f"memory is planned again in each run, because plans cannot be cached ({error}): name a folder in "
            "LOWRANK_TUNE_CACHE",
            RuntimeWarning,
            stacklevel=2,
        )


def _file_of(key: str) -> Path:
    return cache_folder() / FOLDER / f"{key}.json"


def _remove_oldest(folder: Path) -> None:
    files = list(folder.glob("*.json"))
    if len(files) <= MAX_FILES:
        return
    # A file that another process removed meanwhile is the oldest.
    ages = {file: file.stat().st_mtime for file in files if file.exists()}
    for file in sorted(ages, key=lambda file: ages[file])[: len(files) - MAX_FILES // 2]:
        file.unlink(missing_ok=True)
