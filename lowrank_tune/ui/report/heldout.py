"""Held-out questions and pairs: the figures of the base and of each stage, and their answers side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from lowrank_tune.evaluation.grading import is_exact
from lowrank_tune.json_files import get_mapping, get_number, get_objects
from lowrank_tune.ui.formatting import format_metric, percent
from lowrank_tune.ui.html import render
from lowrank_tune.ui.metrics import PAIR_ACCURACY, heldout_parts
from lowrank_tune.ui.report.run_log import ChainLog, RunLog

FIGURE_LABELS = {
    "": "(all)",
    "accuracy": "exact answers (pass@1)",
    "eos_rate": "stops by itself",
    "mean_length": "tokens per answer",
}
FIGURES_AT_END = ("eos_rate", "mean_length")
PASS_PREFIX = "pass_at_"

StageStats = dict[str, dict[str, float]]
"""Held-out figures by stage and by name; the stage that was measured first comes first."""


@dataclass(frozen=True)
class Figure:
    """A figure in words; `share` is what its bar shows, None for a figure that is not a share."""

    text: str
    share: float | None = None


@dataclass(frozen=True)
class GradedAnswer:
    """An answer; `is_right` is None where it could not be graded."""

    text: str
    is_complete: bool
    is_right: bool | None


@dataclass(frozen=True)
class HeldoutAnswer:
    """A stage's answer to one question."""

    prompt: Any
    ground_truth: Any
    answer: GradedAnswer


def heldout_by_stage(run_log: RunLog) -> StageStats:
    """Returns the figures of the base and of each stage, from the summary or, if it has none, from the events."""
    stages: StageStats = {}
    for stage, stats in get_mapping(run_log.summary, "heldout_details").items():
        if isinstance(stats, Mapping):
            stages[str(stage)] = {str(name): get_number(stats, name) for name in stats}
    if stages:
        return stages
    for name, points in run_log.checks.items():
        if name.startswith("heldout/") and points:
            stage, figure = heldout_parts(name)
            stages.setdefault(stage, {})[figure] = points[max(points)]
    return stages


def heldout_by_stage_of_chain(chain: ChainLog) -> StageStats:
    """Returns the figures of the base and of every stage of a chain."""
    stages: StageStats = {}
    for run_log in chain.started_stages:
        for stage, stats in heldout_by_stage(run_log).items():
            stages.setdefault(stage, stats)
    return stages


def heldout_pair_accuracy(run_log: RunLog) -> float | None:
    """Returns the share of held-out pairs that are right: of the final adapter, or else of the last validation."""
    if run_log.algorithm not in PAIR_ACCURACY:
        return None
    checks = run_log.finite_values(f"eval_{PAIR_ACCURACY[run_log.algorithm]}")
    scored = get_mapping(run_log.summary, "heldout_pairs")
    if not checks and "accuracy" not in scored:
        return None
    last_check = checks[max(checks)] if checks else 0.0
    return get_number(
        scored,
        "accuracy",
        last_check,
    )


def heldout_section(run_log: RunLog) -> Markup:
    """Returns a table with a column for each stage, and the same questions as each stage answers them."""
    return _section(heldout_by_stage(run_log), [run_log])


def chain_heldout_section(chain: ChainLog) -> Markup:
    """Returns the same over the base and all stages of a chain."""
    return _section(heldout_by_stage_of_chain(chain), chain.started_stages)


def _section(
    stages: StageStats,
    run_logs: Sequence[RunLog],
) -> Markup:
    if not stages:
        return Markup()
    rows = []
    for name in figure_names(stages):
        rows.append(
            (
                figure_label(name),
                [_figure(name, stats.get(name)) for stats in stages.values()],
            )
        )
    answers = _answers_by_stage(run_logs)
    questions = list(zip(*answers.values(), strict=False))
    return render(
        "heldout",
        stages=list(stages),
        rows=rows,
        answered_by=list(answers),
        questions=questions,
    )


def figure_names(stages: StageStats) -> list[str]:
    """Returns the names of the figures in the order in which they are shown."""
    names = dict.fromkeys(name for stats in stages.values() for name in stats)
    return sorted(names, key=_position)


def _position(name: str) -> tuple[bool, int]:
    return name != "accuracy", FIGURES_AT_END.index(name) + 1 if name in FIGURES_AT_END else 0


def figure_label(name: str) -> str:
    """Returns a figure in words."""
    if name.startswith(PASS_PREFIX):
        count = name.removeprefix(PASS_PREFIX)
        return f"one of {count} exact (pass@{count})"
    return FIGURE_LABELS.get(name, name)


def format_figure(
    name: str,
    value: float,
) -> str:
    """Returns the value of a figure; all but the length of the answers are shares."""
    return format_metric(name, value) if name == "mean_length" else percent(value)


def _figure(
    name: str,
    value: float | None,
) -> Figure:
    if value is None:
        return Figure("")
    return Figure(format_figure(name, value), None if name == "mean_length" else value)


def _answers_by_stage(run_logs: Sequence[RunLog]) -> dict[str, list[HeldoutAnswer]]:
    answers: dict[str, list[HeldoutAnswer]] = {}
    for run_log in run_logs:
        by_stage = get_mapping(run_log.summary, "answers")
        for stage in by_stage:
            if str(stage) not in answers:
                answers[str(stage)] = [_heldout_answer(answer) for answer in get_objects(by_stage, stage)]
    return answers


def _heldout_answer(answer: Mapping[str, Any]) -> HeldoutAnswer:
    ground_truth = answer.get("ground_truth")
    graded = grade(
        str(answer.get("completion", "")),
        bool(answer.get("stopped")),
        ground_truth,
    )
    return HeldoutAnswer(
        answer.get("prompt") or "",
        ground_truth or "",
        graded,
    )


def grade(
    completion: str,
    is_complete: bool,
    ground_truth: Any,
) -> GradedAnswer:
    """Returns an answer with its grade. One that was cut off is never right."""
    if not isinstance(ground_truth, str):
        return GradedAnswer(
            completion,
            is_complete,
            None,
        )
    return GradedAnswer(
        completion,
        is_complete,
        is_complete and is_exact(completion, ground_truth),
    )
