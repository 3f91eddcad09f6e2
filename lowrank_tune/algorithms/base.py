"""The base of all algorithms: what a step needs of one, and what it may use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from lowrank_tune.batch import Batch
from lowrank_tune.model.roles import Roles
from lowrank_tune.stats import Stats


@dataclass(frozen=True)
class LossTerm:
    """One loss, already weighted (a sum over the micro-batch), with its statistics. Its graph dies before the next term
    is made."""

    loss: Tensor
    stats: Stats


@dataclass
class StepBatch:
    """The result of `collect` for one step: a batch, and metrics of the collecting. `minibatches` are PPO's epochs and
    minibatches."""

    batch: Batch
    stats: Stats = field(default_factory=dict)

    def minibatches(self) -> Iterator[Batch]:
        yield self.batch


class Algorithm(Protocol):
    """An algorithm: three methods of a step, and a little state.

    `collect` returns the rows of a step; `token_weights` turns their mask into token weights, once; `compute_losses`
    yields losses, one graph alive at a time. `step_metrics` computes, without gradient, metrics that cost too much for
    every step; `eval_metrics` those of held-out rows (`loss` among them: the best step has the lowest);
    `should_continue` False ends the inner epochs early.

    `check` gets the first micro-batch of each start before any update, `step` steps after the run's start; it raises
    TrainingError where the reference is not what it must be. `iter_warnings` yields warnings about the metrics of a
    step.
    """

    rows_per_unit: int
    """Adjacent rows that stay in one micro-batch."""

    def collect(self, step: int) -> StepBatch: ...
    def token_weights(self, batch: Batch) -> Tensor: ...
    def compute_losses(self, micro: Batch) -> Iterator[LossTerm]: ...
    def step_metrics(self, micro: Batch) -> Stats: ...
    def eval_metrics(self, micro: Batch) -> Stats: ...
    def check(self, micro: Batch, step: int) -> None: ...
    def iter_warnings(self, metrics: Mapping[str, float]) -> Iterator[str]: ...
    def should_continue(self, stats: Stats) -> bool: ...
    def state(self) -> dict[str, float]: ...
    def restore(self, state: Mapping[str, float]) -> None: ...


@dataclass(frozen=True)
class AlgorithmContext:
    """The roles, and `get_batch(step)`: the training rows of an optimizer step, padded, on the CPU.

    `reference_description` says in words what the policy is compared with. `fresh`: the trained adapter began at zero,
    so that before the first step the policy *is* its reference; one that was continued from an earlier run is not.
    """

    roles: Roles
    get_batch: Callable[[int], Batch]
    reference_description: str = "the base, adapters off"
    fresh: bool = True
