"""A few steps of the kit's own loop, with the time and the memory of collecting and of updating told apart."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from card.machine import peak_gib, reset_peak, synchronise
from card.made import Train
from lowrank_tune.events import Event, StepDone
from lowrank_tune.model.roles import Roles
from lowrank_tune.train import Loop, Progress, make_optimizer
from lowrank_tune.types import Algorithm, Batch, Experience


@dataclass
class Course:
    """One entry a step: what the loop told, seconds of collecting and of all else, forwards of layers that are not collecting's, the rows.
    `peaks` is the most memory in GiB of each phase, over all steps; without a card, of the whole process."""

    events: list[StepDone] = field(default_factory=list)
    collecting: list[float] = field(default_factory=list)
    updating: list[float] = field(default_factory=list)
    forwards: list[int] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    peaks: dict[str, float] = field(default_factory=dict)
    short: int = 0
    """How often memory ran short, and work was done again in halves."""

    def note(self, phase: str, gib: float) -> None:
        self.peaks[phase] = max(self.peaks.get(phase, 0.0), gib)

    @property
    def peak(self) -> float:
        return max(self.peaks.values())


def run(algorithm: Algorithm, roles: Roles, parameters: list[nn.Parameter], train: Train, steps: int) -> Course:
    """Raises RunFailed and torch.OutOfMemoryError as the loop does."""
    course, base, device = Course(), roles.base, roles.base.device
    collect, begun, known = algorithm.collect, 0.0, 0

    def mark() -> float:
        synchronise(device)
        return time.perf_counter()

    def apart(step: int) -> Experience:
        nonlocal begun, known
        reset_peak(device)
        at = mark()
        experience = collect(step)
        begun = mark()
        course.collecting.append(begun - at)
        course.batches.append(experience.batch)
        course.note("collecting", peak_gib(device))
        reset_peak(device)
        known = count[0]
        return experience

    def at_border(progress: Progress, last: bool) -> None:
        course.updating.append(mark() - begun)
        course.forwards.append(count[0] - known)
        course.note("updating", peak_gib(device))

    def emit(event: Event) -> None:
        if isinstance(event, StepDone):
            course.events.append(event)

    with counted_forwards(base.model) as count:
        algorithm.collect = apart  # type: ignore[method-assign]
        Loop(algorithm, parameters, make_optimizer(parameters, train, device),  # type: ignore[arg-type]
             train, steps, 0, device, emit, at_border, limits=roles.limits).run()  # type: ignore[arg-type]  # fmt: skip
    course.short = roles.limits.times
    return course


@contextmanager
def counted_forwards(model: Any) -> Iterator[list[int]]:
    """Counts the forwards of decoder layers, so that recomputation is known to have happened. The hooks stand on a module *inside* each
    layer: transformers 5.23 recomputes a layer without calling the layer's own hooks."""
    count = [0]

    def add(*_: Any) -> None:
        count[0] += 1

    handles = [next(layer.children()).register_forward_pre_hook(add) for layer in model.get_decoder().layers]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
