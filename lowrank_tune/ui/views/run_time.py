"""The run-time estimate of a plan in a terminal: tokens per second of each phase, and hours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowrank_tune.memory_planner.plan_report import PHASE_SEPARATOR
from lowrank_tune.memory_planner.run_length import Span
from lowrank_tune.memory_planner.run_time import PhaseSpeed, RunTime
from lowrank_tune.ui import escape_control_chars

MILLION = 1_000_000
MIN_HOURS = 0.1
"""Times below this number of hours are in minutes."""
MIN_MINUTES = 1.0
"""Times below this number of minutes are in seconds."""
ESTIMATE = "estimate, not measured"


def show_run_time(run_time: RunTime, console: Console) -> None:
    """Prints the estimate: a table of phases, and the time of the whole run."""
    console.print(_table(run_time))
    for line in run_time_lines(run_time):
        console.print(line)


def run_time_lines(run_time: RunTime) -> Iterator[Text]:
    """Yields the time of the whole run, or of a million tokens if its length is unknown."""
    hours = run_time.hours
    if hours is None or run_time.length is None:
        million = duration(run_time.update_hours(MILLION))
        yield Text(f"a million tokens of the update: {million} ({ESTIMATE}); the number of rows is not known")
        return
    yield Text(f"the whole run: {duration(hours)} ({ESTIMATE})")
    yield Text(escape_control_chars(f"for {run_time.length.basis}"), "dim")


def duration(hours: Span) -> str:
    """Returns a range of hours, or of minutes or seconds if it is short."""
    if hours.high >= MIN_HOURS:
        return f"{_figure(hours.low)} to {_figure(hours.high)} hours"
    if hours.high * 60 >= MIN_MINUTES:
        return f"{_figure(hours.low * 60)} to {_figure(hours.high * 60)} minutes"
    return f"{_figure(hours.low * 3600)} to {_figure(hours.high * 3600)} seconds"


def run_time_to_dict(run_time: RunTime) -> dict[str, Any]:
    """Returns the estimate as JSON."""
    phases = []
    for phase in run_time.phases:
        phases.append(
            {
                "phase": phase.name,
                "tokens_per_second": round(phase.tokens_per_second, 1),
                "hours": _bounds(phase.hours),
                "host_bound": phase.time.is_host_bound,
            }
        )
    length = run_time.length
    return {
        "label": ESTIMATE,
        "gpu": run_time.gpu.name,
        "phases": phases,
        "hours": _bounds(run_time.hours),
        "hours_per_million_tokens": _bounds(run_time.update_hours(MILLION)),
        "steps": None if length is None else round(length.steps),
        "tokens": None if length is None else _bounds(length.tokens),
        "length": None if length is None else length.basis,
    }


def _table(run_time: RunTime) -> Table:
    table = Table(
        box=None,
        pad_edge=False,
        padding=(0, 0, 0, 2),
        header_style="dim",
    )
    table.add_column(f"speed on one {run_time.gpu.device_name}", no_wrap=True)
    table.add_column("tokens/s", justify="right", no_wrap=True)
    table.add_column("of the run", no_wrap=True)
    table.add_column("limit", no_wrap=True)
    for phase in run_time.phases:
        table.add_row(*_cells(phase))
    return table


def _cells(phase: PhaseSpeed) -> tuple[str, ...]:
    _, _, part = phase.name.partition(PHASE_SEPARATOR)
    name = f"  {part}" if part else phase.name
    hours = "" if phase.hours is None else duration(phase.hours)
    limit = "host" if phase.time.is_host_bound else ""
    return name, f"{phase.tokens_per_second:,.0f}", hours, limit


def _figure(number: float) -> str:
    return f"{number:.2g}" if number < 10 else f"{number:,.0f}"


def _bounds(span: Span | None) -> list[float] | None:
    if span is None:
        return None
    return [float(f"{span.low:.4g}"), float(f"{span.high:.4g}")]
