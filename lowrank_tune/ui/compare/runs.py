"""What is compared: runs and chains, read from their folders as the report reads them, their figures, and where their
recipes differ."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank_tune.checkpoint.run_format import check_run_format
from lowrank_tune.config.yaml import dotted, leaves
from lowrank_tune.errors import UserError
from lowrank_tune.evaluation import EvalRecord as Evaluated
from lowrank_tune.evaluation import read_records
from lowrank_tune.ui.metrics import charts_of
from lowrank_tune.ui.report.run_log import ChainLog, RunLog, StepValues, read_chain, read_run_log
from lowrank_tune.ui.run_paths import EVENTS, is_chain

IGNORED_SETTINGS = ("name", "description")  # what every recipe has for itself
CHECKED = ("eval_loss", "eval_mean_token_accuracy", "eval_accuracy", "eval_rewards/accuracies")
ALGORITHM_SPECIFIC_METRICS = ("loss", "eval_loss", "entropy")
"""What algorithms call by one name and mean differently: only runs of one kind share such a chart."""
METRIC_FAMILIES = {"reward": "pairs", "dpo": "pairs", "grpo": "completions", "ppo": "completions"}


@dataclass(frozen=True)
class ComparedRun:
    """One run, or a chain: what it is called here, its stages that have begun, and its recipe where that can be read.
    The curves and the settings of a chain are those of the stage that began last."""

    label: str
    folder: Path
    run_logs: Sequence[RunLog]
    chain: ChainLog | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Evaluated | None = None
    """The newest evaluation of `lowrank-tune eval`."""

    @property
    def last(self) -> RunLog:
        return self.run_logs[-1]

    @property
    def status(self) -> str:
        if self.chain is not None:
            return self.chain.status
        return self.last.status

    def points(self, name: str) -> StepValues:
        """The finite values of a statistic by step."""
        step_values = self.last.series.get(name) or self.last.checks.get(name, {})
        return {step: value for step, value in sorted(step_values.items()) if math.isfinite(value)}


def read_runs(paths: Sequence[Path]) -> list[ComparedRun]:
    """The sides, in the order in which they were named. Raises UserError where there are fewer than two, one is named
    twice, or one is no run; what a killed or running run has written so far is read."""
    folders = [path.parent if path.name == EVENTS and path.is_file() else path for path in paths]
    if len(folders) < 2:
        raise UserError("compare needs two runs or more; one by itself is what `lowrank-tune report RUN` is for")
    for resolved_path, count in Counter(folder.resolve() for folder in folders).items():
        if count > 1:
            raise UserError(f"{resolved_path} is named {count} times; name different runs")
    for folder in folders:
        check_run_format(folder)
    return [_read_run(folder, label) for folder, label in zip(folders, labels_of(folders), strict=True)]


def _read_run(folder: Path, label: str) -> ComparedRun:
    evaluation = next(reversed(read_records(folder)), None)
    if not is_chain(folder):
        return ComparedRun(label, folder, [read_run_log(folder)], None, _recipe(folder), evaluation)
    chain = read_chain(folder)
    return ComparedRun(label, folder, chain.started_stages, chain, _recipe(folder), evaluation)


def labels_of(folders: Sequence[Path]) -> list[str]:
    """As much of each path's end as tells it from the others."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(each[-depth:]) for each in parts]
        if len(set(labels)) == len(labels):
            break
    return labels


def _recipe(folder: Path) -> Mapping[str, Any]:
    try:
        recipe = json.loads((folder / "run.json").read_bytes())["recipe"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return recipe if isinstance(recipe, dict) else {}


def differences(runs: Sequence[ComparedRun]) -> dict[str, list[str | None]]:
    """Every setting that is not the same everywhere, with its value on each side, None where it is not set. A chain is
    compared by the stage that began last; before that stands how its stages follow each other."""
    settings = [_settings(run) for run in runs]
    keys = dict.fromkeys(key for run_settings in settings for key in run_settings)
    values_by_key = {key: [run_settings.get(key) for run_settings in settings] for key in keys}
    return {key: values for key, values in values_by_key.items() if len(set(values)) > 1}


def without_recipe(runs: Sequence[ComparedRun]) -> list[str]:
    """The sides whose settings are not known."""
    return [run.label for run in runs if not run.recipe]


def _settings(run: ComparedRun) -> dict[str, str]:
    """Each leaf of a recipe under its dotted path; a path within the side's own folder says nothing."""
    recipe = _recipe(run.last.folder) if run.chain is not None else run.recipe
    own = str(run.folder.resolve())
    try:
        leaf_values = {
            dotted(path): value
            for path, value in leaves(dict(recipe))
            if path[:1] not in [(setting,) for setting in IGNORED_SETTINGS]
        }
    except RecursionError:
        return {}
    if run.chain:
        stages = {"stages": " -> ".join(str(run_log.started.algorithm) for run_log in run.run_logs if run_log.started)}
    else:
        stages = {}
    return stages | {
        key: _as_text(value)
        for key, value in leaf_values.items()
        if not (isinstance(value, str) and value.startswith(own))
    }


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value)


def common_metrics(runs: Sequence[ComparedRun]) -> list[tuple[str, list[ComparedRun]]]:
    """Each statistic that two sides or more have, with these sides, the most telling first. One that algorithms mean
    differently has a chart for each kind."""
    names = dict.fromkeys(
        [
            *(name for run in runs for chart in charts_of(_algorithm(run)) for name in chart),
            *CHECKED,
            "completions/mean_length",
            "heldout/mean_length",
            "heldout/repetition",
        ]
    )
    shared_metrics = []
    for name in names:
        families: dict[str, list[ComparedRun]] = {}
        for run in runs:
            if len(run.points(name)) > 1:
                families.setdefault(metric_family(name, _algorithm(run)), []).append(run)
        shared_metrics += [(name, family_runs) for family_runs in families.values() if len(family_runs) > 1]
    return shared_metrics


def metric_family(name: str, algorithm: str) -> str:
    """What algorithms must have in common for a statistic to mean the same."""
    if name in ("loss", "eval_loss"):
        return algorithm
    if name in ALGORITHM_SPECIFIC_METRICS:
        return METRIC_FAMILIES.get(algorithm, algorithm)
    return ""


def _algorithm(run: ComparedRun) -> str:
    if run.last.started is not None:
        return str(run.last.started.algorithm)
    return "sft"
