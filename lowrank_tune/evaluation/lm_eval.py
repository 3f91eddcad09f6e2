"""Tasks of lm-evaluation-harness on the live model: its own Hugging Face adapter around the base in memory, with a
variant's stack active.

It is an extra (`pip install 'lowrank-tune[harness]'`) with many packages of its own, and takes seconds to import: it is
loaded where a task is asked for, and nowhere else.
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
from lowrank_tune.evaluation.intervals import STANDARD_NORMAL, Interval, mean_ci, proportion_ci
from lowrank_tune.evaluation.metrics import Metrics
from lowrank_tune.evaluation.target import role_of
from lowrank_tune.events import Emit, Progress
from lowrank_tune.model.base import Base
from lowrank_tune.model.roles import Roles

MISSING = "--tasks needs lm-evaluation-harness, which is not installed: pip install 'lowrank-tune[harness]'"
BOOTSTRAP_ITERS = 1000  # of the harness, for metrics that are no means
CPU_BATCH_SIZE = 8  # rows at once on a CPU; on a GPU the harness finds out how many fit


@dataclass(frozen=True)
class Tasks:
    """Which tasks, by their names in the harness or in the user's own YAML files; `limit` documents of each;
    `apply_chat_template`: with the chat template that the model was trained with."""

    names: tuple[str, ...]
    limit: int | None
    confidence: float
    seed: int
    apply_chat_template: bool
    task_manager: Any
    """The harness's own register, as `make_task_manager` made it."""


def make_task_manager(names: Sequence[str], path: Path | None) -> Any:
    """The harness's register of tasks, with those of a folder. Raises UserError, before anything is loaded, where the
    harness is missing or does not know one of these."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(MISSING)
    if path is not None and not path.is_dir():
        raise UserError(f"--tasks-path: {path} is no folder; it should hold the YAML files of your tasks")
    from lm_eval.tasks import TaskManager  # an extra, and it takes seconds

    task_manager = TaskManager(include_path=str(path) if path is not None else None)
    unknown = [name for name in names if name not in task_manager.all_tasks]
    if unknown:
        where = f" nor under {path}" if path is not None else ""
        raise UserError(
            f"--tasks: there is no task `{unknown[0]}` in lm-evaluation-harness{where}"
            f"{did_you_mean(unknown[0], task_manager.all_tasks)}"
        )
    return task_manager


def run_tasks(
    roles: Roles,
    base: Base,
    template: ChatTemplate,
    variants: Sequence[str],
    tasks: Tasks,
    emit: Emit,
) -> tuple[dict[str, Metrics], bool]:
    """Every task for every variant. Ctrl-C keeps the variants that are done and returns True."""
    # its warnings are about how it was called, which is settled here
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    metrics: dict[str, Metrics] = {}
    label = f"tasks {', '.join(tasks.names)}"
    try:
        for done, variant in enumerate(variants):
            emit(Progress(description=label, done=done, total=len(variants)))
            with roles.inference_mode(), roles.activate(role_of(variant)), base.autocast():
                metrics[variant] = _parse_metrics(_results(base, template, tasks), tasks)
        emit(Progress(description=label, done=len(variants), total=len(variants)))
    except KeyboardInterrupt:
        return metrics, True
    return metrics, False


def _results(base: Base, template: ChatTemplate, tasks: Tasks) -> Mapping[str, Any]:
    from lm_eval import simple_evaluate  # an extra, and it takes seconds
    from lm_eval.models.huggingface import HFLM

    tokenizer = copy.deepcopy(base.tokenizer)  # the harness gives it a padding token
    tokenizer.chat_template = template.dated_chat_template
    model = HFLM(
        pretrained=base.model,
        tokenizer=tokenizer,
        backend="causal",
        max_length=base.max_row_length,
        batch_size="auto" if base.device.type == "cuda" else CPU_BATCH_SIZE,
    )
    try:
        return dict(
            simple_evaluate(
                model,
                tasks=list(tasks.names),
                task_manager=tasks.task_manager,
                limit=tasks.limit,
                bootstrap_iters=BOOTSTRAP_ITERS,
                log_samples=True,
                apply_chat_template=tasks.apply_chat_template,
                random_seed=tasks.seed,
                numpy_random_seed=tasks.seed,
                torch_random_seed=tasks.seed,
                fewshot_random_seed=tasks.seed,
            )
        )
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        ImportError,
        AssertionError,
        AttributeError,
        RuntimeError,
    ) as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        # Its tasks are files and data sets of others, which break in their own ways.
        message = (str(error).splitlines() or [""])[0]
        raise TrainingError(
            f"--tasks: lm-evaluation-harness broke on {', '.join(tasks.names)}: {type(error).__name__}: {message}"
        ) from error


def _parse_metrics(results: Mapping[str, Any], tasks: Tasks) -> Metrics:
    """`TASK METRIC` of every task that was asked for, with an interval over its documents."""
    metrics: Metrics = {}
    for task in tasks.names:
        scores = results.get("results", {}).get(task) or results.get("groups", {}).get(task) or {}
        for key, value in scores.items():
            metric, _, filter_name = key.partition(",")
            if (
                metric.endswith("_stderr")
                or metric == "alias"
                or not isinstance(value, (int, float))
                or not filter_name
            ):
                continue
            name = f"{task} {metric}" + (f" ({filter_name})" if filter_name != "none" else "")
            documents = [
                float(sample[metric])
                for sample in results.get("samples", {}).get(task, ())
                if isinstance(sample.get(metric), (int, float)) and sample.get("filter", filter_name) == filter_name
            ]
            metrics[name] = _interval(float(value), scores.get(f"{metric}_stderr,{filter_name}"), documents, tasks)
    return metrics


def _interval(value: float, stderr: Any, document_scores: list[float], tasks: Tasks) -> Interval:
    """Over the documents, where the figure is their mean; else by the standard error that the harness gives."""
    if document_scores and math.isclose(math.fsum(document_scores) / len(document_scores), value, abs_tol=1e-9):
        if all(0 <= score <= 1 for score in document_scores):
            return proportion_ci(document_scores, 1, tasks.confidence)
        return mean_ci(document_scores, tasks.seed, tasks.confidence)
    if isinstance(stderr, (int, float)):
        margin = STANDARD_NORMAL.inv_cdf((1 + tasks.confidence) / 2) * stderr
        return Interval(value, value - margin, value + margin, len(document_scores), "standard error of the harness")
    return Interval(value, math.nan, math.nan, len(document_scores), "none")
