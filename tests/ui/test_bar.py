"""Bars of a report are to scale, also in a narrow terminal."""

from __future__ import annotations

import io

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from lowrank_tune.ui.views.bar import Bar

EIGHTHS_OF = {"█": 8, "▉": 7, "▊": 6, "▋": 5, "▌": 4, "▍": 3, "▎": 2, "▏": 1}


def drawn(counts: list[int], console_width: int, plain: bool) -> tuple[list[str], int]:
    """The bars of a table as they are printed, and the width of their column."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_column(no_wrap=True)
    largest = max(*counts, 1)
    for count in counts:
        table.add_row("from", Bar(count / largest, "", plain, 40), "|")
    file = io.StringIO()
    Console(file=file, width=console_width).print(table)
    lines = file.getvalue().splitlines()
    assert len(lines) == len(counts)
    bars = [line[line.index("from") + 6 : line.index("|") - 2] for line in lines]
    return [bar.rstrip() for bar in bars], len(bars[0])


@given(
    counts=st.lists(st.integers(0, 10_000), min_size=2, max_size=9),
    console_width=st.integers(20, 90),
    plain=st.booleans(),
)
@settings(max_examples=60)
def test_the_width_of_a_bar_is_proportional_to_its_count(counts: list[int], console_width: int, plain: bool) -> None:
    bars, width = drawn(counts, console_width, plain)
    assert width == min(40, console_width - len("from  " + "  |"))
    largest = max(*counts, 1)
    for bar, count in zip(bars, counts, strict=True):
        if plain:
            assert set(bar) <= {"#"} and abs(len(bar) - width * count / largest) <= (1 if count else 0)
            continue
        eighths = sum(EIGHTHS_OF[cell] for cell in bar)
        assert abs(eighths - 8 * width * count / largest) <= (1 if count else 0)
        assert (eighths == 0) == (count == 0), "the smallest bar is one eighth of a cell"
        assert set(bar[:-1]) <= {"█"}
