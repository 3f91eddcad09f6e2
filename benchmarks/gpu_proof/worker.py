"""One process of the proof: runs parts one after the other and writes each record when it exists."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

from gpu_proof import records, tables
from gpu_proof.machine import is_usable
from gpu_proof.parts import Context, Part
from gpu_proof.records import Record

BASE_LIMIT_S = 25.0
"""Seconds to build a base of 8 billion parameters; added to the limit of the part that first needs it."""
TINY_BASE_LIMIT_S = 5.0
BROKEN_DEVICE = 3
"""Exit code: an error has left the process without a usable device or base."""
ORPHAN_POLL_S = 0.5


class Worker:
    def __init__(
        self, context: Context, parts: Sequence[Part], path: Path | None, deadline: float, limit_factor: float
    ) -> None:
        """`deadline` is in seconds of `time.time()`."""
        self.context, self.parts, self.path, self.deadline = context, parts, path, deadline
        self.limit_factor = limit_factor

    def run(self) -> int:
        """Run the parts. Returns 0, or `BROKEN_DEVICE` where the rest needs a new process."""
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
        self.write(self.context.machine)
        for part in self.parts:
            limit = self.limit(part)
            left = self.deadline - time.time()
            if left < limit:
                self.write({"kind": "part", "part": part.name, "status": "skipped", "left_s": left, "limit_s": limit})
                continue
            if not self.run_part(part, limit):
                return BROKEN_DEVICE
        return 0

    def limit(self, part: Part) -> float:
        base_s = TINY_BASE_LIMIT_S if self.context.tiny else BASE_LIMIT_S
        extra = base_s if part.needs_base and not self.context.has_base else 0.0
        return self.limit_factor * (part.limit(self.context.tiny) + extra)

    def run_part(self, part: Part, limit: float) -> bool:
        """Run one part. Returns whether the process can go on: an error may leave adapters in the base or a broken
        device."""
        start = time.time()
        times = {"time": start, "limit_s": limit, "left_s": self.deadline - start}
        self.write({"kind": "part", "part": part.name, "status": "started", **times})
        had_base = self.context.has_base
        try:
            for record in part.run(self.context):
                if self.context.has_base and not had_base:
                    had_base = True
                    self.write({**(self.context.base_record or {}), "part": part.name})
                self.write({"part": part.name, **record})
        except Exception as error:
            where = traceback.format_exc().splitlines()[-8:]
            failure = {"error": f"{type(error).__name__}: {error}", "traceback": where}
            self.write({"kind": "failed", "part": part.name, **failure, "seconds": time.time() - start})
            return False
        self.write({"kind": "part", "part": part.name, "status": "done", "seconds": time.time() - start})
        return is_usable(self.context.device)

    def write(self, record: Record) -> None:
        records.append(self.path, record)
        tables.print_record(record)
        sys.stdout.flush()


def end_with_parent(parent: int) -> None:
    """Kill this process group when the supervisor is gone, however it ended: nothing else would stop a hanging part."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(ORPHAN_POLL_S)
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
