"""The compared runs and chains, read from their folders as the report reads them: their curves and the settings that
differ."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank_tune.checkpoint.run_format import check_run_format
from lowrank_tune.config.yaml import dotted, leaves
from lowrank_tune.errors import UserError
from lowrank_tune.evaluation import EvalRecord, read_records
from lowrank_tune.ui.metrics import Point, charts_of, kl_metric
from lowrank_tune.ui.report.run_log import (
    ChainLog,
    RunLog,
    StepValues,
    in_order,
    read_chain,
    read_run_log,
)
from lowrank_tune.ui.run_paths import EVENTS, is_chain, read_recipe

IGNORED_SETTINGS = ("name", "description")
"""Settings that every recipe has for itself."""
MIN_POINTS_TO_SMOOTH = 15
"""A curve of at most so many points is drawn as it is."""
VALIDATION_METRICS = (
    "eval_loss",
    "eval_perplexity",
    "eval_mean_token_accuracy",
    "eval_accuracy",
    "eval_rewards/accuracies",
)
ANSWER_METRICS = (
    "completions/mean_length",
    "heldout/mean_length",
    "heldout/repetition",
)
ALGORITHM_SPECIFIC_METRICS = ("loss", "eval_loss", "entropy")
"""Metrics whose meaning depends on the algorithm: only runs of one kind share such a chart."""
METRIC_FAMILIES = {
    "reward": "pairs",
    "dpo": "pairs",
    "kto": "labels",
    "grpo": "completions",
    "ppo": "completions",
}


@dataclass(frozen=True)
class ComparedRun:
    """A run or a chain: its label, its stages that have begun, and its recipe if that can be read. The curves and the
    settings of a chain are those of the stage that began last."""

    label: str
    folder: Path
    run_logs: Sequence[RunLog]
    chain: ChainLog | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    evaluation: EvalRecord | None = None
    """The newest evaluation of `lowrank-tune eval`."""

    @property
    def last(self) -> RunLog:
        return self.run_logs[-1]

    @property
    def algorithm(self) -> str:
        return str(self.last.algorithm)

    @property
    def status(self) -> str:
        return self.last.status if self.chain is None else self.chain.status

    def points(self, name: str) -> StepValues:
        """Returns the finite values of a statistic by step."""
        return self.last.finite_values(name)

    def curve(self, name: str) -> list[Point]:
        """Returns the finite values of a statistic as points."""
        return in_order(self.points(name))


def read_runs(paths: Sequence[Path]) -> list[ComparedRun]:
    """Returns the runs in the order of the paths; of a killed or running one, what it has written so far.

    Raises UserError if there are fewer than two, if one is named twice, or if a path is not a run.
    """
    folders = [path.parent if path.name == EVENTS and path.is_file() else path for path in paths]
    if len(folders) < 2:
        raise UserError("compare needs two runs or more; one by itself is what `lowrank-tune report RUN` is for")
    for resolved_path, count in Counter(folder.resolve() for folder in folders).items():
        if count > 1:
            raise UserError(f"{resolved_path} is named {count} times; name different runs")
    for folder in folders:
        check_run_format(folder)
    return [
        _read_run(folder, label)
        for folder, label in zip(
            folders,
            labels_of(folders),
            strict=True,
        )
    ]


def _read_run(
    folder: Path,
    label: str,
) -> ComparedRun:
    chain = read_chain(folder) if is_chain(folder) else None
    return ComparedRun(
        label,
        folder,
        [read_run_log(folder)] if chain is None else chain.started_stages,
        chain,
        read_recipe(folder),
        next(reversed(read_records(folder)), None),
    )


def labels_of(folders: Sequence[Path]) -> list[str]:
    """Returns the shortest ends of the paths by which they differ."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(each[-depth:]) for each in parts]
        if len(set(labels)) == len(labels):
            break
    return labels


def differences(runs: Sequence[ComparedRun]) -> dict[str, list[str | None]]:
    """Returns every setting that is not the same in all runs: its value in each, None where it is not set.

    A chain is compared by the stage that began last; the first entry is the order of its stages.
    """
    settings = [_settings(run) for run in runs]
    keys = dict.fromkeys(key for run_settings in settings for key in run_settings)
    changed = {}
    for key in keys:
        values = [run_settings.get(key) for run_settings in settings]
        if len(set(values)) > 1:
            changed[key] = values
    return changed


def without_recipe(runs: Sequence[ComparedRun]) -> list[str]:
    """Returns the labels of the runs whose settings are not known."""
    return [run.label for run in runs if not run.recipe]


def _settings(run: ComparedRun) -> dict[str, str]:
    """Returns each leaf of a recipe under its dotted path, without paths within the folder of the run."""
    settings = {}
    recipe = run.recipe
    if run.chain is not None:
        recipe = read_recipe(run.last.folder)
        settings["stages"] = " -> ".join(str(run_log.algorithm) for run_log in run.run_logs if run_log.started)
    own_folder = str(run.folder.resolve())
    try:
        for path, value in leaves(dict(recipe)):
            text = value if isinstance(value, str) else json.dumps(value)
            is_own_path = isinstance(value, str) and value.startswith(own_folder)
            if not is_own_path and not set(path[:1]) & set(IGNORED_SETTINGS):
                settings[dotted(path)] = text
    except RecursionError:
        return {}
    return settings


def common_metrics(runs: Sequence[ComparedRun]) -> list[tuple[str, list[ComparedRun]]]:
    """Returns each statistic that two or more runs have, with these runs, in the order of the charts. A statistic whose
    meaning depends on the algorithm is returned once for each kind."""
    names = [name for run in runs for chart in charts_of(run.algorithm) for name in chart]
    shared = []
    for name in dict.fromkeys([*names, *VALIDATION_METRICS, *ANSWER_METRICS]):
        families: dict[str, list[ComparedRun]] = {}
        for run in runs:
            if len(run.points(name)) > 1:
                families.setdefault(metric_family(name, run.algorithm), []).append(run)
        shared += [(name, family_runs) for family_runs in families.values() if len(family_runs) > 1]
    return shared


def metric_family(
    name: str,
    algorithm: str,
) -> str:
    """Returns what the algorithms of two runs must have in common for a statistic to mean the same."""
    if name in ("loss", "eval_loss"):
        return algorithm
    if name in ALGORITHM_SPECIFIC_METRICS:
        return METRIC_FAMILIES.get(algorithm, algorithm)
    if name == "kl" and kl_metric(algorithm) != name:
        return algorithm
    return ""
