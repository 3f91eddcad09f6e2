"""The loop. It knows no algorithm, no display and no file format: it emits events and polls a `Control`.

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

from lowrank_tune.control import Control
from lowrank_tune.errors import RunFailed
from lowrank_tune.events import Emit, Note, StepDone
from lowrank_tune.maths import step_seed
from lowrank_tune.model.optimizers import make_optimizer
from lowrank_tune.model.recovery import Limits, added_whole
from lowrank_tune.types import Algorithm, Batch, Mean, Stats, add_stats, to_floats

if TYPE_CHECKING:  # the model floor must run where pydantic is not installed (benchmarks/gpu.py)
    from lowrank_tune import settings

T = TypeVar("T")
__all__ = ["Loop", "Progress", "make_optimizer", "memory_gib", "movement", "rate_at"]

# A B that starts at 0 moves at any rate, so the share alone is not enough; and at the end of a schedule it is right to
# stand still.
FEW_MOVED, TINY_UPDATE, SMALL_RATE, LOOKS_BEFORE_WARNING = 0.5, 1e-8, 0.01, 3


@dataclass
class Progress:
    """Where the loop stands; saved with a checkpoint, so that a resumed run goes on as if nothing had happened."""

    step: int = 0
    bad_steps: int = 0
    bad_in_a_row: int = 0
    still_looks: int = 0
    tokens: int = 0

    def to_dict(self) -> dict[str, int]:
        return dict(vars(self))


@dataclass
class Loop:
    """One run's loop. `at_border(done, last)` evaluates and saves what is due after a step, or what `control` asks for;
    it is called between steps, where nothing is half done, and again at the same border for wishes that came meanwhile.
    It may say `enough`, which ends the run as its last step does."""

    algorithm: Algorithm
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    train: settings.Train
    steps: int
    seed: int
    device: torch.device
    emit: Emit
    at_border: Callable[[Progress, bool], None]
    control: Control = field(default_factory=Control)
    progress: Progress = field(default_factory=Progress)
    checked: bool = False
    told: set[str] = field(default_factory=set)
    enough: bool = False
    limits: Limits = field(default_factory=Limits)

    def run(self) -> bool:
        """Runs to the last step. Returns False where it was asked to stop before; all is saved by then."""
        while self.progress.step < self.steps and not self.enough:
            self._wait_while_paused()
            if self.control.stop:  # asked at any moment, while the border evaluated too
                self.control.save = True
                self.at_border(self.progress, False)
                return False
            self._step()
            self.limits.when = f"after step {self.progress.step}: "
            self.at_border(self.progress, self.progress.step == self.steps)
        return True

    def _wait_while_paused(self) -> None:
        while self.control.pause and not self.control.stop:
            if self.control.save or self.control.evaluate:
                self.at_border(self.progress, False)
            time.sleep(0.1)

    def _step(self) -> None:
        begun, step = time.perf_counter(), self.progress.step
        torch.manual_seed(step_seed(self.seed, step))
        self.limits.when = f"step {step + 1}: "
        logged = (step + 1) % self.train.log_every == 0 or step in (0, self.steps - 1)
        rate = self.train.learning_rate * rate_at(step, self.steps, self.train.warmup_steps, self.train.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("share", 1.0)
        experience = self.algorithm.collect(step)
        if not self.checked:
            self._check(experience.batch, step)
        stats: Stats = dict(experience.stats)
        if logged:
            self._observe(experience.batch, stats)
        tokens = 0
        for part in experience.parts():
            part_stats, loss, norm = self._accumulate(part)
            tokens += int(part.attended.sum())
            if not (math.isfinite(norm) and math.isfinite(loss)):
                self._skip(step, norm)
                break
            self.progress.bad_in_a_row = 0
            before = [p.detach().clone() for p in self.parameters] if logged else None
            self.optimizer.step()
            if before is not None:
                stats |= movement(self.parameters, before)
            stats["grad_norm"] = Mean(norm, 1)
            add_stats(stats, part_stats)
            if not self.algorithm.go_on(part_stats):
                break
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.tokens += tokens
        values = to_floats(stats)
        self._watch_learning(values, rate / self.train.learning_rate)
        if "grad_norm" in values:
            self._warn(values)
        seconds = time.perf_counter() - begun
        values |= {"learning_rate": rate, "memory_gib": memory_gib(self.device), "tokens_per_second": tokens / seconds}
        if self.progress.bad_steps:
            values["bad_steps"] = self.progress.bad_steps
        if self.limits.times:
            values["out_of_memory"] = self.limits.times
        self.emit(
            StepDone(
                step=self.progress.step, steps=self.steps, stats=values, seconds=seconds, tokens=tokens, logged=logged
            )
        )

    def _check(self, batch: Batch, step: int) -> None:
        """Once a start. The random state stays as it was: a continued run must draw what the straight one drew."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            for _ in self._in_pieces(next(self._micros(batch)), lambda micro: self.algorithm.check(micro, step)):
                pass
        self.checked = True

    def _observe(self, batch: Batch, stats: Stats) -> None:
        """Adds what the algorithm measures on one micro-batch."""
        for found in self._in_pieces(next(self._micros(batch)), self.algorithm.observe):
            add_stats(stats, found)

    def _micros(self, batch: Batch) -> Iterator[Batch]:
        together, size = self.algorithm.together, self.train.micro_rows
        tokens = self.limits.within("update_tokens", self.train.micro_batch_tokens)
        return batch.split(None if size is None else size * together, tokens, together)

    def _in_pieces(self, micro: Batch, work: Callable[[Batch], T]) -> Iterator[T]:
        """What `work` makes of a micro-batch on the device, or of pieces of it, where memory is too short for all of
        it."""
        together, width = self.algorithm.together, micro.ids.shape[1]

        def on_device(units: Sequence[int]) -> T:
            whole = len(units) * together == len(micro)
            return work((micro if whole else micro.take(_rows(units, together))).to(self.device))

        for _, done in self.limits.pieces(
            "update_tokens", range(len(micro) // together), together * width, on_device, together
        ):
            yield done

    def _accumulate(self, part: Batch) -> tuple[Stats, float, float]:
        """Adds up the gradients of all micro-batches and clips them; returns the statistics, the loss, and the norm
        before clipping."""
        part.weight = self.algorithm.weigh(part)
        stats: Stats = {}
        loss = torch.zeros((), device=self.device)
        for micro in self._micros(part):
            for more, counted in self._in_pieces(micro, self._backward):
                loss += more
                add_stats(stats, counted)
        total, size = torch.stack([loss, self._clip().to(self.device)]).tolist()
        return stats, total, size

    def _backward(self, micro: Batch) -> tuple[Tensor, Stats]:
        """Adds the gradients of a micro-batch, all or none of them; returns its loss and its statistics."""
        loss, stats = torch.zeros((), device=self.device), Stats()
        with added_whole(self.parameters):
            for term in self.algorithm.terms(micro):
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

    def _skip(self, step: int, norm: float) -> None:
        self.progress.bad_steps += 1
        self.progress.bad_in_a_row += 1
        self.emit(
            Note(
                level="warning",
                message=f"step {step + 1}: loss or gradient is not finite (norm {norm}); the step changes nothing",
            )
        )
        if self.progress.bad_in_a_row >= self.train.max_bad_steps:
            raise RunFailed(
                f"{self.progress.bad_in_a_row} steps in a row had no finite loss or gradient, the last at step "
                f"{step + 1}; "
                "lower train.learning_rate, and look at the rows of these steps"
            )

    def _watch_learning(self, values: Mapping[str, float], rate_share: float) -> None:
        """Says so when a run learns nothing: the optimizer steps, and the adapter stays where it was."""
        if "moved_share" not in values or rate_share < SMALL_RATE:
            return
        moved, size = values["moved_share"], values["update_ratio"]
        still = moved < FEW_MOVED or size < TINY_UPDATE
        self.progress.still_looks = self.progress.still_looks + 1 if still else 0
        if self.progress.still_looks == LOOKS_BEFORE_WARNING:
            message = (
                f"the last step moved {moved:.1%} of the adapter's elements, by {size:.0e} of their size: "
                f"nothing is being learned"
            )
            self.emit(Note(level="warning", message=f"{message}; look at train.learning_rate and at the loss mask"))

    def _warn(self, values: Mapping[str, float]) -> None:
        """What the algorithm finds worrying, each kind (its first words) once a start."""
        for message in self.algorithm.warnings(values):
            kind = message.partition(",")[0]
            if kind not in self.told:
                self.told.add(kind)
                self.emit(Note(level="warning", message=f"step {self.progress.step}: {message}"))


def _rows(units: Sequence[int], together: int) -> Tensor:
    return torch.tensor([unit * together + i for unit in units for i in range(together)])


def rate_at(step: int, steps: int, warmup: int, schedule: str) -> float:
    """Share of the peak learning rate at a step, 0-based: a linear warm-up, then cosine or linear to 0 after the last
    step, or constant."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1.0 - done


def movement(parameters: list[nn.Parameter], before: list[Tensor]) -> Stats:
    """Share of elements that the last step moved, and the size of the update against that of the weights. An adapter's
    B starts at 0, so the second is large at first."""
    moved = torch.stack([(p.detach() != b).sum() for p, b in zip(parameters, before, strict=True)]).sum()
    update = (
        torch.stack([(p.detach() - b).square().sum() for p, b in zip(parameters, before, strict=True)]).sum().sqrt()
    )
    weight = torch.stack([b.square().sum() for b in before]).sum().sqrt()
    return {"moved_share": Mean(moved, sum(p.numel() for p in parameters)), "update_ratio": Mean(update, weight)}


def memory_gib(device: torch.device) -> float:
    """Peak memory so far: of the card, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not on Windows, where nothing else of the kit is promised either

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
