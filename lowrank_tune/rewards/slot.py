"""One place of the pool: a thread with its worker process, which it replaces when it is lost."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from lowrank_tune.errors import UserError
from lowrank_tune.rewards.process import Died, Overdue, Worker
from lowrank_tune.rewards.protocol import Item, Score, Worked


@dataclass(frozen=True)
class Task:
    """One completion for one reward: `place` is the reward's among all, `job` its among those of the workers."""

    key: Any
    item: Item
    place: int
    job: int
    reward: Worked


class Board(Protocol):
    """Where slots put what they have: the Scorer."""

    timeout_seconds: float
    start_seconds: float

    def store(self, task: Task, score: Score) -> None: ...
    def warmed(self, faults: Sequence[str | None]) -> None: ...
    def fail(self, failure: BaseException) -> None: ...


class Slot(threading.Thread):
    """Serves tasks until it is given None. `worker` is its process, None before and after."""

    def __init__(self, board: Board, jobs: Sequence[Mapping[str, Any]], tasks: queue.SimpleQueue[Task | None]) -> None:
        super().__init__(daemon=True, name="rewards")
        self.worker: Worker | None = None
        self._board, self._jobs, self._tasks = board, jobs, tasks
        self._ended = threading.Event()

    def end(self) -> None:
        """Kills the worker at once; the thread follows at its next task. From any thread."""
        self._ended.set()
        if (worker := self.worker) is not None:
            worker.end()

    def run(self) -> None:
        try:
            self._board.warmed(self._warm())
            while (task := self._tasks.get()) is not None:
                self._serve(task)
        except BaseException as failure:  # whoever waits for the scores must hear of it, or would wait for ever
            self._board.fail(failure)
        finally:
            self._drop()

    def _warm(self) -> list[str | None]:
        """A new worker with its jobs loaded."""
        self.worker = Worker()
        if self._ended.is_set():  # between its start and the line above nobody could end it
            self.worker.end()
        try:
            return self.worker.load(self._jobs, self._board.start_seconds)
        except Died as death:
            uses = ", ".join(str(job.get("use", job["kind"])) for job in self._jobs)
            raise UserError(f"rewards: the worker that loads {uses} {death}") from None

    def _drop(self) -> None:
        if self.worker is not None:
            self.worker.kill()
            self.worker = None

    def _serve(self, task: Task) -> None:
        assert self.worker is not None
        item, reward = task.item, task.reward
        limit = min(self._board.timeout_seconds, reward.limit)
        try:
            reply = self.worker.ask({"job": task.job, "seconds": limit, **reward.ask(item)}, limit)
        except Overdue:
            score = replace(reward.overdue(item, limit), seconds=limit)
        except Died as death:
            score = reward.lost(item, str(death))
        else:
            score = reward.overdue(item, limit) if reply.get("late") else reward.judge(item, reply)
            self._board.store(task, replace(score, seconds=reply["seconds"]))
            if reply.get("worn"):
                self._renew()
            return
        self._drop()
        self._board.store(task, score)  # before the next worker starts: a last completion does not wait for it
        self._renew()

    def _renew(self) -> None:
        """Another worker in the place of one that is lost, or that a verifier has left large."""
        self._drop()
        if not self._ended.is_set():
            self._board.warmed(self._warm())
