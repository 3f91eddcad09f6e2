"""The base class of all algorithms, with the values that they receive and return."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic

from torch import Tensor

from lowrank_tune.batch import BatchT
from lowrank_tune.model.roles import Roles
from lowrank_tune.stats import Stats

if TYPE_CHECKING:  # an algorithm must run where pydantic is not installed (benchmarks/gpu.py)
    from lowrank_tune.data import TokenizedDataset


@dataclass(frozen=True)
class AlgorithmContext:
    """The part of a run that an algorithm uses."""

    roles: Roles
    get_batch: Callable[[int], Any] | None = None
    """Returns the training rows of an optimizer step, padded, on the CPU. None for an algorithm that draws its own
    rows."""
    reference_description: str = "the base, adapters off"
    """Which adapters the reference has, for messages."""
    fresh: bool = True
    """True if the trained adapter began at zero, so that the policy equals the reference before the first step. False
    for an adapter that continues an earlier run."""
    label_counts: tuple[float, float] = (0, 0)
    """Desirable and undesirable training rows, of KTO."""


@dataclass(frozen=True)
class LossTerm:
    """One weighted loss, a sum over a micro-batch, with its statistics. The trainer runs its backward pass, which frees
    its graph, before it takes the next term."""

    loss: Tensor
    stats: Stats


@dataclass
class StepBatch(Generic[BatchT]):
    """The rows of one step, with metrics of their collection."""

    batch: BatchT
    stats: Stats = field(default_factory=dict)

    def minibatches(self) -> Iterator[BatchT]:
        """Yields the rows of each optimizer step; several in PPO and GRPO."""
        yield self.batch


class Algorithm(Generic[BatchT]):
    """Base class of all algorithms: what the trainer calls. `token_weights` and `compute_losses` must be implemented;
    the other methods are hooks with a default."""

    rows_per_unit = 1
    """Number of adjacent rows that stay in one micro-batch; 2 for pairs."""

    def __init__(self, context: AlgorithmContext) -> None:
        self.context = context

    def collect(self, step: int) -> StepBatch[BatchT]:
        """Returns the rows of a step; by default the next rows of the training data."""
        assert self.context.get_batch is not None, "an algorithm without training rows implements collect"
        return StepBatch(self.context.get_batch(step))

    def token_weights(self, batch: BatchT) -> Tensor:
        """Returns the weight of each token or row in the loss, (B, T) or (B,), for all rows of an optimizer step."""
        raise NotImplementedError

    def compute_losses(self, micro: BatchT) -> Iterator[LossTerm]:
        """Yields the losses of a micro-batch, one graph at a time."""
        raise NotImplementedError

    def should_continue(self, stats: Stats) -> bool:
        """Returns False to skip the remaining minibatches of the step. `stats` are those of the last minibatch."""
        return True

    def step_metrics(self, micro: BatchT) -> Stats:
        """Returns metrics that are too expensive for every step, without gradient."""
        return {}

    def eval_metrics(self, micro: BatchT) -> Stats:
        """Returns metrics of held-out rows. The best checkpoint has the lowest `loss`."""
        raise NotImplementedError

    def validation_metrics(self, means: dict[str, float]) -> dict[str, float]:
        """Returns the metrics of all held-out rows, from the means of those of `eval_metrics`."""
        return means

    def evaluate_batch(self, micro: BatchT) -> tuple[Stats, Tensor | None]:
        """Returns what `eval_metrics` does, and the losses (P,) of the pairs, or of the answers with a label; None for
        other rows."""
        return self.eval_metrics(micro), None

    def start_validation(self, rows: TokenizedDataset) -> None:
        """Prepares `evaluate_batch` of these validation rows. Called before the first batch of each validation."""

    def derived_metrics(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Returns further metrics of a step or a validation, which follow from its means."""
        return {}

    def check(
        self,
        micro: BatchT,
        step: int,
    ) -> None:
        """Checks the first micro-batch of a run, new or resumed, before any update. Raises TrainingError if the
        reference is wrong."""

    def check_metrics(self, metrics: Mapping[str, float]) -> None:
        """Checks the metrics of a step. Raises TrainingError if the run must stop."""

    def diagnostics(self, metrics: Mapping[str, float]) -> Iterator[str]:
        """Yields warnings about the metrics of a step. Never raises."""
        return iter(())

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint must contain to resume the algorithm, as JSON."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores what `state` returned."""
        assert not state, f"{type(self).__name__} has no state to restore"
