"""`watch` in a terminal and in a pipe: growing, finished and replaced files, half-written lines, several runs."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from test_live_screen import ENVIRON, PLAYER, Emulator, shell_is_sane

from lowrank_tune.errors import UserError
from lowrank_tune.events import Event, LogMessage, RunEnded, RunStarted, StepEnd
from lowrank_tune.training.sinks import to_json_line
from lowrank_tune.ui.formatting import clock
from lowrank_tune.ui.run_paths import stage_folders
from lowrank_tune.ui.terminal.panes import View
from lowrank_tune.ui.terminal.render import render
from lowrank_tune.ui.terminal.text_layout import plain_text
from lowrank_tune.ui.watch import Tail, Tails, WatchedRun, event_files, read_events, watch

RECORDED = (Path(__file__).parents[1] / "recorded" / "demo.jsonl").read_bytes()
END = f"done after step 96 in {clock(json.loads(RECORDED.splitlines()[-1])['seconds'])}"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run's folder."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "events.jsonl").write_bytes(RECORDED)
    return folder


def test_tail_of_a_file_in_parts_returns_the_same_events(tmp_path: Path) -> None:
    path, data = tmp_path / "events.jsonl", RECORDED[:20_000]
    whole = [to_json_line(event) for event in read_events(tmp_path / "absent")]
    assert whole == []
    path.write_bytes(data)
    expected = list(read_events(path))
    for size in (1, 7, 1000):
        path.write_bytes(b"")
        tail, seen = Tail(path), []
        for at in range(0, len(data), size * 50):
            with path.open("ab") as file:
                file.write(data[at : at + size * 50])
            anew, events = tail.poll()
            assert not anew
            seen += events
        assert seen == expected and len(seen) == data.count(b"\n")


def test_a_half_written_line_waits_for_its_end(tmp_path: Path) -> None:
    path, event = tmp_path / "events.jsonl", LogMessage(message="whole")
    path.write_bytes(to_json_line(event) + to_json_line(event)[:20])
    tail = Tail(path)
    assert tail.poll() == (False, [event]) and tail.poll() == (False, [])
    with path.open("ab") as file:
        file.write(to_json_line(event)[20:])
    assert tail.poll() == (False, [event])


def test_lines_that_are_not_events_are_skipped(tmp_path: Path) -> None:
    path, event = tmp_path / "events.jsonl", LogMessage(message="whole")
    lines = (
        b"\xff\xfe\x00\n[]\n{}\n1\nnull\n"
        + b"[" * 100_000
        + b'\n{"event": "step_end"}\n{"event": "new kind", "v": 9}\n\n'
    )
    path.write_bytes(lines + to_json_line(event))
    assert list(read_events(path)) == [event]


def test_a_replaced_file_is_read_from_its_start(run: Path) -> None:
    watched = WatchedRun(run / "events.jsonl")
    assert watched.poll() and watched.state.step == 96
    other = run / "other"
    other.write_bytes(b"".join(raw for raw in RECORDED.splitlines(keepends=True)[:60]))
    other.replace(run / "events.jsonl")
    assert watched.poll() and watched.state.step < 30 and not watched.poll()
    (run / "events.jsonl").write_bytes(b"")
    assert watched.poll() and watched.state.step == 0
    (run / "events.jsonl").unlink()
    assert not watched.poll()


def test_watch_of_a_folder_without_events_raises(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run to watch: there is no events.jsonl"):
        watch([tmp_path])
    with pytest.raises(UserError, match="no such file or folder"):
        watch([tmp_path / "absent"])


def piped(*words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "lowrank_tune", "watch", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRON)


def test_a_pipe_gets_lines_without_an_escape_byte(run: Path) -> None:
    out, errors = piped(str(run)).communicate(timeout=60)
    assert b"\x1b" not in out and not errors
    output = out.decode().splitlines()
    assert (
        any(one.startswith("loading tiny-tutor") for one in output)
        and output[-1] == END
        and any("step 96/96" in one for one in output)
    )
    assert b"nothing: there is no such run" in piped(str(run / "nothing")).communicate(timeout=60)[1]


def ended_pid() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_killed_run_has_an_ended_process(run: Path) -> None:
    lines = RECORDED.splitlines(keepends=True)
    (run / "events.jsonl").write_bytes(b"".join(lines[:-1]))
    (run / ".lock").write_text(f"{os.getpid()}\n")
    watched = WatchedRun(run / "events.jsonl", folder=run)
    assert watched.poll() and watched.state.ended_process is None and not watched.poll()
    process = ended_pid()
    (run / ".lock").write_text(f"{process}\n")
    with (run / ".lock").open() as lock:  # the process is in a container: the kernel has it under another number
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not watched.poll() and watched.state.ended_process is None
    assert watched.poll() and watched.state.ended_process == process and not watched.poll()
    now = watched.state.last_time + 5
    words = f"process {process} has ended, no news for 0:05"
    for width, height in ((100, 30), (40, 8)):
        screen = plain_text(render(watched.state, View(now=now), width, height))
        assert words[: width - 10] in screen and "ETA" not in screen
    out, errors = piped(str(run)).communicate(timeout=60)
    assert f"process {process} has ended before the run did" in out.decode() and not errors
    (run / "events.jsonl").write_bytes(RECORDED)
    assert watched.poll() and "has ended," not in plain_text(render(watched.state, View(now=now), 100, 30))


STARTS = [
    LogMessage(message="a chain begins"),
    RunStarted(name="c", algorithm="sft", model="m", roles={}, reference="r", steps=2, stage=1, stages=2),
]
SECOND = RunStarted(name="c", algorithm="dpo", model="m", roles={}, reference="r", steps=2, stage=2, stages=2)


def step(number: int) -> StepEnd:
    return StepEnd(step=number, steps=2, stats={"loss": 1.0}, seconds=1.0, tokens=1)


def ended(status: Literal["done", "interrupted", "failed"] = "done") -> RunEnded:
    return RunEnded(status=status, step=2, seconds=2.0)


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """A chain of two stages of which none has begun."""
    folder = tmp_path / "chain"
    folder.mkdir()
    (folder / "run.json").write_text(
        json.dumps({"version": 2, "recipe": {"name": "c", "stages": [{"name": "sft"}, {"name": "dpo"}]}})
    )
    return folder


def write_events(folder: Path, *events: Event) -> None:
    """Appends to a stage's events."""
    folder.mkdir(exist_ok=True)
    with (folder / "events.jsonl").open("ab") as file:
        file.write(b"".join(map(to_json_line, events)))


def test_a_chain_has_stages_and_a_run_is_its_own(chain: Path, run: Path) -> None:
    assert stage_folders(chain) == [chain / "1-sft", chain / "2-dpo"] and stage_folders(run) == [run]
    of_all_stages = [chain / "1-sft" / "events.jsonl", chain / "2-dpo" / "events.jsonl"]
    assert event_files(chain) == of_all_stages
    for name in ("1-sft", "2-dpo"):
        write_events(chain / name, *STARTS)
        assert stage_folders(chain / name) == [chain / name]
        assert event_files(chain / name) == [chain / name / "events.jsonl"]
        assert event_files(chain) == of_all_stages


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[[[",
        b"[]",
        b'{"recipe": 1}',
        b'{"recipe": {"stages": 3}}',
        b'{"recipe": {"stages": [1]}}',
        b"\xff",
        b'{"recipe": {"stages": [{"name": "../../etc"}]}}',
        b'{"recipe": {"stages": [{"name": "a\\u0000"}]}}',
        b'{"recipe": {"stages": []}}',
        b'{"recipe": {"stages": [{"name": "a"}, {}]}}',
        b"[" * 100_000,
    ],
)
def test_malformed_run_json_is_not_a_chain(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    assert stage_folders(tmp_path) == [tmp_path]
    with pytest.raises(UserError, match="not a run to watch"):
        event_files(tmp_path)


def test_watched_chain_shows_the_newest_stage(chain: Path) -> None:
    watched = WatchedRun(*event_files(chain))
    assert not watched.poll() and watched.state.started is None
    write_events(chain / "1-sft", *STARTS, step(1), step(2), ended())
    assert watched.poll() and watched.state.step == 2 and watched.state.ended is not None
    write_events(chain / "2-dpo", SECOND, step(1))
    assert (
        watched.poll() and watched.state.started == SECOND and watched.state.step == 1 and watched.state.ended is None
    )
    other = chain / "other"
    other.write_bytes((chain / "1-sft" / "events.jsonl").read_bytes())
    other.replace(chain / "1-sft" / "events.jsonl")  # replaced: all events of the chain are read again, in order
    assert watched.poll() and watched.state.started == SECOND and watched.state.step == 1 and not watched.poll()


def test_stages_stay_in_order_where_the_first_is_long(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_tune.ui.watch.MAX_BYTES", 100)
    write_events(chain / "1-sft", *STARTS, step(1), step(2), ended())
    write_events(chain / "2-dpo", SECOND, step(1))
    tails, seen = Tails(event_files(chain)), list[Event]()
    # a part may be shorter than a line
    assert len(list(read_events(chain / "1-sft" / "events.jsonl"))) == 5
    for _ in range(200):
        seen += tails.poll()[1]
    assert [type(event) for event in seen] == [LogMessage, RunStarted, StepEnd, StepEnd, RunEnded, RunStarted, StepEnd]
    assert [event.stage for event in seen if isinstance(event, RunStarted)] == [1, 2]


def test_a_pipe_follows_a_chain_to_the_end_of_its_last_stage(chain: Path) -> None:
    write_events(chain / "1-sft", *STARTS, step(1), step(2), ended())
    process = piped(str(chain))
    time.sleep(2.0)
    assert process.poll() is None  # the end of a stage is not the end
    write_events(chain / "2-dpo", SECOND, step(1), step(2), ended())
    out = process.communicate(timeout=60)[0].decode().splitlines()
    assert "stage 1 of 2 done after step 2 in 0:02" in out and out[-1] == "stage 2 of 2 done after step 2 in 0:02"
    assert out[0] == "a chain begins" and "\x1b" not in "".join(out)


@pytest.mark.slow
@pytest.mark.parametrize("status", ["failed", "interrupted"])
def test_failed_stage_ends_its_chain(chain: Path, run: Path, status: Literal["failed", "interrupted"]) -> None:
    write_events(chain / "1-sft", *STARTS, step(1), ended(status))
    out = piped(str(chain), str(run)).communicate(timeout=60)[0].decode().splitlines()  # and the next run follows
    assert f"stage 1 of 2 {status} after step 2 in 0:02" in out and out[-1] == END
    write_events(chain / "2-dpo", SECOND, ended())
    assert (
        piped(str(chain / "1-sft"))
        .communicate(timeout=60)[0]
        .decode()
        .splitlines()[-1]
        .startswith(f"stage 1 of 2 {status}")
    )


@pytest.mark.slow
def test_the_dashboard_of_a_chain_that_runs(tmp_path: Path) -> None:
    emulator = Emulator(PLAYER, str(tmp_path), "0.05", "--chain")
    emulator.until("stage 1 of 2: sft")
    emulator.until("stage 2 of 2: dpo")
    emulator.until("/68 (")
    emulator.press("q")
    assert emulator.finish() == 0 and shell_is_sane(emulator)
    assert (
        json.loads((tmp_path / "handled.json").read_text()) == ["stop"] and b"interrupted after step 1" in emulator.raw
    )


@pytest.mark.slow
def test_a_chain_in_a_terminal(chain: Path) -> None:
    emulator = Emulator("-m", "lowrank_tune", "watch", str(chain))
    emulator.until("starting")
    write_events(chain / "1-sft", *STARTS, step(1))
    emulator.until("stage 1 of 2: sft")
    write_events(chain / "1-sft", step(2), ended())
    emulator.until("stage 1 done in 0:02")
    write_events(chain / "2-dpo", SECOND, step(1))
    emulator.until("stage 2 of 2: dpo")
    emulator.until("step 1/2 (50 %)")
    emulator.press("q")
    assert emulator.finish() == 0 and shell_is_sane(emulator)


@pytest.mark.slow
def test_group_view_opens_and_closes(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_bytes((Path(__file__).parents[1] / "recorded" / "grpo.jsonl").read_bytes())
    emulator = Emulator("-m", "lowrank_tune", "watch", str(tmp_path))
    emulator.until("step 24/24")
    for leave in ("g", "\x1b"):
        emulator.press("g")
        emulator.until("group of step 24: 8 completions")
        emulator.press(leave)
        emulator.until(lambda: "group of step" not in emulator.text() and "question 1 of 4" in emulator.text())
    emulator.press("q")
    assert emulator.finish() == 0 and shell_is_sane(emulator)


@pytest.mark.slow
def test_a_pipe_follows_a_growing_file(run: Path) -> None:
    lines = RECORDED.splitlines(keepends=True)
    path = run / "events.jsonl"
    path.write_bytes(b"".join(lines[:50]))
    process = piped(str(path))
    time.sleep(1.0)
    with path.open("ab") as file:
        file.write(b"".join(lines[50:]))
    assert process.communicate(timeout=60)[0].decode().splitlines()[-1] == END


@pytest.fixture
def growing(run: Path) -> Iterator[Path]:
    path = run / "events.jsonl"
    path.write_bytes(RECORDED[: len(RECORDED) // 2])  # half a line at the end
    assert not path.read_bytes().endswith(b"\n")
    yield path


def test_a_growing_file_in_a_terminal(growing: Path) -> None:
    emulator = Emulator("-m", "lowrank_tune", "watch", str(growing.parent))
    emulator.until("no news for")  # it was recorded long ago
    emulator.until("q quit")  # the last line of the frame, which may come in pieces
    assert "pause" not in emulator.text()
    with growing.open("ab") as file:
        file.write(RECORDED[len(RECORDED) // 2 :])
    emulator.until(f"done in {END.rpartition(' ')[2]}")
    emulator.until("step 96/96 (100 %)")
    emulator.press("y")
    emulator.until("loss log")
    emulator.press("q")
    assert emulator.finish() == 0 and shell_is_sane(emulator)


@pytest.mark.slow
def test_several_runs_in_a_terminal(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_bytes(RECORDED.replace(b'"name": "demo"', b'"name": "rival"'))
    emulator = Emulator("-m", "lowrank_tune", "watch", str(run), str(other), columns=160, lines=40)
    emulator.until(lambda: "demo" in emulator.screen.display[0][:80] and "rival" in emulator.screen.display[0][80:])
    emulator.resize(80, 24)
    emulator.until(lambda: "1 demo" in emulator.screen.display[1] and "2 rival" in emulator.screen.display[2])
    emulator.press("2")
    emulator.until(lambda: "rival" in emulator.screen.display[0])
    emulator.press("\x03")
    assert emulator.finish() == 0 and shell_is_sane(emulator)


def test_hostile_events_do_not_reach_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    step = StepEnd(step=1, steps=2, stats={"\x1b[31mx": 1.0}, seconds=1.0, tokens=1)
    events = [
        step,
        LogMessage(message="\x1b]52;c;eA==\x07\u202e", level="warning"),
        RunEnded(status="done", step=2, seconds=1.0),
    ]
    path.write_bytes(b"".join(to_json_line(event) for event in events))
    out = piped(str(path)).communicate(timeout=60)[0]
    assert b"\x1b" not in out and b"\x07" not in out and "\u202e" not in out.decode()
    emulator = Emulator("-m", "lowrank_tune", "watch", str(path))
    emulator.until("\\x1b]52")
    emulator.press("q")
    assert emulator.finish() == 0 and b"\x1b]" not in emulator.raw and b"\x07" not in emulator.raw
