"""Tasks of lm-evaluation-harness on the live model: its own Hugging Face adapter around the base in memory, with a
voice's stack entered.

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

from lowrank_tune.data import Template
from lowrank_tune.errors import RunFailed, UserError, did_you_mean
from lowrank_tune.evals.figures import Figures
from lowrank_tune.evals.intervals import NORMAL, Interval, mean_of, share_of
from lowrank_tune.evals.subject import role_of
from lowrank_tune.events import Emit, Progress
from lowrank_tune.model.base import Base
from lowrank_tune.model.roles import Roles

MISSING = "--tasks needs lm-evaluation-harness, which is not installed: pip install 'lowrank-tune[harness]'"
BOOTSTRAPS = 1000  # of the harness, for metrics that are no means
BATCH = 8  # rows at once on a CPU; on a card the harness finds out how many fit


@dataclass(frozen=True)
class Tasks:
    """Which tasks, by their names in the harness or in the user's own YAML files; `limit` documents of each; `chat`:
    asked in the chat template that the model was trained with."""

    names: tuple[str, ...]
    limit: int | None
    level: float
    seed: int
    chat: bool
    manager: Any
    """The harness's own register, as `known` made it."""


def known(names: Sequence[str], path: Path | None) -> Any:
    """The harness's register of tasks, with those of a folder. Raises UserError, before anything is loaded, where the
    harness is missing or does not know one of these."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(MISSING)
    if path is not None and not path.is_dir():
        raise UserError(f"--tasks-path: {path} is no folder; it should hold the YAML files of your tasks")
    from lm_eval.tasks import TaskManager  # an extra, and it takes seconds

    manager = TaskManager(include_path=str(path) if path is not None else None)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        where = f" nor under {path}" if path is not None else ""
        raise UserError(
            f"--tasks: there is no task `{unknown[0]}` in lm-evaluation-harness{where}"
            f"{did_you_mean(unknown[0], manager.all_tasks)}"
        )
    return manager


def measure(
    roles: Roles, base: Base, template: Template, voices: Sequence[str], tasks: Tasks, emit: Emit
) -> tuple[dict[str, Figures], bool]:
    """Every task for every voice. Ctrl-C keeps the voices that are done, and says so by True."""
    # its warnings are about how it was called, which is settled here
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found: dict[str, Figures] = {}
    what = f"tasks {', '.join(tasks.names)}"
    try:
        for done, voice in enumerate(voices):
            emit(Progress(what=what, done=done, total=len(voices)))
            with roles.quiet(), roles.use(role_of(voice)), base.autocast():
                found[voice] = _figures(_results(base, template, tasks), tasks)
        emit(Progress(what=what, done=len(voices), total=len(voices)))
    except KeyboardInterrupt:
        return found, True
    return found, False


def _results(base: Base, template: Template, tasks: Tasks) -> Mapping[str, Any]:
    from lm_eval import simple_evaluate  # an extra, and it takes seconds
    from lm_eval.models.huggingface import HFLM

    tokenizer = copy.deepcopy(base.tokenizer)  # the harness gives it a padding token
    tokenizer.chat_template = tokenizer.chat_template or template.jinja
    model = HFLM(
        pretrained=base.model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size="auto" if base.device.type == "cuda" else BATCH,
    )
    try:
        return dict(
            simple_evaluate(
                model,
                tasks=list(tasks.names),
                task_manager=tasks.manager,
                limit=tasks.limit,
                bootstrap_iters=BOOTSTRAPS,
                log_samples=True,
                apply_chat_template=tasks.chat,
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
        told = (str(error).splitlines() or [""])[0]
        raise RunFailed(
            f"--tasks: lm-evaluation-harness broke on {', '.join(tasks.names)}: {type(error).__name__}: {told}"
        ) from error


def _figures(results: Mapping[str, Any], tasks: Tasks) -> Figures:
    """`TASK METRIC` of every task that was asked for, with an interval over its documents."""
    made: Figures = {}
    for task in tasks.names:
        found = results.get("results", {}).get(task) or results.get("groups", {}).get(task) or {}
        for key, value in found.items():
            metric, _, kept = key.partition(",")
            if metric.endswith("_stderr") or metric == "alias" or not isinstance(value, (int, float)) or not kept:
                continue
            name = f"{task} {metric}" + (f" ({kept})" if kept != "none" else "")
            documents = [
                float(one[metric])
                for one in results.get("samples", {}).get(task, ())
                if isinstance(one.get(metric), (int, float)) and one.get("filter", kept) == kept
            ]
            made[name] = _interval(float(value), found.get(f"{metric}_stderr,{kept}"), documents, tasks)
    return made


def _interval(value: float, error: Any, documents: list[float], tasks: Tasks) -> Interval:
    """Over the documents, where the figure is their mean; else by the standard error that the harness gives."""
    if documents and math.isclose(math.fsum(documents) / len(documents), value, abs_tol=1e-9):
        if all(0 <= one <= 1 for one in documents):
            return share_of(documents, 1, tasks.level)
        return mean_of(documents, tasks.seed, tasks.level)
    if isinstance(error, (int, float)):
        half = NORMAL.inv_cdf((1 + tasks.level) / 2) * error
        return Interval(value, value - half, value + half, len(documents), "standard error of the harness")
    return Interval(value, math.nan, math.nan, len(documents), "none")
