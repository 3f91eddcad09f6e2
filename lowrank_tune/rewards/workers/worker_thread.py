"""One place of the pool: a thread with its worker process, which it replaces when it is lost.

A completion that exceeds a limit is at fault itself where the row's own answer keeps it, graded by the same process or
a new one: then it is wrong, and else it has no score.
"""

from __future__ import annotations

import hashlib
import json
import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from lowrank_tune.errors import UserError
from lowrank_tune.rewards.base import Reply, RewardInput, Score, WorkerReward
from lowrank_tune.rewards.workers.process import Worker, WorkerDied, WorkerStarved, WorkerTimeout

MEMORY_LIMIT = "the memory that the verifier may use"


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
        self._pool = pool
        self._worker_specs = worker_specs
        self._requests = requests
        self._stopped = threading.Event()
        self._graded: dict[bytes, bool] = {}

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
        item = request.item
        reward = request.reward
        limit = self._limit(reward) * reward.worker_time_factor
        try:
            reply = self._ask(request, reward.build_request(item))
        except WorkerTimeout:
            self._stop_worker()
            score = self._exceeded(request, f"{limit:g} s") or reward.on_timeout(item, limit)
            score = replace(score, seconds=limit)
        except WorkerStarved as starved:
            self._stop_worker()
            reason = f"`{reward.name}`: the machine is too busy to grade {item}: {starved}"
            score = Score(None, "timeout", reason, limit)
        except WorkerDied as death:
            self._stop_worker()
            score = reward.on_worker_crash(item, str(death))
        else:
            score = replace(self._score_of(request, reply), seconds=reply["seconds"])
            if reply.get("worn"):
                self._stop_worker()
        self._pool.store(request, score)  # before the next worker starts: a last completion does not wait for it
        self._ensure_worker()

    def _limit(self, reward: WorkerReward) -> float:
        return min(self._pool.timeout_seconds, reward.max_seconds)

    def _ask(self, request: ScoreRequest, message: Mapping[str, Any]) -> Reply:
        """The worker's reply. Raises what `Worker.request` raises."""
        self._ensure_worker()
        if self.worker is None:
            raise WorkerDied("was ended")
        limit = self._limit(request.reward)
        message = {"job": request.spec_index, "seconds": limit, **message}
        return self.worker.request(message, limit * request.reward.worker_time_factor)

    def _score_of(self, request: ScoreRequest, reply: Reply) -> Score:
        """The score from a reply, also from one that reports an exceeded limit."""
        if reply.get("late"):
            limit = self._limit(request.reward)
            return self._exceeded(request, f"{limit:g} s") or request.reward.on_timeout(request.item, limit)
        score = request.reward.parse_reply(request.item, reply)
        if score.value is None and reply.get("steep"):
            return self._exceeded(request, MEMORY_LIMIT) or score
        return score

    def _exceeded(self, request: ScoreRequest, limit: str) -> Score | None:
        """The score of a completion that exceeds a limit of a verifier, where it alone is at fault. None for a user's
        function, which has no limits that a completion may exceed."""
        reward = request.reward
        is_verifier = self._worker_specs[request.spec_index]["kind"] == "verifier"
        if is_verifier:
            message = reward.reference_request(request.item)
        else:
            message = None
        if message is not None and self._is_graded(request, message):
            return reward.on_exceeded_limit(limit)
        return None

    def _is_graded(self, request: ScoreRequest, message: Mapping[str, Any]) -> bool:
        """Whether the worker grades a message within its limits. It does so once."""
        key = hashlib.blake2b(json.dumps([request.spec_index, message], default=str).encode()).digest()
        if key not in self._graded:
            try:
                reply = self._ask(request, message)
            except WorkerStarved:
                self._stop_worker()
                return False
            except (WorkerTimeout, WorkerDied):
                self._stop_worker()
                reply = {"late": True}
            parse_reply = request.reward.parse_reply
            self._graded[key] = not reply.get("late") and parse_reply(request.item, reply).value is not None
        return self._graded[key]

    def _ensure_worker(self) -> None:
        """Another worker in the place of one that was lost, or that a verifier has left large."""
        if self.worker is None and not self._stopped.is_set():
            self._pool.on_ready(self._start_worker())
