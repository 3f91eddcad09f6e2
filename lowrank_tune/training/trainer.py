"""The training loop. It is independent of the algorithm, the display and the file formats: it emits events and reads a
`TrainerControl`.

A step: collect rows, weigh their tokens, one backward pass for each loss of each micro-batch, clip, update. A
micro-batch that is too large for the memory is repeated in halves, with the same gradient. A step without a finite loss
and gradient changes nothing and is counted. The random numbers of a step depend only on the seed and its number, so a
step that a crash has lost is repeated with the same numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from lowrank_tune.algorithms.base import Algorithm, LossTerm
from lowrank_tune.batch import Batch, rows_of_units
from lowrank_tune.errors import TrainingError
from lowrank_tune.events import Emit, LogMessage, StepEnd, warning
from lowrank_tune.functional import step_seed
from lowrank_tune.model.oom import MemoryLimits, atomic_grad_accumulation
from lowrank_tune.model.optimizers import make_optimizer
from lowrank_tune.model.router_loss import RouterLoss
from lowrank_tune.stats import Stats, WeightedMean, add_stats, to_floats
from lowrank_tune.training.loss_scaling import LossScaler
from lowrank_tune.training.run_totals import tokens_per_second
from lowrank_tune.training.signals import TrainerControl

if TYPE_CHECKING:  # the trainer must run where pydantic is not installed (benchmarks/gpu.py)
    from lowrank_tune.config import TrainingConfig

T = TypeVar("T")
__all__ = [
    "Trainer",
    "TrainerState",
    "make_optimizer",
    "memory_gib",
    "update_stats",
    "lr_at_step",
]

# An update is stalled below either of the first two limits: a B that starts at 0 changes at any learning rate, so the
# share alone is not enough. Near the end of a schedule small updates are expected.
MIN_UPDATED_FRACTION = 0.5
MIN_UPDATE_RATIO = 1e-8
MIN_LR_FRACTION = 0.01
STALLED_CHECKS_BEFORE_WARNING = 3


@dataclass
class TrainerState:
    """The state of the loop, saved with each checkpoint, so that a resumed run equals an uninterrupted one."""

    step: int = 0
    nonfinite_steps: int = 0
    consecutive_nonfinite_steps: int = 0
    num_stalled_checks: int = 0
    tokens: int = 0

    def to_dict(self) -> dict[str, int]:
        return dict(vars(self))


@dataclass
class Trainer:
    """The training loop of one run."""

    algorithm: Algorithm[Any]
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    train: TrainingConfig
    steps: int
    seed: int
    device: torch.device
    emit: Emit
    on_step_end: Callable[[TrainerState, bool], None]
    """`on_step_end(state, is_last)` evaluates and saves, when due or requested by `control`. It is called between
    steps, and again after the same step for a request that arrives meanwhile. It may set `should_stop`, which ends the
    run as its last step does."""
    control: TrainerControl = field(default_factory=TrainerControl)
    state: TrainerState = field(default_factory=TrainerState)
    checked: bool = False
    warned: set[str] = field(default_factory=set)
    """Kinds of warnings already logged."""
    should_stop: bool = False
    limits: MemoryLimits = field(default_factory=MemoryLimits)
    loss_scaler: LossScaler = field(default_factory=LossScaler)
    router_loss: RouterLoss | None = None

    def run(self) -> bool:
        """Runs to the last step. Returns False if `control.stop` ended the run before; everything is saved then."""
        while self.state.step < self.steps and not self.should_stop:
            self._wait_while_paused()
            if self.control.stop:
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
        """Runs one step: the rows, an update for each of their minibatches, the checks of the metrics, and the
        event."""
        start_time = time.perf_counter()
        step = self.state.step
        torch.manual_seed(step_seed(self.seed, step))
        self.limits.message_prefix = f"step {step + 1}: "
        is_logged = (step + 1) % self.train.logging_steps == 0 or step in (0, self.steps - 1)
        lr_factor = lr_at_step(
            step,
            self.steps,
            self.train.warmup_steps,
            self.train.lr_scheduler_type,
        )
        learning_rate = self.train.learning_rate * lr_factor
        self._set_learning_rate(learning_rate)

        step_batch = self.algorithm.collect(step)
        if not self.checked:
            self._check(step_batch.batch, step)
        stats: Stats = dict(step_batch.stats)
        if is_logged:
            self._add_step_metrics(step_batch.batch, stats)
        tokens = self._update(step_batch.minibatches(), stats, is_logged)

        self.state.step += 1
        self.state.tokens += tokens
        metrics = to_floats(stats)
        metrics |= self.algorithm.derived_metrics(metrics)
        self._check_update_size(metrics, learning_rate / self.train.learning_rate)
        has_updated = "grad_norm" in metrics
        if has_updated:
            self.algorithm.check_metrics(metrics)
            self._emit_diagnostics(metrics)
        seconds = time.perf_counter() - start_time
        self._add_run_metrics(metrics, learning_rate, tokens_per_second(tokens, seconds))
        self.emit(
            StepEnd(
                step=self.state.step,
                steps=self.steps,
                stats=metrics,
                seconds=seconds,
                tokens=tokens,
                logged=is_logged,
            )
        )

    def _set_learning_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("share", 1.0)

    def _update(
        self,
        minibatches: Iterator[Batch],
        stats: Stats,
        is_logged: bool,
    ) -> int:
        """Runs an optimizer step for each minibatch and adds its metrics to `stats`. Returns the number of tokens.

        A minibatch without a finite loss and gradient changes nothing and ends the step. One whose scaled gradient
        exceeds float16 changes nothing, and the next one follows.
        """
        tokens = 0
        for minibatch in minibatches:
            self.optimizer.zero_grad(set_to_none=True)
            minibatch_stats, loss, grad_norm = self._accumulate(minibatch)
            tokens += int(minibatch.attention_mask.sum())
            if self.loss_scaler.update(loss, grad_norm):
                self._log_overflow()
                continue
            if not (math.isfinite(grad_norm) and math.isfinite(loss)):
                self._skip_nonfinite_step(grad_norm)
                break
            self.state.consecutive_nonfinite_steps = 0
            if is_logged:
                before = [parameter.detach().clone() for parameter in self.parameters]
                self.optimizer.step()
                stats |= update_stats(self.parameters, before)
            else:
                self.optimizer.step()
            stats["grad_norm"] = WeightedMean(grad_norm, 1)
            add_stats(stats, minibatch_stats)
            if not self.algorithm.should_continue(minibatch_stats):
                break
        self.optimizer.zero_grad(set_to_none=True)
        return tokens

    def _add_run_metrics(
        self,
        metrics: dict[str, float],
        learning_rate: float,
        speed: float,
    ) -> None:
        metrics["learning_rate"] = learning_rate
        metrics["memory_gib"] = memory_gib(self.device)
        metrics["tokens_per_second"] = speed
        if self.loss_scaler.enabled:
            metrics["loss_scale"] = self.loss_scaler.scale
            metrics["overflowed_steps"] = self.loss_scaler.num_overflows
        if self.state.nonfinite_steps:
            metrics["skipped_steps"] = self.state.nonfinite_steps
        if self.limits.num_ooms:
            metrics["oom_retries"] = self.limits.num_ooms

    def _check(self, batch: Batch, step: int) -> None:
        """Runs the algorithm's check on the first micro-batch, once for each start. The random state is restored: a
        resumed run must draw the same numbers as an uninterrupted one."""

        def check(micro: Batch) -> None:
            self.algorithm.check(micro, step)

        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            first_micro = next(self._split_micro_batches(batch))
            for _ in self._with_oom_split(first_micro, check):
                pass
        self.checked = True

    def _add_step_metrics(self, batch: Batch, stats: Stats) -> None:
        """Adds the algorithm's metrics of one micro-batch."""
        first_micro = next(self._split_micro_batches(batch))
        for metrics in self._with_oom_split(first_micro, self.algorithm.step_metrics):
            add_stats(stats, metrics)

    def _split_micro_batches(self, batch: Batch) -> Iterator[Batch]:
        rows_per_unit = self.algorithm.rows_per_unit
        rows = self.train.micro_batch_rows
        if rows is not None:
            rows *= rows_per_unit
        tokens = self.limits.clamp_to_limits("update_tokens", self.train.micro_batch_tokens)
        return batch.split(rows, tokens, rows_per_unit)

    def _with_oom_split(self, micro: Batch, function: Callable[[Batch], T]) -> Iterator[T]:
        """Yields `function` of a micro-batch on the device, or of each of its parts, if the memory is too small for all
        of it."""
        rows_per_unit = self.algorithm.rows_per_unit
        width = micro.input_ids.shape[1]

        def on_device(units: Sequence[int]) -> T:
            if len(units) * rows_per_unit == len(micro):
                part = micro
            else:
                part = micro.select_rows(rows_of_units(units, rows_per_unit))
            return function(part.to(self.device))

        for _, result in self.limits.split_on_oom(
            "update_tokens",
            range(len(micro) // rows_per_unit),
            rows_per_unit * width,
            on_device,
            rows_per_unit,
        ):
            yield result

    def _accumulate(self, minibatch: Batch) -> tuple[Stats, float, float]:
        """Adds up the gradients of all micro-batches and clips them. Returns the metrics, the loss, and the norm of the
        gradient before clipping."""
        minibatch.token_weights = self.algorithm.token_weights(minibatch)
        if self.router_loss is not None:
            self.router_loss.num_tokens = int(minibatch.attention_mask.sum())
        stats: Stats = {}
        loss = torch.zeros((), device=self.device)
        for micro in self._split_micro_batches(minibatch):
            for micro_loss, micro_stats in self._with_oom_split(micro, self._backward):
                loss += micro_loss
                add_stats(stats, micro_stats)
        self.loss_scaler.unscale(self.optimizer)
        grad_norm = self._clip_gradients().to(self.device)
        loss_value, grad_norm_value = torch.stack([loss, grad_norm]).tolist()
        return stats, loss_value, grad_norm_value

    def _backward(self, micro: Batch) -> tuple[Tensor, Stats]:
        """Adds the gradients of a micro-batch, all or, if it fails, none of them. Returns its loss and its metrics."""
        loss = torch.zeros((), device=self.device)
        stats = Stats()
        with atomic_grad_accumulation(self.parameters):
            for term in self._loss_terms(micro):
                self.loss_scaler.scaled(term.loss).backward()  # type: ignore[no-untyped-call]
                loss += term.loss.detach()
                add_stats(stats, term.stats)
        return loss, stats

    def _loss_terms(self, micro: Batch) -> Iterator[LossTerm]:
        """Yields the losses of the algorithm, each with the load-balancing loss of its pass if there is one."""
        terms: Iterator[LossTerm] = self.algorithm.compute_losses(micro)
        if self.router_loss is None:
            yield from terms
            return
        self.router_loss.discard()
        try:
            for term in terms:
                balancing = self.router_loss.take()
                if balancing is None:
                    yield term
                else:
                    loss, stats = balancing
                    yield LossTerm(term.loss + loss, term.stats | stats)
        finally:
            # After an out-of-memory error, so that the graph of a pass does not stay.
            self.router_loss.discard()

    def _clip_gradients(self) -> Tensor:
        """Clips the gradients of each group of parameters. Returns the norm of all gradients before that."""
        norms: list[Tensor] = []
        for group in self.optimizer.param_groups:
            norms.append(nn.utils.clip_grad_norm_(group["params"], self.train.max_grad_norm))
        if len(norms) == 1:
            return norms[0]
        total: Tensor = torch.stack(norms).norm()
        return total

    def _log_overflow(self) -> None:
        """Logs an update that changes nothing because its scaled gradient exceeded float16."""
        self.emit(
            LogMessage(
                message=f"step {self.state.step + 1}: a gradient exceeded float16; this update changes nothing, and "
                f"the loss scale is now {self.loss_scaler.scale:,.0f}"
            )
        )

    def _skip_nonfinite_step(self, grad_norm: float) -> None:
        """Counts and logs a step that changes nothing. Raises TrainingError after too many in a row."""
        state = self.state
        state.nonfinite_steps += 1
        state.consecutive_nonfinite_steps += 1
        self.emit(
            warning(
                f"step {state.step + 1}: loss or gradient is not finite (norm {grad_norm}); the step changes nothing"
            )
        )
        if state.consecutive_nonfinite_steps >= self.train.max_nonfinite_steps:
            raise TrainingError(
                f"{state.consecutive_nonfinite_steps} steps in a row had no finite loss or gradient, the last at "
                f"step {state.step + 1}; lower train.learning_rate, and look at the rows of these steps"
            )

    def _check_update_size(self, metrics: Mapping[str, float], lr_factor: float) -> None:
        """Warns if nothing is learned: the optimizer steps do not change the adapter."""
        if "updated_param_fraction" not in metrics or lr_factor < MIN_LR_FRACTION:
            return
        updated_fraction = metrics["updated_param_fraction"]
        update_ratio = metrics["update_ratio"]
        is_stalled = updated_fraction < MIN_UPDATED_FRACTION or update_ratio < MIN_UPDATE_RATIO
        if not is_stalled:
            self.state.num_stalled_checks = 0
            return
        self.state.num_stalled_checks += 1
        if self.state.num_stalled_checks == STALLED_CHECKS_BEFORE_WARNING:
            self.emit(
                warning(
                    f"the last step moved {updated_fraction:.1%} of the adapter's elements, by {update_ratio:.0e} of "
                    "their size: nothing is being learned; look at train.learning_rate and at the loss mask"
                )
            )

    def _emit_diagnostics(self, metrics: Mapping[str, float]) -> None:
        """Logs the warnings of the algorithm, each kind (the words before its first comma) once for each start."""
        for message in self.algorithm.diagnostics(metrics):
            kind = message.partition(",")[0]
            if kind not in self.warned:
                self.warned.add(kind)
                self.emit(warning(f"step {self.state.step}: {message}"))


def lr_at_step(
    step: int,
    steps: int,
    warmup: int,
    schedule: str,
) -> float:
    """Returns the learning rate of a step (0-based) relative to its peak: linear warmup, then cosine or linear decay to
    0 after the last step, or constant."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    fraction_done = (step - warmup) / max(1, steps - warmup)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * fraction_done))
    return 1.0 - fraction_done


def update_stats(parameters: list[nn.Parameter], before: list[Tensor]) -> Stats:
    """Returns the share of elements that the last step changed, and the norm of the update relative to that of the
    weights. The second is large at first, because the B of an adapter starts at 0."""
    num_updated = []
    squared_updates = []
    squared_weights = []
    for parameter, old in zip(parameters, before, strict=True):
        new = parameter.detach()
        num_updated.append((new != old).sum())
        squared_updates.append((new - old).square().sum())
        squared_weights.append(old.square().sum())
    num_elements = sum(parameter.numel() for parameter in parameters)
    update_norm = torch.stack(squared_updates).sum().sqrt()
    weight_norm = torch.stack(squared_weights).sum().sqrt()
    return {
        "updated_param_fraction": WeightedMean(torch.stack(num_updated).sum(), num_elements),
        "update_ratio": WeightedMean(update_norm, weight_norm),
    }


def memory_gib(device: torch.device) -> float:
    """Returns the peak memory so far, of the GPU, or of the process on the CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Windows has no such module, and the CPU is not supported there.
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
