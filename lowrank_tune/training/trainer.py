"""The loop. It knows no algorithm, no display and no file format: it emits events and polls a `TrainerControl`.

A step: collect, weigh, one backward for each term of each micro-batch, clip, step. A micro-batch that memory is too
short for is done again in halves, which have the same gradient. A step whose loss or gradient is not finite changes
nothing and is counted. Each step draws its random numbers from the seed and its own number, so a step that was lost to
a crash is drawn again just so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from lowrank_tune.algorithms.base import Algorithm
from lowrank_tune.batch import Batch
from lowrank_tune.errors import TrainingError
from lowrank_tune.events import Emit, LogMessage, StepEnd
from lowrank_tune.functional import step_seed
from lowrank_tune.model.oom import MemoryLimits, atomic_grad_accumulation
from lowrank_tune.model.optimizers import make_optimizer
from lowrank_tune.stats import Stats, WeightedMean, add_stats, to_floats
from lowrank_tune.training.signals import TrainerControl

if TYPE_CHECKING:  # the model floor must run where pydantic is not installed (benchmarks/gpu.py)
    from lowrank_tune.config import TrainingConfig

T = TypeVar("T")
__all__ = ["Trainer", "TrainerState", "make_optimizer", "memory_gib", "update_stats", "lr_at_step"]

# A B that starts at 0 moves at any rate, so the share alone is not enough; and at the end of a schedule it is right to
# stand still.
MIN_UPDATED_FRACTION = 0.5
MIN_UPDATE_RATIO = 1e-8
MIN_LR_FRACTION = 0.01
STALLED_CHECKS_BEFORE_WARNING = 3


@dataclass
class TrainerState:
    """Where the loop stands; saved with a checkpoint, so that a resumed run goes on as if nothing had happened."""

    step: int = 0
    nonfinite_steps: int = 0
    consecutive_nonfinite_steps: int = 0
    num_stalled_checks: int = 0
    tokens: int = 0

    def to_dict(self) -> dict[str, int]:
        return dict(vars(self))


@dataclass
class Trainer:
    """One run's loop. `on_step_end(state, last)` evaluates and saves what is due after a step, or what `control` asks
    for; it is called between steps, where nothing is half done, and again at the same border for requests that came
    meanwhile. It may set `should_stop`, which ends the run as its last step does."""

    algorithm: Algorithm
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    train: TrainingConfig
    steps: int
    seed: int
    device: torch.device
    emit: Emit
    on_step_end: Callable[[TrainerState, bool], None]
    control: TrainerControl = field(default_factory=TrainerControl)
    state: TrainerState = field(default_factory=TrainerState)
    checked: bool = False
    warned: set[str] = field(default_factory=set)
    should_stop: bool = False
    limits: MemoryLimits = field(default_factory=MemoryLimits)

    def run(self) -> bool:
        """Runs to the last step. Returns False where it was asked to stop before; all is saved by then."""
        while self.state.step < self.steps and not self.should_stop:
            self._wait_while_paused()
            if self.control.stop:  # asked at any moment, while the border evaluated too
                self.control.save = True
                self.on_step_end(self.state, False)
                return False
            self._step()
            self.limits.message_prefix = f"after step {self.state.step}: "
            self.on_step_end(self.state, self.state.step == self.steps)
        return True

    def _wait_while_paused(self) -> None:
        while self.control.pause and not self.control.stop:
            if self.control.save or self.control.evaluate:
                self.on_step_end(self.state, False)
            time.sleep(0.1)

    def _step(self) -> None:
        start_time = time.perf_counter()
        step = self.state.step
        torch.manual_seed(step_seed(self.seed, step))
        self.limits.message_prefix = f"step {step + 1}: "
        logged = (step + 1) % self.train.logging_steps == 0 or step in (0, self.steps - 1)
        learning_rate = self.train.learning_rate * lr_at_step(
            step,
            self.steps,
            self.train.warmup_steps,
            self.train.lr_scheduler_type,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("share", 1.0)
        step_batch = self.algorithm.collect(step)
        if not self.checked:
            self._check(step_batch.batch, step)
        stats: Stats = dict(step_batch.stats)
        if logged:
            self._add_step_metrics(step_batch.batch, stats)
        tokens = 0
        for minibatch in step_batch.minibatches():
            minibatch_stats, loss, grad_norm = self._accumulate(minibatch)
            tokens += int(minibatch.attention_mask.sum())
            if not (math.isfinite(grad_norm) and math.isfinite(loss)):
                self._skip_nonfinite_step(step, grad_norm)
                break
            self.state.consecutive_nonfinite_steps = 0
            if logged:
                before = [p.detach().clone() for p in self.parameters]
            else:
                before = None
            self.optimizer.step()
            if before is not None:
                stats |= update_stats(self.parameters, before)
            stats["grad_norm"] = WeightedMean(grad_norm, 1)
            add_stats(stats, minibatch_stats)
            if not self.algorithm.should_continue(minibatch_stats):
                break
        self.optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        self.state.tokens += tokens
        values = to_floats(stats)
        self._check_update_size(values, learning_rate / self.train.learning_rate)
        if "grad_norm" in values:
            self._emit_diagnostics(values)
        seconds = time.perf_counter() - start_time
        values |= {
            "learning_rate": learning_rate,
            "memory_gib": memory_gib(self.device),
            "tokens_per_second": tokens / seconds,
        }
        if self.state.nonfinite_steps:
            values["skipped_steps"] = self.state.nonfinite_steps
        if self.limits.num_ooms:
            values["oom_retries"] = self.limits.num_ooms
        self.emit(
            StepEnd(step=self.state.step, steps=self.steps, stats=values, seconds=seconds, tokens=tokens, logged=logged)
        )

    def _check(self, batch: Batch, step: int) -> None:
        """Once a start. The random state stays as it was: a continued run must draw what the straight one drew."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            for _ in self._with_oom_split(
                next(self._split_micro_batches(batch)), lambda micro: self.algorithm.check(micro, step)
            ):
                pass
        self.checked = True

    def _add_step_metrics(self, batch: Batch, stats: Stats) -> None:
        """Adds what the algorithm measures on one micro-batch."""
        for metrics in self._with_oom_split(next(self._split_micro_batches(batch)), self.algorithm.step_metrics):
            add_stats(stats, metrics)

    def _split_micro_batches(self, batch: Batch) -> Iterator[Batch]:
        rows_per_unit = self.algorithm.rows_per_unit
        size = self.train.micro_batch_rows
        tokens = self.limits.clamp_to_limits("update_tokens", self.train.micro_batch_tokens)
        return batch.split(None if size is None else size * rows_per_unit, tokens, rows_per_unit)

    def _with_oom_split(self, micro: Batch, work: Callable[[Batch], T]) -> Iterator[T]:
        """What `work` makes of a micro-batch on the device, or of pieces of it, where memory is too short for all of
        it."""
        rows_per_unit = self.algorithm.rows_per_unit
        width = micro.input_ids.shape[1]

        def on_device(units: Sequence[int]) -> T:
            whole = len(units) * rows_per_unit == len(micro)
            return work((micro if whole else micro.select_rows(_rows_of_units(units, rows_per_unit))).to(self.device))

        for _, done in self.limits.split_on_oom(
            "update_tokens",
            range(len(micro) // rows_per_unit),
            rows_per_unit * width,
            on_device,
            rows_per_unit,
        ):
            yield done

    def _accumulate(self, minibatch: Batch) -> tuple[Stats, float, float]:
        """Adds up the gradients of all micro-batches and clips them; returns the statistics, the loss, and the norm
        before clipping."""
        minibatch.token_weights = self.algorithm.token_weights(minibatch)
        stats: Stats = {}
        loss = torch.zeros((), device=self.device)
        for micro in self._split_micro_batches(minibatch):
            for micro_loss, micro_stats in self._with_oom_split(micro, self._backward):
                loss += micro_loss
                add_stats(stats, micro_stats)
        total, grad_norm = torch.stack([loss, self._clip().to(self.device)]).tolist()
        return stats, total, grad_norm

    def _backward(self, micro: Batch) -> tuple[Tensor, Stats]:
        """Adds the gradients of a micro-batch, all or none of them; returns its loss and its statistics."""
        loss = torch.zeros((), device=self.device)
        stats = Stats()
        with atomic_grad_accumulation(self.parameters):
            for term in self.algorithm.compute_losses(micro):
                term.loss.backward()  # type: ignore[no-untyped-call]
                loss += term.loss.detach()
                add_stats(stats, term.stats)
        return loss, stats

    def _clip(self) -> Tensor:
        """Clips the gradients of each group of parameters; returns the norm of all before that."""
        norms = [
            nn.utils.clip_grad_norm_(group["params"], self.train.max_grad_norm) for group in self.optimizer.param_groups
        ]
        return norms[0] if len(norms) == 1 else torch.stack(norms).norm()

    def _skip_nonfinite_step(self, step: int, norm: float) -> None:
        self.state.nonfinite_steps += 1
        self.state.consecutive_nonfinite_steps += 1
        self.emit(
            LogMessage(
                level="warning",
                message=f"step {step + 1}: loss or gradient is not finite (norm {norm}); the step changes nothing",
            )
        )
        if self.state.consecutive_nonfinite_steps >= self.train.max_nonfinite_steps:
            raise TrainingError(
                f"{self.state.consecutive_nonfinite_steps} steps in a row had no finite loss or gradient, the last at "
                f"step {step + 1}; lower train.learning_rate, and look at the rows of these steps"
            )

    def _check_update_size(self, values: Mapping[str, float], lr_fraction: float) -> None:
        """Says so when a run learns nothing: the optimizer steps, and the adapter stays where it was."""
        if "updated_param_fraction" not in values or lr_fraction < MIN_LR_FRACTION:
            return
        updated_fraction = values["updated_param_fraction"]
        update_ratio = values["update_ratio"]
        is_stalled = updated_fraction < MIN_UPDATED_FRACTION or update_ratio < MIN_UPDATE_RATIO
        if is_stalled:
            self.state.num_stalled_checks = self.state.num_stalled_checks + 1
        else:
            self.state.num_stalled_checks = 0
        if self.state.num_stalled_checks == STALLED_CHECKS_BEFORE_WARNING:
            message = (
                f"the last step moved {updated_fraction:.1%} of the adapter's elements, by {update_ratio:.0e} of their "
                f"size: nothing is being learned"
            )
            self.emit(
                LogMessage(level="warning", message=f"{message}; look at train.learning_rate and at the loss mask")
            )

    def _emit_diagnostics(self, values: Mapping[str, float]) -> None:
        """What the algorithm finds worrying, each kind (its first words) once a start."""
        for message in self.algorithm.iter_warnings(values):
            kind = message.partition(",")[0]
            if kind not in self.warned:
                self.warned.add(kind)
                self.emit(LogMessage(level="warning", message=f"step {self.state.step}: {message}"))


def _rows_of_units(units: Sequence[int], rows_per_unit: int) -> Tensor:
    return torch.tensor([unit * rows_per_unit + i for unit in units for i in range(rows_per_unit)])


def lr_at_step(step: int, steps: int, warmup: int, schedule: str) -> float:
    """Share of the peak learning rate at a step, 0-based: a linear warm-up, then cosine or linear to 0 after the last
    step, or constant."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    fraction_done = (step - warmup) / max(1, steps - warmup)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * fraction_done))
    return 1.0 - fraction_done


def update_stats(parameters: list[nn.Parameter], before: list[Tensor]) -> Stats:
    """Share of elements that the last step moved, and the size of the update against that of the weights. An adapter's
    B starts at 0, so the second is large at first."""
    num_updated = torch.stack([(p.detach() != b).sum() for p, b in zip(parameters, before, strict=True)]).sum()
    update_norm = (
        torch.stack([(p.detach() - b).square().sum() for p, b in zip(parameters, before, strict=True)]).sum().sqrt()
    )
    weight_norm = torch.stack([b.square().sum() for b in before]).sum().sqrt()
    return {
        "updated_param_fraction": WeightedMean(num_updated, sum(p.numel() for p in parameters)),
        "update_ratio": WeightedMean(update_norm, weight_norm),
    }


def memory_gib(device: torch.device) -> float:
    """Peak memory so far: of the card, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not on Windows, where nothing else of the kit is promised either

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
