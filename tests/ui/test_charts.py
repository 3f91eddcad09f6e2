"""Charts in the terminal: their dots are read back and compared with the measured values."""

from __future__ import annotations

import math
import time

import pytest

from lowrank_tune.ui.terminal.charts import LABEL_WIDTH, Curve, chart, format_number, smooth
from lowrank_tune.ui.terminal.text_layout import Line, width_of


def dots(lines: list[Line]) -> set[tuple[int, int]]:
    """(column, row) of every dot of a chart, (0, 0) the upper left one."""
    bits = {0: (0, 0), 1: (0, 1), 2: (0, 2), 3: (1, 0), 4: (1, 1), 5: (1, 2), 6: (0, 3), 7: (1, 3)}
    found = set()
    for row, line in enumerate(lines[:-1]):
        for column, character in enumerate("".join(text for text, _ in line)[LABEL_WIDTH + 1 :]):
            code = ord(character) - 0x2800 if character != " " else 0
            for bit, (right, down) in bits.items():
                if code >> bit & 1:
                    found.add((2 * column + right, 4 * row + down))
    return found


def texts(lines: list[Line]) -> list[str]:
    return ["".join(text for text, _ in line) for line in lines]


@pytest.mark.parametrize(("log", "ends"), [(False, (0.0, 3.0)), (True, (0.1, 5.0))])
def test_dots_are_at_the_measured_values(log: bool, ends: tuple[float, float]) -> None:
    width, height = 49, 11
    values = [0.1 + 2 * math.exp(-step / 20) + 0.05 * math.sin(step) for step in range(80)]
    lines = chart([Curve(list(enumerate(values)), line=False)], width, height, log)
    rows, columns = 4 * (height - 1) - 1, 2 * (width - LABEL_WIDTH - 1) - 1
    scale = math.log if log else float
    low, high = (scale(end) for end in ends)
    expected = {
        (round(step * columns / 79), rows - (scale(value) - low) / (high - low) * rows)
        for step, value in enumerate(values)
    }
    found = dots(lines)
    assert len(lines) == height and all(width_of(line) <= width for line in lines)
    by_column = dict(found)
    assert len(found) == len(by_column) == len(expected) == 80
    assert all(abs(by_column[column] - row) <= 0.5 + 1e-9 for column, row in expected)


def test_a_line_has_no_gaps() -> None:
    found = dots(chart([Curve([(0, 0.0), (1, 1.0), (2, 0.2), (9, 0.9)])], 40, 10))
    for column, row in found:
        assert any((column + dx, row + dy) in found for dx in (-1, 0, 1) for dy in (-1, 0, 1) if dx or dy)
    assert {column for column, _ in found} == set(range(2 * 31))


def test_axes_are_labeled() -> None:
    drawn = texts(chart([Curve([(5, 0.25), (95, 4.0)])], 40, 8))
    assert [row[:LABEL_WIDTH].strip() for row in drawn] == ["4", "", "", "2", "", "", "0", ""]
    assert drawn[7].split() == ["5", "95"] and drawn[7].endswith("95") and len(drawn[7]) == 40
    drawn = texts(chart([Curve([(5, 0.25), (95, 4.0)])], 40, 8, log=True))
    assert [row[:LABEL_WIDTH].strip() for row in drawn[:7]] == ["5", "", "2", "1", "0.5", "", "0.2"]


def test_two_curves_in_ascii_have_their_own_signs() -> None:
    one, two = Curve([(0, 1.0), (10, 2.0)], "first", "*"), Curve([(0, 2.0), (10, 1.0)], "second", "o")
    drawn = chart([one, two], 40, 8, ascii_only=True)
    assert "".join(texts(drawn)).isascii() and {"*", "o"} <= set("".join(texts(drawn)))
    assert {style for line in drawn for _, style in line} >= {"first", "second"}


def test_chart_leaves_out_values_that_cannot_be_drawn() -> None:
    nan, inf = float("nan"), float("inf")
    assert (
        "no values" in texts(chart([Curve([])], 40, 8))[0]
        and "no values" in texts(chart([Curve([(1, nan), (2, inf)])], 40, 8))[0]
    )
    assert dots(chart([Curve([(1, nan), (2, 1.0), (3, -inf), (4, 2.0)])], 40, 8))
    assert chart([Curve([(1, 1.0)])], 8, 3) == []
    assert len(dots(chart([Curve([(7, 3.0)])], 40, 8))) == 1
    constant = dots(chart([Curve([(x, 3.0) for x in range(64)])], 40, 8))
    assert len({row for _, row in constant}) == 1
    assert dots(chart([Curve([(0, 0.0), (1, -1.0)])], 40, 8, log=True))  # nothing is positive: linear
    assert len(dots(chart([Curve([(0, 0.0), (1, 1.0), (2, 2.0)], line=False)], 40, 8, log=True))) == 2


def test_smooth_is_a_corrected_moving_average() -> None:
    assert smooth([(1, 2.0), (2, 4.0)], 0.0) == [(1, 2.0), (2, 4.0)]
    averaged = smooth([(1, 2.0), (2, float("nan")), (3, 4.0)], 0.5)
    assert averaged == [(1, 2.0), (3, pytest.approx((0.25 * 2 + 0.5 * 4) / 0.75))]
    assert smooth([(x, 7.0) for x in range(9)], 0.98)[0][1] == pytest.approx(7.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1.0915, "1.09"),
        (0.0544, "0.054"),
        (12.345, "12.3"),
        (99_999, "99999"),
        (2e-4, "2e-4"),
        (5.4e-7, "5.4e-7"),
        (123_456, "1.2e5"),
        (-0.5, "-0.500"),
        (0.001, "0.001"),
    ],
)
def test_format_number_uses_at_most_six_characters(value: float, text: str) -> None:
    assert format_number(value) == text and len(text) <= 6


def test_a_chart_of_hundreds_of_points_takes_about_a_millisecond() -> None:
    points = [(float(x), math.sin(x / 50)) for x in range(500)]
    times = []
    for _ in range(20):
        start = time.thread_time()
        chart([Curve(points)], 40, 9)
        times.append(time.thread_time() - start)
    assert min(times) < 0.005
