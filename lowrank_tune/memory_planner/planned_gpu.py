"""The GPU that is planned for: the named one, else this machine's, else a default."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowrank_tune.errors import UserError
from lowrank_tune.memory_planner.gpu_specs import DEFAULT_GPU, GPUS, GpuSpec
from lowrank_tune.model.gpu_memory import GIB, read_gpu_memory


@dataclass(frozen=True)
class PlannedGpu:
    """A GPU: its memory, and its rates if they are known. `note` is what the user should know about them."""

    vram_gib: float
    spec: GpuSpec | None
    note: str = ""


def planned_gpu(name: str | None, vram_gib: float | None) -> PlannedGpu:
    """Returns the GPU to plan for. `vram_gib` replaces its memory and nothing else. Raises UserError for a name that is
    not known."""
    if name is not None:
        spec = gpu_named(name)
        note = ""
        if not spec.has_bf16:
            note = f"{spec.device_name} has no bfloat16: `run` computes in float16, with loss scaling"
        return PlannedGpu(vram_gib or spec.memory_gib, spec, note)
    if torch.cuda.is_available():
        return _installed_gpu(vram_gib)
    spec = gpu_named(DEFAULT_GPU)
    if vram_gib:
        return PlannedGpu(vram_gib, spec, f"the speed is that of an {spec.device_name}; --gpu NAME plans for another")
    note = (
        f"no GPU found: {spec.memory_gib:.0f} GiB are assumed, and the speed of an {spec.device_name}; "
        "--gpu NAME plans for another GPU, --vram GIB for another size"
    )
    return PlannedGpu(spec.memory_gib, spec, note)


def gpu_named(name: str) -> GpuSpec:
    """Returns the GPU of a short name. Raises UserError."""
    for spec in GPUS:
        if spec.name == name.lower():
            return spec
    names = ", ".join(spec.name for spec in GPUS)
    raise UserError(f"--gpu {name}: not known; the known ones are {names}")


def installed_gpu_spec() -> GpuSpec | None:
    """Returns the rates of this machine's GPU, None without a GPU or for an unknown one."""
    memory = read_gpu_memory()
    return None if memory is None else spec_of_device(memory.name)


def spec_of_device(device_name: str) -> GpuSpec | None:
    """Returns the GPU whose words the name of a device contains, None for another device: a laptop's GPU has another
    rate than the desktop's of the same number."""
    words = device_name.upper().split()
    if "LAPTOP" in words:
        return None
    for spec in GPUS:
        wanted = spec.device_name.upper().split()
        parts = [part for word in words for part in word.split("-")]
        if all(word in parts for word in wanted) and "TI" not in parts and "D" not in parts:
            return spec
    return None


def installed_spec() -> GpuSpec | None:
    """Returns this machine's GPU, None without one whose rates are known."""
    if not torch.cuda.is_available():
        return None
    return spec_of_device(torch.cuda.get_device_name())


def _installed_gpu(vram_gib: float | None) -> PlannedGpu:
    memory = read_gpu_memory()
    assert memory is not None, "called with a GPU"
    spec = spec_of_device(memory.name)
    note = ""
    if spec is None:
        names = ", ".join(gpu.name for gpu in GPUS)
        note = f"no hours are estimated: the rates of {memory.name} are not known; --gpu takes {names}"
    return PlannedGpu(vram_gib or memory.budget_bytes / GIB, spec, note)
