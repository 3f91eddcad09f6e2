"""Results of an evaluation as table rows and sentences, for the terminal, the report and the comparison."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowrank_tune.evaluation import EvalRecord, MetricValue
from lowrank_tune.evaluation.results import MetricTable
from lowrank_tune.ui import escape_control_chars
from lowrank_tune.ui.formatting import number, percent
from lowrank_tune.ui.metrics import reward_label

BASE = "base"
SHARE_METRICS = re.compile(r"pass_at_\d+|eos_rate")
LABELS = {
    "loss": "loss, nats per token",
    "reward": "reward",
    "reward_model_score": "reward model score",
    "eos_rate": "stops by itself",
    "mean_length": "tokens per answer",
}
TableRow = tuple[str, str, str, str, str]
"""Metric (empty if it is that of the row above), variant, value, interval, change against the base."""


def heads(record: EvalRecord) -> tuple[str, ...]:
    """Returns the columns of `rows`, without the last if no variant was tuned."""
    level = record.settings.get("confidence")
    interval = "interval"
    if isinstance(level, float):
        interval = f"{100 * level:g} % interval"
    columns = ("", "", "value", interval)
    if record.wins or record.deltas:
        return (*columns, "against the base")
    return columns


def label_of(name: str) -> str:
    """Returns the label of a metric."""
    if name.startswith("pass_at_"):
        return f"pass@{name.removeprefix('pass_at_')}"
    if name in LABELS:
        return LABELS[name]
    reward = reward_label(name)
    if reward != name:
        return f"reward {reward}"
    return name


def value_of(name: str, figure: MetricValue) -> str:
    return _writer(name)(figure.value)


def interval_of(name: str, figure: MetricValue) -> str:
    """Returns the ends of the interval, empty without one."""
    if figure.low is None or figure.high is None or not math.isfinite(figure.low + figure.high):
        return ""
    write = _writer(name)
    return f"{_bare(write(figure.low))} to {_bare(write(figure.high))}"


def change_of(name: str, figure: MetricValue | None) -> str:
    """Returns the difference to the base with its interval, with signs; proportions in percentage points."""
    if figure is None:
        return ""
    change = _signed(name, figure.value)
    if figure.low is None or figure.high is None:
        return change
    return f"{change} ({_signed(name, figure.low)} to {_signed(name, figure.high)})"


def _signed(name: str, value: float) -> str:
    if SHARE_METRICS.fullmatch(name):
        return f"{100 * value:+.1f}"
    if name == "mean_length":
        return f"{value:+.1f}"
    return f"{value:+.3f}"


def rows(record: EvalRecord) -> Iterator[TableRow]:
    """Yields a row for each metric and variant, then the wins against the base, then the tasks."""
    for name, figures in _by_name(record.metrics).items():
        label = label_of(name)
        for model, figure in figures.items():
            change = change_of(name, record.deltas.get(model, {}).get(name))
            yield label, model, value_of(name, figure), interval_of(name, figure), change
            label = ""
    wins = _by_name(record.wins)
    for name in ("reward_model", "verifier"):
        label = f"wins by {name.replace('_', ' ')}"
        for model, figure in wins.get(name, {}).items():
            share = record.shares[model][name]
            shares = f"better {percent(share.wins)}, equal {percent(share.ties)}, worse {percent(share.losses)}"
            yield label, model, percent(figure.value), interval_of("eos_rate", figure), shares
            label = ""
    for name, figures in _by_name(record.tasks).items():
        label = name
        for model, figure in figures.items():
            yield label, model, number(figure.value), interval_of(name, figure), ""
            label = ""


def _by_name(table: MetricTable) -> dict[str, dict[str, MetricValue]]:
    """Returns the metrics by name and then by variant."""
    figures: dict[str, dict[str, MetricValue]] = {}
    for model, model_metrics in table.items():
        for name, figure in model_metrics.items():
            figures.setdefault(name, {})[model] = figure
    return figures


def rows_of_last_model(record: EvalRecord) -> Iterator[tuple[str, str]]:
    """Yields the metrics of the last variant, each in one cell, and their questions, for a comparison of runs."""
    model = next(reversed(list(record.metrics or record.tasks)), "")
    for name, figure in record.metrics.get(model, {}).items():
        yield f"eval: {label_of(name)}", _cell(name, figure)
    for by, figure in record.wins.get(model, {}).items():
        yield f"eval: wins ({by.replace('_', ' ')})", _cell("eos_rate", figure)
    for name, figure in record.tasks.get(model, {}).items():
        yield f"eval: {name}", _cell(name, figure)
    if record.planned:
        yield "eval: of", f"{escape_control_chars(model, 40)}, {escape_control_chars(record.origin, 60)}"
        yield "eval: prompts", f"{record.prompts:,}" + (", interrupted" if record.interrupted else "")


def _cell(name: str, figure: MetricValue) -> str:
    value = value_of(name, figure)
    interval = interval_of(name, figure)
    if interval:
        return f"{value} ({interval})"
    return value


def describe_evaluation(record: EvalRecord) -> list[str]:
    """Returns what was evaluated and how, in sentences."""
    lines = []
    if record.planned:
        lines.append(_describe_questions(record))
    if record.grader_name:
        lines.append(f"answers graded by: {escape_control_chars(record.grader_name, 200)}")
    if record.reward_model:
        lines.append(f"reward model: {escape_control_chars(record.reward_model, 200)}")
    level = record.settings.get("confidence")
    if isinstance(level, float):
        lines.append(
            f"intervals of {100 * level:g} %, a prompt with all its answers one draw: Wilson's for shares, bootstrap "
            "for the rest"
        )
    if record.interrupted:
        lines.append("interrupted: the metrics are of the prompts that all models had finished")
    return lines


def _describe_questions(record: EvalRecord) -> str:
    """Returns source and number of the questions, and how answers were drawn."""
    prompts = f"{record.prompts:,}"
    if record.prompts != record.planned:
        prompts = f"{prompts} of {record.planned:,}"
    samples = _setting(record, "num_samples")
    temperature = _setting(record, "temperature")
    if samples != "1":
        drawn = f"{samples} answers each at temperature {temperature}"
    elif temperature in ("0", "0.0"):
        drawn = "one answer each, greedy"
    else:
        drawn = f"one answer each, at temperature {temperature}"
    origin = escape_control_chars(record.origin, 200)
    return f"{origin}: {prompts} prompts, {drawn}, seed {_setting(record, 'seed')}"


def _setting(record: EvalRecord, name: str) -> str:
    return escape_control_chars(str(record.settings.get(name, "?")), 20)


def show(
    record: EvalRecord,
    ungraded: Mapping[str, int],
    console: Console,
) -> None:
    """Prints the table, and how the metrics were computed."""
    columns = heads(record)
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows(record):
        cells = [Text(escape_control_chars(cell, 80)) for cell in row[: len(columns)]]
        table.add_row(*cells)
    console.print(table)
    lines = describe_evaluation(record)
    for reason, count in ungraded.items():
        lines.append(f"{count:,} answers could not be graded and are in no metric: {escape_control_chars(reason, 300)}")
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def _writer(name: str) -> Callable[[float], str]:
    if SHARE_METRICS.fullmatch(name):
        return percent
    if name == "mean_length":
        return "{:.1f}".format
    return number


def _bare(text: str) -> str:
    return text.removesuffix(" %")
