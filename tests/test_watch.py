"""`watch`: a growing file, a finished one, a half-written line, a replaced one, several runs; in a terminal and in a pipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowrank_tune.errors import UserError
from lowrank_tune.events import Note, RunEnded, StepDone
from lowrank_tune.sinks import line
from lowrank_tune.ui.plain import clock
from lowrank_tune.ui.watch import Tail, Watched, events_in, file_of, watch
from tests.test_live_screen import ENVIRON, Emulator, shell_is_sane

RECORDED = (Path(__file__).parent / "recorded" / "demo.jsonl").read_bytes()
END = f"done after step 96 in {clock(json.loads(RECORDED.splitlines()[-1])['seconds'])}"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run's folder."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "events.jsonl").write_bytes(RECORDED)
    return folder


def test_every_cut_of_the_file_gives_the_same_events(tmp_path: Path) -> None:
    path, data = tmp_path / "events.jsonl", RECORDED[:20_000]
    whole = [line(event) for event in events_in(tmp_path / "absent")]
    assert whole == []
    path.write_bytes(data)
    expected = list(events_in(path))
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
    path, event = tmp_path / "events.jsonl", Note(message="whole")
    path.write_bytes(line(event) + line(event)[:20])
    tail = Tail(path)
    assert tail.poll() == (False, [event]) and tail.poll() == (False, [])
    with path.open("ab") as file:
        file.write(line(event)[20:])
    assert tail.poll() == (False, [event])


def test_rubbish_is_skipped(tmp_path: Path) -> None:
    path, event = tmp_path / "events.jsonl", Note(message="whole")
    rubbish = b"\xff\xfe\x00\n[]\n{}\n1\nnull\n" + b"[" * 100_000 + b'\n{"event": "step"}\n{"event": "new kind", "v": 9}\n\n'
    path.write_bytes(rubbish + line(event))
    assert list(events_in(path)) == [event]


def test_a_replaced_file_is_begun_anew(run: Path) -> None:
    watched = Watched(run / "events.jsonl")
    assert watched.poll() and watched.state.step == 96
    other = run / "other"
    other.write_bytes(b"".join(raw for raw in RECORDED.splitlines(keepends=True)[:60]))
    os.replace(other, run / "events.jsonl")
    assert watched.poll() and watched.state.step < 30 and not watched.poll()
    (run / "events.jsonl").write_bytes(b"")
    assert watched.poll() and watched.state.step == 0
    (run / "events.jsonl").unlink()
    assert not watched.poll()


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run to watch, for there is no events.jsonl"):
        file_of(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        watch([tmp_path / "absent"])


def piped(*words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "lowrank_tune", "watch", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRON)


def test_a_pipe_gets_lines_without_an_escape_byte(run: Path) -> None:
    out, errors = piped(str(run)).communicate(timeout=60)
    assert b"\x1b" not in out and not errors
    told = out.decode().splitlines()
    assert any(one.startswith("loading tiny-tutor") for one in told) and told[-1] == END and any("step 96/96" in one for one in told)
    assert b"no run to watch" in piped(str(run / "nothing")).communicate(timeout=60)[1]


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
    emulator.press("l")
    emulator.until("loss log")
    emulator.press("q")
    assert emulator.finish() == 0 and shell_is_sane(emulator)


def test_several_runs_in_a_terminal(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_bytes(RECORDED.replace(b'"name": "demo"', b'"name": "rival"'))
    emulator = Emulator("-m", "lowrank_tune", "watch", str(run), str(other), columns=160, lines=40)
    emulator.until(lambda: "demo" in emulator.screen.display[0][:80] and "rival" in emulator.screen.display[0][80:])
    emulator.resize(80, 48)
    emulator.until(lambda: "demo" in emulator.screen.display[0] and "rival" in emulator.screen.display[24])
    emulator.press("\x03")
    assert emulator.finish() == 0 and shell_is_sane(emulator)


def test_hostile_events_do_not_reach_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    step = StepDone(step=1, steps=2, stats={"\x1b[31mx": 1.0}, seconds=1.0, tokens=1)
    events = [step, Note(message="\x1b]52;c;eA==\x07\u202e", level="warning"), RunEnded(status="done", step=2, seconds=1.0)]
    path.write_bytes(b"".join(line(event) for event in events))
    out = piped(str(path)).communicate(timeout=60)[0]
    assert b"\x1b" not in out and b"\x07" not in out and "\u202e" not in out.decode()
    emulator = Emulator("-m", "lowrank_tune", "watch", str(path))
    emulator.until("\\x1b]52")
    emulator.press("q")
    assert emulator.finish() == 0 and b"\x1b]" not in emulator.raw and b"\x07" not in emulator.raw
