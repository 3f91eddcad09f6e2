"""Before anything of a run is loaded: files, columns, rewards, adapters, disk and memory of all its stages.

Every fault is reported at once, with the line of its setting in the recipe. Of data only the first rows are read. What
a later stage needs of an earlier one is only checked to be what that stage makes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank_tune.config import BaseConfig, Chain, RecipeConfig, locate
from lowrank_tune.config.base import Finding
from lowrank_tune.errors import ConfigError, UserError
from lowrank_tune.events import Emit, LogMessage
from lowrank_tune.memory_planner import check_fit
from lowrank_tune.preflight.adapters import adapter_findings
from lowrank_tune.preflight.base import meta_model, optimizer_findings, row_length_findings, target_findings
from lowrank_tune.preflight.data import DataCheck
from lowrank_tune.preflight.disk import disk_findings
from lowrank_tune.preflight.findings import findings_of
from lowrank_tune.preflight.rewards import reward_findings
from lowrank_tune.preflight.stages import PlannedStage, stages_of
from lowrank_tune.training import trackers

__all__ = ["check_before_loading"]

Findings = dict[str, list[Finding]]
"""By stage."""


def check_before_loading(
    loaded: RecipeConfig | Chain,
    folder: Path,
    finished: frozenset[str],
    vram_gib: float | None,
    emit: Emit,
) -> Mapping[str, Mapping[str, Any]]:
    """Checks a recipe, or the stages of a chain, that is to run in a folder, where those called `finished` have ended.

    Returns what `auto` stands for in `train`, by stage, on a GPU of `vram_gib`; without a GPU no memory is planned.
    Raises ConfigError with every fault.
    """
    stages = stages_of(loaded, folder, finished)
    findings: Findings = {stage.recipe.name: [] for stage in stages}
    data = DataCheck(emit)
    for stage in stages:
        if not stage.is_finished:
            findings[stage.recipe.name] += _input_findings(stage, data, on_gpu=vram_gib is not None)
    model, base_findings = _read_base(stages[0].recipe.base, emit)
    for found in findings.values():  # a chain has one base, and what is wrong with it is reported once
        found += base_findings
    sound = _sound_stages(stages, model, findings)
    if sound and model is not None:
        _extend(findings, disk_findings(sound, folder, model))
    changes: Mapping[str, Mapping[str, Any]] = {}
    if vram_gib is not None and not base_findings:
        fit = check_fit(loaded, vram_gib, emit, skip=findings.keys() - _with_known_adapters(sound, emit))
        changes = fit.changes
        _extend(findings, {name: [(("train",), message)] for name, message in fit.faults.items()})
        _extend(findings, {name: list(findings_of(error, ("train",))) for name, error in fit.errors.items()})
    if problems := locate(loaded, findings):
        raise ConfigError(problems)
    return changes


def _with_known_adapters(stages: Sequence[PlannedStage], emit: Emit) -> set[str]:
    """The stages whose memory can be planned. One that names the folder of an earlier stage as an adapter's, or
    inherits such an adapter, is planned when that adapter is there, as its shape is read from its files."""
    known: set[str] = set()
    for stage in stages:
        by_path = (*stage.recipe.adapters, *sorted(stage.inherited))
        pending = [name for name in by_path if stage.pending_adapter(name) is not None]
        if not pending:
            known.add(stage.recipe.name)
        elif stage.recipe.train.memory_check != "off":
            folder = stage.complete.adapters[pending[0]].path
            message = f"{stage.recipe.name}: memory is not planned: adapters.{pending[0]} is read from {folder}, which "
            emit(LogMessage(message=f"{message}an earlier stage of this run writes", level="warning"))
    return known


def _extend(findings: Findings, more: Mapping[str, Sequence[Finding]]) -> None:
    for name, found in more.items():
        findings[name] += found


def _input_findings(stage: PlannedStage, data: DataCheck, on_gpu: bool) -> Iterator[Finding]:
    """What a stage reads or needs, but for its base and adapters."""
    yield from optimizer_findings(stage, on_gpu)
    try:
        trackers.check_installed(stage.recipe.train.trackers)
    except UserError as error:
        yield from findings_of(error, ("train", "report_to"))
    yield from reward_findings(stage)
    yield from data.findings(stage.recipe)


def _read_base(base: BaseConfig, emit: Emit) -> tuple[Any, list[Finding]]:
    """The base without weights, None where it cannot be had; and why."""
    try:
        return meta_model(base), []
    except UserError as error:
        return None, list(findings_of(error, ("base", "model")))
    except (RuntimeError, NotImplementedError, TypeError) as error:
        message = f"{base.model} cannot be built without its weights ({type(error).__name__})"
        emit(LogMessage(message=f"{message}: target modules and disk space are not checked", level="warning"))
        return None, []


def _sound_stages(stages: Sequence[PlannedStage], model: Any, findings: Findings) -> list[PlannedStage]:
    """The stages that are to run and whose adapters can be stacked, so that their size can be computed.
    Adds the findings of the others. A stage above a faulty one is not sound either."""
    sound: list[PlannedStage] = []
    is_sound = True
    for stage in stages:
        found = list(adapter_findings(stage))
        if model is not None and not stage.is_finished:
            found += [*target_findings(stage, model), *row_length_findings(stage, model)]
        findings[stage.recipe.name] += found
        is_sound = is_sound and not found
        if is_sound and not stage.is_finished:
            sound.append(stage)
    return sound
