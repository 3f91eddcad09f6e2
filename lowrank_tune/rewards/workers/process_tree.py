"""Processes and all that descends from them, as Linux shows them in /proc: the CPU time that they used, and whether one
of their threads could run now."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class ProcessTree:
    """`cpu_seconds`: of all threads, those that have ended too, and of children that were waited for. `runnable`: a
    thread runs, or waits for a processor."""

    cpu_seconds: float
    runnable: bool


@dataclass(frozen=True)
class ProcessStat:
    """What one process is a child of, and the CPU time that it used."""

    parent: int
    cpu_seconds: float


def read_tree(roots: Collection[int]) -> ProcessTree | None:
    """The processes `roots` and their descendants together. None where the system has no /proc as Linux has it."""
    if not (PROC / "self/stat").exists():
        return None
    processes = dict(_processes())
    pids = [pid for pid in roots if pid in processes]
    for pid in pids:
        pids += [child for child, stat in processes.items() if stat.parent == pid and child not in roots]
    return ProcessTree(sum(processes[pid].cpu_seconds for pid in pids), any(map(_runnable, pids)))


def _processes() -> Iterator[tuple[int, ProcessStat]]:
    tick = 1.0 / os.sysconf("SC_CLK_TCK")
    for folder in PROC.iterdir():
        if folder.name.isdigit() and (fields := _stat_fields(folder)):
            # user, system, and both of children that were waited for
            yield int(folder.name), ProcessStat(int(fields[1]), tick * sum(map(int, fields[11:15])))


def _runnable(pid: int) -> bool:
    """Whether a thread of the process is in the state R."""
    try:
        threads = list((PROC / str(pid) / "task").iterdir())
    except OSError:  # it has ended meanwhile
        return False
    return any(_stat_fields(thread)[:1] == [b"R"] for thread in threads)


def _stat_fields(folder: Path) -> list[bytes]:
    """The fields behind the name, which may hold anything: state, parent, ...; none where the process has ended."""
    try:
        return (folder / "stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return []
