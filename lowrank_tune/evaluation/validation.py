"""Measurements on held-out rows: what an algorithm is judged by, and how far its scores of preference pairs can be
believed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from lowrank_tune.algorithms.base import Algorithm
from lowrank_tune.batch import Batch
from lowrank_tune.data import TokenizedDataset
from lowrank_tune.data.collate import chunked
from lowrank_tune.events import Emit, Progress
from lowrank_tune.functional import calibration_error, correlation, pair_accuracy, reliability_bins
from lowrank_tune.model.roles import Roles
from lowrank_tune.stats import Stats, add_stats, to_floats

T = TypeVar("T")
NUM_PROGRESS_UPDATES = 20  # times that a long job tells how far it is
MAX_SAVED_SCORES = 2000  # pairs whose scores are kept for the report
CollateFn = Callable[[Sequence[int]], Batch]


class PairAlgorithm(Protocol):
    """An algorithm that has an opinion on whole rows: a learned score, or DPO's implicit reward."""

    def scores(self, micro: Batch) -> Tensor: ...


@dataclass(frozen=True)
class PairScores:
    """Scores (P,) and tokens (P,) of the chosen and the rejected answers of P pairs."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    def metrics(self) -> dict[str, float]:
        """How far the scores can be believed, and whether they follow the length of an answer."""
        difference = self.chosen - self.rejected
        longer = (self.chosen_tokens - self.rejected_tokens).sign()
        unequal = longer != 0
        scores = torch.cat([self.chosen, self.rejected])
        tokens = torch.cat([self.chosen_tokens, self.rejected_tokens])
        return {
            "accuracy": pair_accuracy(difference).value,
            "margin": float(difference.double().mean()),
            "calibration_error": calibration_error(reliability_bins(difference)),
            "length_correlation": correlation(scores, tokens),
            "prefers_longer": float(((difference * longer)[unequal] > 0).double().mean())
            if bool(unequal.any())
            else math.nan,
        }

    def to_dict(self) -> dict[str, Any]:
        """As JSON, for the report: figures, the reliability diagram, and the scores of the first pairs."""
        sides = {
            "chosen": self.chosen,
            "rejected": self.rejected,
            "chosen_tokens": self.chosen_tokens,
            "rejected_tokens": self.rejected_tokens,
        }
        bin_stats = reliability_bins(self.chosen - self.rejected)
        bins = [{"confidence": confidence, "accuracy": right, "pairs": count} for confidence, right, count in bin_stats]
        return {
            "version": 1,
            "pairs": len(self.chosen),
            "metrics": self.metrics(),
            "reliability": bins,
            **{name: [round(value, 5) for value in side[:MAX_SAVED_SCORES].tolist()] for name, side in sides.items()},
        }


def validate(
    algorithm: Algorithm[Any],
    roles: Roles,
    rows: TokenizedDataset,
    collate_fn: CollateFn,
    micro_tokens: int,
    emit: Emit,
) -> dict[str, float]:
    """What the algorithm measures on held-out rows, means over all of them; dropout off."""
    stats: Stats = {}
    for measured, _ in validation_batches(
        roles,
        rows,
        collate_fn,
        algorithm.eval_metrics,
        micro_tokens,
        "validating",
        emit,
    ):
        add_stats(stats, measured)
    return to_floats(stats)


def score_pairs(
    algorithm: PairAlgorithm,
    roles: Roles,
    rows: TokenizedDataset,
    collate_fn: CollateFn,
    micro_tokens: int,
    emit: Emit,
) -> PairScores:
    """What the algorithm thinks of both sides of every pair, and how long they are."""
    scores = torch.empty(len(rows))
    lengths = torch.empty(len(rows), dtype=torch.long)

    def score_batch(batch: Batch) -> tuple[Tensor, Tensor]:
        return algorithm.scores(batch).float().cpu(), batch.loss_mask.sum(dim=1).cpu()

    for values, indices in validation_batches(
        roles,
        rows,
        collate_fn,
        score_batch,
        micro_tokens,
        "scoring held-out pairs",
        emit,
    ):
        scores[indices], lengths[indices] = values
    return PairScores(scores[::2], scores[1::2], lengths[::2], lengths[1::2])


def validation_batches(
    roles: Roles,
    rows: TokenizedDataset,
    collate_fn: CollateFn,
    compute: Callable[[Batch], T],
    micro_tokens: int,
    description: str,
    emit: Emit,
) -> Iterator[tuple[T, Tensor]]:
    """What `compute` makes, without gradient or dropout, of all units of a store in batches of similar length, longest
    first, on the device of the base; and of which rows of the store."""

    def compute_batch(units: Sequence[int]) -> T:
        with roles.inference_mode():
            return compute(collate_fn(units).to(roles.base.device))

    done = 0
    for part, values in chunked(roles.limits, rows, micro_tokens, compute_batch):
        yield values, torch.tensor([unit * rows.rows_per_unit + i for unit in part for i in range(rows.rows_per_unit)])
        before = done
        done = done + len(part)
        if done * NUM_PROGRESS_UPDATES // rows.units != before * NUM_PROGRESS_UPDATES // rows.units:
            emit(Progress(description=description, done=done, total=rows.units))
