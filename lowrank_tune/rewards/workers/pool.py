"""A pool of worker processes that score completions while others are still decoded. Runs in the main process.

Each worker has a thread that sends it requests and limits its time (`worker_thread.py`). A worker that exceeds its time
is killed and replaced, so the pool keeps its size. Scores depend neither on the worker nor on the order.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

from lowrank_tune.errors import ConfigError, ConfigProblem
from lowrank_tune.rewards.base import BatchedReward, Reward, RewardInput, Score, WorkerReward
from lowrank_tune.rewards.workers.worker_thread import ScoreRequest, WorkerThread

TIMEOUT_SECONDS = 10.0
START_SECONDS = 60.0  # for the imports of a user's file

Key = TypeVar("Key", bound=Hashable)


class WorkerPool(Generic[Key]):
    """Scores completions with several rewards. A context manager: at its end no worker is left.

    A `WorkerReward` is computed on `workers` processes, a `BatchedReward` by `collect` for all completions together,
    and the others at once in this process. The constructor waits until the workers have loaded all graders. Raises
    ConfigError if one cannot be loaded.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        workers: int = 2,
        timeout_seconds: float = TIMEOUT_SECONDS,
        start_seconds: float = START_SECONDS,
    ) -> None:
        self.rewards = tuple(rewards)
        self.timeout_seconds = timeout_seconds
        self.start_seconds = start_seconds
        self.worker_specs: list[Mapping[str, Any]] = [
            reward.worker_spec() for reward in self.rewards if isinstance(reward, WorkerReward)
        ]
        self._scores: dict[Key, list[Score | None]] = {}
        self._batched: dict[Key, RewardInput] = {}
        self._pending = 0
        self._requests: queue.SimpleQueue[ScoreRequest | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._num_ready = 0
        num_threads = max(1, workers) if self.worker_specs else 0
        self._threads = [
            WorkerThread(
                self,
                self.worker_specs,
                self._requests,
            )
            for _ in range(num_threads)
        ]
        try:
            for thread in self._threads:
                thread.start()
            self._wait(lambda: self._num_ready >= len(self._threads))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> WorkerPool[Key]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers."""
        return [thread.worker.pid for thread in self._threads if thread.worker is not None]

    def submit(self, key: Key, item: RewardInput) -> None:
        """Starts to score a completion. A key can be used again after `collect`. Raises ValueError for a key in use."""
        if key in self._scores:
            raise ValueError(f"{key!r} was submitted before")
        self._scores[key] = [None] * len(self.rewards)
        spec_index = 0
        for reward_index, reward in enumerate(self.rewards):
            if isinstance(reward, WorkerReward):
                self._dispatch(
                    ScoreRequest(
                        key,
                        item,
                        reward_index,
                        spec_index,
                        reward,
                    )
                )
                spec_index += 1
            elif isinstance(reward, BatchedReward):
                self._batched[key] = item
            else:
                start = time.perf_counter()
                score = reward.score([item])[0]
                self._scores[key][reward_index] = replace(score, seconds=time.perf_counter() - start)

    def _dispatch(self, request: ScoreRequest) -> None:
        with self._changed:
            self._pending += 1
        start = time.perf_counter()
        score = request.reward.score_without_worker(request.item)
        if score is None:
            self._requests.put(request)
        else:
            self.store(request, replace(score, seconds=time.perf_counter() - start))

    def collect(self) -> dict[Key, list[Score]]:
        """Waits for all submitted completions. Returns for each key, in order of submission, one score per reward."""
        keys = list(self._batched)
        items = list(self._batched.values())
        self._batched = {}
        # before the wait, while the workers compute
        for reward_index, reward in enumerate(self.rewards):
            if isinstance(reward, BatchedReward) and items:
                for key, score in zip(keys, reward.score(items), strict=True):
                    self._scores[key][reward_index] = score
        self._wait(lambda: not self._pending)
        done = {key: [score for score in scores if score is not None] for key, scores in self._scores.items()}
        self._scores = {}
        return done

    def close(self) -> None:
        """Kills all workers. Scores that were not collected are lost."""
        for thread in self._threads:
            thread.end()
        for _ in self._threads:
            self._requests.put(None)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def store(self, request: ScoreRequest, score: Score) -> None:
        """Stores a score. Called by the threads of the workers."""
        with self._changed:
            self._scores[request.key][request.reward_index] = score
            self._pending -= 1
            self._changed.notify_all()

    def on_ready(self, faults: Sequence[str | None]) -> None:
        """Counts a worker that has loaded its graders; `faults`: why one could not be loaded. Called by the threads of
        the workers. Raises ConfigError."""
        problems = []
        for fault, spec in zip(faults, self.worker_specs, strict=True):
            if fault is not None:
                problems.append(ConfigProblem(fault, str(spec.get("use", spec["kind"]))))
        if problems:
            raise ConfigError(problems)
        with self._changed:
            self._num_ready += 1
            self._changed.notify_all()

    def fail(self, failure: BaseException) -> None:
        """Stores the failure of a thread, which the next wait raises. Called by the threads of the workers."""
        with self._changed:
            self._failure = self._failure or failure
            self._changed.notify_all()

    def _wait(self, ready: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or ready())
            if self._failure is not None:
                raise self._failure
