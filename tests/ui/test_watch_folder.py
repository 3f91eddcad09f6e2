"""`watch` of a folder of runs: the newest run, and each one that starts later; other commands name the newest run."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from report_pages import run_started, step_end, write_run
from typer.testing import CliRunner

from lowrank_tune.cli import app
from lowrank_tune.errors import UserError
from lowrank_tune.events import Event, LogMessage, RunEnded
from lowrank_tune.training.sinks import to_json_line
from lowrank_tune.ui import watch_folder
from lowrank_tune.ui.run_paths import is_folder_of_runs, newest_run, run_folders
from lowrank_tune.ui.watch_folder import NewestRun


def begin_run(folder: Path, at: float, *more: Event) -> Path:
    """A run whose session started at a time."""
    run = write_run(folder, run_started(name=folder.name), step_end(1, loss=1.0), *more, run={"recipe": {"a": 1}})
    os.utime(run / "run.json", (at, at))
    return run


def ended() -> RunEnded:
    return RunEnded(status="done", step=1, seconds=1.0)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    begin_run(folder / "newer", 2000.0)
    begin_run(folder / "older", 1000.0)
    (folder / "compare.html").touch()
    return folder


def test_runs_are_in_the_order_in_which_their_sessions_started(runs: Path, tmp_path: Path) -> None:
    assert [run.name for run in run_folders(runs)] == ["newer", "older"] and newest_run(runs) == runs / "newer"
    assert newest_run(tmp_path / "none") is None and newest_run(runs / "older") is None
    assert is_folder_of_runs(runs) and not is_folder_of_runs(runs / "older") and not is_folder_of_runs(tmp_path)
    (runs / "config.json").touch()
    assert not is_folder_of_runs(runs), "a model whose folder also contains a run"


def test_watched_folder_shows_the_run_that_started_last(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_folder, "CHECK_SECONDS", 0.0)
    watched = NewestRun(runs)
    assert watched.poll() and watched.state.started is not None and watched.state.started.name == "newer"
    with (runs / "older" / "events.jsonl").open("ab") as file:
        file.write(to_json_line(step_end(2, loss=0.5)))
    assert not watched.poll(), "an older run that goes on is not the newest"
    (runs / "third").mkdir()
    (runs / "third" / "run.json").write_text("{}")
    assert not watched.poll(), "a run without events cannot be shown yet"
    begin_run(runs / "third", 3000.0)
    assert watched.poll()
    assert watched.state.started is not None and watched.state.started.name == "third"
    assert [line.text for line in watched.state.log][0] == f"watching {runs / 'third'}, the newest run in {runs}"
    assert watched.folder == runs / "third" and not watched.poll()


def test_the_log_of_an_old_run_that_is_continued_has_its_own_times(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its session is the newest, but its first events are from another day."""
    monkeypatch.setattr(watch_folder, "CHECK_SECONDS", 0.0)
    watched = NewestRun(runs)
    watched.poll()
    first = run_started(time=100.0, name="old")
    events = [first, replace(step_end(1, loss=1.0), time=103.0), LogMessage(message="then", time=110.0)]
    write_run(runs / "old", *events, run={})
    os.utime(runs / "old" / "run.json", (3000.0, 3000.0))
    assert watched.poll() and watched.folder == runs / "old"
    assert [line.time for line in watched.state.log] == [0.0, 10.0] and watched.state.last_time == 110.0
    assert watched.state.phases == {"training": pytest.approx(0.1), "other": pytest.approx(9.9)}


def test_a_folder_is_looked_at_once_a_second(runs: Path) -> None:
    watched = NewestRun(runs)
    watched.poll()
    begin_run(runs / "third", 3000.0)
    assert not watched.poll()


def test_lines_of_the_newest_run_and_of_one_that_starts_later(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch_folder, "CHECK_SECONDS", 0.0)

    def begin_third(seconds: float) -> None:
        begin_run(runs / "third", 3000.0, ended())

    monkeypatch.setattr(time, "sleep", begin_third)
    watch_folder.watch_folder(runs, plain=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"watching {runs / 'newer'}, the newest run in {runs}"
    assert lines.index(f"watching {runs / 'third'}, the newest run in {runs}") > 1
    assert "done after step 1" in lines[-1] and "older" not in "".join(lines)


def test_folder_without_events_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "run.json").write_text(json.dumps({"recipe": {}}))
    with pytest.raises(UserError, match="no run to watch"):
        NewestRun(tmp_path)


@pytest.mark.parametrize("command", ["chat {}", "merge {}", "export {} --to peft", "report {}", "compare {} {}"])
def test_a_folder_of_runs_in_place_of_a_run_names_the_newest(command: str, runs: Path) -> None:
    shown = CliRunner().invoke(app, command.format(runs, runs).split())
    assert shown.exit_code == 2 and f"did you mean `{runs / 'newer'}`, the newest?" in shown.output.replace("\n", "")
