"""Runs the parts in worker processes within a time budget.

A worker that crashes, or exceeds the limit of a part, is ended; the part is recorded as failed, and a new worker
continues with the next part.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from gpu_proof import records, tables
from gpu_proof.parts import Part
from gpu_proof.records import Record, Tail

STARTUP_LIMIT_S = 150.0
"""Imports from a cold disk, and the device's rates."""
POLL_S = 0.1
GRACE_S = 1.0
"""Seconds before the end of the budget at which a running part is stopped, so that the proof itself ends in time."""
FINAL = ("done", "skipped")
Command = Callable[[Sequence[Part], float], list[str]]
"""Parts, deadline in seconds of `time.time()` -> the command of a worker."""


@dataclass
class Supervisor:
    """Runs parts in the order given. `deadline` is in seconds of `time.time()`."""

    path: Path
    command: Command
    deadline: float
    tiny: bool
    limit_factor: float = 1.0
    finished: set[str] = field(default_factory=set)
    running: str | None = None
    stop_at: float = 0.0
    """When the running part, or the start of the worker, exceeds its limit."""

    def run(self, parts: Sequence[Part]) -> None:
        """Run all parts that fit into the time. Each of them has a final record then: done, skipped or failed."""
        self.tail = Tail(self.path)
        remaining = list(parts)
        while remaining:
            group = first_group(remaining)
            needed = self.limit_factor * group[0].limit(self.tiny)
            left = self.deadline - time.time()
            if left < needed + GRACE_S:
                self.skip(group[0].name, left, needed)
            else:
                self.run_worker(group)
            remaining = [part for part in remaining if part.name not in self.finished]

    def run_worker(self, group: Sequence[Part]) -> None:
        """Run one worker until it ends or exceeds a limit. The part that was running then gets a record `failed`."""
        self.running = None
        self.stop_at = min(time.time() + STARTUP_LIMIT_S * self.limit_factor, self.deadline - GRACE_S)
        # A session of its own, so that its children (the commands of `product`) can be ended with it.
        worker = subprocess.Popen(self.command(group, self.deadline), start_new_session=True)
        timed_out = False
        try:
            while worker.poll() is None and not timed_out:
                time.sleep(POLL_S)
                self.follow()
                timed_out = time.time() > self.stop_at
        finally:
            end_process_group(worker)
        self.follow()
        out_of_time = time.time() > self.deadline - GRACE_S
        if self.running is not None:
            limit = "the time budget was spent" if out_of_time else "it exceeded its time limit"
            self.fail(self.running, limit if timed_out else f"the worker ended with {describe_exit(worker.returncode)}")
        elif not any(part.name in self.finished for part in group):
            if timed_out and out_of_time:
                self.skip(group[0].name, 0.0, self.limit_factor * group[0].limit(self.tiny))
            else:
                code = describe_exit(worker.returncode)
                self.fail(group[0].name, f"the worker ended with {code} before it started this part")

    def follow(self) -> None:
        """Read the new records: which part runs, until when, and which have ended."""
        for record in self.tail.new():
            name = record.get("part")
            if record["kind"] == "part" and record["status"] == "started":
                self.running = name
                self.stop_at = min(record["time"] + record["limit_s"], self.deadline - GRACE_S)
            elif record["kind"] == "failed" or (record["kind"] == "part" and record["status"] in FINAL):
                self.finished.add(str(name))
                self.running = None

    def fail(self, name: str, reason: str) -> None:
        self.write({"kind": "failed", "part": name, "error": reason})

    def skip(self, name: str, left_s: float, limit_s: float) -> None:
        self.write({"kind": "part", "part": name, "status": "skipped", "left_s": left_s, "limit_s": limit_s})

    def write(self, record: Record) -> None:
        records.append(self.path, record)
        tables.print_record(record)
        self.follow()


def first_group(parts: Sequence[Part]) -> list[Part]:
    """Return the parts that share the next process: an isolated one alone, else all up to the next isolated one."""
    if parts[0].isolated:
        return [parts[0]]
    group: list[Part] = []
    for part in parts:
        if part.isolated:
            break
        group.append(part)
    return group


def end_process_group(worker: subprocess.Popen[bytes]) -> None:
    """Kill a worker and all its children, which may outlive a worker that has ended by itself."""
    with suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def describe_exit(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"


def worker_command(script: Path, options: Sequence[str], path: Path) -> Command:
    """Return the command of a worker of this interpreter."""

    def command(parts: Sequence[Part], deadline: float) -> list[str]:
        names = ",".join(part.name for part in parts)
        words = [sys.executable, "-u", str(script), "worker", "--parts", names, "--json", str(path)]
        return [*words, "--deadline", str(deadline), "--parent", str(os.getpid()), *options]

    return command
