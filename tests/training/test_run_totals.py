"""Wall time, sessions and speed of a run that was interrupted and killed: one figure on every screen, page and file."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from crash import small_recipe
from report_pages import check_page

from lowrank_tune import Recipe, run
from lowrank_tune.events import (
    CheckpointSaved,
    Event,
    LogMessage,
    RunEnded,
    RunStarted,
    StepEnd,
)
from lowrank_tune.training import run_totals
from lowrank_tune.training.run_totals import RunTotals, Session, chain_totals, totals_of
from lowrank_tune.training.stage import StagePosition
from lowrank_tune.training.summaries import chain_summary
from lowrank_tune.ui.compare.figures import rows
from lowrank_tune.ui.compare.runs import read_runs
from lowrank_tune.ui.formatting import clock
from lowrank_tune.ui.report.run_log import read_run_log
from lowrank_tune.ui.state import State
from lowrank_tune.ui.terminal.panes import View
from lowrank_tune.ui.terminal.plain import LineLogger
from lowrank_tune.ui.terminal.render import render
from lowrank_tune.ui.views.summary import summary_table
from lowrank_tune.ui.watch import WatchedRun, read_events

START = RunStarted(
    time=105.0,
    name="r",
    algorithm="sft",
    model="m",
    roles={"policy": ["policy"]},
    reference="the base",
    steps=4,
)


def step(number: int, time: float, seconds: float = 2.0, tokens: int = 100) -> StepEnd:
    return StepEnd(time=time, step=number, steps=4, stats={"loss": 1.0}, seconds=seconds, tokens=tokens)


FIRST = [LogMessage(time=100.0, message="loading"), replace(START, earlier_sessions=0, loading_seconds=6.0)]
"""A first session, whose stage began a second before its first message."""


def test_a_run_of_one_session() -> None:
    assert totals_of([*FIRST, step(1, 110.0)]) == RunTotals(11.0, 1, 100, 2.0)
    end = RunEnded(time=112.0, status="done", step=1, seconds=13.1, total_seconds=13.1, sessions=1)
    totals = totals_of([*FIRST, step(1, 110.0), end])
    assert totals == RunTotals(13.1, 1, 100, 2.0) and totals.tokens_per_second == 50.0


def test_lost_work_of_a_killed_session_counts_as_time_and_not_as_tokens() -> None:
    """The log of the resumed run no longer has the step that was lost; its `RunStarted` has the time of that step."""
    lost = [*FIRST, step(1, 110.0), CheckpointSaved(time=111.0, step=1, path="", seconds=1.0), step(2, 113.0)]
    before = totals_of(lost)
    assert before == RunTotals(14.0, 1, 200, 4.0)
    again = replace(
        START,
        time=9000.0,
        resumed_from=1,
        earlier_sessions=before.sessions,
        earlier_seconds=before.seconds,
        loading_seconds=3.0,
    )
    resumed = [*lost[:-1], LogMessage(time=8999.0, message="planning"), again, step(2, 9004.0), step(3, 9006.0)]
    assert totals_of(resumed) == RunTotals(14.0 + 3.0 + 6.0, 2, 300, 6.0)


def test_the_next_stage_of_a_chain_begins_again() -> None:
    first = [*FIRST, step(1, 110.0), RunEnded(time=111.0, status="done", step=1, seconds=12.0)]
    second = replace(START, time=121.0, stage=2, stages=2)
    assert totals_of([*first, LogMessage(time=120.0, message=""), second, step(1, 125.0)]) == RunTotals(
        5.0, 1, 100, 2.0
    )


def test_a_clock_that_is_set_back_takes_no_time_away() -> None:
    set_back = [*FIRST, step(1, 110.0), step(2, 50.0), step(3, 53.0)]
    assert totals_of(set_back).seconds == 6.0 + 5.0 + 3.0


def test_the_monotonic_clock_measures_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(began=run_totals.time.monotonic() - 7.04, earlier=RunTotals(10.0, 2, 5, 1.0))
    totals = session.totals(RunTotals(0.0, 0, 300, 6.0))
    assert totals.seconds == pytest.approx(17.0, abs=0.15) and round(totals.seconds, 1) == totals.seconds
    assert (totals.sessions, totals.tokens, totals.step_seconds) == (3, 300, 6.0)


def test_totals_of_a_chain_are_sums_over_its_stages() -> None:
    """By hand: two sessions in the first stage, the second of which began the second stage, which took three."""
    stages = [RunTotals(10.04, 2, 300, 6.0, False), RunTotals(20.0, 3, 100, 4.0, True)]
    totals = chain_totals(stages)
    assert totals == RunTotals(30.0, 4, 400, 10.0) and totals.tokens_per_second == 40.0
    older = [replace(stage, shares_first_session=None) for stage in stages]
    assert chain_totals(older) == totals, "older versions did not write what is shared"
    assert chain_totals([]).sessions == 1


def test_a_chain_that_stopped_between_two_stages_had_a_session_for_each() -> None:
    stages = [RunTotals(10.0, 1, 300, 6.0, False), RunTotals(20.0, 1, 100, 4.0, False), RunTotals(1.0, 1, 9, 1.0, True)]
    assert chain_totals(stages).sessions == 2


@pytest.mark.parametrize("shares", [True, False, None])
def test_the_log_of_a_stage_contains_whether_its_first_session_is_shared(shares: bool | None) -> None:
    """A continued stage writes what was true of its first session; a stage that fails before it starts has only an
    end."""
    started = replace(FIRST[1], shares_first_session=shares)
    assert totals_of([FIRST[0], started, step(1, 110.0)]).shares_first_session is shares
    session = Session(earlier=RunTotals(11.0, 1, 100, 2.0), shares_first_session=shares)
    assert session.totals(RunTotals()).shares_first_session is shares
    end = StagePosition(2, 2).ended("failed", 0, session, session.totals(RunTotals()))
    assert totals_of([FIRST[0], end]).shares_first_session is shares


def test_summary_of_a_chain_has_the_totals(tmp_path: Path) -> None:
    from lowrank_tune.config import Chain

    data = {"train": [{"dataset": "builtin:arithmetic"}]}
    stages = [{"name": name, "algorithm": "sft", "data": data} for name in ("one", "two")]
    settings = {"name": "c", "base": {"model": "tiny-tutor"}, "train": {"max_steps": 2}}
    chain = Chain.from_dict({**settings, "stages": stages})
    written = [
        {"status": "done", "warnings": [], **RunTotals(10.0, 2, 300, 6.0).to_dict()},
        {"status": "done", "warnings": [], **RunTotals(20.5, 1, 100, 4.0, False).to_dict()},
    ]
    summary = chain_summary(chain, written)
    assert {key: summary[key] for key in ("seconds", "sessions", "tokens_per_second")} == {
        "seconds": 30.5,
        "sessions": 3,
        "tokens_per_second": 40.0,
    }
    assert "shares_first_session" not in summary and summary["stages"][1]["shares_first_session"] is False
    table = summary_table(summary, tmp_path)
    assert (
        "seconds    0:30 (3 sessions)\ntokens/s   40\n" in table and "one        ?: done in 0:10 (2 sessions)" in table
    )


def stop_after(number: int) -> Callable[[Event], None]:
    def stop(event: Event) -> None:
        if isinstance(event, StepEnd) and event.step == number:
            os.kill(os.getpid(), signal.SIGINT)

    return stop


def as_killed(events: Path) -> None:
    """Removes the end of the session from a log, and adds a step that no checkpoint has."""
    *lines, last = events.read_text(encoding="utf-8").splitlines()
    assert json.loads(last)["event"] == "run_ended"
    steps = [line for line in lines if json.loads(line)["event"] == "step_end"]
    lost = json.loads(steps[-1])
    lost |= {"step": lost["step"] + 1, "time": lost["time"] + 60.0}
    events.write_text("\n".join([*lines, json.dumps(lost), ""]), encoding="utf-8")


@pytest.mark.slow
def test_every_surface_has_the_same_totals_of_an_interrupted_and_killed_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    recipe = Recipe.from_dict(small_recipe(max_steps=4, save_steps=1))
    first = run(recipe, out=out, ui="none", on_event=stop_after(1)).summary
    assert first["sessions"] == 1
    run(recipe, out=out, ui="none", on_event=stop_after(2))
    as_killed(out / "events.jsonl")
    killed = totals_of(read_events(out / "events.jsonl"))
    plain = io.StringIO()
    done = run(recipe, out=out, ui="none", on_event=LineLogger(plain)).summary
    assert done["sessions"] == 3 and done["seconds"] > killed.seconds > first["seconds"] + 60

    steps = [event for event in read_events(out / "events.jsonl") if isinstance(event, StepEnd)]
    assert [event.step for event in steps] == [1, 2, 3, 4]
    assert done["tokens"] == sum(event.tokens for event in steps)
    speed = f"{done['tokens'] / sum(event.seconds for event in steps):,.0f}"
    time = f"{clock(done['seconds'])} (3 sessions)"
    assert f"done after step 4 in {time}, {speed} tokens/s" in plain.getvalue()
    assert json.loads((out / "summary.json").read_bytes())["tokens_per_second"] == done["tokens_per_second"]
    table = summary_table(done, out)
    assert f"seconds    {time}\ntokens/s   {speed}\n" in table
    shutil.copytree(out, tmp_path / "copy")
    compared: dict[str, Any] = dict(rows(read_runs([out, tmp_path / "copy"])))
    assert compared["wall time"] == 2 * [time] and compared["tokens per second"] == 2 * [speed]
    text = check_page((out / "report.html").read_text(encoding="utf-8")).text
    assert "wall time, 3 sessions" in text and clock(done["seconds"]) in text and speed in text
    watched = WatchedRun(out / "events.jsonl")
    watched.poll()
    header = screen_text(watched.state)
    assert f"done in {time}" in header and f"{speed} tokens/s" in header
    assert (
        read_run_log(out).totals
        == watched.state.totals
        == RunTotals(done["seconds"], 3, done["tokens"], done["step_seconds"])
    )


def screen_text(state: State) -> str:
    return "\n".join("".join(text for text, _ in line) for line in render(state, View(), 160, 40))


def test_a_running_session_is_shown_after_the_earlier_ones() -> None:
    state = State()
    resumed = replace(START, resumed_from=1, earlier_sessions=2, earlier_seconds=300.0, loading_seconds=10.0)
    for event in (resumed, step(2, 110.0), step(3, 112.0)):
        state.apply(event)
    assert "for 5:17 (3 sessions)" in screen_text(state) and "50 tokens/s" in screen_text(state)


def test_a_speed_without_a_clock_is_a_dash(tmp_path: Path) -> None:
    end = RunEnded(time=105.0, status="done", step=1, seconds=0.0, total_seconds=0.0, total_tokens=100)
    plain = io.StringIO()
    state = State()
    for event in (START, step(1, 105.0, seconds=0.0), end):
        LineLogger(plain)(event)
        state.apply(event)
    assert "done after step 1 in 0:00, - tokens/s" in plain.getvalue() and "- tokens/s" in screen_text(state)
    summary = {"status": "done", **RunTotals(0.0, 1, 100, 0.0).to_dict()}
    assert "tokens/s   -" in summary_table(summary, tmp_path)
