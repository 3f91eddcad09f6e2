"""The time of a completion: right programs pass however busy the machine is, and wrong ones that use up
time get a 0, at every level of the sandbox; neither is ever left without a score.

`TIME_PROGRAMS=50` draws so many programs of each kind instead of a few.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from time_programs import CHEATS, HONEST, TASK

from lowrank_tune.rewards import RewardInput, Score, WorkerPool
from lowrank_tune.rewards.code.python_tests import PythonTestsReward
from lowrank_tune.rewards.sandbox import isolation
from lowrank_tune.rewards.sandbox.launch import Level

DRAWS = int(os.environ.get("TIME_PROGRAMS", "6"))
FOREIGN_PROGRAMS = 8
HONEST_SECONDS, CHEAT_SECONDS = 2.0, 1.0


@dataclass(frozen=True)
class AtLevel(PythonTestsReward):
    """`python_tests` at any level of the sandbox, not only the strongest."""

    level: Level = "landlock"

    def isolation(self) -> Level:
        return self.level


@pytest.fixture(params=["namespaces", "landlock"])
def level(request: pytest.FixtureRequest) -> Level:
    if fault := isolation.probe_level(request.param).fault:
        pytest.skip(fault)
    return request.param  # type: ignore[no-any-return]


@contextlib.contextmanager
def foreign_programs(count: int) -> Iterator[None]:
    """Runs other programs that compute, each in its own session, which gets its own share of the processors."""
    command = [sys.executable, "-S", "-c", "while True: pass"]
    programs = [subprocess.Popen(command, start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


@pytest.fixture(params=["idle", "busy"])
def machine(request: pytest.FixtureRequest) -> Iterator[str]:
    with foreign_programs(FOREIGN_PROGRAMS if request.param == "busy" else 0):
        yield request.param


@pytest.fixture
def busy_processor() -> Iterator[None]:
    """Restricts this thread and what it starts to one processor, which two other programs use."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    with foreign_programs(2):
        yield
    os.sched_setaffinity(0, allowed)


def draw(programs: dict[str, str], count: int, seed: str) -> dict[str, str]:
    names = random.Random(seed).sample(sorted(programs), min(count, len(programs)))
    return {name: programs[name] for name in names}


def score_all(programs: dict[str, str], level: Level, seconds: float) -> dict[str, Score]:
    with WorkerPool[str]([AtLevel(level=level)], 2, seconds) as pool:
        for name, code in programs.items():
            pool.submit(name, RewardInput("Double it.", f"```python\n{code}\n```", None, TASK, True, 9))
        return {name: scores[0] for name, scores in pool.collect().items()}


def others(scores: dict[str, Score], verdict: str) -> dict[str, Score]:
    return {name: score for name, score in scores.items() if score.verdict != verdict}


def test_the_tables_have_many_kinds_of_programs() -> None:
    assert len(HONEST) >= 50 and len(CHEATS) >= 50


def test_threads_that_wait_for_each_other_are_not_a_busy_machine(level: Level) -> None:
    programs = {name: CHEATS[name] for name in ("14 threads, then sleep",)}
    assert others(score_all(programs, level, CHEAT_SECONDS), "fail") == {}


@pytest.mark.slow
def test_on_a_busy_processor_right_programs_pass_and_wrong_ones_fail(busy_processor: None) -> None:
    """The right program takes longer than its limit by the wall clock."""
    strongest = isolation.best_available()
    if strongest is None:
        pytest.skip("this machine has no sandbox for code")
    programs = {"right": HONEST["loop"], "wrong": CHEATS["loop"], "threads": CHEATS["14 threads, then sleep"]}
    scores = score_all(programs, strongest.level, CHEAT_SECONDS)
    assert {name: score.verdict for name, score in scores.items()} == {
        "right": "pass",
        "wrong": "fail",
        "threads": "fail",
    }


@pytest.mark.slow
def test_right_programs_pass_however_busy_the_machine_is(level: Level, machine: str) -> None:
    programs = draw(HONEST, DRAWS, f"{level} {machine}")
    assert others(score_all(programs, level, HONEST_SECONDS), "pass") == {}


@pytest.mark.slow
def test_wrong_programs_that_use_up_time_get_a_zero(level: Level, machine: str) -> None:
    programs = draw(CHEATS, DRAWS, f"{level} {machine}")
    assert others(score_all(programs, level, CHEAT_SECONDS), "fail") == {}
