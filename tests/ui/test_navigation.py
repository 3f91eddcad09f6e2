"""Keys that change what is shown: stages of a chain, and panes that scroll through the whole log and all answers."""

from __future__ import annotations

import os
import pty
import threading
from dataclasses import replace

import pytest
from test_dashboard import RECORDED, START, answered, chain, ended, state_after, steps

from lowrank_tune.events import Evaluated, Event, LogMessage, SampleLogged
from lowrank_tune.ui.formatting import plural, validation_line
from lowrank_tune.ui.state import LOG_LINES, MAX_SAMPLES, State
from lowrank_tune.ui.terminal.keys import DOWN, END, HOME, PAGE_DOWN, PAGE_UP, UP, Keyboard, keys_in
from lowrank_tune.ui.terminal.log_pane import log_pane
from lowrank_tune.ui.terminal.navigation import handle_key, settle
from lowrank_tune.ui.terminal.panes import View
from lowrank_tune.ui.terminal.render import render
from lowrank_tune.ui.terminal.scroll_panes import log_screen
from lowrank_tune.ui.terminal.text_layout import plain_text, shorten, width_of, wrap

STAGES = [
    replace(START, stage=1, stages=3, time=0.0),
    *steps(10, loss=9.0),
    LogMessage(message="first stage", time=10.0),
    answered(10, "one"),
    ended(time=11.0),
    replace(START, algorithm="dpo", stage=2, stages=3, time=20.0),
    *steps(5, start_time=20.0, loss=0.7),
    ended(time=26.0),
    LogMessage(message="between the stages", time=30.0),
    replace(START, algorithm="grpo", stage=3, stages=3, time=31.0),
    *steps(3, start_time=31.0, reward=0.5),
]


def press(state: State, view: View, *keys: str, width: int = 80, height: int = 24) -> View:
    """The view after keys, each of which is followed by a frame."""
    for key in keys:
        view = settle([state], handle_key(view, key, 1e9), width, height)
    return view


def shown(state: State, view: View, width: int = 80, height: int = 24) -> list[str]:
    return plain_text(render(state, view, width, height)).splitlines()


def log_of(count: int) -> State:
    return state_after([START, *(LogMessage(message=f"message {n}", time=float(n)) for n in range(1, count + 1))])


def test_stage_keys_show_earlier_stages_and_follow_the_chain_again() -> None:
    state = state_after(STAGES)
    assert "stage 3 of 3: grpo" in shown(state, View())[0]
    second = press(state, View(), "[")
    rows = shown(state, second)
    assert "stage 2 of 3: dpo" in rows[0] and "stage 2 done in 0:10 \u00b7 ] to stage 3" in rows[0]
    assert "loss 0.700" in " ".join(rows) and "reward" not in "".join(rows[5:]) and "between" not in "".join(rows)
    first = press(state, second, "[")
    rows = shown(state, first)
    assert "stage 1 of 3: sft" in rows[0] and "loss 9.00" in " ".join(rows) and any("one" in row for row in rows)
    assert press(state, first, "[", "<") == first
    assert press(state, first, "]") == second and press(state, first, ">", "]").stage == 0
    assert press(state, View(), "]", "]").stage == 0
    # log and answers are those of the stage
    assert any("first stage" in row for row in shown(state, replace(first, pane="l")))
    assert any("one" in row for row in shown(state, replace(first, pane="a")))


def test_the_header_of_an_earlier_stage_names_the_stage_of_the_next_key() -> None:
    state = state_after(STAGES)
    first = press(state, View(), "[", "[")
    assert "stage 1 done in 0:10 \u00b7 ] to stage 2" in shown(state, first, 120)[0]
    # the dashboard of a chain that was continued in its second stage does not have the first one
    continued = state_after(STAGES[14:])
    assert "stage 2 done in 0:10 \u00b7 ] to stage 3" in shown(continued, press(continued, View(), "["), 120)[0]


def test_the_speed_of_an_earlier_stage_stays_while_the_chain_goes_on() -> None:
    state = state_after(STAGES)
    first, second = state.finished_stages
    assert [stage.totals.tokens for stage in (first, second, state)] == [10 * 50, 5 * 50, 3 * 50]
    assert [stage.totals.step_seconds for stage in (first, second)] == [10.0, 5.0]


def test_a_selected_stage_stays_while_the_chain_goes_on() -> None:
    state = state_after(STAGES[: STAGES.index(STAGES[-4])])
    view = press(state, View(), "[")
    for event in STAGES[-4:]:
        state.apply(event)
    assert "stage 1 of 3: sft" in shown(state, settle([state], view, 80, 24))[0]
    assert "stage 3 of 3: grpo" in shown(state, View())[0]


def test_stage_keys_are_in_the_footer_of_a_chain_only() -> None:
    assert "[  ]  stage" in shown(state_after(STAGES), View(owns_run=False), 120)[-1]
    assert "stage" not in shown(state_after(RECORDED), View(), 120)[-1]


def test_a_recorded_chain_keeps_the_curves_of_its_first_stage() -> None:
    state = state_after(chain())
    rows = " ".join(" ".join(shown(state, press(state, View(), "["), 120, 40)).split())
    assert "loss 0.402 validation 0.193 KL to the reference 1.73" in rows and "stage 1 done in 1:13" in rows


def test_the_log_scrolls_through_every_line() -> None:
    state = log_of(100)
    view = press(state, View(), "l")
    rows = shown(state, view)
    assert "lines 83-100 of 100" in rows[4] and "message 100" in rows[-2]
    assert "lines 82-99 of 100" in shown(state, press(state, view, UP))[4]
    assert "lines 65-82 of 100" in shown(state, press(state, view, *[UP] * 18))[4]
    page = press(state, view, PAGE_UP)
    assert "lines 66-83 of 100" in shown(state, page)[4]
    top = press(state, view, HOME, UP, PAGE_UP)
    assert "lines 1-18 of 100" in shown(state, top)[4] and "message 1" in shown(state, top)[5]
    assert "lines 2-19 of 100" in shown(state, press(state, top, DOWN))[4]
    assert "lines 18-35 of 100" in shown(state, press(state, top, PAGE_DOWN))[4]
    assert press(state, top, END) == view and press(state, view, DOWN) == view
    assert press(state, top, "l").pane == "" and press(state, top, "\x1b") == View(page_lines=view.page_lines)
    # every line is in some page
    seen = {row.split()[-1] for turn in range(9) for row in shown(state, press(state, top, *[PAGE_DOWN] * turn))[5:-1]}
    assert seen == {str(number) for number in range(1, 101)}


def test_new_lines_do_not_move_a_scrolled_log() -> None:
    state = log_of(100)
    view = press(state, View(), "l", PAGE_UP)
    before = shown(state, view)[5:-1]
    for number in range(30):
        state.apply(LogMessage(message=f"new {number}", time=2e9))
    view = settle([state], view, 80, 24)
    assert shown(state, view)[5:-1] == before
    assert "new 29" in shown(state, press(state, view, END))[-2]


@pytest.mark.parametrize("view", [View(), View(help=True), View(pane="l", help=True)])
def test_without_a_pane_arrows_have_no_effect(view: View) -> None:
    for key in (UP, DOWN, HOME, END, PAGE_UP, PAGE_DOWN):
        assert handle_key(view, key) is view


def test_the_key_of_a_pane_opens_it_from_the_help_above_it() -> None:
    view = press(log_of(100), View(), "l", "?")
    assert "PgUp" not in shown(log_of(100), view, 140)[-1]
    view = press(log_of(100), view, "l")
    assert view.pane == "l" and not view.help and "PgUp" in shown(log_of(100), view, 140)[-1]


def test_a_long_log_is_limited_with_a_note() -> None:
    state = log_of(LOG_LINES + 120)
    rows = shown(state, press(state, View(), "l"), 120)
    assert "the newest 5,000 of 5,120 messages, lines 4,983-5,000 of 5,000" in rows[4]
    for number in range(MAX_SAMPLES + 5):
        state.apply(answered(number, "x", time=1.0))
    assert "the newest 2,000 of 2,005 answers" in shown(state, press(state, View(), "a"), 120)[4]


def test_all_answers_scroll_with_their_line_breaks() -> None:
    events: list[Event] = [START]
    for step in (4, 8):
        for prompt in ("one?", "two?"):
            text = f"first of {step}\nsecond of {prompt}"
            events.append(
                SampleLogged(step=step, prompt=prompt, completion=text, finish_reason="length", reward=0.5, time=1.0)
            )
    state = state_after(events)
    rows = [row.strip() for row in shown(state, press(state, View(), "a"))]
    at = rows.index("after step 4")
    assert rows[at : at + 4] == [
        "after step 4",
        "one?",
        "policy     first of 4",
        "second of one?  [cut off, reward 0.500]",
    ]
    assert rows.index("after step 8") > at and "\\n" not in " ".join(rows)
    assert "no answers yet" in " ".join(shown(state_after([START]), View(pane="a")))


@pytest.mark.parametrize("pane", ["", "a"])
def test_the_solution_in_wide_characters_is_not_cut_off(pane: str) -> None:
    """A Chinese character fills two cells of a terminal."""
    gold = "\u4e2d" * 20
    for length in range(15, 40):
        sample = replace(answered(1, "x" * length), ground_truth=gold)
        rows = " ".join(shown(state_after([START, sample]), View(pane=pane)))
        assert f"[gold {gold}]" in rows


def test_the_log_after_ten_hours_has_whole_lines() -> None:
    state = state_after([START, LogMessage(message="word " * 40, time=36_000.0)])
    for width in range(30, 40):
        lines = [*log_pane(state, View(), width, 40), *log_screen(state, View(), width, 40)]
        assert "10:00:00 word" in plain_text(lines) and all(width_of(line) <= width for line in lines)


def test_without_a_keyboard_the_footer_names_what_ctrl_c_does() -> None:
    state = state_after([START])
    assert "Ctrl-C saves and quits" in shown(state, View(keys=False))[-1]
    assert "Ctrl-C closes this screen" in shown(state, View(keys=False, owns_run=False))[-1]


@pytest.mark.parametrize(("ascii_only", "sign"), [(False, "\u23ce "), (True, " | ")])
def test_line_breaks_of_prompts_and_answers_are_signs(ascii_only: bool, sign: str) -> None:
    sample = SampleLogged(step=1, prompt="User:\nHi", completion="a\nb", finish_reason="stop", time=1.0)
    rows = " ".join(shown(state_after([START, sample]), View(ascii_only=ascii_only)))
    assert f"User:{sign}Hi" in rows and f"a{sign}b" in rows and "\\n" not in rows


def test_keys_in_what_a_terminal_sends() -> None:
    assert keys_in(b"\x1b[Aq\x1bOB\x1b[5~\x1b[6~\x1b[H\x1b[4~[") == [UP, "q", DOWN, PAGE_UP, PAGE_DOWN, HOME, END, "["]
    # function keys, Alt with a key, a mouse; Esc alone is a key
    assert keys_in(b"\x1bOP\x1bx\x1b[<0;1;2M\x1b[1;5q") == [] and keys_in(b"\x1b") == ["\x1b"]
    assert keys_in("\u00fc".encode()) == ["\u00fc"]


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_key_that_arrives_in_two_parts_is_one_key(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Esc would close the pane, and `[` show another stage."""
    monkeypatch.setattr("lowrank_tune.ui.terminal.keys.SEQUENCE_SECONDS", 10.0)
    master, slave = pty.openpty()
    keyboard = Keyboard(slave)
    keyboard.start()
    later = threading.Timer(0.01, os.write, (master, b"\x1b[5~"[at:]))
    os.write(master, b"\x1b[5~"[:at])
    later.start()
    assert keyboard.read(10.0) == [PAGE_UP]
    later.join()
    monkeypatch.undo()
    os.write(master, b"\x1b")
    assert keyboard.read(10.0) == ["\x1b"]
    keyboard.close()
    os.close(master)
    os.close(slave)


def test_only_warnings_of_the_training_stay_above_newer_lines() -> None:
    """One about the data, such as dropped rows, is a line like any other."""
    before = LogMessage(level="warning", message="dropped 2 rows", time=1.0)
    during = LogMessage(level="warning", message="reward is flat", time=4.0)
    state = state_after([before, replace(START, time=2.0), during, LogMessage(message="later", time=5.0)])
    rows = plain_text(log_pane(state, View(), 80, 9)).splitlines()
    assert "2 warnings" in rows[0]
    assert [row[8:].strip() for row in rows[1:4]] == ["reward is flat", "later", "dropped 2 rows"]
    assert sum("dropped" in row for row in rows) == 1


def test_no_answer_right_is_not_called_the_best_so_far() -> None:
    for accuracy, is_mentioned in ((0.0, False), (0.25, True)):
        event = Evaluated(step=3, stats={"heldout/policy/accuracy": accuracy}, best=True, time=1.0)
        assert ("best so far" in validation_line(event)) is is_mentioned


def test_long_texts_break_at_words_and_slashes() -> None:
    assert shorten("one two three four", 14) == "one two..." and shorten("short", 9) == "short"
    assert shorten("x" * 20, 10) == "xxxxxxx..."
    assert wrap("runs/a-long-folder/s/alpaca_en_demo.json is read", 24, 3) == [
        "runs/a-long-folder/s/",
        "alpaca_en_demo.json is",
        "read",
    ]


def test_a_narrow_header_leaves_out_whole_details() -> None:
    roles = {"policy": ["p"], "value": ["v"], "reference": ["a", "b"]}
    start = replace(START, name="ppo-run", model="stories260K", device="CPU, 1 thread, fp32, 23.5 GiB", roles=roles)
    start = replace(start, algorithm="ppo", reference="the base with the frozen adapters a and b, merged")
    state = state_after([start, *steps(3, reward=0.5)])
    narrow, wide = shown(state, View()), shown(state, View(), 140)
    assert narrow[0].split()[:6] == ["lowrank-tune", "ppo-run", "\u00b7", "ppo", "of", "stories260K"]
    assert "CPU" not in narrow[0] and "CPU, 1 thread, fp32, 23.5 GiB" in wide[0]
    assert narrow[1].endswith("reference = base + a + b") and wide[1].endswith(start.reference)


def test_counts_of_one_have_no_plural() -> None:
    assert [plural(count, "step") for count in (0, 1, 2, 1200)] == ["0 steps", "1 step", "2 steps", "1,200 steps"]
