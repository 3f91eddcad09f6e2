"""Scoring on worker processes while other completions still decode.

Each worker has a thread that feeds it and holds the wall clock. A worker that overstays is killed and a new one takes
its place, so the pool keeps its size. Scores do not depend on which worker gave them, nor on the order.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

from lowrank_tune.errors import Fault, Faults
from lowrank_tune.rewards.protocol import Item, Reward, Score, Whole, Worked
from lowrank_tune.rewards.slot import Slot, Task

TIMEOUT_SECONDS = 10.0
START_SECONDS = 60.0  # for what a user's file imports

Key = TypeVar("Key", bound=Hashable)


class Scorer(Generic[Key]):
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
        self.timeout_seconds, self.start_seconds = timeout_seconds, start_seconds
        self.jobs: list[Mapping[str, Any]] = [reward.job() for reward in self.rewards if isinstance(reward, Worked)]
        self._scores: dict[Key, list[Score | None]] = {}
        self._together: dict[Key, Item] = {}
        self._pending = 0
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._warm = 0
        self._slots = [Slot(self, self.jobs, self._tasks) for _ in range(max(1, workers) if self.jobs else 0)]
        try:
            for slot in self._slots:
                slot.start()
            self._wait(lambda: self._warm >= len(self._slots))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Scorer[Key]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """The processes of the workers."""
        return [slot.worker.pid for slot in self._slots if slot.worker is not None]

    def submit(self, key: Key, item: Item) -> None:
        """Takes a completion, as soon as it is finished. Keys are told apart until `collect`."""
        if key in self._scores:
            raise ValueError(f"{key!r} was submitted before")
        self._scores[key] = [None] * len(self.rewards)
        job = 0
        for place, reward in enumerate(self.rewards):
            if isinstance(reward, Worked):
                self._hand_on(Task(key, item, place, job, reward))
                job += 1
            elif isinstance(reward, Whole):
                self._together[key] = item
            else:
                start = time.perf_counter()
                score = reward.score([item])[0]
                self._scores[key][place] = replace(score, seconds=time.perf_counter() - start)

    def _hand_on(self, task: Task) -> None:
        with self._changed:
            self._pending += 1
        start = time.perf_counter()
        score = task.reward.early(task.item)
        if score is None:
            self._tasks.put(task)
        else:
            self.store(task, replace(score, seconds=time.perf_counter() - start))

    def collect(self) -> dict[Key, list[Score]]:
        """Waits for all that was submitted: for each key one score a reward, in the order of submission."""
        keys, items, self._together = list(self._together), list(self._together.values()), {}
        for place, reward in enumerate(self.rewards):
            if isinstance(reward, Whole) and items:  # while the workers are busy
                for key, score in zip(keys, reward.score(items), strict=True):
                    self._scores[key][place] = score
        self._wait(lambda: not self._pending)
        done = {key: [score for score in scores if score is not None] for key, scores in self._scores.items()}
        self._scores = {}
        return done

    def close(self) -> None:
        """Ends all workers, whatever they are doing. What was not collected is lost."""
        for slot in self._slots:
            slot.end()
        for _ in self._slots:
            self._tasks.put(None)
        for slot in self._slots:
            if slot.ident is not None:
                slot.join()

    def store(self, task: Task, score: Score) -> None:
        """A score has come; called by the slots."""
        with self._changed:
            self._scores[task.key][task.place] = score
            self._pending -= 1
            self._changed.notify_all()

    def warmed(self, faults: Sequence[str | None]) -> None:
        """A worker is warm, or says what its jobs lack; called by the slots."""
        told = [
            Fault(fault, str(job.get("use", job["kind"])))
            for fault, job in zip(faults, self.jobs, strict=True)
            if fault is not None
        ]
        if told:
            raise Faults(told)
        with self._changed:
            self._warm += 1
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


def alone(reward: Reward, items: Sequence[Item], timeout_seconds: float = TIMEOUT_SECONDS) -> list[Score]:
    """Scores with one worker that lives for this call: what `score` is for a reward that needs a worker."""
    with Scorer[int]([reward], 1, timeout_seconds) as scorer:
        for number, item in enumerate(items):
            scorer.submit(number, item)
        return [scores[0] for scores in scorer.collect().values()]
