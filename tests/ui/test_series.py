"""Curves of long runs: constant memory and drawing time, and every value in the mean of exactly one point."""

from __future__ import annotations

import math

import pytest

from lowrank_tune.ui.state import MAX_POINTS, Series


def long_series(steps: int) -> Series:
    series = Series()
    for step in range(1, steps + 1):
        series.add(step, float(step))
    return series


@pytest.mark.parametrize("steps", [MAX_POINTS + 1, 3 * MAX_POINTS, 2000, 20_000])
def test_number_of_points_stays_the_same_in_a_long_run(steps: int) -> None:
    """A number that falls to one half again and again makes the time of a frame rise between these times."""
    assert len(long_series(steps).points) == MAX_POINTS


@pytest.mark.parametrize("steps", [MAX_POINTS, MAX_POINTS + 1, 700, 1024, 4096, 5000])
def test_each_point_is_the_mean_of_the_steps_since_the_point_before(steps: int) -> None:
    before = 0
    for step, value in long_series(steps).points:
        assert value == (before + 1 + step) / 2
        before = step
    # the last values may be waiting for their point
    assert steps - before < 2 * steps / MAX_POINTS


def test_points_at_the_left_cover_at_most_twice_the_steps_of_the_others() -> None:
    steps = [0, *(step for step, _ in long_series(3000).points)]
    widths = [after - before for before, after in zip(steps, steps[1:], strict=False)]
    assert widths == sorted(widths, reverse=True) and widths[0] == 2 * widths[-1]


def test_series_that_was_cut_for_a_resumed_run_continues() -> None:
    series = long_series(3000)
    series.cut(700)
    assert series.points[-1][0] <= 700
    for step in range(701, 9001):
        series.add(step, float(step))
        assert len(series.points) <= MAX_POINTS
    steps = [step for step, _ in series.points]
    assert steps == sorted(set(steps)) and all(math.isfinite(value) for _, value in series.points)
