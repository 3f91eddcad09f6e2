"""Checks before anything of a run is loaded: files, columns, rewards, adapters, disk and memory of all its stages.

All faults are reported at once, with the line of their settings in the recipe. Only the first rows of data are read. An
adapter that a later stage needs of an earlier one is only checked to be the one that stage trains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lowrank_tune.config import BaseConfig, Chain, RecipeConfig, locate
from lowrank_tune.config.base import Finding
from lowrank_tune.errors import ConfigError, UserError
from lowrank_tune.events import Emit, warning
from lowrank_tune.memory_planner import check_fit
from lowrank_tune.preflight.adapters import adapter_findings
from lowrank_tune.preflight.base import (
    meta_model,
    optimizer_findings,
    router_findings,
    row_length_findings,
    target_findings,
)
from lowrank_tune.preflight.data import DataCheck
from lowrank_tune.preflight.disk import disk_findings
from lowrank_tune.preflight.findings import findings_of
from lowrank_tune.preflight.outputs import output_findings
from lowrank_tune.preflight.rewards import reward_findings
from lowrank_tune.preflight.stages import PlannedStage, stages_of
from lowrank_tune.training import trackers

__all__ = ["check_before_loading"]

Findings = dict[str, list[Finding]]
"""By the name of the stage."""


def check_before_loading(
    loaded: RecipeConfig | Chain,
    folder: Path,
    finished: frozenset[str],
    vram_gib: float | None,
    emit: Emit,
    chosen: Mapping[str, Mapping[str, int]] = MappingProxyType({}),
) -> Mapping[str, Mapping[str, Any]]:
    """Checks a recipe, or the stages of a chain, that is to run in a folder where the stages `finished` have ended.

    Returns the values of `auto` in `train`, by stage, on a GPU of `vram_gib`; without a GPU no memory is planned. Those
    that an earlier start of the run has `chosen` stay. Raises ConfigError with every fault.
    """
    stages = stages_of(loaded, folder, finished)
    findings: Findings = {stage.recipe.name: [] for stage in stages}
    data = DataCheck(emit)
    for stage in stages:
        if not stage.is_finished:
            findings[stage.recipe.name] += _input_findings(
                stage,
                data,
                on_gpu=vram_gib is not None,
            )
            findings[stage.recipe.name] += output_findings(stage, folder)
    model, base_findings = _read_base(stages[0].recipe.base)
    # A chain has one base. `locate` reports its faults once.
    for found in findings.values():
        found += base_findings
    sound = _sound_stages(stages, model, findings)
    if sound and model is not None:
        for name, found in disk_findings(sound, folder, model).items():
            findings[name] += found
    changes: Mapping[str, Mapping[str, Any]] = {}
    if vram_gib is not None and not base_findings:
        skipped = findings.keys() - _with_known_adapters(sound, emit)
        fit = check_fit(
            loaded,
            vram_gib,
            emit,
            skip=skipped,
            chosen=chosen,
        )
        changes = fit.changes
        for name, message in fit.faults.items():
            findings[name].append((("train",), message))
        for name, error in fit.errors.items():
            findings[name] += findings_of(error, ("train",))
    problems = locate(loaded, findings)
    if problems:
        raise ConfigError(problems)
    return changes


def _with_known_adapters(stages: Sequence[PlannedStage], emit: Emit) -> set[str]:
    """Returns the stages whose memory can be planned.

    If an adapter is the folder of an earlier stage, or inherited from a stage with such an adapter, its shape is read
    from its files. So the stage is planned only when that adapter is written.
    """
    known: set[str] = set()
    for stage in stages:
        by_path = (*stage.recipe.adapters, *sorted(stage.inherited))
        pending = [name for name in by_path if stage.pending_adapter(name) is not None]
        if not pending:
            known.add(stage.recipe.name)
        elif stage.recipe.train.memory_check != "off":
            folder = stage.complete.adapters[pending[0]].path
            message = f"{stage.recipe.name}: memory is not planned: adapters.{pending[0]} is read from {folder}, which "
            emit(warning(f"{message}an earlier stage of this run writes"))
    return known


def _input_findings(
    stage: PlannedStage,
    data: DataCheck,
    on_gpu: bool,
) -> Iterator[Finding]:
    """Yields the faults of what a stage reads or needs, except its base and adapters."""
    yield from optimizer_findings(stage, on_gpu)
    try:
        trackers.check_installed(stage.recipe.train.trackers)
    except UserError as error:
        yield from findings_of(error, ("train", "report_to"))
    yield from reward_findings(stage)
    yield from data.findings(stage.recipe)


def _read_base(base: BaseConfig) -> tuple[Any, list[Finding]]:
    """Returns the base without weights, None if it cannot be built; and why."""
    try:
        return meta_model(base), []
    except UserError as error:
        return None, list(findings_of(error, ("base", "model")))


def _sound_stages(
    stages: Sequence[PlannedStage],
    model: Any,
    findings: Findings,
) -> list[PlannedStage]:
    """Returns the stages that are to run and whose adapters can be stacked, so that their size can be computed.
    Adds the findings of the others. A stage that stacks on a faulty one is not sound either."""
    sound: list[PlannedStage] = []
    is_sound = True
    for stage in stages:
        found = list(adapter_findings(stage))
        if model is not None and not stage.is_finished:
            for check in (target_findings, row_length_findings, router_findings):
                found += check(stage, model)
        findings[stage.recipe.name] += found
        is_sound = is_sound and not found
        if is_sound and not stage.is_finished:
            sound.append(stage)
    return sound
