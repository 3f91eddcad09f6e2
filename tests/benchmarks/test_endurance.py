"""Endurance: slopes of series by hand, what is counted of a process, and a short run that leaves nothing behind."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def endurance(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import endurance

    yield endurance


def slope(endurance: Any, values: list[float], bound: float = 0.01) -> Any:
    return endurance.measure_slope("x", "MiB", [float(step) for step in range(len(values))], values, bound)


def test_slope_and_its_interval_by_hand(endurance: Any) -> None:
    """A line is found exactly, beside rare slow steps too; noise alone has an interval that contains 0."""
    line = [100 + 0.25 * step + (500 if step % 50 == 0 else 0) for step in range(1000)]
    found = slope(endurance, line)
    assert found.per_1000 == pytest.approx(250) and found.low <= 250 <= found.high and not found.is_flat
    assert found.growth == pytest.approx(250 / 225, rel=0.02)
    numbers = random.Random(0)
    noise = slope(endurance, [100 + numbers.gauss(0, 10) for _ in range(1000)])
    assert noise.low < 0 < noise.high and noise.is_flat
    waves = slope(endurance, [100 + 10 * math.sin(step / 20) for step in range(1000)])
    assert waves.is_flat and waves.high - waves.low > 1


def test_small_growth_is_flat_and_a_leak_is_not(endurance: Any) -> None:
    assert slope(endurance, [500 + 0.002 * step for step in range(2000)]).is_flat
    assert not slope(endurance, [500 + 0.004 * step for step in range(2000)]).is_flat
    assert slope(endurance, [23.0] * 500).growth == 0
    assert not slope(endurance, [23.0 + step // 100 for step in range(500)]).is_flat
    from_zero = slope(endurance, [max(0.0, step - 260.0) for step in range(500)])
    assert from_zero.level == 0 and not from_zero.is_flat
    assert slope(endurance, [0.0] * 500).growth == 0


def test_ratio_of_an_old_and_a_fresh_process(endurance: Any) -> None:
    numbers = random.Random(0)
    same = endurance.measure_ratio("step", [1 + numbers.gauss(0, 0.05) for _ in range(80)], 0.02)
    assert same.low < 1 < same.high and same.is_flat
    slower = endurance.measure_ratio("step", [1.1 + numbers.gauss(0, 0.05) for _ in range(80)], 0.02)
    assert slower.middle == pytest.approx(1.1, abs=0.02) and not slower.is_flat
    assert endurance.measure_ratio("step", [1.01] * 80, 0.02).is_flat


def test_a_run_within_its_warm_up_is_refused_before_it_starts(endurance: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        endurance.main(["sft", "--steps", "9", "--warm-up", "9"])


GROWING_PROCESS = """if True:
    import subprocess, sys, threading
    print(flush=True)
    input()
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    file = open(sys.argv[1], "w")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    print(flush=True)
    input()
    child.communicate(b"x")"""


def test_descriptors_threads_and_children_are_counted(endurance: Any, tmp_path: Path) -> None:
    """Of a process of its own: in that of the tests, what earlier tests left open may be closed in between."""
    process = subprocess.Popen(
        [sys.executable, "-c", GROWING_PROCESS, str(tmp_path / "file")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    samples = []
    for _ in range(2):
        process.stdout.readline()
        samples.append(endurance.sample_process(process.pid))
        process.stdin.write(b"\n")
        process.stdin.flush()
    before, after = samples
    assert process.wait(20) == 0
    assert after["threads"] == before["threads"] + 1 and after["children"] == before["children"] + 1
    # the file, and the pipe to the child
    assert after["descriptors"] == before["descriptors"] + 2
    assert after["rss_mib"] > 5 and after["children_mib"] > before["children_mib"]
    assert endurance.sample_process(2**22 - 1) == {}


@pytest.mark.slow
def test_short_run_with_the_dashboard_keeps_its_descriptors_and_threads(tmp_path: Path, endurance: Any) -> None:
    """40 steps in a pseudo-terminal, with evaluations and checkpoints in between. A fresh process does the last ones
    again."""
    endurance.observe("sft", 40, tmp_path / "sft")
    seen = list(endurance.rows(tmp_path / "sft" / "process.jsonl"))
    steps = list(endurance.rows(tmp_path / "sft" / "steps.jsonl"))
    frames = list(endurance.rows(tmp_path / "sft" / "frames.jsonl"))
    # from the first checkpoint on, everything that stays open is open
    first_time = steps[10]["time"]
    training = [row for row in seen if first_time <= row["time"] <= steps[-1]["time"]]
    assert len(steps) == 40 and frames[-1]["size"] == [120, 40] and training
    for count in ("descriptors", "threads", "children"):
        assert max(row[count] for row in training) - min(row[count] for row in training) == 0, (count, training)
    again = [row["step"] for row in endurance.rows(tmp_path / "sft" / "fresh" / "steps.jsonl")]
    assert again == list(range(31, 41))
    events = [json.loads(line) for line in (tmp_path / "sft" / "run" / "events.jsonl").read_text().splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds.count("checkpoint_saved") == 4 and kinds.count("evaluated") >= 4
