"""One worker process that grades completions, as the main process uses it. The other side is `worker.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lowrank_tune.processes.worker_process import WorkerProcess

MODULE = "lowrank_tune.rewards.workers.worker"


class Worker(WorkerProcess):
    """One worker process. The kernel kills it when the thread that created it ends."""

    def __init__(self) -> None:
        super().__init__(MODULE)

    def load(self, worker_specs: Sequence[Mapping[str, Any]], seconds: float) -> list[str | None]:
        """Loads the graders; returns for each of them why it cannot be loaded, or None. Raises WorkerExited."""
        faults: list[str | None] = self.first_request(worker_specs, seconds)["faults"]
        return faults
