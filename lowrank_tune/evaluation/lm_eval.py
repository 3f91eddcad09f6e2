"""Tasks of lm-evaluation-harness on the loaded model: the harness's own Hugging Face adapter around the base in memory,
with the stack of a variant active.

The harness is an optional dependency (`pip install 'lowrank-tune[harness]'`) with many packages, and importing it takes
seconds, so it is imported only for --tasks.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_tune.data import ChatTemplate
from lowrank_tune.errors import TrainingError, UserError, did_you_mean
from lowrank_tune.evaluation.intervals import (
    STANDARD_NORMAL,
    Interval,
    mean_ci,
    no_interval,
    proportion_ci,
)
from lowrank_tune.evaluation.metrics import Metrics
from lowrank_tune.evaluation.options import Options
from lowrank_tune.evaluation.target import role_of
from lowrank_tune.events import Emit, ProgressBar
from lowrank_tune.json_files import as_mapping
from lowrank_tune.model.base import Base
from lowrank_tune.model.roles import Roles
from lowrank_tune.offline import offline_variable

MISSING = "--tasks needs lm-evaluation-harness, which is not installed: pip install 'lowrank-tune[harness]'"
BOOTSTRAP_ITERS = 1000
"""Bootstrap draws of the harness, for metrics that are not means."""
CPU_BATCH_SIZE = 8
"""Rows at once on a CPU; on a GPU the harness selects how many."""
_HARNESS_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    ImportError,
    AssertionError,
    AttributeError,
    RuntimeError,
)
"""Errors of tasks, which are files and data sets of other people."""


@dataclass(frozen=True)
class Tasks:
    """The tasks of an evaluation, by their names in the harness or in the user's YAML files."""

    options: Options
    seed: int
    task_manager: Any
    """The result of `make_task_manager`."""


def make_task_manager(names: Sequence[str], path: Path | None) -> Any:
    """Returns the harness's register of tasks, with those of a folder. Raises UserError if the harness is not
    installed, or does not contain one of the names."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(MISSING)
    if path is not None and not path.is_dir():
        raise UserError(f"--tasks-path: {path} is not a folder; give the folder with the YAML files of your tasks")
    # an optional dependency, and slow to import
    from lm_eval.tasks import TaskManager

    task_manager = TaskManager(include_path=str(path) if path is not None else None)
    for name in names:
        if name not in task_manager.all_tasks:
            other_place = f" nor under {path}" if path is not None else ""
            suggestion = did_you_mean(name, task_manager.all_tasks)
            raise UserError(f"--tasks: there is no task `{name}` in lm-evaluation-harness{other_place}{suggestion}")
    return task_manager


def run_tasks(
    roles: Roles,
    base: Base,
    template: ChatTemplate,
    variants: Sequence[str],
    tasks: Tasks,
    emit: Emit,
) -> tuple[dict[str, Metrics], bool]:
    """Returns the metrics of every variant, and whether Ctrl-C ended it before the last one."""
    # the harness warns about arguments that are set on purpose here
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    metrics: dict[str, Metrics] = {}
    bar = ProgressBar(
        f"tasks {', '.join(tasks.options.tasks)}",
        len(variants),
        emit,
        len(variants),
    )
    bar.report()
    try:
        for variant in variants:
            with roles.inference_mode(), roles.activate(role_of(variant)), base.autocast():
                metrics[variant] = _parse_metrics(_results(base, template, tasks), tasks)
            bar.advance()
    except KeyboardInterrupt:
        return metrics, True
    return metrics, False


def _results(
    base: Base,
    template: ChatTemplate,
    tasks: Tasks,
) -> Mapping[str, Any]:
    """Runs the harness. Raises TrainingError with the harness's own error."""
    # an optional dependency, and slow to import
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    # A copy, since the harness adds a padding token. The harness renders the template itself, without the limits of
    # `data/templates/render_process.py`; `ChatTemplate` has rendered it before, within them.
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = template.fixed_chat_template
    model = HFLM(
        pretrained=base.model,
        tokenizer=tokenizer,
        backend="causal",
        max_length=base.max_row_length,
        batch_size="auto" if base.device.type == "cuda" else CPU_BATCH_SIZE,
    )
    try:
        results = simple_evaluate(
            model,
            tasks=list(tasks.options.tasks),
            task_manager=tasks.task_manager,
            limit=tasks.options.limit,
            bootstrap_iters=BOOTSTRAP_ITERS,
            log_samples=True,
            apply_chat_template=tasks.options.apply_chat_template,
            random_seed=tasks.seed,
            numpy_random_seed=tasks.seed,
            torch_random_seed=tasks.seed,
            fewshot_random_seed=tasks.seed,
        )
    except _HARNESS_ERRORS as error:
        kind = type(error).__name__
        if kind == "OutOfMemoryError":
            raise
        first_line = str(error).partition("\n")[0]
        names = ", ".join(tasks.options.tasks)
        variable = offline_variable()
        advice = ""
        if variable and isinstance(error, OSError):
            advice = f"; {variable} is set, so data sets that are not in the cache are not fetched: unset it once"
        raise TrainingError(
            f"--tasks: lm-evaluation-harness failed on {names}: {kind}: {first_line}{advice}"
        ) from error
    return dict(results)


def _parse_metrics(results: Mapping[str, Any], tasks: Tasks) -> Metrics:
    """Returns `TASK METRIC` of every task, with an interval over its documents."""
    metrics: Metrics = {}
    for task in tasks.options.tasks:
        scores = as_mapping(results.get("results")).get(task) or as_mapping(results.get("groups")).get(task) or {}
        samples = as_mapping(results.get("samples")).get(task, ())
        for key, value in scores.items():
            # keys are "METRIC,FILTER"
            metric, _, filter_name = key.partition(",")
            is_metric = bool(filter_name) and not metric.endswith("_stderr") and metric != "alias"
            if not is_metric or not isinstance(value, (int, float)):
                continue
            name = f"{task} {metric}"
            if filter_name != "none":
                name = f"{name} ({filter_name})"
            stderr = scores.get(f"{metric}_stderr,{filter_name}")
            document_scores = _document_scores(samples, metric, filter_name)
            metrics[name] = _interval(
                float(value),
                stderr,
                document_scores,
                tasks,
            )
    return metrics


def _document_scores(
    samples: Sequence[Mapping[str, Any]],
    metric: str,
    filter_name: str,
) -> list[float]:
    scores = []
    for sample in samples:
        score = sample.get(metric)
        if isinstance(score, (int, float)) and sample.get("filter", filter_name) == filter_name:
            scores.append(float(score))
    return scores


def _interval(
    value: float,
    stderr: Any,
    document_scores: list[float],
    tasks: Tasks,
) -> Interval:
    """Returns the interval over the documents if the metric is their mean, else that of the harness's standard
    error."""
    count = len(document_scores)
    if count and math.isclose(math.fsum(document_scores) / count, value, abs_tol=1e-9):
        if all(0 <= score <= 1 for score in document_scores):
            return proportion_ci(document_scores, 1, tasks.options.confidence)
        return mean_ci(document_scores, tasks.seed, tasks.options.confidence)
    if isinstance(stderr, (int, float)):
        margin = STANDARD_NORMAL.inv_cdf((1 + tasks.options.confidence) / 2) * stderr
        return Interval(
            value,
            value - margin,
            value + margin,
            count,
            "standard error of the harness",
        )
    return no_interval(value, count)
