"""The load of the machine on the dashboard: of a GPU through its driver (a fake one), else of the process."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import Any

import pytest
from test_dashboard import middle, state_after

from lowrank_tune.ui.gpu_stats import GpuReading, GpuStats
from lowrank_tune.ui.system_stats import MAX_READINGS, ProcessReading, Reading, SystemStats
from lowrank_tune.ui.terminal.navigation import handle_key
from lowrank_tune.ui.terminal.panes import View
from lowrank_tune.ui.terminal.render import render
from lowrank_tune.ui.terminal.system_line import system_line
from lowrank_tune.ui.terminal.text_layout import plain_text, width_of
from lowrank_tune.ui.watch import WatchedRun, WatchScreen

SUCCESS, NOT_SUPPORTED = 0, 3


class FakeDriver:
    """NVML as ctypes calls it: each function writes its result through a pointer and returns a code."""

    def __init__(self) -> None:
        self.opened = list[object]()
        self.unsupported = set[str]()

    def nvmlInit_v2(self) -> int:
        return SUCCESS

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:
        self.opened.append(index.value)
        return SUCCESS

    def nvmlDeviceGetHandleByUUID(self, name: bytes, handle: Any) -> int:
        self.opened.append(name)
        return SUCCESS

    def nvmlDeviceGetMemoryInfo(self, device: Any, memory: Any) -> int:
        memory._obj.total, memory._obj.used = 24 << 30, 19 << 30
        return NOT_SUPPORTED if "memory" in self.unsupported else SUCCESS

    def nvmlDeviceGetUtilizationRates(self, device: Any, rates: Any) -> int:
        rates._obj.gpu, rates._obj.memory = 97, 50
        return SUCCESS

    def nvmlDeviceGetTemperature(self, device: Any, sensor: Any, degrees: Any) -> int:
        degrees._obj.value = 71 if sensor.value == 0 else -1
        return SUCCESS

    def nvmlDeviceGetPowerUsage(self, device: Any, milliwatts: Any) -> int:
        milliwatts._obj.value = 310_000
        return NOT_SUPPORTED if "power" in self.unsupported else SUCCESS

    def nvmlDeviceGetEnforcedPowerLimit(self, device: Any, milliwatts: Any) -> int:
        milliwatts._obj.value = 350_000
        return SUCCESS


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    monkeypatch.setattr("ctypes.CDLL", {"libnvidia-ml.so.1": fake}.__getitem__)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", missing)


def line_of(history: list[Reading], width: int = 120, ascii_only: bool = False) -> str:
    return plain_text([system_line(history, View(ascii_only=ascii_only), width)]).rstrip("\n")


def test_a_gpu_is_read_through_its_driver(driver: FakeDriver) -> None:
    assert GpuStats({}).read() == GpuReading(97.0, 19.0, 24.0, 71.0, 310.0, 350.0)
    # some laptops do not report the power
    driver.unsupported = {"power"}
    assert GpuStats({}).read() == GpuReading(97.0, 19.0, 24.0, 71.0, None, 350.0)
    driver.unsupported = {"memory"}
    assert GpuStats({}).read() is None


@pytest.mark.parametrize(
    ("environ", "opened"),
    [
        ({}, 0),
        ({"CUDA_VISIBLE_DEVICES": "2"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "1,0"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "GPU-4f2a,GPU-9"}, b"GPU-4f2a"),
        ({"CUDA_VISIBLE_DEVICES": "MIG-7"}, b"MIG-7"),
    ],
)
def test_the_first_visible_gpu_is_read(driver: FakeDriver, environ: dict[str, str], opened: object) -> None:
    assert GpuStats(environ).read() is not None
    assert driver.opened == [opened]


@pytest.mark.parametrize("visible", ["", "-1", "none"])
def test_a_gpu_that_cuda_does_not_show_is_not_read(driver: FakeDriver, visible: str) -> None:
    assert GpuStats({"CUDA_VISIBLE_DEVICES": visible}).read() is None and driver.opened == []


def test_without_a_driver_there_is_no_reading(no_driver: None) -> None:
    assert GpuStats({}).read() is None


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


def test_without_a_gpu_the_process_is_shown(no_driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_tune.ui.system_stats.POLL_SECONDS", 0.0)
    stats = SystemStats(os.getpid())
    # the first call has nothing to compare with
    assert not stats.poll()
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    assert stats.poll()
    monkeypatch.setattr("lowrank_tune.ui.system_stats.POLL_SECONDS", 1000.0)
    assert not stats.poll()
    (reading,) = stats.history
    assert isinstance(reading, ProcessReading) and reading.cpu_percent > 0 and 0.01 < reading.memory_gib < 50
    assert line_of([ProcessReading(50.0, 1.0), ProcessReading(200.0, 2.0)]).split() == [
        *("process", "CPU", "200", "%", "\u2583\u2588", "memory", "2.0", "GiB", "\u2585\u2588"),
    ]
    assert not SystemStats(2**22 + 1).poll()


def test_the_past_is_limited(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_tune.ui.system_stats.POLL_SECONDS", 0.0)
    stats = SystemStats(1)
    assert all(stats.poll() for _ in range(MAX_READINGS + 10)) and len(stats.history) == MAX_READINGS


@pytest.mark.parametrize(("width", "height"), [(60, 15), (80, 24), (120, 40), (200, 50)])
def test_the_line_is_below_the_header_and_the_screen_stays_full(width: int, height: int) -> None:
    system = (GpuReading(97.0, 19.0, 24.0, 71.0, 310.0, 350.0),) * 40
    lines = render(state_after(middle()), View(system=system), width, height)
    assert len(lines) == height and all(width_of(line) == width for line in lines)
    rows = plain_text(lines).splitlines()
    row = rows[4] if height >= 30 else rows[1]
    assert row.split()[:3] == ["GPU", "97", "%"] and "310 W" in row and "help" in rows[-1]


def test_watch_shows_the_load_only_while_a_local_process_writes(tmp_path: Path, driver: FakeDriver) -> None:
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


def test_the_load_of_one_run_is_not_shown_for_all(tmp_path: Path) -> None:
    runs = [WatchedRun(tmp_path / name) for name in ("one", "two")]
    for number, run in enumerate(runs, 1):
        run.system = SystemStats(number)
        run.system.history.append(ProcessReading(100.0 * number, 1.0))
    screen = WatchScreen(runs)
    view = screen._settle(View(run=2), 160, 40)
    assert "CPU 200 %" in plain_text(screen._draw(view, 160, 40))
    view = screen._settle(handle_key(view, "0"), 160, 40)
    assert "CPU" not in plain_text(screen._draw(view, 160, 40)) and view.system == ()
