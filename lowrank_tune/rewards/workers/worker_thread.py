"""One thread of the pool with its worker process, which it replaces if it is lost. Runs in the main process.

A completion that exceeds a limit of a verifier is the cause itself if the row's own answer does not exceed it, graded
by the same process or a new one: then it is wrong. Else it has no score.
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
from lowrank_tune.processes.worker_process import WorkerExited, WorkerStarved, WorkerTimeout
from lowrank_tune.rewards.base import Reply, RewardInput, Score, WorkerReward
from lowrank_tune.rewards.workers.process import Worker

MEMORY_LIMIT = "the memory that the verifier may use"


@dataclass(frozen=True)
class ScoreRequest:
    """One completion for one reward. `reward_index`: the index of the reward among all rewards; `spec_index`: its index
    among those that workers compute."""

    key: Any
    item: RewardInput
    reward_index: int
    spec_index: int
    reward: WorkerReward


class PoolCallbacks(Protocol):
    """The part of WorkerPool that its threads use."""

    timeout_seconds: float
    start_seconds: float

    def store(self, request: ScoreRequest, score: Score) -> None: ...
    def on_ready(self, faults: Sequence[str | None]) -> None: ...
    def fail(self, failure: BaseException) -> None: ...


class WorkerThread(threading.Thread):
    """Serves requests until it gets None. `worker`: its process, None before the start and after the end."""

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
        """Kills the worker at once; the thread ends at its next request. Can be called from any thread."""
        self._stopped.set()
        if (worker := self.worker) is not None:
            worker.end()

    def run(self) -> None:
        try:
            self._pool.on_ready(self._start_worker())
            while (request := self._requests.get()) is not None:
                self._serve(request)
        except BaseException as failure:  # else a wait for the scores would never end
            self._pool.fail(failure)
        finally:
            self._stop_worker()

    def _start_worker(self) -> list[str | None]:
        """Starts a new worker and loads its graders; returns a fault or None for each of them."""
        self.worker = Worker()
        # `end` may have been called before the line above, when there was no worker to kill
        if self._stopped.is_set():
            self.worker.end()
        try:
            return self.worker.load(self._worker_specs, self._pool.start_seconds)
        except WorkerExited as error:
            names = ", ".join(str(spec.get("use", spec["kind"])) for spec in self._worker_specs)
            raise UserError(f"rewards: the worker that loads {names} {error}") from None

    def _stop_worker(self) -> None:
        if self.worker is not None:
            self.worker.kill()
            self.worker = None

    def _serve(self, request: ScoreRequest) -> None:
        item = request.item
        reward = request.reward
        limit = self._limit(reward) * reward.worker_time_factor
        try:
            reply = self._send(request, reward.build_request(item))
        except WorkerTimeout:
            self._stop_worker()
            score = replace(self._time_exceeded(request, limit), seconds=limit)
        except WorkerStarved as starved:
            self._stop_worker()
            reason = f"`{reward.name}`: the machine is too busy to grade {item}: {starved}"
            score = Score(None, "timeout", reason, limit)
        except WorkerExited as error:
            self._stop_worker()
            score = reward.worker_failure(item, "error", str(error))
        else:
            score = replace(self._score_of(request, reply), seconds=reply["seconds"])
            if reply.get("too_large"):
                self._stop_worker()
        # before the next worker starts: the last completion of a batch does not wait for it
        self._pool.store(request, score)
        self._ensure_worker()

    def _limit(self, reward: WorkerReward) -> float:
        return min(self._pool.timeout_seconds, reward.max_seconds)

    def _send(self, request: ScoreRequest, message: Mapping[str, Any]) -> Reply:
        """Returns the worker's reply. Raises what `Worker.request` raises."""
        self._ensure_worker()
        if self.worker is None:
            raise WorkerExited("was ended")
        limit = self._limit(request.reward)
        message = {
            "job": request.spec_index,
            "seconds": limit,
            **message,
        }
        reply: Reply = self.worker.request(message, limit * request.reward.worker_time_factor)
        return reply

    def _score_of(self, request: ScoreRequest, reply: Reply) -> Score:
        """Returns the score of a reply, which may report an exceeded limit."""
        if reply.get("late"):
            return self._time_exceeded(request, self._limit(request.reward))
        score = self._parse(request, reply)
        if score.value is None and reply.get("steep") and self._only_completion_exceeds(request):
            return _limit_exceeded(MEMORY_LIMIT)
        return score

    def _parse(self, request: ScoreRequest, reply: Reply) -> Score:
        if "fault" in reply:
            return request.reward.worker_failure(request.item, "error", reply["fault"])
        return request.reward.parse_reply(request.item, reply)

    def _time_exceeded(self, request: ScoreRequest, seconds: float) -> Score:
        if self._only_completion_exceeds(request):
            return _limit_exceeded(f"{seconds:g} s")
        return request.reward.worker_failure(
            request.item,
            "timeout",
            f"did not return within {seconds:g} s",
        )

    def _only_completion_exceeds(self, request: ScoreRequest) -> bool:
        """Returns whether a completion that exceeds a limit is the cause, because the row's own answer does not exceed
        it. False for a user's function, which has no limits that a completion may exceed."""
        if self._worker_specs[request.spec_index]["kind"] != "verifier":
            return False
        message = request.reward.reference_request(request.item)
        return message is not None and self._is_graded(request, message)

    def _is_graded(self, request: ScoreRequest, message: Mapping[str, Any]) -> bool:
        """Returns whether the worker grades a request within its limits. Each request is sent once."""
        key = hashlib.blake2b(json.dumps([request.spec_index, message], default=str).encode()).digest()
        if key not in self._graded:
            try:
                reply = self._send(request, message)
            except WorkerStarved:
                self._stop_worker()
                return False
            except (WorkerTimeout, WorkerExited):
                self._stop_worker()
                reply = {"late": True}
            self._graded[key] = not reply.get("late") and self._parse(request, reply).value is not None
        return self._graded[key]

    def _ensure_worker(self) -> None:
        """Starts another worker if the last one was lost, or was ended because it had grown too large."""
        if self.worker is None and not self._stopped.is_set():
            self._pool.on_ready(self._start_worker())


def _limit_exceeded(limit: str) -> Score:
    """Returns the score of a completion that alone exceeds a limit."""
    return Score(0.0, "fail", f"grading it takes more than {limit}")
