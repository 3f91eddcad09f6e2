"""CPU seconds of a contender's steps, its adapters, and its turns."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from learning_curves.task import Task


@dataclass
class Meter:
    """Measures a contender from its first step to its last, reference log-probs included, and writes its adapter after
    each step that is evaluated. Saving, waiting and loading are not counted.

    Contenders work in turns, from one saved adapter to the next, so that other work on the machine affects both.
    """

    task: Task
    contender: str
    pipe: Connection
    tensors: Callable[[], dict[str, Any]] | None = None
    """Returns the adapter, with the names of PEFT's file format."""
    cpu: float = 0.0
    wall: float = 0.0
    prepared: float = 0.0
    """CPU seconds before the first step."""
    steps: list[dict[str, float]] = field(default_factory=list)
    _started: tuple[float, float] = (0.0, 0.0)
    _has_turn: bool = False

    def start(self) -> None:
        """Begins to count, in this contender's turn."""
        if not self._has_turn:
            self._wait_for_turn()
        self._started = (time.process_time(), time.perf_counter())

    def start_training(self) -> None:
        """Begins the first step."""
        self.prepared = self.cpu
        self.start()

    def stop(self) -> None:
        """Adds the time since `start`."""
        self.cpu += time.process_time() - self._started[0]
        self.wall += time.perf_counter() - self._started[1]

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts the time of a block before the first step."""
        self.start()
        yield
        self.stop()

    def end_step(self, value: float) -> None:
        """Ends a step, with its loss or mean reward, and begins the next one."""
        self.stop()
        self.steps.append({"cpu": self.cpu, "wall": self.wall, "value": value})
        number = len(self.steps)
        if number in self.task.settings.evaluated:
            self._save(number)
            self._has_turn = False
        if number < self.task.settings.steps:
            self.start()
        else:
            self._write()

    def _wait_for_turn(self) -> None:
        self.pipe.send("waits")
        self.pipe.recv()
        self._has_turn = True

    def _save(self, step: int) -> None:
        from safetensors.torch import save_file

        assert self.tensors is not None, "the adapter is there before the first step"
        tensors = {name: tensor.detach().clone().contiguous() for name, tensor in self.tensors().items()}
        save_file(tensors, self.task.adapter(self.contender, step))

    def _write(self) -> None:
        file = self.task.of(self.contender) / "steps.json"
        file.write_text(json.dumps({"prepared": self.prepared, "steps": self.steps}), encoding="utf-8")
