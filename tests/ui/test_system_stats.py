"""The load of the machine on the dashboard: of a GPU through its driver (a fake one), else of the process."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace as Named
from typing import Any

import pytest
from test_dashboard import middle, state_after

from lowrank_tune.ui.gpu_stats import GpuReading, GpuStats
from lowrank_tune.ui.system_stats import MAX_READINGS, ProcessReading, Reading, SystemStats
from lowrank_tune.ui.terminal.panes import View
from lowrank_tune.ui.terminal.render import render
from lowrank_tune.ui.terminal.system_line import system_line
from lowrank_tune.ui.terminal.text_layout import plain_text, width_of
from lowrank_tune.ui.watch import WatchedRun


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Any:
    fake = Named(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTemperature=lambda handle, kind: 71,
        nvmlDeviceGetMemoryInfo=lambda handle: Named(used=19 << 30, total=24 << 30),
        nvmlDeviceGetPowerUsage=lambda handle: 310_000,
        nvmlDeviceGetEnforcedPowerLimit=lambda handle: 350_000,
        nvmlDeviceGetUtilizationRates=lambda handle: Named(gpu=97),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def line_of(history: list[Reading], width: int = 120, ascii_only: bool = False) -> str:
    return plain_text([system_line(history, View(ascii_only=ascii_only), width)]).rstrip("\n")


def test_a_gpu_is_read_through_nvidia_ml(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert GpuStats().read() == GpuReading(97.0, 19.0, 24.0, 71.0, 310.0, 350.0)
    # some laptops do not report the power
    driver.nvmlDeviceGetPowerUsage = None
    assert GpuStats().read() == GpuReading(97.0, 19.0, 24.0, 71.0, None, 350.0)
    stats = GpuStats()
    driver.nvmlDeviceGetMemoryInfo = None
    assert stats.read() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert GpuStats().read() is None


def test_the_line_of_a_gpu_has_its_four_quantities_with_their_past() -> None:
    history: list[Reading] = [
        GpuReading(load, 12.0, 24.0, 30.0 + load * 0.6, 3.5 * load, 350.0) for load in (0.0, 50.0, 100.0)
    ]
    assert line_of(history).split() == [
        *("GPU", "100", "%", "\u2581\u2585\u2588", "12.0", "of", "24.0", "GiB", "\u2585\u2585\u2585"),
        *("90", "C", "\u2581\u2585\u2588", "350", "W", "\u2581\u2585\u2588"),
    ]
    narrow = line_of(history, 60)
    assert "100 %" in narrow and "350 W" in narrow and len(narrow) <= 60
    assert line_of(history, ascii_only=True).isascii()
    hot = system_line([GpuReading(None, 23.0, 24.0, 88.0, None)], View(), 80)
    assert [style for text, style in hot if text.strip() in ("23.0 of 24.0 GiB", "88 C")] == ["warning", "warning"]
    assert "%" not in plain_text([hot]) and "W" not in plain_text([hot])


def test_without_a_gpu_the_process_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr("lowrank_tune.ui.system_stats.POLL_SECONDS", 0.05)
    stats = SystemStats(os.getpid())
    # the first call has nothing to compare with
    assert not stats.poll()
    end = time.monotonic() + 0.1
    while time.monotonic() < end:
        pass
    assert stats.poll() and not stats.poll()
    (reading,) = stats.history
    assert isinstance(reading, ProcessReading) and reading.cpu_percent > 5 and 0.01 < reading.memory_gib < 50
    assert line_of([ProcessReading(50.0, 1.0), ProcessReading(200.0, 2.0)]).split() == [
        *("process", "CPU", "200", "%", "\u2583\u2588", "memory", "2.0", "GiB", "\u2585\u2588"),
    ]
    assert not SystemStats(2**22 + 1).poll()


def test_the_past_is_limited(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_tune.ui.system_stats.POLL_SECONDS", 0.0)
    stats = SystemStats(1)
    assert all(stats.poll() for _ in range(MAX_READINGS + 10)) and len(stats.history) == MAX_READINGS


@pytest.mark.parametrize(("width", "height"), [(60, 15), (80, 24), (120, 40), (200, 50)])
def test_the_line_is_below_the_header_and_the_screen_stays_full(width: int, height: int) -> None:
    system = (GpuReading(97.0, 19.0, 24.0, 71.0, 310.0, 350.0),) * 40
    lines = render(state_after(middle()), View(system=system), width, height)
    assert len(lines) == height and all(width_of(line) == width for line in lines)
    rows = plain_text(lines).splitlines()
    assert rows[4].split()[:3] == ["GPU", "97", "%"] and "310 W" in rows[4] and "help" in rows[-1]


def test_watch_shows_the_load_only_while_a_local_process_writes(tmp_path: Path, driver: Any) -> None:
    (tmp_path / "events.jsonl").write_bytes(b"")
    watched = WatchedRun(tmp_path / "events.jsonl", folder=tmp_path)
    assert not watched.poll() and watched.readings() == ()
    (tmp_path / ".lock").write_text(f"{os.getpid()}\n")
    # a process of that number exists, but does not hold the lock
    assert not watched.poll() and watched.readings() == ()
    with (tmp_path / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert watched.poll() and watched.readings() == (GpuReading(97.0, 19.0, 24.0, 71.0, 310.0, 350.0),)
    assert watched.poll() and watched.readings() == ()
