"""Reward model: a scalar score R(x, y) learned from comparisons (Bradley and Terry 1952; arXiv:2203.02155, equation 1).

    L = 1/P sum over pairs [ -log sigmoid(R(x, y+) - R(x, y-) - margin) + c (R(x, y+) + R(x, y-))^2 ]

R is an fp32 head on the hidden state of the last attended token of a row, independent of the ids of pad and end tokens.
The margin is a column of the data, 0 by default. c is `center_rewards_coefficient` (arXiv:2312.09244): it keeps the
scores around 0, which the difference alone does not determine. The rows are chosen, rejected, chosen, rejected, ...,
and a pair stays in one micro-batch. P counts the pairs of the whole optimizer step, so the split into micro-batches
does not change the gradient.

Metrics: `loss` is L; `accuracy` is the share of pairs whose chosen answer has the higher score, a tie counts half;
`margin` is the mean of R+ - R-; `score_chosen` and `score_rejected` are the mean scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from lowrank_tune.algorithms.base import Algorithm, AlgorithmContext, LossTerm
from lowrank_tune.batch import PairBatch, required
from lowrank_tune.functional import mean, pair_accuracy, pair_mean_weights
from lowrank_tune.stats import Stats

if TYPE_CHECKING:  # an algorithm must run where pydantic is not installed (benchmarks/gpu.py)
    from lowrank_tune.config import RewardModelConfig


def reward_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor,
    center_rewards_coefficient: float = 0.0,
) -> Tensor:
    """Returns the loss of each pair, (P,), from the scores of both sides and the margins, (P,) each."""
    losses = -F.logsigmoid(chosen - rejected - margin)
    if center_rewards_coefficient:
        return losses + center_rewards_coefficient * (chosen + rejected).square()
    return losses


class RewardModeling(Algorithm[PairBatch]):
    """Training of a reward model."""

    rows_per_unit = 2

    def __init__(self, context: AlgorithmContext, settings: RewardModelConfig) -> None:
        super().__init__(context)
        self.settings = settings

    def token_weights(self, batch: PairBatch) -> Tensor:
        return pair_mean_weights(batch.input_ids)

    def scores(self, micro: PairBatch) -> Tensor:
        """Returns the score of each row, (B,)."""
        return self.context.roles.sequence_scores("reward", micro)

    def compute_losses(self, micro: PairBatch) -> Iterator[LossTerm]:
        losses, stats = self._pair_losses(micro)
        weights = required(micro.token_weights)[::2]
        yield LossTerm((losses * weights).sum(), stats)

    def eval_metrics(self, micro: PairBatch) -> Stats:
        stats, _ = self.evaluate_batch(micro)
        return stats

    def evaluate_batch(self, micro: PairBatch) -> tuple[Stats, Tensor]:
        losses, stats = self._pair_losses(micro)
        return stats, losses.detach()

    def _pair_losses(self, micro: PairBatch) -> tuple[Tensor, Stats]:
        """Returns the losses (P,) and the metrics."""
        scores = self.scores(micro)
        chosen = scores[::2]
        rejected = scores[1::2]
        margin = required(micro.margin)[::2]
        losses = reward_loss(
            chosen,
            rejected,
            margin,
            self.settings.center_rewards_coefficient,
        )
        stats = {
            "loss": mean(losses),
            "accuracy": pair_accuracy(chosen - rejected),
            "margin": mean(chosen - rejected),
            "score_chosen": mean(chosen),
            "score_rejected": mean(rejected),
        }
        return losses, stats
