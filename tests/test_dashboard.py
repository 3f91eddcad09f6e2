"""The dashboard as a function of events: a recorded run at three sizes, small and odd screens, hostile text, a resumed run."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lowrank_tune.events import Event, Note, Progress, RunEnded, RunStarted, Sampled, Saved, StepDone, Validated, from_json
from lowrank_tune.ui.card import Card
from lowrank_tune.ui.frame import coded, fit, plain_text, width_of, wrap
from lowrank_tune.ui.panes import View
from lowrank_tune.ui.render import render, render_several
from lowrank_tune.ui.screenshot import screenshot, until
from lowrank_tune.ui.session import press
from lowrank_tune.ui.state import MOST_POINTS, Series, State
from tests.hostile import HOSTILE, is_inert

HERE = Path(__file__).parent
RECORDED = [event for line in (HERE / "recorded" / "demo.jsonl").read_text().splitlines() if (event := from_json(json.loads(line)))]
START = RunStarted(name="x", algorithm="sft", model="m", roles={"policy": ["policy"]}, reference="the base", steps=100, time=0.0)


def state_after(events: list[Event]) -> State:
    state = State()
    for event in events:
        state.apply(event)
    return state


def steps(count: int, first: int = 1, begun: float = 0.0, **stats: float) -> list[Event]:
    return [StepDone(step=step, steps=100, stats=stats or {"loss": 1 / step, "kl": 0.1}, seconds=1.0, tokens=50, time=begun + step)
            for step in range(first, first + count)]  # fmt: skip


def middle() -> list[Event]:
    """The recorded run up to its 60th step."""
    return RECORDED[: next(index for index, event in enumerate(RECORDED) if isinstance(event, StepDone) and event.step == 60)]


@pytest.mark.parametrize(("name", "width", "height", "view"), [
    ("80x24", 80, 24, View()), ("120x40", 120, 40, View()), ("200x60", 200, 60, View(log_scale=True)),
    ("80x24_ascii", 80, 24, View(ascii_only=True)), ("80x24_help", 80, 24, View(help=True)), ("59x14", 59, 14, View()),
])  # fmt: skip
def test_snapshots(name: str, width: int, height: int, view: View) -> None:
    """SNAPSHOTS=1 writes them anew; look at them before they are committed."""
    shown = plain_text(render(state_after(RECORDED if name == "120x40" else middle()), view, width, height))
    file = HERE / "snapshots" / f"dashboard_{name}.txt"
    if os.environ.get("SNAPSHOTS"):
        file.write_text(shown, encoding="utf-8")
    assert shown == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("count", [0, 1, 3, 20, 40, 120, len(RECORDED)])
def test_every_size_is_filled_exactly(count: int) -> None:
    state = state_after(RECORDED[:count])
    for width in (1, 20, 59, 60, 61, 75, 80, 99, 100, 133, 200, 300):
        for height in (1, 2, 14, 15, 16, 20, 24, 40, 61, 90):
            for view in (View(), View(help=True, ascii_only=True)):
                lines = render(state, view, width, height)
                assert len(lines) == height and all(width_of(line) == width for line in lines)
                assert not view.ascii_only or plain_text(lines).isascii()


def test_several_runs() -> None:
    states = [state_after(RECORDED), state_after(middle()), State()]
    for width, height, beside in ((200, 50, True), (80, 48, False), (300, 20, True)):
        lines = render_several(states, View(), width, height)
        assert len(lines) == height and all(width_of(line) == width for line in lines)
        assert ("demo" in plain_text([lines[0]]) and plain_text([lines[0]]).count("lowrank-tune") == 3) is beside


def test_hostile_text_is_inert() -> None:
    for text in HOSTILE:
        events = [
            replace(START, name=text, algorithm=text, model=text, roles={text: [text]}, reference=text, device=text),
            *steps(3, **{"loss": 1.0, text: 2.0, f"validation_{text}": 1.0}), Progress(what=text, done=1, total=2, time=4.0),
            Note(message=text, time=5.0), Note(message=text, level="warning", time=5.0), Saved(step=3, path=text, seconds=0.1, time=5.0),
            Sampled(step=0, prompt=text, completion=text, finish="stop", gold=text, role=text, time=6.0),
            Sampled(step=3, prompt=text, completion=text, finish=text, gold=text, role=text, time=7.0),
            Validated(step=3, stats={f"heldout_{text}_exact": 0.5, f"validation_{text}": 1.0}, time=8.0), Progress(what=text, done=1, total=2),
        ]  # fmt: skip
        for state in (state_after(events), state_after([*events, RunEnded(status="failed", step=3, seconds=1.0, message=text, time=9.0)])):
            for width, height in ((80, 24), (120, 40), (40, 10)):
                lines = render(state, View(), width, height)
                assert is_inert(plain_text(lines)) and all(width_of(line) == width for line in lines)
                codes = "".join(coded(line, True) for line in lines)
                assert is_inert("".join(part.partition("m")[2] for part in ("m" + codes).split("\x1b[")))  # no escape but for our colours
                assert plain_text(render(state, View(ascii_only=True), width, height)).isascii()


def test_no_color_has_no_colour() -> None:
    codes = "".join(coded(line, False) for line in render(state_after(RECORDED), View(), 120, 40))
    assert "\x1b[3" not in codes and "\x1b[9" not in codes and "\x1b[7m" in codes


def test_time_is_shared_out_and_an_eta_told() -> None:
    checked, saved = Validated(step=4, stats={"validation_loss": 1.0}, time=6.0), Saved(step=4, path="p", seconds=2.0, time=8.0)
    state = state_after([Progress(what="loading", done=0, total=1, time=-4.0), START, *steps(4), checked, saved])
    assert state.shares() == {"loading": 4 / 12, "training": 4 / 12, "evaluating": 2 / 12, "saving": 2 / 12}
    assert state.seconds_left == 96.0 and state.tokens_per_second == 50.0
    shown = plain_text(render(state, View(), 120, 40))
    assert "ETA 1:36" in shown and "50 tokens/s" in shown and "training 33%" in shown


def test_a_resumed_run_forgets_what_it_does_again() -> None:
    state = state_after([START, *steps(10), replace(START, resumed_from=6, time=5000.0), *steps(1, 7, 5000.0)])
    assert [step for step, _ in state.series["loss"].points] == [1, 2, 3, 4, 5, 6, 7]
    assert sum(state.phases.values()) <= 8 and "continued after step 6" in plain_text(render(state, View(), 80, 24))


def test_long_series_stay_short_and_true() -> None:
    series = Series()
    for step in range(1, 50_001):
        series.add(step, float("nan") if step % 7 == 0 else step)
    assert len(series.points) <= MOST_POINTS and series.points[-1][0] > 49_000 and series.last == 50_000
    assert all(abs(value - step) < 200 for step, value in series.points if math.isfinite(value))


def test_the_header_tells_how_it_stands() -> None:
    state = state_after([replace(START, stage=2, stages=3, memory_total_gib=24.0), *steps(3, loss=1.0, memory_gib=18.9)])
    shown = plain_text(render(state, View(now=3.0 + 100), 120, 40))
    assert "stage 2 of 3" in shown and "no news for 1:40" in shown and "18.9 of 24.0 GiB" in shown and "reference = the base" in shown
    assert "paused" in plain_text(render(state, View(asked=("paused: p goes on",)), 80, 24))
    state.apply(RunEnded(status="interrupted", step=3, seconds=61.0))
    assert "interrupted in 1:01" in plain_text(render(state, View(), 80, 24))


def test_warnings_stand_first_and_repeats_are_counted() -> None:
    state = state_after([START, Note(message="old warning", level="warning", time=1.0), *[Note(message="again", level="warning", time=2.0)] * 3,
                         *(Note(message=f"news {n}", time=3.0) for n in range(50))])  # fmt: skip
    shown = plain_text(render(state, View(), 120, 40))
    assert shown.index("again (x3)") < shown.index("old warning") < shown.index("news 49") < shown.index("news 48")


def test_keys_change_the_view() -> None:
    view = View()
    assert press(view, "l").log_scale and press(view, "?").help and press(view, "n").sample == 1
    assert press(view, "+").smoothing == view.smoothing + 1 and press(view, "-").smoothing == view.smoothing - 1 and press(view, "x") is view
    for _ in range(20):
        view = press(view, "+")
    assert "question 2 of 4" in plain_text(render(state_after(RECORDED), replace(view, sample=5), 80, 24))
    assert "pause" not in plain_text(render(state_after(RECORDED), View(mine=False), 80, 24))


def test_reward_is_drawn_where_there_is_one() -> None:
    state = state_after([replace(START, algorithm="grpo"), *steps(30, reward=0.5, kl=0.01, loss=0.0, entropy=1.0)])
    assert "reward" in plain_text(render(state, View(), 80, 24))


def test_wrapping_and_fitting_by_cells() -> None:
    assert wrap("one two three", 8, 5) == ["one two", "three"] and wrap("x" * 9, 4, 2) == ["xxxx", "x..."] and wrap("", 9, 2) == []
    assert wrap("\u4e2d" * 5, 6, 3) == ["\u4e2d" * 3, "\u4e2d" * 2]
    assert fit([("\u4e2d\u4e2d", "")], 3) == [("\u4e2d ", "")] and fit([("a", "")], 3) == [("a", ""), ("  ", "")]


def test_a_card_speaks_through_nvidia_ml(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import SimpleNamespace as Named

    driver = Named(nvmlInit=lambda: None, nvmlDeviceGetHandleByIndex=lambda index: index, nvmlDeviceGetTemperature=lambda handle, kind: 71,
                   nvmlDeviceGetMemoryInfo=lambda handle: Named(used=19 << 30, total=24 << 30), nvmlDeviceGetPowerUsage=lambda handle: 310_000,
                   nvmlDeviceGetUtilizationRates=lambda handle: Named(gpu=97))  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    assert Card().read() == "card 19.0/24.0 GiB 71 C 310 W 97 %"
    driver.nvmlDeviceGetTemperature = None
    assert Card().read() == ""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Card().read() == ""


def test_the_picture_in_the_readme_is_drawn_from_the_recorded_run() -> None:
    """Made by `python -m lowrank_tune.ui.screenshot tests/recorded/demo.jsonl docs/dashboard.svg 120 40 86`."""
    svg = screenshot(until(RECORDED, 86), 120, 40)
    assert svg == (HERE.parent / "docs" / "dashboard.svg").read_text(encoding="utf-8")
    assert "url(http" not in svg and "@font-face" not in svg
    words = "".join(ElementTree.fromstring(svg).itertext()).replace("\xa0", " ")
    for wanted in ("lowrank-tune", "step 86/96", "KL to the reference", "overfitting", "What is 6 * 33?"):
        assert wanted in words
