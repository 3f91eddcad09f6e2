"""`memory.json`: the memory budget of a run and the values that `auto` became, so that it continues with the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lowrank_tune.checkpoint import RunFolder
from lowrank_tune.config import RecipeConfig
from lowrank_tune.config.memory import memory_settings
from lowrank_tune.events import Emit, warning
from lowrank_tune.json_files import as_mapping, get_mapping, get_number, read_json_object
from lowrank_tune.model.gpu_memory import GIB, GpuMemory

MEMORY_FILE = "memory.json"
VERSION = 1


@dataclass(frozen=True)
class RunMemory:
    """The memory of the GPU at the start of a run, the bytes that the run may use, the values of `train` that were
    `auto`, by stage, and the settings of memory that they were chosen with."""

    gpu: str
    total_bytes: int
    free_bytes: int
    budget_bytes: int
    auto: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def budget_gib(self) -> float:
        return self.budget_bytes / GIB

    def kept_values(self, stages: Iterable[RecipeConfig]) -> dict[str, Mapping[str, int]]:
        """Returns the values of the stages whose settings of memory are those that the values were chosen with."""
        kept = {}
        for stage in stages:
            if stage.name in self.auto and self.settings.get(stage.name) == memory_settings(stage):
                kept[stage.name] = self.auto[stage.name]
        return kept

    def with_values(
        self,
        stages: Iterable[RecipeConfig],
        auto: Mapping[str, Mapping[str, int]],
    ) -> RunMemory:
        """Returns this with the values of the stages that are planned now. Those of other stages stay."""
        settings = {stage.name: memory_settings(stage) for stage in stages if auto.get(stage.name)}
        values = {name: auto[name] for name in settings}
        return replace(
            self,
            auto={**self.auto, **values},
            settings={**self.settings, **settings},
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of `memory.json`."""
        return {"version": VERSION, **asdict(self)}


def start_memory(
    path: Path,
    memory: GpuMemory,
    emit: Emit,
) -> RunMemory:
    """Returns the memory of a run that starts in the folder `path`, or that continues there: then it is that of its
    first start. Warns if less is free now."""
    stored = _stored_memory(path)
    if stored is not None and stored.budget_bytes <= memory.total_bytes:
        if memory.available_bytes < stored.budget_bytes:
            emit(warning(_less_is_free(stored, memory)))
        return stored
    if stored is not None:
        message = (
            f"{path} began on a GPU with a budget of {stored.budget_gib:.1f} GiB, and {memory.name} has "
            f"{memory.total_bytes / GIB:.1f}: memory is planned again"
        )
        emit(warning(message))
    return RunMemory(
        memory.name,
        memory.total_bytes,
        memory.free_bytes,
        memory.budget_bytes,
    )


def _less_is_free(stored: RunMemory, memory: GpuMemory) -> str:
    return (
        f"the run began with a memory budget of {stored.budget_gib:.1f} GiB and continues with it, but only "
        f"{memory.available_bytes / GIB:.1f} GiB are free now: close other programs that use the GPU"
    )


def _stored_memory(path: Path) -> RunMemory | None:
    """Returns what the unfinished run in a folder has stored; None without a checkpoint, because such a run starts
    again."""
    folder = RunFolder.unfinished(path)
    if folder is None or not folder.has_checkpoints():
        return None
    data = read_json_object(folder.path / MEMORY_FILE)
    budget = int(get_number(data, "budget_bytes"))
    if data.get("version") != VERSION or budget <= 0:
        return None
    return RunMemory(
        str(data.get("gpu")),
        int(get_number(data, "total_bytes")),
        int(get_number(data, "free_bytes")),
        budget,
        {stage: _whole_numbers(values) for stage, values in get_mapping(data, "auto").items()},
        {stage: as_mapping(values) for stage, values in get_mapping(data, "settings").items()},
    )


def _whole_numbers(values: Any) -> dict[str, int]:
    return {key: value for key, value in as_mapping(values).items() if isinstance(value, int)}
