"""Simulations whose results are read from the cache if nothing changed that they depend on."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

from lowrank_tune.assembly.model import logits_chunk_of
from lowrank_tune.memory_planner.extrapolation import Peaks
from lowrank_tune.memory_planner.kernel_counter import KernelCounts
from lowrank_tune.memory_planner.meta_model import Layer
from lowrank_tune.memory_planner.simulation import SimulationSpec, count_kernels, simulate
from lowrank_tune.memory_planner.simulation_cache import SimulationResult, read_result, write_result
from lowrank_tune.training.machine import library_versions

PACKAGE = Path(__file__).parents[1]
UNUSED_SETTINGS = ("name", "description")
UNUSED_TRAIN_SETTINGS = ("gradient_checkpointing", "memory_budget_gib", "memory_check")
"""Settings that a simulation does not read: the number of recomputed layers is an argument of its own."""


def cached_result(
    spec: SimulationSpec,
    layers: Sequence[Layer],
    only_update: bool = False,
) -> SimulationResult:
    """Returns the result of `simulate`, from the cache if it is there."""
    key = simulation_key(spec, layers, only_update)
    result = read_result(key)
    if result is None:
        peaks = simulate(spec, layers, only_update)
        result = SimulationResult(peaks, fault=spec.programs.fault)
        write_result(key, result)
    spec.programs.add_fault(result.fault)
    return result


def cached_peaks(
    spec: SimulationSpec,
    layers: Sequence[Layer],
    only_update: bool = False,
) -> Peaks:
    """Returns the peaks of `cached_result`."""
    return cached_result(spec, layers, only_update).peaks


def cached_kernels(
    spec: SimulationSpec,
    layers: Sequence[Layer],
    only_update: bool = False,
) -> KernelCounts:
    """Returns the result of `count_kernels`, from the cache if it is there."""
    key = simulation_key(
        spec,
        layers,
        only_update,
        "kernels",
    )
    result = read_result(key)
    if result is None:
        result = SimulationResult(kernels=count_kernels(spec, layers, only_update))
        write_result(key, result)
    return result.kernels


def simulation_key(
    spec: SimulationSpec,
    layers: Sequence[Layer],
    only_update: bool,
    result: str = "peaks",
) -> str:
    """Returns a hash of all that a simulation depends on: its arguments, what it returns, the code of the kit, and the
    libraries."""
    inputs = {
        "result": result,
        "recipe": _recipe_settings(spec),
        "config": _config_values(spec.config),
        "device": spec.device.type,
        "sizes": asdict(spec.sizes),
        "loaded": {name: config.to_dict() for name, config in spec.loaded.items()},
        "reward_base_adapters": list(spec.reward_base_adapters),
        "rollouts": {name: asdict(rollout) for name, rollout in spec.rollouts.items()},
        "layers": [asdict(layer) for layer in layers],
        "only_update": only_update,
        "compiled": spec.compiled,
        "code": code_hash(),
        "libraries": library_versions(),
        "python": platform.python_version(),
    }
    text = json.dumps(inputs, sort_keys=True, default=_as_json)
    return sha256(text.encode()).hexdigest()


def _recipe_settings(spec: SimulationSpec) -> dict[str, Any]:
    settings = spec.recipe.to_dict()
    for name in UNUSED_SETTINGS:
        settings.pop(name, None)
    train = dict(settings.get("train", {}))
    for name in UNUSED_TRAIN_SETTINGS:
        train.pop(name, None)
    train["logits_chunk"] = logits_chunk_of(spec.recipe)
    return {**settings, "train": train}


def _config_values(config: Any) -> dict[str, Any]:
    values = dict(config.to_dict())
    # The folder that the configuration was read from.
    values.pop("_name_or_path", None)
    return values


def _as_json(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return str(value)


@cache
def code_hash(package: Path = PACKAGE) -> str:
    """Returns the hash of the package's Python files: a simulation runs most of them."""
    digest = blake2b(digest_size=16)
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
