"""Several runs on one screen: shared charts with a legend, side by side on a wide screen, a single one by its key."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from malformed_yaml import HOSTILE_TEXTS, is_inert
from rich.cells import cell_len
from test_dashboard import GRPO, RECORDED, START, middle, state_after, steps, up_to

from lowrank_tune.events import Event, LogMessage
from lowrank_tune.ui.state import State
from lowrank_tune.ui.terminal.keys import HOME
from lowrank_tune.ui.terminal.navigation import handle_key, settle
from lowrank_tune.ui.terminal.panes import View
from lowrank_tune.ui.terminal.render import render
from lowrank_tune.ui.terminal.several import render_several
from lowrank_tune.ui.terminal.text_layout import plain_text, width_of


def run_of(name: str, loss: float, count: int = 30, outlier: bool = False) -> State:
    events: list[Event] = [replace(START, name=name)]
    for step in range(1, count + 1):
        value = loss + 0.01 * math.sin(step)
        events += steps(1, step, loss=50.0 if outlier and step == 20 else value, kl=0.1)
    return state_after([*events, LogMessage(message=f"news of {name}", time=float(count))])


RUNS = [run_of("first", 1.0), run_of("second", 2.0, 20), run_of("third", 3.0)]


def shown(states: list[State], view: View, width: int, height: int) -> list[str]:
    return plain_text(render_several(states, view, width, height)).splitlines()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40)])
def test_three_runs_share_charts_and_have_a_line_each(width: int, height: int) -> None:
    rows = [" ".join(row.split()) for row in shown(RUNS, View(), width, height)]
    assert rows[0].startswith("lowrank-tune 3 runs") and rows[0].endswith("3 of 3 running")
    assert rows[1].startswith("1 first sft running step 30/100 (30 %) loss 0.990 ETA")
    assert rows[2].startswith("2 second sft running step 20/100 (20 %) loss 2.01 ETA")
    assert rows[3].startswith("3 third sft running step 30/100 (30 %) loss 2.99 ETA")
    assert "loss 1 0.990 2 2.01 3 2.99" in rows[4] and "KL to the reference" in rows[4]
    assert any(row.startswith("3 0:30 news of third") for row in rows) and "0-9 runs" in rows[-1]
    if height == 40:
        assert any(row.startswith("2 ! the loss does not fall") for row in rows)


def test_each_curve_has_the_color_and_the_number_of_its_run() -> None:
    lines = render_several(RUNS, View(), 120, 40)
    styles = {text.strip(): style for line in lines[1:4] for text, style in line if text.strip() in ("1", "2", "3")}
    assert styles == {"1": "first", "2": "second", "3": "third"}
    ends = [(text, style) for line in lines[5:28] for text, style in line if style in styles.values()]
    for number, style in styles.items():
        assert any(number in text and drawn == style for text, drawn in ends)
    # the run with fewer steps ends earlier
    rows = plain_text(lines).splitlines()[5:28]
    first, second = (max(row[9:60].rfind(number) for row in rows) for number in "12")
    assert 20 < second < first


def test_runs_are_side_by_side_where_each_has_room() -> None:
    two = RUNS[:2]
    assert shown(two, View(), 160, 40)[0].count("lowrank-tune") == 2
    assert shown(RUNS, View(), 200, 50)[0].count("lowrank-tune") == 1
    # the key of the layout
    assert shown(two, View(other_layout=True), 160, 40)[0].count("lowrank-tune") == 1
    assert shown(RUNS, View(other_layout=True), 200, 50)[0].count("lowrank-tune") == 3
    titles = [at for at, row in enumerate(shown(RUNS, View(other_layout=True), 100, 61)) if "lowrank-tune" in row]
    assert titles == [0, 20, 40], "one below the other"
    assert handle_key(View(), "o").other_layout and not handle_key(View(other_layout=True), "o").other_layout


def test_number_keys_show_a_single_run_and_all_again() -> None:
    view = settle(RUNS, View(), 120, 40)
    second = handle_key(view, "2")
    expected = plain_text(render(RUNS[1], second, 120, 40)).splitlines()
    assert shown(RUNS, second, 120, 40) == expected and "second" in expected[0] and "0-9" in expected[-1]
    assert handle_key(second, "0").run == 0 and handle_key(second, "\x1b").run == 0
    single = View()
    assert handle_key(view, "4") is view and handle_key(single, "1") is single


@pytest.mark.parametrize(("width", "height", "view"), [(160, 24, View()), (100, 60, View(other_layout=True))])
def test_the_log_of_each_of_several_runs_scrolls_to_its_first_line(width: int, height: int, view: View) -> None:
    """Their panes are narrower, or lower, than the screen, so that there are more lines to scroll."""
    runs = []
    for name in ("one", "two"):
        messages = [LogMessage(message=f"{name} {number} " + "word " * 20, time=1.0) for number in range(100)]
        runs.append(state_after([START, *messages]))
    for key in ("l", HOME):
        view = settle(runs, handle_key(view, key, 1e9), width, height)
    rows = shown(runs, view, width, height)
    assert any("lines 1-" in row for row in rows)
    assert any("one 0 word" in row for row in rows) and any("two 0 word" in row for row in rows)


def test_a_pane_that_was_opened_elsewhere_is_not_in_the_footer_of_shared_charts() -> None:
    assert "PgUp" not in shown(RUNS, View(pane="l"), 140, 40)[-1]


def test_columns_of_runs_with_wide_names_stay_below_each_other() -> None:
    rows = shown([run_of("\u4e2d\u6587", 1.0), run_of("second", 2.0)], View(), 120, 40)[1:3]
    first, second = (cell_len(row.partition("sft")[0]) for row in rows)
    assert first == second


def test_the_outlier_of_one_run_is_marked_unless_another_run_has_such_values() -> None:
    rows = shown([run_of("a", 1.0, outlier=True), run_of("b", 2.0)], View(), 120, 40)
    assert any("\u25b2 50.0 at 20" in row for row in rows)
    rows = shown([run_of("a", 1.0, outlier=True), run_of("b", 60.0)], View(), 120, 40)
    assert not any("\u25b2" in row or "\u25bc" in row for row in rows)


@pytest.mark.parametrize("width", [60, 61, 80, 120, 200, 300])
def test_every_size_is_filled_exactly(width: int) -> None:
    states = [state_after(RECORDED), state_after(middle()), state_after(up_to(GRPO, 22)), State(), *RUNS]
    for height in (15, 16, 24, 40, 61):
        for count in (2, 3, 7):
            for view in (View(), View(help=True), View(ascii_only=True, log_scale=True), View(other_layout=True)):
                lines = render_several(states[:count], view, width, height)
                assert len(lines) == height and all(width_of(line) == width for line in lines)
                assert not view.ascii_only or plain_text(lines).isascii()


def test_hostile_text_is_inert() -> None:
    for text in HOSTILE_TEXTS:
        start = replace(START, name=text, algorithm=text, model=text)
        state = state_after([start, *steps(3, **{"loss": 1.0, text: 2.0}), LogMessage(message=text, time=5.0)])
        # rewards alone, whose names are those of the first chart
        rewards = {f"rewards/{text}/mean": 1.0, "rewards/b/mean": 1.0}
        of_rewards = state_after([replace(START, algorithm="grpo"), *steps(3, **rewards)])
        lines = render_several([state, of_rewards, RUNS[0]], View(), 100, 30)
        assert is_inert(plain_text(lines)) and all(width_of(line) == 100 for line in lines)
