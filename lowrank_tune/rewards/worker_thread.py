"""One place of the pool: a thread with its worker process, which it replaces when it is lost."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from lowrank_tune.errors import UserError
from lowrank_tune.rewards.base import RewardInput, Score, WorkerReward
from lowrank_tune.rewards.process import Worker, WorkerDied, WorkerTimeout


@dataclass(frozen=True)
class ScoreRequest:
    """One completion for one reward: `reward_index` is the reward's among all, `spec_index` its among those of the
    workers."""

    key: Any
    item: RewardInput
    reward_index: int
    spec_index: int
    reward: WorkerReward


class PoolCallbacks(Protocol):
    """Where slots put what they have: the WorkerPool."""

    timeout_seconds: float
    start_seconds: float

    def store(self, request: ScoreRequest, score: Score) -> None: ...
    def on_ready(self, faults: Sequence[str | None]) -> None: ...
    def fail(self, failure: BaseException) -> None: ...


class WorkerThread(threading.Thread):
    """Serves tasks until it is given None. `worker` is its process, None before and after."""

    def __init__(
        self,
        pool: PoolCallbacks,
        worker_specs: Sequence[Mapping[str, Any]],
        requests: queue.SimpleQueue[ScoreRequest | None],
    ) -> None:
        super().__init__(daemon=True, name="rewards")
        self.worker: Worker | None = None
        self._pool, self._worker_specs, self._requests = pool, worker_specs, requests
        self._stopped = threading.Event()

    def end(self) -> None:
        """Kills the worker at once; the thread follows at its next task. From any thread."""
        self._stopped.set()
        if (worker := self.worker) is not None:
            worker.end()

    def run(self) -> None:
        try:
            self._pool.on_ready(self._start_worker())
            while (request := self._requests.get()) is not None:
                self._serve(request)
        except BaseException as failure:  # whoever waits for the scores must hear of it, or would wait for ever
            self._pool.fail(failure)
        finally:
            self._stop_worker()

    def _start_worker(self) -> list[str | None]:
        """A new worker with its jobs loaded."""
        self.worker = Worker()
        if self._stopped.is_set():  # between its start and the line above nobody could end it
            self.worker.end()
        try:
            return self.worker.load(self._worker_specs, self._pool.start_seconds)
        except WorkerDied as death:
            names = ", ".join(str(spec.get("use", spec["kind"])) for spec in self._worker_specs)
            raise UserError(f"rewards: the worker that loads {names} {death}") from None

    def _stop_worker(self) -> None:
        if self.worker is not None:
            self.worker.kill()
            self.worker = None

    def _serve(self, request: ScoreRequest) -> None:
        assert self.worker is not None
        item, reward = request.item, request.reward
        limit = min(self._pool.timeout_seconds, reward.max_seconds)
        try:
            reply = self.worker.request(
                {"job": request.spec_index, "seconds": limit, **reward.build_request(item)}, limit
            )
        except WorkerTimeout:
            score = replace(reward.on_timeout(item, limit), seconds=limit)
        except WorkerDied as death:
            score = reward.on_worker_crash(item, str(death))
        else:
            score = reward.on_timeout(item, limit) if reply.get("late") else reward.parse_reply(item, reply)
            self._pool.store(request, replace(score, seconds=reply["seconds"]))
            if reply.get("worn"):
                self._restart_worker()
            return
        self._stop_worker()
        self._pool.store(request, score)  # before the next worker starts: a last completion does not wait for it
        self._restart_worker()

    def _restart_worker(self) -> None:
        """Another worker in the place of one that is lost, or that a verifier has left large."""
        self._stop_worker()
        if not self._stopped.is_set():
            self._pool.on_ready(self._start_worker())
