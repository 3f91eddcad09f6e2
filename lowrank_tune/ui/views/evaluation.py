"""What an evaluation says, in words and rows: for the terminal, the report and the comparison. Pure but for `show`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowrank_tune.evaluation import EvalRecord, MetricValue
from lowrank_tune.ui import escape_control_chars
from lowrank_tune.ui.formatting import number, percent
from lowrank_tune.ui.metrics import reward_label

BASE = "base"
SHARE_METRICS = re.compile(r"pass_at_\d+|eos_rate")
TableRow = tuple[str, str, str, str, str]
"""Figure (empty where it is that of the line above), variant, value, interval, change against the base."""


def heads(record: EvalRecord) -> tuple[str, ...]:
    """The columns of `rows`; without the last where nothing was tuned."""
    level = record.settings.get("confidence")
    if isinstance(level, float):
        interval = f"{100 * level:g} % interval"
    else:
        interval = "interval"
    return ("", "", "value", interval, *(("against the base",) if record.wins or record.deltas else ()))


def label_of(name: str) -> str:
    """A figure in words."""
    if match := re.fullmatch(r"pass_at_(\d+)", name):
        return f"pass@{match[1]}"
    plain = {
        "loss": "loss, nats a token",
        "reward": "reward",
        "reward_model_score": "reward model score",
        "eos_rate": "stops by itself",
        "mean_length": "tokens an answer",
    }
    reward = reward_label(name)
    return plain.get(name) or (f"reward {reward}" if reward != name else name)


def value_of(name: str, figure: MetricValue) -> str:
    return _writer(name)(figure.value)


def interval_of(name: str, figure: MetricValue) -> str:
    """From where to where; empty where nothing can be said."""
    if figure.low is None or figure.high is None or not math.isfinite(figure.low + figure.high):
        return ""
    write = _writer(name)
    return f"{_bare(write(figure.low))} to {_bare(write(figure.high))}"


def change_of(name: str, figure: MetricValue | None) -> str:
    """The difference with its interval, with signs; shares in points."""
    if figure is None:
        return ""
    share = SHARE_METRICS.fullmatch(name) is not None

    def write(value: float) -> str:
        if share:
            return f"{100 * value:+.1f}"
        if name == "mean_length":
            return f"{value:+.1f}"
        return f"{value:+.3f}"

    has_interval = figure.low is not None and figure.high is not None
    if has_interval and figure.low is not None and figure.high is not None:
        ends = f" ({write(figure.low)} to {write(figure.high)})"
    else:
        ends = ""
    return write(figure.value) + ends


def rows(record: EvalRecord) -> Iterator[TableRow]:
    """Every figure, a line a variant, then the wins against the base, then the tasks."""
    names = list(dict.fromkeys(name for model_metrics in record.metrics.values() for name in model_metrics))
    for name in names:
        first = True
        for model, model_metrics in record.metrics.items():
            if name in model_metrics:
                figure = model_metrics[name]
                change = change_of(name, record.deltas.get(model, {}).get(name))
                yield label_of(name) if first else "", model, value_of(name, figure), interval_of(name, figure), change
                first = False
    for by in ("reward_model", "verifier"):
        first = True
        for model, model_metrics in record.wins.items():
            if by in model_metrics:
                share = record.shares[model][by]
                shares_text = (
                    f"better {percent(share.wins)}, equal {percent(share.ties)}, worse {percent(share.losses)}"
                )
                yield (
                    f"wins by {by.replace('_', ' ')}" if first else "",
                    model,
                    percent(model_metrics[by].value),
                    interval_of("eos_rate", model_metrics[by]),
                    shares_text,
                )
                first = False
    for name in dict.fromkeys(name for model_metrics in record.tasks.values() for name in model_metrics):
        first = True
        for model, model_metrics in record.tasks.items():
            if name in model_metrics:
                yield (
                    name if first else "",
                    model,
                    number(model_metrics[name].value),
                    interval_of(name, model_metrics[name]),
                    "",
                )
                first = False


def rows_of_last_model(record: EvalRecord) -> Iterator[tuple[str, str]]:
    """The figures of what was trained last, each in one cell, and what they were measured on: for a comparison."""
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
    interval = interval_of(name, figure)
    return value_of(name, figure) + (f" ({interval})" if interval else "")


def describe_evaluation(record: EvalRecord) -> list[str]:
    """What was measured, on what and how, in sentences."""
    lines = []
    settings = record.settings
    level = settings.get("confidence")
    if record.planned:
        if record.prompts == record.planned:
            prompts = f"{record.prompts:,} prompts"
        else:
            prompts = f"{record.prompts:,} of {record.planned:,} prompts"
        samples, temperature, seed = (
            escape_control_chars(str(settings.get(name, "?")), 20) for name in ("num_samples", "temperature", "seed")
        )
        if samples != "1":
            drawn = f"{samples} answers each at temperature {temperature}"
        else:
            drawn = "one answer each, " + ("greedy" if temperature in ("0", "0.0") else f"at temperature {temperature}")
        lines.append(f"{escape_control_chars(record.origin, 200)}: {prompts}, {drawn}, seed {seed}")
    if record.grader_name:
        lines.append(f"answers graded by: {escape_control_chars(record.grader_name, 200)}")
    if record.reward_model:
        lines.append(f"reward model: {escape_control_chars(record.reward_model, 200)}")
    if isinstance(level, float):
        lines.append(
            f"intervals of {100 * level:g} %, a prompt with all its answers one draw: Wilson's for shares, bootstrap "
            f"for the rest"
        )
    if record.interrupted:
        lines.append("interrupted: the figures are of what was measured until then, the same prompts for all")
    return lines


def show(record: EvalRecord, ungraded: Mapping[str, int], console: Console) -> None:
    """The table for the terminal."""
    table = Table(*heads(record), box=None, pad_edge=False)
    width = len(heads(record))
    for row in rows(record):
        table.add_row(*(Text(escape_control_chars(cell, 80)) for cell in row[:width]))
    console.print(table)
    for line in describe_evaluation(record):
        console.print(Text(line), soft_wrap=True)
    for reason, count in ungraded.items():
        console.print(
            Text(f"{count:,} answers could not be graded and are in no metric: {escape_control_chars(reason, 300)}"),
            soft_wrap=True,
        )


def _writer(name: str) -> Callable[[float], str]:
    if SHARE_METRICS.fullmatch(name):
        return percent
    if name == "mean_length":
        return "{:.1f}".format
    return number


def _bare(text: str) -> str:
    return text.removesuffix(" %")
