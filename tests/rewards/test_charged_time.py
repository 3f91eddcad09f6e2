"""The time that is charged to processes. Oracles: a simulated process with known phases, and the CPU time that the
kernel counted for a real process."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from lowrank_tune.processes import charged_time
from lowrank_tune.processes.charged_time import ChargedTime, Starved, TimeLimitReached
from lowrank_tune.processes.process_tree import ProcessTree, read_tree

StartProgram = Callable[[str], "subprocess.Popen[bytes]"]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="this system does not count the time as Linux does")


# --- a simulated process ----------------------------------------------------------------------------------------------


@dataclass
class SimulatedProcess:
    """A process that repeats phases of (seconds, processors that it uses, whether it can run)."""

    phases: list[tuple[float, float, bool]]
    now: float = 0.0

    def passed(self) -> Iterator[tuple[float, float, bool]]:
        """Yields the phases up to now; the last one may be incomplete."""
        left, index = self.now, 0
        while left > 0:
            seconds, used, could_run = self.phases[index % len(self.phases)]
            yield min(left, seconds), used, could_run
            left, index = left - seconds, index + 1

    def read_tree(self, roots: object) -> ProcessTree:
        phases = list(self.passed())
        return ProcessTree(sum(seconds * used for seconds, used, _ in phases), bool(phases and phases[-1][2]))

    def own_seconds(self) -> float:
        """Returns the time in which the process ran or could not run."""
        return sum(seconds for seconds, used, could_run in self.passed() if used or not could_run)


def simulate(monkeypatch: pytest.MonkeyPatch, process: SimulatedProcess, limit: float, seed: int = 0) -> ChargedTime:
    clock = SimpleNamespace(monotonic=lambda: process.now, thread_time=lambda: 0.0)
    monkeypatch.setattr(charged_time, "time", clock)
    monkeypatch.setattr(charged_time, "read_tree", process.read_tree)
    monkeypatch.setattr(charged_time, "random", SimpleNamespace(Random=lambda: random.Random(seed)))
    return ChargedTime([1], limit)


def run_to_the_end(process: SimulatedProcess, charged: ChargedTime) -> None:
    while True:
        process.now = max(process.now, charged.next_sample)
        charged.check()
        assert charged.charged <= process.now + 1e-9


PROGRAMS = {
    "runs": [(1.0, 1.0, True)],
    "sleeps": [(1.0, 0.0, False)],
    "runs a quarter of the time, waits for others": [(0.01, 1.0, True), (0.03, 0.0, True)],
    "runs, then sleeps": [(1.3, 1.0, True), (1000.0, 0.0, False)],
    "waits for others, then sleeps": [(2.0, 0.0, True), (1000.0, 0.0, False)],
    "half asleep": [(0.05, 1.0, True), (0.05, 0.0, False)],
    "half asleep in a busy machine": [(0.05, 1.0, True), (0.1, 0.0, True), (0.05, 0.0, False)],
    "slow rhythm": [(0.7, 1.0, True), (0.9, 0.0, True), (0.8, 0.0, False)],
    "in the rhythm of the samples": [(0.075, 0.0, True), (0.075, 0.0, False)],
    "threads on four processors": [(0.1, 4.0, True), (0.2, 0.0, False)],
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_charged_time_is_the_time_that_the_process_runs_or_sleeps(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """At the end the process has used its limit: exactly if no sample is needed, else within 5 standard deviations."""
    for seed in range(5):
        process = SimulatedProcess(PROGRAMS[name])
        with pytest.raises(TimeLimitReached):
            run_to_the_end(process, simulate(monkeypatch, process, 6.0, seed))
        exact = len({could_run for _, _, could_run in process.phases}) == 1
        assert process.own_seconds() == pytest.approx(6.0, rel=0.05 if exact else 0.4), (seed, process.now)


def test_a_process_that_only_waits_for_others_is_starved(monkeypatch: pytest.MonkeyPatch) -> None:
    process = SimulatedProcess([(0.001, 1.0, True), (0.1, 0.0, True)])
    with pytest.raises(Starved, match=r"in 12\d s other programs left it [12]\.\d s of the 6 s of its limit"):
        run_to_the_end(process, simulate(monkeypatch, process, 6.0))
    assert process.now == pytest.approx(charged_time.MAX_WALL_FACTOR * 6.0, rel=0.05)


def test_without_a_count_of_the_kernel_the_wall_clock_is_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    process = SimulatedProcess([(1.0, 0.0, True)])
    charged = simulate(monkeypatch, process, 6.0)
    monkeypatch.setattr(charged_time, "read_tree", lambda roots: None)
    with pytest.raises(TimeLimitReached):
        run_to_the_end(process, charged)
    assert process.now == pytest.approx(6.0)


def test_samples_come_at_random_times_and_change_no_other_draw() -> None:
    random.seed(3)
    gaps = {ChargedTime([os.getpid()], 10.0).next_sample - time.monotonic() for _ in range(20)}
    assert len(gaps) == 20 and all(0.1 < gap < 0.4 for gap in gaps)
    drawn = random.random()
    random.seed(3)
    assert drawn == random.random()


# --- real processes ---------------------------------------------------------------------------------------------------

SPIN = "while True: pass"
SLEEP = "import time\ntime.sleep(1000)"
STOP = "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)"
THREADS = """
import hashlib, threading, time
end, block = time.process_time() + 0.1, bytes(200_000)
def spin():
    while time.process_time() < end: hashlib.sha256(block).digest()
    time.sleep(1000)
for _ in range(30): threading.Thread(target=spin).start()
"""


@pytest.fixture
def processor() -> Iterator[None]:
    """Restricts this thread and the processes that it starts to one processor."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    yield
    os.sched_setaffinity(0, allowed)


@pytest.fixture
def start() -> Iterator[StartProgram]:
    """Starts a program in its own session, which gets its own share of the processors."""
    started: list[subprocess.Popen[bytes]] = []

    def start_program(code: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-S", "-c", code]
        started.append(subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE))
        return started[-1]

    yield start_program
    for program in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
        program.communicate()


def wall_seconds_to_the_limit(program: subprocess.Popen[bytes], limit: float) -> float:
    begin, charged = time.monotonic(), ChargedTime([program.pid], limit)
    with pytest.raises(TimeLimitReached):
        while True:
            time.sleep(max(0.0, charged.next_sample - time.monotonic()))
            charged.check()
    return time.monotonic() - begin


def cpu_seconds_at_the_end(program: subprocess.Popen[bytes]) -> float:
    """Returns the CPU time that the kernel counted for a child that has ended."""
    program.kill()
    usage = os.wait4(program.pid, 0)[2]
    program.returncode = -signal.SIGKILL
    return usage.ru_utime + usage.ru_stime


def test_a_program_that_others_keep_from_running_has_its_cpu_time(processor: None, start: StartProgram) -> None:
    for _ in range(3):
        start(SPIN)
    program = start(SPIN)
    wall = wall_seconds_to_the_limit(program, 0.4)
    assert wall > 0.8 and 0.3 < cpu_seconds_at_the_end(program) < 0.6


@pytest.mark.parametrize("code", [SLEEP, STOP, THREADS])
def test_sleep_is_charged_while_other_threads_run(processor: None, start: StartProgram, code: str) -> None:
    """Also for threads that wait for each other for a long time, which by the wall clock would exceed the limit."""
    for _ in range(3):
        start(SPIN)
    program = start(code)
    time.sleep(0.5)
    wall = wall_seconds_to_the_limit(program, 0.5)
    assert cpu_seconds_at_the_end(program) < 0.4 and wall < 1.5


def test_the_share_that_computing_gets_is_that_of_one_of_several(processor: None, start: StartProgram) -> None:
    for _ in range(5):
        start(SPIN)
    assert charged_time.computing_share(0.5) < 0.6


FAMILY = """
import subprocess, sys, threading, time
def use(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end: pass
thread = threading.Thread(target=use, args=(0.15,))
thread.start()
thread.join()
spin = "import time\\nwhile time.process_time() < 0.15: pass\\n"
subprocess.run([sys.executable, "-S", "-c", spin])
subprocess.Popen([sys.executable, "-S", "-c", spin + "print(1, flush=True)\\ntime.sleep(99)"])
time.sleep(1000)
"""


def test_threads_and_children_count_also_when_they_have_ended(start: StartProgram) -> None:
    program = start(FAMILY)
    assert program.stdout is not None
    program.stdout.readline()
    time.sleep(0.1)
    tree = read_tree([program.pid])
    # The kernel counts in hundredths and truncates user and system time of each process. Without one part it is 0.3.
    assert tree is not None and 0.38 < tree.cpu_seconds < 0.9 and not tree.runnable


NAMED = """
import ctypes, time
ctypes.CDLL(None).prctl(15, b") R 1 1 (")
print(1, flush=True)
time.sleep(99)
"""


def test_a_process_name_with_brackets_is_not_read_as_a_state(start: StartProgram) -> None:
    program = start(NAMED)
    assert program.stdout is not None
    program.stdout.readline()
    time.sleep(0.1)
    tree = read_tree([program.pid])
    assert tree is not None and tree.cpu_seconds < 0.5 and not tree.runnable


def test_processes_that_have_ended_are_not_counted(start: StartProgram) -> None:
    program = start("")
    program.wait()
    assert read_tree([program.pid]) == ProcessTree(0, False)
