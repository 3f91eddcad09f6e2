"""Axes of the terminal's charts: round ticks, shares in percent, outliers that do not press the curve together."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import product

import pytest
from test_dashboard import START, make_group, state_after, steps, wrote

from lowrank_tune.events import Evaluated, Event
from lowrank_tune.ui.terminal.axes import make_axis
from lowrank_tune.ui.terminal.chart_pane import chart_pane
from lowrank_tune.ui.terminal.charts import LABEL_WIDTH
from lowrank_tune.ui.terminal.outliers import split_outliers
from lowrank_tune.ui.terminal.panes import View
from lowrank_tune.ui.terminal.text_layout import plain_text

TINY_KL = [0.0, 3.2e-14, 2.9e-14, 0.01]


def chart_rows(name: str, values: list[float], algorithm: str = "sft", log: bool = False) -> list[str]:
    events = [replace(START, algorithm=algorithm)]
    for step, value in enumerate(values, 1):
        events += steps(1, step, **{name: value})  # type: ignore[arg-type]
    pane = chart_pane(state_after(events), (name,), View(log_scale=log), 40, 10)
    return plain_text(pane).splitlines()


def labels(rows: list[str]) -> list[str]:
    """The labels of the y axis, the highest first."""
    found = [row[: LABEL_WIDTH - 1].strip() for row in rows[1:-1]]
    return [label for label in found if label]


@pytest.mark.parametrize("rows", [4, 7, 8, 12, 20])
@pytest.mark.parametrize("log", [False, True])
def test_ticks_are_round_distinct_and_cover_the_values(rows: int, log: bool) -> None:
    generator = random.Random(0)
    for _ in range(500):
        low = 10 ** generator.uniform(-9, 6) * (1 if log else generator.choice((-1, 1)))
        high = low + abs(low) * 10 ** generator.uniform(-12, 3)
        axis = make_axis(low, high, rows, log)
        texts = axis.labels()
        assert axis.low <= low + 0.016 * (axis.high - axis.low) and high <= axis.high + 0.016 * (axis.high - axis.low)
        assert len(texts) == len(set(texts)) == len(axis.ticks) >= 3 and all(len(text) < LABEL_WIDTH for text in texts)
        for tick in axis.ticks:
            mantissa = f"{abs(tick):.9e}".partition("e")[0].rstrip("0").rstrip(".")
            assert len(mantissa) <= 7, f"{tick} between {low} and {high}"


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0.101, 1.28, ["0", "0.5", "1.0", "1.5"]),
        (0.804, 0.972, ["0.8", "0.9", "1.0"]),
        (-1.7e-6, 1.0, ["0", "0.5", "1.0"]),
        (-0.5, 1.25, ["-1", "0", "1", "2"]),
        (-4.3, 0.0, ["-6", "-4", "-2", "0"]),
        (6.8e-4, 2e-3, ["0.0005", "0.0010", "0.0015", "0.0020"]),
        (2e-3, 2e-3, ["0.0016", "0.0020", "0.0024"]),
        (1e-8, 5e-6, ["0", "2e-6", "4e-6", "6e-6"]),
        (0.0, 0.0, ["0", "0.5", "1.0"]),
    ],
)
def test_ticks_of_known_ranges(low: float, high: float, wanted: list[str]) -> None:
    assert make_axis(low, high, 8).labels() == wanted


def test_a_log_axis_has_powers_of_ten() -> None:
    assert make_axis(3e-5, 0.4, 9, log=True).labels() == ["1e-4", "0.001", "0.01", "0.1"]
    assert make_axis(0.09, 1.3, 9, log=True).labels() == ["0.05", "0.1", "0.2", "0.5", "1", "2"]


def test_a_learning_rate_has_different_labels() -> None:
    found = labels(chart_rows("learning_rate", [0.0020, 0.0019, 0.0016]))
    assert len(found) >= 3 and len(set(found)) == len(found)


def test_a_share_is_in_percent_and_between_0_and_1() -> None:
    assert labels(chart_rows("mean_token_accuracy", [0.0, 0.36, 1.0]))[0] == "100 %"
    assert labels(chart_rows("mean_token_accuracy", [1.0, 1.0]))[0] == "100 %"
    assert labels(chart_rows("clip_ratio", [0.0, 0.0], "grpo"))[-1] == "0 %"
    for low, high, rows in product(range(0, 100, 7), range(0, 101, 5), (2, 5, 8, 15)):
        axis = make_axis(min(low, high) / 100, max(low, high) / 100, rows, share=True)
        assert axis.low >= 0 and axis.high <= 1 and axis.labels()[-1].endswith(" %")


@pytest.mark.parametrize("value", [0.003, 0.03, 0.3, 0.97, 1.0])
def test_a_constant_share_has_a_log_axis_above_0(value: float) -> None:
    """The first step of a run is such a share."""
    axis = make_axis(value, value, 7, log=True, share=True)
    assert 0 < axis.low < value <= axis.high <= 1 and len(axis.labels()) >= 3
    assert "%" in chart_rows("clip_ratio", [value], "grpo", log=True)[1]


def test_a_share_that_is_none_still_has_an_axis() -> None:
    """Anyone may have edited the file of the events."""
    for low, high in ((1.5, 2.0), (-2.0, -1.0), (-1.0, 3.0)):
        axis = make_axis(low, high, 7, share=True)
        assert axis.low <= low and high <= axis.high
    assert make_axis(0.9, 1 + 1e-7, 7, share=True).high == 1.0, "the mean of ones in single precision"


def test_rounding_errors_of_the_kl_are_0() -> None:
    rows = chart_rows("kl", TINY_KL)
    assert labels(rows)[-1] == "0" and "e-" not in "".join(rows)
    assert "KL to the reference 0 " in chart_rows("kl", [3.2e-14, 2.9e-14])[0] + " "


def test_charts_have_the_same_gutter() -> None:
    gutters = set()
    for values in (TINY_KL, [3e-10, 5.0], [-1.5e-4, -1e-5], [12_345.0, 99_999.0], [0.98, 1.0]):
        gutters |= {row.index("\u2502") for row in chart_rows("kl", values)[1:-1]}
    assert gutters == {LABEL_WIDTH}


def test_the_band_of_a_reward_of_0_or_1_stays_between_them() -> None:
    noisy = [*steps(9, **{"reward": 0.1, "reward_std": 0.3}), *steps(9, 10, **{"reward": 0.9, "reward_std": 0.3})]
    start = replace(START, algorithm="grpo")
    for rewards, wanted in (((0.0, 1.0), ["1.0", "0"]), ((-1.0, 1.0), ["2", "-1"])):
        group = make_group(1, *(wrote("x", reward, 0.0) for reward in rewards))
        pane = chart_pane(state_after([start, group, *noisy]), ("reward",), View(), 40, 10)
        found = labels(plain_text(pane).splitlines())
        assert [found[0], found[-1]] == wanted


def test_the_band_leaves_out_a_step_without_a_reward() -> None:
    """All rewards of the step failed; the band must not fall to 0 there."""
    events: list[Event] = [replace(START, algorithm="grpo")]
    for step in range(1, 40):
        events += steps(1, step, **{"reward": math.nan if step % 4 == 0 else 0.9, "reward_std": 0.05})
    pane = chart_pane(state_after(events), ("reward",), View(), 40, 10)
    assert labels(plain_text(pane).splitlines())[-1] == "0.85"


def test_an_outlier_is_marked_at_the_edge_and_named() -> None:
    values = [0.01 + 0.001 * math.sin(step) for step in range(40)]
    values[30] = 1.30
    rows = chart_rows("kl", values)
    assert labels(rows)[0] == "0.011" and rows[1].count("\u25b2") == 1
    assert "\u25b2 1.30 at 31" in rows[-1] and rows[-1].split()[-1] == "40"
    below = chart_rows("kl", [-value for value in values])
    assert below[-2].count("\u25bc") == 1 and "\u25bc -1.30 at 31" in below[-1]
    # a logarithmic scale has room for it
    assert "\u25b2" not in "".join(chart_rows("kl", values, log=True))


def test_an_outlier_within_the_range_of_the_validation_is_a_dot() -> None:
    losses = [1.0 + 0.01 * math.sin(step) for step in range(40)]
    losses[30] = 5.0
    events: list[Event] = [START]
    for step, loss in enumerate(losses, 1):
        events += steps(1, step, loss=loss)
    for highest, is_marked in ((6.0, False), (2.0, True)):
        validated = [Evaluated(step=step, stats={"eval_loss": highest - step / 40}, time=41.0) for step in (1, 40)]
        rows = plain_text(chart_pane(state_after([*events, *validated]), ("loss",), View(), 40, 10)).splitlines()
        assert ("\u25b2 5.00 at 31" in rows[-1]) is is_marked
        assert "\u25bc" not in "".join(rows) and any("\u25b2" in row for row in rows) is is_marked


@pytest.mark.parametrize("count", [20, 100, 1000])
def test_a_falling_loss_has_no_outliers(count: int) -> None:
    for values in (
        [10 / step for step in range(1, count + 1)],
        [0.1 + 11 * math.exp(-step) for step in range(count)],
        [5.0] * (count // 2) + [0.1] * (count // 2),
        [0.0] * (count - 1) + [1.0],
        [2.0] * (count - 4) + [0.0, 0.1, 0.2, 0.3],
    ):
        points = list(enumerate(values))
        assert split_outliers(points) == (points, ())


def test_few_points_have_no_outliers() -> None:
    points = [(float(step), 1000.0 if step == 10 else step % 3) for step in range(19)]
    assert split_outliers(points)[1] == ()
    more = [*points, (19.0, 1.0)]
    assert split_outliers(more)[1] == [(10.0, 1000.0)]
