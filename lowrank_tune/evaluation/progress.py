"""Progress events of a long job."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_tune.events import Emit, Progress


@dataclass
class ProgressBar:
    """Emits a limited number of `Progress` events while a job is done."""

    description: str
    total: int
    emit: Emit
    updates: int = 20
    done: int = 0

    def advance(self, count: int = 1) -> None:
        """Adds `count` finished units; emits an event if a further fraction of `1 / updates` is done."""
        before = self.done
        self.done = self.done + count
        if self.done * self.updates // self.total != before * self.updates // self.total:
            self.report()

    def report(self) -> None:
        """Emits the state."""
        self.emit(
            Progress(
                description=self.description,
                done=self.done,
                total=self.total,
            )
        )
