"""The figures of each side in words, a row for each: what was run, how it ended, and what it came to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, median

from lowrank_tune.ui.compare.runs import ComparedRun
from lowrank_tune.ui.formatting import clock, number, percent
from lowrank_tune.ui.metrics import GENERATIVE_ALGORITHMS, PAIR_ACCURACY, POLICY, WITHOUT_REFERENCE
from lowrank_tune.ui.report.html import get_mapping, get_number
from lowrank_tune.ui.report.run_log import StepValues
from lowrank_tune.ui.report.sections import heldout_by_stage, heldout_by_stage_of_chain
from lowrank_tune.ui.views import evaluation as evals_view

ENDS = 10  # a first or last value is the mean of a tenth of the run
ARROW = " \u2192 "


def rows(runs: Sequence[ComparedRun]) -> list[tuple[str, list[str]]]:
    """Label and a cell a side; what no side has is left out."""
    labeled_cells = [(label, [write(run) for run in runs]) for label, write in ROWS]
    return [(label, cells) for label, cells in [*labeled_cells, *_evaluations(runs)] if any(cells)]


def _evaluations(runs: Sequence[ComparedRun]) -> list[tuple[str, list[str]]]:
    """The last variant of each side's newest evaluation: its figures with their intervals, and what they are of."""
    figures = [
        dict(evals_view.rows_of_last_model(run.evaluation)) if run.evaluation is not None else {} for run in runs
    ]
    names = dict.fromkeys(name for run_figures in figures for name in run_figures)
    return [(name, [run_figures.get(name, "") for run_figures in figures]) for name in names]


def heldout(run: ComparedRun) -> dict[str, dict[str, float]]:
    """Held-out figures of the base and of each stage, what was measured first standing first."""
    if run.chain is not None:
        stats_by_stage = heldout_by_stage_of_chain(run.chain)
    else:
        stats_by_stage = heldout_by_stage(run.last)
    return {who: stats for who, stats in stats_by_stage.items() if who != POLICY}


def _algorithm(run: ComparedRun) -> str:
    return ARROW.join(str(run_log.started.algorithm) for run_log in run.run_logs if run_log.started is not None)


def _base(run: ComparedRun) -> str:
    return next((str(run_log.started.model) for run_log in run.run_logs if run_log.started is not None), "")


def _ended(run: ComparedRun) -> str:
    if run.last.ended is not None and get_mapping(run.last.summary, "hacking").get("ended") is True:
        return f"{run.status}, early"
    return run.status


def _steps(run: ComparedRun) -> str:
    last = run.last
    earlier = "".join(f"{run_log.step:,} + " for run_log in run.run_logs[:-1])
    return f"{earlier}{last.step:,}" + (
        f" of {last.started.steps:,}" if last.started is not None and last.step != last.started.steps else ""
    )


def _seconds(run: ComparedRun) -> str:
    return clock(sum(run_log.seconds for run_log in run.run_logs))


def _heldout_cell(
    which: int,
    key: str,
    format_value: Callable[[float], str],
    named: bool = False,
) -> Callable[[ComparedRun], str]:
    """A held-out figure of the first (0) or the last (-1) who was asked; of the last only where somebody was asked
    before."""

    def cell(run: ComparedRun) -> str:
        stage_values = [(who, stats[key]) for who, stats in heldout(run).items() if key in stats]
        if not stage_values or (which == -1 and len(stage_values) < 2):
            return ""
        return format_value(stage_values[which][1]) + (f" ({stage_values[which][0]})" if named else "")

    return cell


def _passes(run: ComparedRun) -> str:
    pass_rates = [
        (key, value)
        for stats in list(heldout(run).values())[1:]
        for key, value in stats.items()
        if key.startswith("pass_at_")
    ]
    if pass_rates:
        return f"{percent(pass_rates[-1][1])} (of {pass_rates[-1][0][8:]})"
    return ""


def _best_accuracy(run: ComparedRun) -> str:
    points = run.points("heldout/accuracy")
    if not points:
        return ""
    best = max(points, key=lambda step: (points[step], step))
    return f"{percent(points[best])} (step {best:,})"


def _pairs(run: ComparedRun) -> str:
    if run.last.started is None or run.last.started.algorithm not in PAIR_ACCURACY:
        return ""
    scored = get_mapping(run.last.summary, "heldout_pairs")
    checks = run.points(f"eval_{PAIR_ACCURACY[run.last.started.algorithm]}")
    if not checks and "accuracy" not in scored:
        return ""
    return percent(get_number(scored, "accuracy", list(checks.values())[-1] if checks else 0.0))


def _best_loss(run: ComparedRun) -> str:
    points = run.points("eval_loss")
    if not points:
        return ""
    best = min(points, key=lambda step: points[step])
    return f"{number(points[best])} (step {best:,})"


def _first_and_last_tenth(metric: str, format_value: Callable[[float], str] = number) -> Callable[[ComparedRun], str]:
    """The first and the last tenth of a curve."""

    def cell(run: ComparedRun) -> str:
        values = list(run.points(metric).values())
        part = max(1, len(values) // ENDS)
        if values:
            return f"{format_value(fmean(values[:part]))}{ARROW}{format_value(fmean(values[-part:]))}"
        return ""

    return cell


def _loss(run: ComparedRun) -> str:
    """Where completions are rewarded it says nothing."""
    if run.last.started is not None and run.last.started.algorithm in GENERATIVE_ALGORITHMS:
        return ""
    return _first_and_last_tenth("loss")(run)


def _kl(run: ComparedRun) -> str:
    if run.last.started is not None and run.last.started.algorithm in WITHOUT_REFERENCE:
        return ""
    values = list(run.points("kl").values())
    if values:
        return number(fmean(values[-max(1, len(values) // ENDS) :]))
    return ""


def _speed(run: ComparedRun) -> str:
    values = _without_nan(run.points("tokens_per_second"))
    return f"{median(values):,.0f}" if values else ""


def _memory(run: ComparedRun) -> str:
    values = [value for run_log in run.run_logs for value in _without_nan(run_log.series.get("memory_gib", {}))]
    return f"{max(values):.1f} GiB" if values else ""


def _without_nan(points: StepValues) -> list[float]:
    return [value for value in points.values() if value == value]


def _warnings(run: ComparedRun) -> str:
    count = sum(len(run_log.warnings) for run_log in run.run_logs)
    return str(count) if count else ""


def _hacking(run: ComparedRun) -> str:
    """Whether the run said that its reward pays for something else."""
    warned_at = get_mapping(run.last.summary, "hacking").get("step")
    if isinstance(warned_at, int):
        return f"said at step {warned_at}"
    return ""


TOKENS = "{:.1f}".format
ROWS: tuple[tuple[str, Callable[[ComparedRun], str]], ...] = (
    ("algorithm", _algorithm),
    ("base", _base),
    ("ended", _ended),
    ("steps", _steps),
    ("time", _seconds),
    ("held-out exact, before", _heldout_cell(0, "accuracy", percent, named=True)),
    ("held-out exact, after", _heldout_cell(-1, "accuracy", percent, named=True)),
    ("one of several exact", _passes),
    ("best while training", _best_accuracy),
    ("held-out pairs right", _pairs),
    ("validation loss, best", _best_loss),
    ("reward", _first_and_last_tenth("reward")),
    ("KL to reference, end", _kl),
    ("loss", _loss),
    ("tokens an answer, before", _heldout_cell(0, "mean_length", TOKENS)),
    ("tokens an answer, after", _heldout_cell(-1, "mean_length", TOKENS)),
    ("tokens a completion", _first_and_last_tenth("completions/mean_length", TOKENS)),
    ("tokens a second", _speed),
    ("peak memory", _memory),
    ("reward hacking", _hacking),
    ("warnings", _warnings),
)
