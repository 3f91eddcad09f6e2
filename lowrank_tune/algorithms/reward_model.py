"""Reward model: a scalar score R(x, y) learned from comparisons (Bradley and Terry 1952; arXiv:2203.02155, equation 1).

    L = 1/P sum over pairs [ -log sigmoid(R(x, y+) - R(x, y-) - margin) + c (R(x, y+) + R(x, y-))^2 ]

R is an fp32 head on the hidden state of a row's last attended token, whatever pad and end tokens are. The margin comes
with a row and is 0 where it has none; c is `center_rewards_coefficient` (arXiv:2312.09244), which pins the level that a
difference leaves free. Rows come as chosen, rejected, chosen, rejected, and a pair stays in one micro-batch; P counts
the pairs of the whole optimizer step, so no split changes the gradient.

Metrics: `loss` is L; `accuracy` the share of pairs whose chosen answer scores higher, a tie counting half; `margin` R+
- R-; `score_chosen` and `score_rejected` the mean scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch.nn.functional as F
from torch import Tensor

from lowrank_tune.algorithms.base import AlgorithmContext, LossTerm, StepBatch
from lowrank_tune.batch import Batch
from lowrank_tune.functional import mean, pair_accuracy, sequence_mean_weights
from lowrank_tune.stats import Stats


def reward_loss(chosen: Tensor, rejected: Tensor, margin: Tensor, center_rewards_coefficient: float = 0.0) -> Tensor:
    """Scores and margins (P,) -> losses (P,)."""
    losses = -F.logsigmoid(chosen - rejected - margin)
    if center_rewards_coefficient:
        return losses + center_rewards_coefficient * (chosen + rejected).square()
    return losses


class RewardModeling:
    """The three verbs."""

    rows_per_unit = 2

    def __init__(self, context: AlgorithmContext, center_rewards_coefficient: float = 0.0) -> None:
        self.context = context
        self.center_rewards_coefficient = center_rewards_coefficient

    def collect(self, step: int) -> StepBatch:
        return StepBatch(self.context.get_batch(step))

    def token_weights(self, batch: Batch) -> Tensor:
        return sequence_mean_weights(batch.input_ids)

    def scores(self, micro: Batch) -> Tensor:
        """(B,) what each row is worth."""
        return self.context.roles.sequence_scores("reward", micro)

    def compute_losses(self, micro: Batch) -> Iterator[LossTerm]:
        assert micro.token_weights is not None, "weigh comes before terms"
        losses, stats = self._losses(micro)
        yield LossTerm((losses * micro.token_weights[::2]).sum(), stats)

    def eval_metrics(self, micro: Batch) -> Stats:
        return self._losses(micro)[1]

    def _losses(self, micro: Batch) -> tuple[Tensor, Stats]:
        scores = self.scores(micro)
        chosen = scores[::2]
        rejected = scores[1::2]
        losses = reward_loss(chosen, rejected, micro.extra["margin"][::2], self.center_rewards_coefficient)
        return losses, {
            "loss": mean(losses),
            "accuracy": pair_accuracy(chosen - rejected),
            "margin": mean(chosen - rejected),
            "score_chosen": mean(chosen),
            "score_rejected": mean(rejected),
        }

    def step_metrics(self, micro: Batch) -> Stats:
        return {}

    def check(self, micro: Batch, step: int) -> None: ...

    def iter_warnings(self, metrics: Mapping[str, float]) -> Iterator[str]:
        return iter(())

    def should_continue(self, stats: Stats) -> bool:
        return True

    def state(self) -> dict[str, float]:
        return {}

    def restore(self, state: Mapping[str, float]) -> None:
        assert not state, "a reward model keeps no state"
