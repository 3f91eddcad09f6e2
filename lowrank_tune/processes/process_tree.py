"""Processes and their descendants, from /proc of Linux: the CPU time that they used, and whether a thread can run.

Runs in the main process, and in the worker of `python_tests` for the sandboxed processes.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class ProcessTree:
    """`cpu_seconds`: of all threads, with those that have ended and with children that were waited for. `runnable`:
    whether a thread runs or waits for a processor."""

    cpu_seconds: float
    runnable: bool


@dataclass(frozen=True)
class ProcessStat:
    """The parent of one process, and the CPU time that it used."""

    parent: int
    cpu_seconds: float


def read_tree(roots: Collection[int]) -> ProcessTree | None:
    """Returns the processes `roots` and their descendants together. None if the system has no /proc like Linux."""
    stats = processes()
    if not stats:
        return None
    pids = with_descendants([pid for pid in roots if pid in stats], stats)
    cpu_seconds = sum(stats[pid].cpu_seconds for pid in pids)
    return ProcessTree(cpu_seconds, runnable=any(map(_runnable, pids)))


def with_descendants(roots: Collection[int], stats: Mapping[int, ProcessStat]) -> list[int]:
    """Returns `roots`, and those processes of `stats` that descend from them."""
    pids = list(roots)
    # the list grows while it is read: children of children are found too
    for pid in pids:
        pids += [child for child, stat in stats.items() if stat.parent == pid and child not in roots]
    return pids


def processes() -> dict[int, ProcessStat]:
    """Returns all processes by id; none if the system has no /proc like Linux."""
    if not (PROC / "self/stat").exists():
        return {}
    tick = 1.0 / os.sysconf("SC_CLK_TCK")
    stats = {}
    for folder in PROC.iterdir():
        if not folder.name.isdigit():
            continue
        fields = _stat_fields(folder)
        if fields:
            # user and system time, of the process and of its children that were waited for
            ticks = sum(map(int, fields[11:15]))
            stats[int(folder.name)] = ProcessStat(int(fields[1]), tick * ticks)
    return stats


def _runnable(pid: int) -> bool:
    """Returns whether a thread of the process is in state R."""
    try:
        threads = list((PROC / str(pid) / "task").iterdir())
    except OSError:  # the process has ended
        return False
    return any(_stat_fields(thread)[:1] == [b"R"] for thread in threads)


def _stat_fields(folder: Path) -> list[bytes]:
    """Returns the fields after the name, which may contain any character: state, parent, ...; no fields if the process
    has ended."""
    try:
        return (folder / "stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return []
