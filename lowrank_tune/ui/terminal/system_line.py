"""The line of the header with the load of the GPU, or of the process, each value with its recent past."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowrank_tune.ui.gpu_stats import GpuReading
from lowrank_tune.ui.system_stats import ProcessReading, Reading
from lowrank_tune.ui.terminal.panes import View
from lowrank_tune.ui.terminal.text_layout import Line, width_of

LEVELS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
ASCII_LEVELS = "_.-:=+*#"
MAX_HISTORY_CELLS = 16
MIN_HISTORY_CELLS = 3
COOLEST, HOTTEST = 30.0, 90.0
"""Degrees Celsius at the ends of the curve."""
HOT = 87.0
FULL = 0.92
"""Share of the memory from which on it is highlighted."""


@dataclass(frozen=True)
class Quantity:
    """The text of the newest value, and the recent past in shares of its range."""

    text: str
    shares: Sequence[float]
    is_high: bool = False


def system_line(
    history: Sequence[Reading],
    view: View,
    width: int,
) -> Line:
    """Returns each quantity with a short curve, as far as there is room."""
    newest = history[-1]
    if isinstance(newest, GpuReading):
        title = " GPU "
        quantities = _gpu_quantities([reading for reading in history if isinstance(reading, GpuReading)])
    else:
        title = " process "
        quantities = _process_quantities([reading for reading in history if isinstance(reading, ProcessReading)])
    texts = sum(len(quantity.text) + 3 for quantity in quantities)
    cells = min(MAX_HISTORY_CELLS, (width - len(title) - texts) // len(quantities))
    line: Line = [(title, "quiet")]
    for quantity in quantities:
        added: Line = [(f"{quantity.text} ", "warning" if quantity.is_high else "")]
        if cells >= MIN_HISTORY_CELLS:
            added.append((_sparkline(quantity.shares[-cells:], view).rjust(cells), "bar"))
        added.append(("  ", ""))
        if width_of(line) + width_of(added) <= width + 2:
            line += added
    return line


def _gpu_quantities(history: Sequence[GpuReading]) -> list[Quantity]:
    newest = history[-1]
    memory = [reading.memory_gib / max(reading.memory_total_gib, 1e-9) for reading in history]
    quantities = [
        Quantity(f"{newest.memory_gib:.1f} of {newest.memory_total_gib:.1f} GiB", memory, memory[-1] > FULL),
    ]
    loads = [reading.utilization for reading in history if reading.utilization is not None]
    if loads:
        quantities.insert(0, Quantity(f"{loads[-1]:.0f} %", [load / 100 for load in loads]))
    degrees = [reading.temperature for reading in history if reading.temperature is not None]
    if degrees:
        shares = [(value - COOLEST) / (HOTTEST - COOLEST) for value in degrees]
        quantities.append(Quantity(f"{degrees[-1]:.0f} C", shares, degrees[-1] >= HOT))
    watts = [reading.power for reading in history if reading.power is not None]
    if watts:
        limit = newest.power_limit or max(watts)
        quantities.append(Quantity(f"{watts[-1]:.0f} W", [value / max(limit, 1.0) for value in watts]))
    return quantities


def _process_quantities(history: Sequence[ProcessReading]) -> list[Quantity]:
    newest = history[-1]
    busiest = max(100.0, *(reading.cpu_percent for reading in history))
    largest = max(1e-9, *(reading.memory_gib for reading in history))
    return [
        Quantity(f"CPU {newest.cpu_percent:.0f} %", [reading.cpu_percent / busiest for reading in history]),
        Quantity(f"memory {newest.memory_gib:.1f} GiB", [reading.memory_gib / largest for reading in history]),
    ]


def _sparkline(shares: Sequence[float], view: View) -> str:
    levels = ASCII_LEVELS if view.ascii_only else LEVELS
    top = len(levels) - 1
    return "".join(levels[round(top * min(1.0, max(0.0, share)))] for share in shares)
