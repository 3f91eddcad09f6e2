"""The figures of each run in words, a row for each: what was run, how it ended, and its results."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lowrank_tune.config.schema import ONLINE_ALGORITHMS
from lowrank_tune.json_files import get_mapping
from lowrank_tune.training.run_totals import RunTotals, chain_totals
from lowrank_tune.ui.compare.runs import ComparedRun
from lowrank_tune.ui.formatting import number, percent, rate, wall_time
from lowrank_tune.ui.metrics import (
    POLICY,
    WITHOUT_REFERENCE,
    kl_metric,
)
from lowrank_tune.ui.report.heldout import (
    PASS_PREFIX,
    StageStats,
    heldout_by_stage,
    heldout_by_stage_of_chain,
    heldout_pair_accuracy,
)
from lowrank_tune.ui.report.run_log import StepValues
from lowrank_tune.ui.trend import ARROW, first_and_last, trend
from lowrank_tune.ui.views.evaluation import rows_of_last_model

Row = tuple[str, list[str]]
"""A label, and a cell for each run."""


def rows(runs: Sequence[ComparedRun]) -> list[Row]:
    """Returns the rows of the table. A row without a figure is left out."""
    labeled = [(label, [write(run) for run in runs]) for label, write in ROWS]
    labeled += _evaluations(runs)
    return [(label, cells) for label, cells in labeled if any(cells)]


def _evaluations(runs: Sequence[ComparedRun]) -> list[Row]:
    """Returns the figures of the model that was trained last, from the newest evaluation of each run."""
    figures = []
    for run in runs:
        evaluation = run.evaluation
        figures.append({} if evaluation is None else dict(rows_of_last_model(evaluation)))
    names = dict.fromkeys(name for run_figures in figures for name in run_figures)
    return [(name, [run_figures.get(name, "") for run_figures in figures]) for name in names]


def heldout(run: ComparedRun) -> StageStats:
    """Returns the held-out figures of the base and of each stage, the one that was measured first at the beginning."""
    if run.chain is not None:
        stages = heldout_by_stage_of_chain(run.chain)
    else:
        stages = heldout_by_stage(run.last)
    return {stage: stats for stage, stats in stages.items() if stage != POLICY}


def _algorithm(run: ComparedRun) -> str:
    return ARROW.join(str(run_log.algorithm) for run_log in run.run_logs if run_log.started is not None)


def _base(run: ComparedRun) -> str:
    return next(
        (str(run_log.started.model) for run_log in run.run_logs if run_log.started is not None),
        "",
    )


def _ended(run: ComparedRun) -> str:
    if run.last.ended is not None and get_mapping(run.last.summary, "hacking").get("ended") is True:
        return f"{run.status}, early"
    return run.status


def _steps(run: ComparedRun) -> str:
    """Returns the steps of all stages, and of how many the last one is if it did not take all of them."""
    steps = " + ".join(f"{run_log.step:,}" for run_log in run.run_logs)
    started = run.last.started
    if started is not None and run.last.step != started.steps:
        return f"{steps} of {started.steps:,}"
    return steps


def _seconds(run: ComparedRun) -> str:
    totals = _totals(run)
    return wall_time(totals.seconds, totals.sessions)


def _totals(run: ComparedRun) -> RunTotals:
    stages = [run_log.totals for run_log in run.run_logs]
    return stages[0] if run.chain is None else chain_totals(stages)


@dataclass(frozen=True)
class HeldoutFigure:
    """Writes a held-out figure of the model that was measured first, or last.

    The last one is written only if another model was measured before it.
    """

    name: str
    format_value: Callable[[float], str]
    is_last: bool = False
    with_stage: bool = False

    def __call__(self, run: ComparedRun) -> str:
        measured = [(stage, stats[self.name]) for stage, stats in heldout(run).items() if self.name in stats]
        if len(measured) <= self.is_last:
            return ""
        stage, value = measured[-1 if self.is_last else 0]
        figure = self.format_value(value)
        return f"{figure} ({stage})" if self.with_stage else figure


def _pass_rate(run: ComparedRun) -> str:
    """Returns the last pass@k of the stages, without that of the base."""
    cell = ""
    for stats in list(heldout(run).values())[1:]:
        for name, value in stats.items():
            if name.startswith(PASS_PREFIX):
                cell = f"{percent(value)} (of {name.removeprefix(PASS_PREFIX)})"
    return cell


def _best_accuracy(run: ComparedRun) -> str:
    points = run.points("heldout/accuracy")
    if not points:
        return ""
    best = max(points, key=lambda step: (points[step], step))
    return f"{percent(points[best])} (step {best:,})"


def _pairs(run: ComparedRun) -> str:
    share = heldout_pair_accuracy(run.last)
    return "" if share is None else percent(share)


def _best_loss(run: ComparedRun) -> str:
    points = run.points("eval_loss")
    if not points:
        return ""
    best = min(points, key=points.__getitem__)
    return f"{number(points[best])} (step {best:,})"


@dataclass(frozen=True)
class Trend:
    """Writes the mean over the first and over the last tenth of a curve."""

    metric: str

    def __call__(self, run: ComparedRun) -> str:
        return trend(self.metric, list(run.points(self.metric).values()))


def _loss(run: ComparedRun) -> str:
    """Returns the trend of the loss; with rewards for completions it has no meaning."""
    if run.algorithm in ONLINE_ALGORITHMS:
        return ""
    return Trend("loss")(run)


def _kl(run: ComparedRun) -> str:
    values = list(run.points(kl_metric(run.algorithm)).values())
    if not values or run.algorithm in WITHOUT_REFERENCE:
        return ""
    _, last = first_and_last(values)
    return number(last)


def _speed(run: ComparedRun) -> str:
    totals = _totals(run)
    return rate(totals.tokens_per_second) if totals.tokens else ""


def _memory(run: ComparedRun) -> str:
    values = list[float]()
    for run_log in run.run_logs:
        values += _without_nan(run_log.series.get("memory_gib", {}))
    return f"{max(values):.2f} GiB" if values else ""


def _without_nan(points: StepValues) -> list[float]:
    return [value for value in points.values() if not math.isnan(value)]


def _warnings(run: ComparedRun) -> str:
    count = sum(len(run_log.warnings) for run_log in run.run_logs)
    return str(count) if count else ""


def _hacking(run: ComparedRun) -> str:
    """Returns the step after which the run warned of reward hacking."""
    warned_at = get_mapping(run.last.summary, "hacking").get("step")
    return f"warned at step {warned_at}" if isinstance(warned_at, int) else ""


TOKENS = "{:.1f}".format
NOTES = (
    "first, last and end: mean over the first or the last tenth of the steps",
    "tokens per second: the tokens of all steps by their time",
)
"""What the labels leave out."""
ROWS: tuple[tuple[str, Callable[[ComparedRun], str]], ...] = (
    ("algorithm", _algorithm),
    ("base", _base),
    ("ended", _ended),
    ("steps", _steps),
    ("wall time", _seconds),
    (
        "held-out exact, before",
        HeldoutFigure(
            "accuracy",
            percent,
            with_stage=True,
        ),
    ),
    (
        "held-out exact, after",
        HeldoutFigure(
            "accuracy",
            percent,
            is_last=True,
            with_stage=True,
        ),
    ),
    ("one of several exact", _pass_rate),
    ("best while training", _best_accuracy),
    ("held-out pairs right", _pairs),
    ("validation loss, best", _best_loss),
    ("reward, first and last", Trend("reward")),
    ("KL to the reference, end", _kl),
    ("loss, first and last", _loss),
    ("tokens per answer, before", HeldoutFigure("mean_length", TOKENS)),
    (
        "tokens per answer, after",
        HeldoutFigure(
            "mean_length",
            TOKENS,
            is_last=True,
        ),
    ),
    ("tokens per completion", Trend("completions/mean_length")),
    ("tokens per second", _speed),
    ("peak memory", _memory),
    ("reward hacking", _hacking),
    ("warnings", _warnings),
)
