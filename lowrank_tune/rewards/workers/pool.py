"""Scoring on worker processes while other completions still decode.

Each worker has a thread that feeds it and limits its time (`charged_time.py`). A worker that overstays is killed and a
new one takes its place, so the pool keeps its size. Scores do not depend on which worker gave them, nor on the order.
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
START_SECONDS = 60.0  # for what a user's file imports

Key = TypeVar("Key", bound=Hashable)


class WorkerPool(Generic[Key]):
    """Scores completions with several rewards. Use it as a context manager: no worker outlives it.

    Rewards that cannot hang are computed at once, in this process, or by `collect` for all completions together; for
    the others `workers` processes are kept. Making it waits until these are warm, and raises Faults where a job cannot
    be loaded.
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
        self._threads = [
            WorkerThread(self, self.worker_specs, self._requests)
            for _ in range(max(1, workers) if self.worker_specs else 0)
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
        """The processes of the workers."""
        return [thread.worker.pid for thread in self._threads if thread.worker is not None]

    def submit(self, key: Key, item: RewardInput) -> None:
        """Takes a completion, as soon as it is finished. Keys are told apart until `collect`."""
        if key in self._scores:
            raise ValueError(f"{key!r} was submitted before")
        self._scores[key] = [None] * len(self.rewards)
        spec_index = 0
        for reward_index, reward in enumerate(self.rewards):
            if isinstance(reward, WorkerReward):
                self._dispatch(ScoreRequest(key, item, reward_index, spec_index, reward))
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
        """Waits for all that was submitted: for each key one score a reward, in the order of submission."""
        keys = list(self._batched)
        items = list(self._batched.values())
        self._batched = {}
        for reward_index, reward in enumerate(self.rewards):
            if isinstance(reward, BatchedReward) and items:  # while the workers are busy
                for key, score in zip(keys, reward.score(items), strict=True):
                    self._scores[key][reward_index] = score
        self._wait(lambda: not self._pending)
        done = {key: [score for score in scores if score is not None] for key, scores in self._scores.items()}
        self._scores = {}
        return done

    def close(self) -> None:
        """Ends all workers, whatever they are doing. What was not collected is lost."""
        for thread in self._threads:
            thread.end()
        for _ in self._threads:
            self._requests.put(None)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def store(self, request: ScoreRequest, score: Score) -> None:
        """A score has come; called by the slots."""
        with self._changed:
            self._scores[request.key][request.reward_index] = score
            self._pending -= 1
            self._changed.notify_all()

    def on_ready(self, faults: Sequence[str | None]) -> None:
        """A worker is warm, or says what its jobs lack; called by the slots."""
        failures = [
            ConfigProblem(fault, str(spec.get("use", spec["kind"])))
            for fault, spec in zip(faults, self.worker_specs, strict=True)
            if fault is not None
        ]
        if failures:
            raise ConfigError(failures)
        with self._changed:
            self._num_ready += 1
            self._changed.notify_all()

    def fail(self, failure: BaseException) -> None:
        """A slot cannot go on; the next who waits raises this."""
        with self._changed:
            self._failure = self._failure or failure
            self._changed.notify_all()

    def _wait(self, ready: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or ready())
            if self._failure is not None:
                raise self._failure


def score_serially(
    reward: Reward,
    items: Sequence[RewardInput],
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> list[Score]:
    """Scores with one worker that lives for this call: what `score` is for a reward that needs a worker."""
    with WorkerPool[int]([reward], 1, timeout_seconds) as pool:
        for number, item in enumerate(items):
            pool.submit(number, item)
        return [scores[0] for scores in pool.collect().values()]
