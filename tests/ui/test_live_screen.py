"""Live screens in an emulated terminal (pyte) and in a real tmux: keys, resize, suspension, and each way to end."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyte
import pytest

from lowrank_tune.checkpoint import latest_checkpoint
from lowrank_tune.events import StepEnd
from lowrank_tune.ui.terminal.device import ENTER, LEAVE, ascii_only, can_show
from lowrank_tune.ui.terminal.live_screen import TICK_SECONDS, LiveScreen
from lowrank_tune.ui.watch import read_events

ROOT = Path(__file__).parents[2]
PLAYER = str(ROOT / "tests" / "event_player.py")
ENVIRON = {
    key: value for key, value in os.environ.items() if key not in ("CI", "NO_COLOR", "TMUX", "COLUMNS", "LINES")
} | {
    "TERM": "xterm-256color",
    "LANG": "C.UTF-8",
    "LC_ALL": "C.UTF-8",
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
PATIENCE = 60.0


class Emulator:
    """A program in its own terminal. Its output is stored in `raw` and drawn on `screen`."""

    def __init__(self, *words: str, columns: int = 80, lines: int = 24, **environ: str) -> None:
        self.screen, self.raw, self.status = pyte.Screen(columns, lines), b"", -1
        self._stream = pyte.ByteStream(self.screen)
        self.child, self.terminal = pty.fork()
        if self.child == 0:
            # the default, as in a shell at a terminal; a background job may have inherited another handler
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            # until then the size is set
            time.sleep(0.2)
            os.execve(sys.executable, [sys.executable, *words], {**ENVIRON, **environ})
        self.resize(columns, lines)
        self.before = termios.tcgetattr(self.terminal)

    def resize(self, columns: int, lines: int) -> None:
        self.screen.resize(lines, columns)
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def text(self) -> str:
        return "\n".join(self.screen.display)

    def press(self, keys: str) -> None:
        os.write(self.terminal, keys.encode())

    def read(self, seconds: float) -> bool:
        """Draws the output of at most so many seconds; returns False if the program has closed its terminal."""
        if select.select([self.terminal], [], [], seconds)[0]:
            try:
                data = os.read(self.terminal, 65536)
            except OSError:
                return False
            self.raw += data
            self._stream.feed(data)
            return bool(data)
        return True

    def until(self, wanted: str | Callable[[], bool], seconds: float = PATIENCE) -> None:
        end = time.monotonic() + seconds
        while not (wanted in self.text() if isinstance(wanted, str) else wanted()):
            assert time.monotonic() < end and self.read(0.1), f"waited for {wanted}:\n{self.text()}"

    def finish(self) -> int:
        """Reads until the end of the program; returns its exit code."""
        end = time.monotonic() + PATIENCE
        while self.read(0.2):
            assert time.monotonic() < end, self.text()
            if select.select([self.terminal], [], [], 0)[0] == [] and (done := os.waitpid(self.child, os.WNOHANG))[0]:
                self.status = done[1]
                break
        while self.status == -1:
            self.status = os.waitpid(self.child, 0)[1]
        return os.waitstatus_to_exitcode(self.status)


def shell_is_sane(emulator: Emulator) -> bool:
    """Returns whether the settings of the terminal are restored and the alternate screen was left."""
    sane = termios.tcgetattr(emulator.terminal) == emulator.before
    return (
        sane
        and emulator.raw.count(ENTER) == emulator.raw.count(LEAVE)
        and emulator.raw.rfind(LEAVE) > emulator.raw.rfind(ENTER)
    )


@pytest.fixture
def emulator(tmp_path: Path) -> Iterator[Emulator]:
    one = Emulator(PLAYER, str(tmp_path), "0.2")
    yield one
    if one.status == -1:
        os.kill(one.child, signal.SIGKILL)
        os.waitpid(one.child, 0)
    os.close(one.terminal)


def test_live_screen_keys_and_resizes_from_start_to_quit(emulator: Emulator, tmp_path: Path) -> None:
    emulator.until("KL to the reference")
    for wanted in (
        "demo \u00b7 sft of tiny-tutor",
        "q quit",
        "ETA",
        "memory",
    ):
        emulator.until(wanted)
    emulator.press("?")
    emulator.until("save and quit")
    emulator.press("?")
    emulator.until("question 1 of 4")
    emulator.press("n")
    emulator.until("question 2 of 4")
    emulator.press("y")
    emulator.until("loss log")
    # without an open pane an arrow has no effect, and function keys never have one
    emulator.press("\x1b[A\x1bOP\x1b[1;5q")
    emulator.press("s")
    emulator.until("met the request to save")
    emulator.press("e")
    emulator.until("met the request to evaluate")
    emulator.press("p")
    emulator.until("paused: p continues")
    emulator.resize(120, 40)
    emulator.until(lambda: "learning rate" in emulator.text() and "q  quit" in emulator.screen.display[39])
    emulator.resize(50, 12)
    emulator.until(lambda: emulator.screen.display[0].startswith("demo: paused"))
    emulator.resize(80, 24)
    emulator.press("p")
    emulator.until("running")
    emulator.press("q")
    assert emulator.finish() == 0 and shell_is_sane(emulator)
    assert json.loads((tmp_path / "handled.json").read_text()) == ["save", "evaluate", "stop"]
    assert (
        emulator.raw.endswith(b"THE END\r\n") and b"interrupted after step" in emulator.raw[emulator.raw.rfind(LEAVE) :]
    )
    log = (tmp_path / "console.log").read_text()
    assert log == "a library prints\nC code writes\n" and b"C code" not in emulator.raw


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_leave_a_sane_terminal(emulator: Emulator, tmp_path: Path, number: signal.Signals) -> None:
    emulator.until("ETA")
    os.kill(emulator.child, number)
    assert (
        emulator.finish() == 0
        and shell_is_sane(emulator)
        and json.loads((tmp_path / "handled.json").read_text()) == ["stop"]
    )


def test_an_exception_leaves_a_sane_terminal(tmp_path: Path) -> None:
    emulator = Emulator(PLAYER, str(tmp_path), "0", "--break")
    assert (
        emulator.finish() == 1
        and shell_is_sane(emulator)
        and b"the run broke" in emulator.raw[emulator.raw.rfind(LEAVE) :]
    )


def test_a_closed_terminal_lets_the_run_save(tmp_path: Path) -> None:
    emulator = Emulator(PLAYER, str(tmp_path), "0.1")
    emulator.until("ETA")
    os.close(emulator.terminal)
    os.waitpid(emulator.child, 0)
    assert json.loads((tmp_path / "handled.json").read_text()) == ["stop"]


@pytest.mark.slow
def test_live_screen_draws_at_most_two_frames_per_second(emulator: Emulator) -> None:
    emulator.until("ETA")
    frames, steps, start = 0, set(), time.monotonic()
    while time.monotonic() < start + 3:
        size = len(emulator.raw)
        emulator.read(0.05)
        frames += len(emulator.raw) > size
        steps |= set(re.findall(r"step (\d+)/96", emulator.text()))
    assert 2 <= len(steps) <= 8


@pytest.mark.slow
def test_live_screen_with_slow_frames_draws_fewer_of_them(tmp_path: Path) -> None:
    """A frame of 60 ms of processor time is allowed every 2 s."""
    program = (
        "import runpy, sys, time; from lowrank_tune.ui.terminal import tui\n"
        "usual, count = tui.render, [0]\n"
        "def slow(*words):\n"
        "    end = time.thread_time() + 0.06\n"
        "    while time.thread_time() < end: pass\n"
        "    count[0] += 1\n"
        "    return usual(*words)\n"
        f"tui.render = slow; sys.argv = ['event_player', {str(tmp_path)!r}, '0.06']; sys.path.insert(0, "
        f"{str(ROOT)!r})\n"
        f"started = time.monotonic(); runpy.run_path({PLAYER!r}, run_name='__main__')\n"
        "print('frames', count[0], 'most', 2 + int((time.monotonic() - started) / 2))"
    )
    emulator = Emulator("-c", program)
    assert emulator.finish() == 0
    frames, most = (int(word) for word in re.findall(rb"frames (\d+) most (\d+)", emulator.raw)[0])
    assert 2 <= frames <= most


@pytest.mark.slow
def test_live_screen_in_ascii_without_color(tmp_path: Path) -> None:
    emulator = Emulator(
        PLAYER, str(tmp_path), "0.01", LC_ALL="C", NO_COLOR="1", PYTHONUTF8="0", PYTHONIOENCODING="ascii"
    )
    emulator.until("ETA")
    assert (
        emulator.finish() == 0
        and emulator.raw.isascii()
        and b"\x1b[3" not in emulator.raw.replace(b"\x1b[3;1H", b"").replace(b"\x1b[30;", b"").replace(b"\x1b[31;", b"")
    )


def test_can_show_and_ascii_only_by_terminal_and_environment(capsys: pytest.CaptureFixture[str]) -> None:
    class Terminal:
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

        def fileno(self) -> int:
            return theirs

    mine, theirs = pty.openpty()
    assert not can_show(Terminal(), {"TERM": "xterm"})  # type: ignore[arg-type]  # not our foreground
    assert not can_show(sys.stdout, {"TERM": "xterm"}, forced=True)
    for environ, wanted in (
        ({"LANG": "C"}, True),
        ({"TERM": "linux"}, True),
        ({"LC_ALL": "C.UTF-8", "LANG": "C"}, False),
        ({}, False),
    ):
        assert ascii_only(Terminal(), environ) is wanted  # type: ignore[arg-type]
    os.close(mine)
    os.close(theirs)
    program = (
        "import os, sys; from lowrank_tune.ui.terminal.device import can_show; e = dict(TERM='xterm')\n"
        "cases = ((e, 0), (e | {'CI': '1'}, 0), (e | {'CI': '1'}, 1), (e | {'TERM': 'dumb'}, 1), ({}, 1),\n"
        " (e | {'JPY_PARENT_PID': '7'}, 0), (e | {'JPY_PARENT_PID': '7'}, 1))\n"
        "print([can_show(sys.stdout, environ, forced) for environ, forced in cases])"
    )
    emulator = Emulator("-c", program)
    assert emulator.finish() == 0 and b"[True, False, True, False, False, False, True]" in emulator.raw


@pytest.mark.slow
def test_an_event_costs_less_than_a_millisecond() -> None:
    emulator = Emulator(str(ROOT / "benchmarks" / "dashboard_render.py"), "--emit", os.devnull)
    assert emulator.finish() == 0
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "dashboard_render.py"), "--quick"],
        capture_output=True,
        text=True,
        env=ENVIRON,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def screen_without_terminal() -> LiveScreen:
    """A screen whose run changes all the time; its terminal is another job's."""
    return LiveScreen(
        draw=lambda view, width, height: [],
        changed=lambda: True,
        on_key=lambda key: None,
        on_failure=lambda error: None,
        settle=lambda view, width, height: view,
        owns_run=False,
        environ={},
    )


def test_a_screen_in_the_background_waits_as_long_as_an_idle_one() -> None:
    """It has a frame to draw and may not: without the wait it would look for its terminal fifty times a second."""
    screen = screen_without_terminal()
    assert screen._update(time.monotonic()) == TICK_SECONDS
    screen.close()


def test_a_key_and_another_size_are_shown_soon_after_a_slow_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first frame of a long log takes a quarter of a second; those after it need no time, but came later."""
    screen = screen_without_terminal()
    sizes = [(80, 24)]
    frames = list[float]()
    monkeypatch.setattr(screen.terminal, "foreground", lambda: True)
    monkeypatch.setattr(screen.terminal, "size", lambda: sizes[-1])
    monkeypatch.setattr(screen.terminal, "enter", lambda: None)
    monkeypatch.setattr(screen.terminal, "show", lambda lines: frames.append(now))
    now = 100.0
    screen._update(now)
    screen.cost = 0.25
    for now in (101.0, 107.0):
        screen._update(now)
    assert frames == [100.0]
    screen._press("n")
    screen._update(now)
    screen.cost = 0.25
    now = 108.0
    sizes.append((81, 24))
    screen._update(now)
    screen.cost = 0.25
    for now in (109.0, 115.0, 117.0):
        screen._update(now)
    assert frames == [100.0, 107.0, 108.0, 117.0]
    screen._is_shown = False
    screen.close()


@pytest.mark.slow
def test_live_screen_after_an_error_continues_in_lines(tmp_path: Path) -> None:
    program = (
        "import runpy, sys; from lowrank_tune.ui.terminal import tui\n"
        "def broken(*_): raise ZeroDivisionError('planted')\n"
        f"tui.render = broken; sys.argv = ['event_player', {str(tmp_path)!r}, '0.02']; sys.path.insert(0, "
        f"{str(ROOT)!r})\n"
        f"runpy.run_path({PLAYER!r}, run_name='__main__')"
    )
    emulator = Emulator("-c", program)
    assert emulator.finish() == 0 and shell_is_sane(emulator)
    output = emulator.raw[emulator.raw.rfind(LEAVE) :].decode()
    assert "plain lines follow: ZeroDivisionError: planted" in output and "step 95/96" in output and "THE END" in output


class Tmux:
    """A real tmux server for one test."""

    def __init__(self, folder: Path) -> None:
        # another name for each server, because one that is about to end would still accept the next command
        self.folder, self._words = (
            folder,
            ["tmux", "-L", f"lowrank{os.getpid()}-{time.monotonic_ns()}", "-f", os.devnull, "-u"],
        )
        self("new-session", "-d", "-x", "80", "-y", "24", "-c", str(folder), "bash --norc --noprofile")
        self.type("PS1='ready> '; clear; stty -a > before.txt")

    def __call__(self, *words: str) -> str:
        done = subprocess.run([*self._words, *words], capture_output=True, text=True, env=ENVIRON)
        assert done.returncode == 0, f"tmux {words[0]}: {done.stderr}"
        return done.stdout

    def type(self, line: str) -> None:
        self("send-keys", "-l", line)
        self("send-keys", "Enter")

    def text(self) -> str:
        return self("capture-pane", "-p")

    def until(self, wanted: str, seconds: float = 2 * PATIENCE) -> None:
        end = time.monotonic() + seconds
        while wanted not in self.text():
            assert time.monotonic() < end, f"waited for {wanted}:\n{self.text()}"
            time.sleep(0.1)

    def settings(self) -> str:
        """Returns the current settings of the terminal without its size."""
        (self.folder / "now.txt").unlink(missing_ok=True)
        self.type("stty -a > now.txt; echo wr''itten")
        self.until("written")
        return (self.folder / "now.txt").read_text().partition("\n")[2]


@pytest.fixture
def tmux(tmp_path: Path) -> Iterator[Tmux]:
    if shutil.which("tmux") is None:
        pytest.skip("needs tmux")
    one = Tmux(tmp_path)
    yield one
    one("kill-server")


@pytest.mark.slow
def test_suspended_and_continued_in_tmux(tmux: Tmux) -> None:
    sane = (tmux.settings(), tmux.type("clear"))[0]
    tmux.type(f"{sys.executable} {PLAYER} . 0.2")
    tmux.until("ETA")
    tmux("send-keys", "C-z")
    tmux.until("Stopped")
    assert tmux.settings() == sane and "lowrank-tune" not in tmux.text()
    tmux.type("clear; bg")
    time.sleep(1.5)
    # in the background it neither draws nor is stopped
    assert "ETA" not in tmux.text()
    tmux.type("clear; jobs")
    tmux.until("Running")
    tmux.type("fg")
    tmux.until("ETA")
    tmux("resize-window", "-x", "120", "-y", "40")
    tmux.until("learning rate")
    tmux("send-keys", "q")
    tmux.until("THE END")
    tmux.type("clear")
    assert tmux.settings() == sane


@pytest.mark.slow
def test_a_background_job_is_not_stopped_and_draws_nothing(tmux: Tmux, tmp_path: Path) -> None:
    tmux.type(
        f"clear; {sys.executable} -m lowrank_tune demo --out run train.max_steps=3 evaluate.num_samples=1 "
        "evaluate.num_prompts=4 &"
    )
    tmux.until("the recipe, complete")
    assert "q quit" not in tmux.text()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "done"


def wait_for_step(log: Path, step: int) -> None:
    """Returns once a run has logged this step or a later one."""
    end = time.monotonic() + PATIENCE
    while True:
        events = read_events(log) if log.exists() else ()
        if any(isinstance(event, StepEnd) and event.step >= step for event in events):
            return
        assert time.monotonic() < end, f"step {step} was not reached"
        time.sleep(0.2)


@pytest.mark.slow
def test_a_real_run_in_tmux_is_stopped_continued_and_left(tmux: Tmux, tmp_path: Path) -> None:
    """By `q`, by Ctrl-C and by closing the terminal: each time there is a valid checkpoint, from which the next start
    continues."""
    demo = (
        f"{sys.executable} -m lowrank_tune demo --out run evaluate.num_samples=1 evaluate.num_prompts=8 "
        "evaluate.eval_steps=50 "
        f"train.save_steps=50 "
        "train.num_train_epochs=40; echo code $?"
    )
    reached = 0
    for way in ("q", "C-c"):
        tmux.type(f"clear; {demo}")
        tmux.until("ETA")
        wait_for_step(tmp_path / "run" / "1-sft" / "events.jsonl", reached + 1)
        tmux("send-keys", way)
        tmux.until("code 130")
        assert "interrupted and saved" in tmux.text()
        found = latest_checkpoint(tmp_path / "run" / "1-sft" / "checkpoints", lambda event: pytest.fail(str(event)))
        assert found is not None and found[0] > reached
        reached = found[0]
    tmux.type(f"clear; {demo}")
    tmux.until("ETA")
    wait_for_step(tmp_path / "run" / "1-sft" / "events.jsonl", reached + 1)
    process = int((tmp_path / "run" / ".lock").read_text())
    tmux("new-window", "bash --norc")
    tmux("kill-pane", "-t", ":0")
    end = time.monotonic() + PATIENCE
    while Path(f"/proc/{process}").exists():
        assert time.monotonic() < end
        time.sleep(0.2)
    found = latest_checkpoint(tmp_path / "run" / "1-sft" / "checkpoints", lambda event: pytest.fail(str(event)))
    assert (
        found is not None
        and found[0] > reached
        and json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"
    )
