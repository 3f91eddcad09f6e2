"""Metrics on held-out rows, and how reliable the scores of preference pairs are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import (
    Any,
    Protocol,
    Self,
    TypeVar,
)

import torch
from torch import Tensor

from lowrank_tune.algorithms.base import Algorithm
from lowrank_tune.batch import Batch, rows_of_units
from lowrank_tune.data import TokenizedDataset
from lowrank_tune.data.token_store import IntArray
from lowrank_tune.evaluation.pair_losses import ValidationResult
from lowrank_tune.events import Emit, ProgressBar
from lowrank_tune.functional import (
    calibration_error,
    correlation,
    pair_accuracy,
    reliability_bins,
)
from lowrank_tune.model.roles import Roles
from lowrank_tune.stats import Stats, add_stats, to_floats

T = TypeVar("T")
MAX_SAVED_SCORES = 2000
"""Pairs whose scores are stored for the report."""
CollateFn = Callable[[IntArray], Batch]
"""Returns the batch of these rows of a store; of pairs both rows."""


class PairAlgorithm(Protocol):
    """An algorithm that scores rows: with a learned score, or DPO's implicit reward."""

    def scores(self, micro: Batch) -> Tensor: ...


@dataclass(frozen=True)
class PairScores:
    """Scores (P,) and tokens (P,) of the chosen and the rejected answers of P pairs."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @classmethod
    def of_rows(
        cls,
        scores: Tensor,
        tokens: Tensor,
    ) -> Self:
        """Returns the pairs of 2P rows in which chosen and rejected answers alternate."""
        return cls(
            scores[::2],
            scores[1::2],
            tokens[::2],
            tokens[1::2],
        )

    def metrics(self) -> dict[str, float]:
        """Returns accuracy and calibration of the scores, and how much they depend on the length of an answer."""
        difference = self.chosen - self.rejected
        scores = torch.cat([self.chosen, self.rejected])
        tokens = torch.cat([self.chosen_tokens, self.rejected_tokens])
        return {
            "accuracy": pair_accuracy(difference).value,
            "margin": float(difference.double().mean()),
            "calibration_error": calibration_error(reliability_bins(difference)),
            "length_correlation": correlation(scores, tokens),
            "prefers_longer": self._prefers_longer(difference),
        }

    def _prefers_longer(self, difference: Tensor) -> float:
        """Returns the fraction of pairs of unequal length whose longer answer has the higher score; nan without such
        pairs."""
        longer = (self.chosen_tokens - self.rejected_tokens).sign()
        unequal = longer != 0
        if not bool(unequal.any()):
            return math.nan
        prefers_longer = (difference * longer)[unequal] > 0
        return float(prefers_longer.double().mean())

    def to_dict(self) -> dict[str, Any]:
        """Returns metrics, reliability diagram and the scores of the first pairs as JSON, for the report."""
        bins = []
        for confidence, accuracy, count in reliability_bins(self.chosen - self.rejected):
            bins.append(
                {
                    "confidence": confidence,
                    "accuracy": accuracy,
                    "pairs": count,
                }
            )
        return {
            "version": 1,
            "pairs": len(self.chosen),
            "metrics": self.metrics(),
            "reliability": bins,
            "chosen": _first_values(self.chosen),
            "rejected": _first_values(self.rejected),
            "chosen_tokens": _first_values(self.chosen_tokens),
            "rejected_tokens": _first_values(self.rejected_tokens),
        }


def _first_values(values: Tensor) -> list[float]:
    return [round(value, 5) for value in values[:MAX_SAVED_SCORES].tolist()]


def validate(
    algorithm: Algorithm[Any],
    roles: Roles,
    rows: TokenizedDataset,
    collate_fn: CollateFn,
    micro_tokens: int,
    emit: Emit,
) -> ValidationResult:
    """Returns the algorithm's metrics on held-out rows, means over all of them, without dropout, and the loss of each
    pair, or answer with a label, in the order of the store."""
    stats: Stats = {}
    losses: dict[int, float] = {}
    algorithm.start_validation(rows)
    batches = validation_batches(
        roles,
        rows,
        collate_fn,
        algorithm.evaluate_batch,
        micro_tokens,
        "validating",
        emit,
    )
    for (batch_stats, pair_losses), indices in batches:
        add_stats(stats, batch_stats)
        if pair_losses is not None:
            pairs = indices[:: rows.rows_per_unit] // rows.rows_per_unit
            losses.update(zip(pairs.tolist(), pair_losses.tolist(), strict=True))
    metrics = algorithm.validation_metrics(to_floats(stats))
    metrics |= algorithm.derived_metrics(metrics)
    return ValidationResult(metrics, [losses[pair] for pair in sorted(losses)])


def score_pairs(
    algorithm: PairAlgorithm,
    roles: Roles,
    rows: TokenizedDataset,
    collate_fn: CollateFn,
    micro_tokens: int,
    emit: Emit,
) -> PairScores:
    """Returns the algorithm's scores and the token counts of both answers of every pair."""
    scores = torch.empty(len(rows))
    tokens = torch.empty(len(rows), dtype=torch.long)

    def score_batch(batch: Batch) -> tuple[Tensor, Tensor]:
        return algorithm.scores(batch).float().cpu(), batch.loss_mask.sum(dim=1).cpu()

    description = "scoring held-out pairs"
    for values, indices in validation_batches(
        roles,
        rows,
        collate_fn,
        score_batch,
        micro_tokens,
        description,
        emit,
    ):
        scores[indices], tokens[indices] = values
    return PairScores.of_rows(scores, tokens)


def validation_batches(
    roles: Roles,
    rows: TokenizedDataset,
    collate_fn: CollateFn,
    compute: Callable[[Batch], T],
    micro_tokens: int,
    description: str,
    emit: Emit,
) -> Iterator[tuple[T, Tensor]]:
    """Yields the result of `compute`, without gradient or dropout, for batches of all rows of a store, and the numbers
    of their rows. Batches have rows (or pairs) of similar length, the longest first, and are on the device of the
    base."""
    rows_at_once = rows.rows_per_unit

    def compute_batch(parts: Sequence[int]) -> T:
        with roles.inference_mode():
            return compute(collate_fn(rows_of_units(parts, rows_at_once).numpy()).to(roles.base.device))

    lengths = rows.lengths.reshape(-1, rows_at_once).max(axis=1) * rows_at_once
    bar = ProgressBar(description, len(lengths), emit)
    batches = roles.limits.forward_batches(
        lengths.tolist(),
        micro_tokens,
        compute_batch,
        rows_at_once,
        rows.families[::rows_at_once].tolist(),
    )
    for parts, values in batches:
        yield values, rows_of_units(parts, rows_at_once)
        bar.advance(len(parts))
