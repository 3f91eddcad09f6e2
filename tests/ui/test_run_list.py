"""`lowrank-tune runs`: states, figures, chains, damaged folders, narrow terminals, speed, and no import of torch."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from malformed_yaml import HOSTILE_TEXTS, is_inert
from report_pages import run_started, step_end, write_run
from rich.console import Console
from run_summaries import DONE_CHAIN, DONE_SUMMARY
from typer.testing import CliRunner

from lowrank_tune.cli import app
from lowrank_tune.events import Evaluated, Event, RunEnded, to_json
from lowrank_tune.full_disk import format_size
from lowrank_tune.ui.formatting import format_age
from lowrank_tune.ui.run_list import ListedRun, RunState, list_runs, print_runs, runs_as_json
from lowrank_tune.ui.run_list import folder as folder_module

RECIPE = {"name": "one", "algorithm": "sft", "base": {"model": "tiny"}}
SUMMARY = {
    **DONE_SUMMARY,
    "step": 9,
    "steps": 9,
    "seconds": 61.0,
    "best": {"step": 6, "loss": 0.25, "mean_token_accuracy": 0.9},
    "last": {"step": 9, "loss": 0.2},
}


def listed_run(folder: Path, *events: Event, recipe: dict[str, Any] | None = None, **files: Any) -> Path:
    """A run folder with its recipe."""
    return write_run(folder, *events, run={"version": 2, "recipe": recipe or RECIPE}, **files)


def session(at: float = 100.0, **changes: Any) -> list[Event]:
    """A session of two steps and an evaluation, without an end."""
    evaluated = Evaluated(step=2, stats={"eval_loss": 0.5}, best=True, time=at + 3)
    return [
        run_started(time=at, **changes),
        *(step_end(number, loss=1.0) for number in (1, 2)),
        evaluated,
    ]


def ended(status: Any, at: float = 104.0, message: str = "") -> RunEnded:
    return RunEnded(status=status, step=2, seconds=4.0, time=at, message=message)


def by_name(folder: Path) -> dict[str, ListedRun]:
    return {run.name: run for run in list_runs(folder)}


def printed(runs: list[ListedRun], width: int) -> str:
    output = StringIO()
    print_runs(runs, Path("runs"), Console(file=output, width=width, highlight=False))
    return output.getvalue()


def test_states_of_runs(tmp_path: Path) -> None:
    listed_run(tmp_path / "done", ended("done", 900.0), summary=SUMMARY)
    listed_run(tmp_path / "interrupted", *session(), ended("interrupted"))
    listed_run(tmp_path / "continued-and-killed", *session(), ended("interrupted"), *session(200.0))
    listed_run(tmp_path / "failed", *session(), ended("failed", message="the disk is full"))
    killed = listed_run(tmp_path / "killed", *session())
    (killed / "summary.json").write_text(json.dumps({"status": "interrupted"}))
    running = listed_run(tmp_path / "running", *session())
    (running / ".lock").write_text(str(os.getpid()))
    created = tmp_path / "created"
    created.mkdir()
    (created / "run.json").write_text(json.dumps({"recipe": RECIPE}))
    with (running / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        states = {run.name: run.state for run in list_runs(tmp_path)}
    assert states == {
        "done": "done",
        "interrupted": "interrupted",
        "continued-and-killed": "killed",
        "failed": "failed",
        "killed": "killed",
        "running": "running",
        "created": "not started",
    }
    assert by_name(tmp_path)["running"].state == "killed", "without its process"


def test_figures_of_a_finished_and_of_an_unfinished_run(tmp_path: Path) -> None:
    listed_run(tmp_path / "done", *session(), ended("done", 900.0), summary=SUMMARY)
    listed_run(tmp_path / "half", *session(), ended("interrupted"))
    listed_run(tmp_path / "bare", run_started(), step_end(1, loss=3.0, reward=0.5))
    runs = by_name(tmp_path)
    done, half, bare = (runs[name] for name in ("done", "half", "bare"))
    assert (done.algorithm, done.base, done.step, done.steps, done.seconds) == ("sft", "tiny", 9, 9, 61.0)
    assert done.best is not None and (done.best.label, done.best.value, done.best.step) == ("validation loss", 0.25, 6)
    assert done.updated == 900.0
    assert done.num_bytes == sum(file.stat().st_size for file in (tmp_path / "done").iterdir())
    assert (half.step, half.steps, half.seconds) == (2, 9, 4.0)
    assert half.best is not None and (half.best.label, half.best.value, half.best.step) == ("validation loss", 0.5, 2)
    assert bare.best is not None and (bare.best.label, bare.best.value) == ("reward", 0.5)


def test_best_of_an_online_run_is_its_held_out_accuracy(tmp_path: Path) -> None:
    best = {"step": 4, "accuracy": 0.985, "eos_rate": 1.0, "mean_length": 33.7}
    listed_run(tmp_path / "grpo", summary={**SUMMARY, "best": best, "last": {"reward": 0.1}})
    pairs = {"step": 4, "accuracy": 0.9, "loss": 0.3}
    listed_run(tmp_path / "reward", summary={**SUMMARY, "best": pairs})
    text = printed(list_runs(tmp_path), 200)
    assert "held-out exact 98.5 %" in text and "validation loss 0.300" in text


def test_the_newest_run_is_first(tmp_path: Path) -> None:
    for name, at in (("old", 100.0), ("new", 300.0), ("middle", 200.0)):
        listed_run(tmp_path / name, *session(at), ended("interrupted", at + 9))
    assert [run.name for run in list_runs(tmp_path)] == ["new", "middle", "old"]


def chain(folder: Path, *states: str) -> Path:
    """A chain of SFT and GRPO, whose first stages have these states."""
    folder.mkdir()
    stages = [{"name": name, "algorithm": name} for name in ("sft", "grpo")]
    (folder / "run.json").write_text(json.dumps({"recipe": {"name": "chained", "stages": stages}}))
    for number, state in enumerate(states, 1):
        name = ("sft", "grpo")[number - 1]
        files = {"summary": SUMMARY} if state == "done" else {}
        end = [ended(state, 100.0 * number)] if state else []
        listed_run(folder / f"{number}-{name}", *session(90.0 * number), *end, recipe=RECIPE, **files)
    return folder


def test_a_chain_is_one_entry_with_its_stages(tmp_path: Path) -> None:
    whole = chain(tmp_path / "whole", "done", "done")
    (whole / "summary.json").write_text(json.dumps(DONE_CHAIN))
    chain(tmp_path / "second-failed", "done", "failed")
    chain(tmp_path / "second-killed", "done", "")
    chain(tmp_path / "between", "done")
    chain(tmp_path / "empty")
    runs = by_name(tmp_path)
    assert {name: run.state.value for name, run in runs.items()} == {
        "whole": "done",
        "second-failed": "failed",
        "second-killed": "killed",
        "between": "killed",
        "empty": "not started",
    }
    assert runs["whole"].algorithm == "sft \u2192 grpo" and runs["whole"].seconds == 122.0
    assert [stage.name for stage in runs["whole"].stages] == ["1-sft", "2-grpo"]
    text = printed(list_runs(tmp_path), 200)
    assert text.count("whole") == 1 and "9 + 9" in text
    assert [run.name for run in list_runs(whole)] == ["2-grpo", "1-sft"], "the stages of a chain are runs"


def test_damaged_folders_are_named_and_not_fatal(tmp_path: Path) -> None:
    listed_run(tmp_path / "good", *session(), ended("done"))
    broken = listed_run(tmp_path / "broken", *session())
    (broken / "run.json").write_text("{")
    write_run(tmp_path / "no-recipe", *session())
    unreadable = listed_run(tmp_path / "unreadable")
    (unreadable / "events.jsonl").unlink()
    (unreadable / "events.jsonl").mkdir()
    junk = write_run(tmp_path / "junk", run=[], summary=[1])
    (junk / "events.jsonl").write_bytes(b"\x00\xff{}\n[1]\n{" * 50)
    waiting = listed_run(tmp_path / "fifo", summary=SUMMARY)
    (waiting / "events.jsonl").unlink()
    os.mkfifo(waiting / "events.jsonl")
    deep = listed_run(tmp_path / "deep")
    (deep / "run.json").write_text("[" * 100_000)
    (tmp_path / "link").symlink_to("link")
    (tmp_path / "notes").mkdir()
    (tmp_path / "compare.html").write_text("")
    runs = by_name(tmp_path)
    assert set(runs) == {"good", "broken", "no-recipe", "unreadable", "junk", "fifo", "deep"}
    assert [name for name, run in runs.items() if run.state == RunState.DAMAGED] == [
        name for name in runs if name != "good"
    ]
    text = printed(list_runs(tmp_path), 200)
    assert "broken damaged: run.json is not valid JSON" in text and "unreadable damaged: events.jsonl cannot be" in text
    assert "no-recipe damaged: run.json cannot be read" in text and "it is a FIFO, not a regular file" in text


def test_lines_with_wrong_values_are_skipped(tmp_path: Path) -> None:
    folder = listed_run(tmp_path / "one", *session())
    wrong = [
        {**to_json(ended("done")), "status": "almost"},
        {**to_json(step_end(3, loss=1.0)), "step": "3"},
        {**to_json(step_end(4, loss=1.0)), "stats": [1]},
        {**to_json(step_end(5, loss=1.0)), "time": math.inf},
    ]
    with (folder / "events.jsonl").open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in wrong)
    (run,) = list_runs(tmp_path)
    assert (run.state, run.step, run.updated) == ("killed", 2, 103.0)
    assert "2 / 9" in printed([run], 200) and json.loads(runs_as_json([run]))


def test_a_run_that_is_deleted_meanwhile_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed_run(tmp_path / "gone")
    monkeypatch.setattr(folder_module, "is_chain", lambda path: bool(shutil.rmtree(path)))
    (run,) = list_runs(tmp_path)
    assert run.state == "damaged" and run.problem.startswith("run.json cannot be read")


@pytest.mark.parametrize("content", ['{"status": "done"}', "{", "[]"])
def test_a_damaged_summary_is_named(tmp_path: Path, content: str) -> None:
    """Also if the log has the end of the run; a run that goes on replaces its summary."""
    for name in ("ended", "running", "killed"):
        run = listed_run(tmp_path / name, *session(), *([ended("done")] if name == "ended" else []))
        (run / "summary.json").write_text(content)
    whole = chain(tmp_path / "whole", "done", "done")
    (whole / "summary.json").write_text(content)
    lock = tmp_path / "running" / ".lock"
    lock.write_text(str(os.getpid()))
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        runs = by_name(tmp_path)
    states = {name: run.state.value for name, run in runs.items()}
    assert states == {"ended": "damaged", "running": "running", "killed": "damaged", "whole": "damaged"}
    assert runs["ended"].step == 2 and [stage.state for stage in runs["whole"].stages] == ["done", "done"]
    assert "killed damaged: summary.json: it" in printed(list_runs(tmp_path), 400)


def test_hostile_names_and_figures_are_inert(tmp_path: Path) -> None:
    for number, bad in enumerate(HOSTILE_TEXTS):
        recipe = {"name": bad, "algorithm": bad, "base": {"model": bad}, "stages": bad}
        started = run_started(name=bad, model=bad, algorithm=bad)
        listed_run(tmp_path / f"<i>[red]\x1b\u202e{number}", started, ended("failed", message=bad), recipe=recipe)
        listed_run(tmp_path / f"s{number}", summary={**SUMMARY, "best": {"loss": bad}, "step": bad, "seconds": bad})
    runs = list_runs(tmp_path)
    assert len(runs) == 2 * len(HOSTILE_TEXTS)
    text = printed(runs, 300)
    assert is_inert(text) and "[red]" in text
    assert len(json.loads(runs_as_json(runs))) == len(runs)


@pytest.mark.parametrize("width", [40, 60, 80, 120, 160])
def test_narrow_terminals_show_fewer_columns(tmp_path: Path, width: int) -> None:
    listed_run(tmp_path / "a-run", *session(), ended("done"), summary=SUMMARY)
    listed_run(tmp_path / ("a-long-name-" * 6), *session(), ended("interrupted"))
    chain(tmp_path / "chained", "done", "failed")
    lines = printed(list_runs(tmp_path), width).splitlines()
    assert max(map(len, lines)) <= width
    head = lines[0].split()
    assert head[:2] == ["run", "state"]
    assert ("best" in head) == (width >= 80) and ("size" in head) == (width >= 160)
    joined = "".join(line.split(" ")[0] for line in lines)
    assert "a-long-name-" * 6 in joined, "a name is wrapped, and no part of it is lost"


def test_command_prints_a_table_or_json(tmp_path: Path) -> None:
    listed_run(tmp_path / "one", *session(), ended("done"), summary=SUMMARY)
    shown = CliRunner().invoke(app, ["runs", str(tmp_path)])
    assert shown.exit_code == 0 and shown.output.splitlines()[0].split() == [
        "run", "state", "algorithm", "base", "best", "steps", "age", "time", "size"
    ]  # fmt: skip
    assert "validation loss 0.250" in shown.output and "1:01" in shown.output
    (entry,) = json.loads(CliRunner().invoke(app, ["runs", str(tmp_path), "--json"]).output)
    assert entry["state"] == "done" and entry["best"] == {"metric": "eval_loss", "value": 0.25, "step": 6}
    assert entry["folder"] == str(tmp_path / "one")


def test_faulty_folders_give_one_sentence(tmp_path: Path) -> None:
    single = listed_run(tmp_path / "one", *session())
    (tmp_path / "none").mkdir()
    for folder, code, message in (
        (single, 2, "is a run itself"),
        (tmp_path / "missing", 2, "there is no such folder; `lowrank-tune run` writes its runs to runs/"),
        (tmp_path / "none", 0, "no run in"),
    ):
        shown = CliRunner().invoke(app, ["runs", str(folder)])
        assert (shown.exit_code, shown.output.count("\n")) == (code, 1) and message in shown.output


def test_two_hundred_runs_are_listed_within_a_second_and_without_torch(tmp_path: Path) -> None:
    steps = [step_end(number, loss=1.0, kl=0.1, grad_norm=0.5) for number in range(1, 51)]
    first = listed_run(tmp_path / "first", run_started(), *steps, ended("interrupted"))
    contents = {name: (first / name).read_bytes() for name in ("run.json", "events.jsonl")}
    for number in range(199):
        folder = tmp_path / f"run-{number}"
        folder.mkdir()
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        if number % 2:
            (folder / "summary.json").write_text(json.dumps(SUMMARY))
    program = (
        "import sys; from lowrank_tune.cli import app; "
        f"sys.argv = ['lowrank-tune', 'runs', {str(tmp_path)!r}]; app(standalone_mode=False); "
        "assert 'torch' not in sys.modules"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    assert len(shown.stdout.splitlines()) == 201
    # the processor time of this process: the machine may be busy
    before = time.process_time()
    assert len(list_runs(tmp_path)) == 200
    assert time.process_time() - before < 1


def test_sizes_and_ages() -> None:
    assert [format_size(size) for size in (0, 1023, 1024, 1_572_864, 5 * 1024**3)] == [
        "0 B", "1,023 B", "1.0 KiB", "1.5 MiB", "5.0 GiB"
    ]  # fmt: skip
    assert [format_age(age) for age in (-5, 59, 60, 7199, 7200, 86400 * 40)] == [
        "0 s", "59 s", "1 min", "1 h", "2 h", "40 d"
    ]  # fmt: skip
