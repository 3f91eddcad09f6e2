"""A clock that stands still, or that is set back again and again: runs, pages, plans and checks work without speeds."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_loop import Toy, steps_of, toy_loop

from lowrank_tune.events import Event, StepEnd
from lowrank_tune.training import trainer as train_module
from lowrank_tune.training.speed import MEASURED_STEPS, SpeedComparison
from lowrank_tune.ui.formatting import format_stats

SCRIPT = r"""
import sys, time

began = time.time()
if sys.argv[1] == "stands still":
    time.time = lambda: began
    time.perf_counter = lambda: 5.0
else:
    calls = iter(range(1, 10**9))
    time.time = lambda: began - 30 * next(calls)

from pathlib import Path
from crash import small_recipe
from typer.testing import CliRunner
from lowrank_tune import Recipe, run
from lowrank_tune.cli import app

out = Path(sys.argv[2])
for algorithm in sys.argv[3:]:
    recipe = small_recipe(algorithm, max_steps=2, save_steps=2)
    recipe["evaluate"]["eval_steps"] = 1
    assert run(Recipe.from_dict(recipe), out=out / algorithm, ui="plain").status == "done"
for command in (
    ["report", str(out / "sft")],
    ["compare", str(out / "sft"), str(out / sys.argv[-1])],
    ["watch", str(out / "sft")],
    ["plan", "tiny-sft"],
    ["doctor"],
):
    result = CliRunner().invoke(app, command)
    print(command[0], result.exit_code, result.output)
    assert result.exit_code == 0
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("clock", "algorithms"),
    [("stands still", ["sft", "dpo", "kto", "reward", "grpo", "ppo"]), ("goes back", ["sft", "grpo"])],
)
def test_runs_pages_plans_and_checks_work(tmp_path: Path, clock: str, algorithms: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", SCRIPT, clock, str(tmp_path), *algorithms]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ("tokens/s -" in ended.stdout) == (clock == "stands still") and "nan" not in ended.stdout
    for algorithm in algorithms:
        summary = json.loads((tmp_path / algorithm / "summary.json").read_bytes())
        assert summary["seconds"] > 0, "the monotonic clock goes on"
        assert (summary["tokens_per_second"] is None) == (clock == "stands still")


def test_a_step_without_time_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module.time, "perf_counter", lambda: 5.0)
    trainer, events = toy_loop(Toy(), steps=1)
    assert trainer.run()
    (step,) = steps_of(events)
    assert step.seconds == 0.0 and math.isnan(step.stats["tokens_per_second"])
    assert "tokens/s -" in format_stats(step.stats)


def test_speeds_are_not_compared_without_times() -> None:
    events: list[Event] = []
    comparison = SpeedComparison(800.0, events.append)
    for number in range(1, MEASURED_STEPS + 1):
        comparison.add(StepEnd(step=number, steps=50, stats={}, seconds=0.0, tokens=100))
    assert comparison.to_dict() == {} and not events
