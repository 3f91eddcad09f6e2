"""The proof as a whole: runs the parts in worker processes within a time budget and ends those that hang.

A worker that dies or exceeds a limit costs the part that it was in; the next worker continues after it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gpu_proof import records
from gpu_proof.parts import Part
from gpu_proof.records import Record, Tail

STARTUP_LIMIT_S = 150.0
"""Imports from a cold disk, and the device's rates."""
TINY_STARTUP_S = 15.0
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
            startup = self.limit_factor * TINY_STARTUP_S if self.tiny else 0.0
            needed = startup + self.limit_factor * group[0].limit(self.tiny)
            left = self.deadline - time.time()
            if left < needed:
                self.write({"part": group[0].name, "status": "skipped", "left_s": left, "limit_s": needed})
            else:
                self.run_worker(group)
            remaining = [part for part in remaining if part.name not in self.finished]

    def run_worker(self, group: Sequence[Part]) -> None:
        """Run one worker until it ends or has to be stopped. The part that it was in then gets a record `failed`."""
        self.running = None
        self.stop_at = min(time.time() + STARTUP_LIMIT_S * self.limit_factor, self.deadline - GRACE_S)
        # A session of its own, so that its children (the product's commands) end with it.
        worker = subprocess.Popen(self.command(group, self.deadline), start_new_session=True)
        reason = ""
        try:
            while worker.poll() is None:
                time.sleep(POLL_S)
                self.follow()
                if time.time() > self.stop_at:
                    reason = (
                        "it exceeded its time limit" if time.time() < self.deadline - GRACE_S else "the time was up"
                    )
                    break
        finally:
            kill_group(worker)
        self.follow()
        code = worker.returncode
        if not reason and code in (0, None):
            unfinished = [part for part in group if part.name not in self.finished]
            assert not unfinished, f"the worker ended without {unfinished}"
            return
        if self.running is not None:
            self.fail(self.running, reason or f"the process ended with {describe_exit(code)}")
        elif not self.started_any(group):
            self.fail(group[0].name, f"the process did not start it: {reason or describe_exit(code)}")

    def started_any(self, group: Sequence[Part]) -> bool:
        return any(part.name in self.finished for part in group)

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
        records.append(self.path, {"kind": "failed", "part": name, "error": reason})
        print(f"{name}: FAILED, {reason}", flush=True)
        self.follow()

    def write(self, record: Record) -> None:
        records.append(self.path, {"kind": "part", **record})
        print(f"{record['part']}: skipped, {record['left_s']:.0f} s are left of {record['limit_s']:.0f}", flush=True)
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


def kill_group(worker: subprocess.Popen[bytes]) -> None:
    """End a worker and all its children."""
    if worker.poll() is None:
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
