"""A few steps of the kit's own loop, with the time and the memory of collecting and of updating measured apart."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from gpu_proof.machine import peak_gib, reset_peak, synchronize
from gpu_proof.profiling import Profile, profiled
from gpu_proof.synthetic import TrainSettings
from lowrank_tune.algorithms.base import Algorithm, StepBatch
from lowrank_tune.batch import Batch
from lowrank_tune.events import Event, StepEnd
from lowrank_tune.model.compiled_layers import CompiledLayers
from lowrank_tune.model.roles import Roles
from lowrank_tune.training.trainer import Trainer, TrainerState, make_optimizer


@dataclass
class MeasuredRun:
    """One entry a step: the event of the loop, seconds of collecting and of all else, forwards of layers outside
    collecting, the rows.

    `peaks_gib` is the peak memory of each phase over all steps; without a GPU, of the whole process.
    """

    events: list[StepEnd] = field(default_factory=list)
    collect_seconds: list[float] = field(default_factory=list)
    update_seconds: list[float] = field(default_factory=list)
    layer_forwards: list[int] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    peaks_gib: dict[str, float] = field(default_factory=dict)
    out_of_memory: int = 0
    """How often memory ran out and the work was repeated in halves."""
    profile: Profile | None = None
    """Of the update of the profiled step, where one was requested."""

    def add_peak(self, phase: str, gib: float) -> None:
        self.peaks_gib[phase] = max(self.peaks_gib.get(phase, 0.0), gib)

    @property
    def peak_gib(self) -> float:
        return max(self.peaks_gib.values())


def run(
    algorithm: Algorithm[Any],
    roles: Roles,
    parameters: list[nn.Parameter],
    train: TrainSettings,
    steps: int,
    profile_step: int | None = None,
) -> MeasuredRun:
    """Run `steps` steps. Raises TrainingError and torch.OutOfMemoryError as the loop does."""
    measured, device = MeasuredRun(), roles.base.device
    collect, started, forwards_before = algorithm.collect, 0.0, 0
    profiling = ExitStack()

    def now() -> float:
        synchronize(device)
        return time.perf_counter()

    def measured_collect(step: int) -> StepBatch[Any]:
        nonlocal started, forwards_before
        reset_peak(device)
        before = now()
        experience = collect(step)
        measured.collect_seconds.append(now() - before)
        measured.batches.append(experience.batch)
        measured.add_peak("collecting", peak_gib(device))
        reset_peak(device)
        forwards_before = count[0]
        if step == profile_step:
            measured.profile = profiling.enter_context(profiled(device))
        started = now()
        return experience

    def after_step(progress: TrainerState, last: bool) -> None:
        measured.update_seconds.append(now() - started)
        profiling.close()
        measured.layer_forwards.append(count[0] - forwards_before)
        measured.add_peak("updating", peak_gib(device))

    def emit(event: Event) -> None:
        if isinstance(event, StepEnd):
            measured.events.append(event)

    # A compiled layer would count the passes in its graph, and be compiled again for each count.
    is_compiled = any(path.name == CompiledLayers.name for path in roles.fast_paths)
    with counted_forwards([] if is_compiled else roles.base.model.get_decoder().layers) as count, profiling:
        algorithm.collect = measured_collect  # type: ignore[method-assign]
        optimizer = make_optimizer(parameters, train, device)  # type: ignore[arg-type]
        loop = Trainer(
            algorithm,
            parameters,
            optimizer,
            train,  # type: ignore[arg-type]
            steps,
            0,
            device,
            emit,
            after_step,
            limits=roles.limits,
        )
        loop.run()
    measured.out_of_memory = roles.limits.num_ooms
    return measured


@contextmanager
def counted_forwards(layers: Iterable[Any]) -> Iterator[list[int]]:
    """Count the forwards of these decoder layers, to see recomputation. The hooks are on a module *inside* each layer:
    transformers 5.23 recomputes a layer without calling the layer's own hooks."""
    count = [0]

    def add(*_: Any) -> None:
        count[0] += 1

    handles = [next(layer.children()).register_forward_pre_hook(add) for layer in layers]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
