"""A list of runs as a table for a terminal: narrow terminals show fewer columns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowrank_tune.full_disk import format_size
from lowrank_tune.ui import escape_control_chars
from lowrank_tune.ui.formatting import clock, format_age, format_metric
from lowrank_tune.ui.run_list.entry import ListedRun, RunState

MAX_NAME_WIDTH = 40
MAX_CELL = 200
GAP = 2
STYLES = {
    RunState.RUNNING: "cyan",
    RunState.DONE: "green",
    RunState.INTERRUPTED: "yellow",
    RunState.FAILED: "bold red",
    RunState.KILLED: "yellow",
    RunState.NOT_STARTED: "dim",
    RunState.DAMAGED: "bold red",
}


@dataclass(frozen=True)
class Column:
    """A column of the table. The one with the largest `rank` is left out first; rank 0 always stays."""

    head: str
    rank: int
    cell: Callable[[ListedRun], str]
    is_number: bool = False


def _best(run: ListedRun) -> str:
    return "" if run.best is None else f"{run.best.label} {format_metric(run.best.name, run.best.value)}"


def _steps(run: ListedRun) -> str:
    """Returns the steps of a run, and of how many if it has not taken all of them; of a chain those of each stage."""
    if run.stages:
        return " + ".join(map(_steps, run.stages))
    if run.step == run.steps:
        return f"{run.step:,}" if run.steps else ""
    return f"{run.step:,} / {run.steps:,}"


def _base(run: ListedRun) -> str:
    """Returns the name of the base; of a path only its last part."""
    is_path = run.base.startswith(("/", ".", "~"))
    return run.base.rstrip("/").rpartition("/")[2] if is_path else run.base


def _age(run: ListedRun) -> str:
    return format_age(time.time() - run.updated) if run.updated else ""


def _time(run: ListedRun) -> str:
    return clock(run.seconds) if run.seconds else ""


def _size(run: ListedRun) -> str:
    return format_size(run.num_bytes)


def _name(run: ListedRun) -> str:
    return run.name


def _state(run: ListedRun) -> str:
    return run.state.value


def _algorithm(run: ListedRun) -> str:
    return run.algorithm


COLUMNS = (
    Column(
        "run",
        0,
        _name,
    ),
    Column(
        "state",
        0,
        _state,
    ),
    Column(
        "algorithm",
        2,
        _algorithm,
    ),
    Column(
        "base",
        6,
        _base,
    ),
    Column(
        "best",
        1,
        _best,
    ),
    Column(
        "steps",
        4,
        _steps,
        is_number=True,
    ),
    Column(
        "age",
        3,
        _age,
        is_number=True,
    ),
    Column(
        "time",
        5,
        _time,
        is_number=True,
    ),
    Column(
        "size",
        7,
        _size,
        is_number=True,
    ),
)


def print_runs(
    runs: Sequence[ListedRun],
    folder: Path,
    console: Console,
) -> None:
    """Prints the table, and below it what is wrong with damaged and failed runs."""
    if not runs:
        console.print(Text(escape_control_chars(f"no run in {folder}")))
        return
    console.print(runs_table(runs, console.width))
    for problem in problems(runs):
        console.print(Text(problem, "yellow"))


def runs_table(
    runs: Sequence[ListedRun],
    width: int,
) -> Table:
    """Returns the table with the columns that fit into `width` cells."""
    columns = _fitting(runs, width)
    table = Table(
        box=None,
        pad_edge=False,
        padding=(0, GAP, 0, 0),
    )
    for column in columns:
        table.add_column(
            column.head,
            justify="right" if column.is_number else "left",
            overflow="fold",
            no_wrap=column.rank > 0,
        )
    for run in runs:
        cells = [_text(column, run) for column in columns]
        table.add_row(*cells)
    return table


def problems(runs: Sequence[ListedRun]) -> list[str]:
    """Returns what is wrong with the runs that are damaged or have failed, one line for each."""
    return [
        escape_control_chars(f"{run.name} {run.state}: {run.problem}", MAX_CELL)
        for run in runs
        if run.problem and run.state in (RunState.DAMAGED, RunState.FAILED)
    ]


def _fitting(
    runs: Sequence[ListedRun],
    width: int,
) -> list[Column]:
    columns = list(COLUMNS)
    widths = {column: GAP + _width(column, runs) for column in columns}
    while sum(widths[column] for column in columns) > width and any(column.rank for column in columns):
        columns.remove(max(columns, key=_rank))
    return columns


def _rank(column: Column) -> int:
    return column.rank


def _width(
    column: Column,
    runs: Sequence[ListedRun],
) -> int:
    """Returns the cells that a column needs; one that may be wrapped needs at most `MAX_NAME_WIDTH`."""
    widest = max([cell_len(column.head), *(cell_len(_text(column, run).plain) for run in runs)])
    return widest if column.rank else min(MAX_NAME_WIDTH, widest)


def _text(
    column: Column,
    run: ListedRun,
) -> Text:
    style = STYLES[run.state] if column.head == "state" else ""
    return Text(escape_control_chars(column.cell(run), MAX_CELL), style)
