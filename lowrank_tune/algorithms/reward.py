"""Reward model: a scalar score R(x, y) learned from comparisons (Bradley and Terry 1952; arXiv:2203.02155, equation 1).

    L = 1/P sum over pairs [ -log sigmoid(R(x, y+) - R(x, y-) - margin) + c (R(x, y+) + R(x, y-))^2 ]

R is an fp32 head on the hidden state of a row's last attended token, whatever pad and end tokens are. The margin comes
with a row and is 0 where it has none; c is `centering` (arXiv:2312.09244), which pins the level that a difference
leaves free. Rows come as chosen, rejected, chosen, rejected, and a pair stays in one micro-batch; P counts the pairs of
the whole optimizer step, so no split changes the gradient.

Metrics: `loss` is L; `accuracy` the share of pairs whose chosen answer scores higher, a tie counting half; `margin` R+
- R-; `score_chosen` and `score_rejected` the mean scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch.nn.functional as F
from torch import Tensor

from lowrank_tune.algorithms.kit import Kit
from lowrank_tune.maths import mean_of, pair_weights, share_right
from lowrank_tune.types import Batch, Experience, Stats, Term


def reward_loss(chosen: Tensor, rejected: Tensor, margin: Tensor, centering: float = 0.0) -> Tensor:
    """Scores and margins (P,) -> losses (P,)."""
    losses = -F.logsigmoid(chosen - rejected - margin)
    return losses + centering * (chosen + rejected).square() if centering else losses


class Reward:
    """The three verbs."""

    together = 2

    def __init__(self, kit: Kit, centering: float = 0.0) -> None:
        self.kit, self.centering = kit, centering

    def collect(self, step: int) -> Experience:
        return Experience(self.kit.rows(step))

    def weigh(self, batch: Batch) -> Tensor:
        return pair_weights(batch.ids)

    def scores(self, micro: Batch) -> Tensor:
        """(B,) what each row is worth."""
        return self.kit.roles.last_scores("reward", micro)

    def terms(self, micro: Batch) -> Iterator[Term]:
        assert micro.weight is not None, "weigh comes before terms"
        losses, stats = self._losses(micro)
        yield Term((losses * micro.weight[::2]).sum(), stats)

    def measure(self, micro: Batch) -> Stats:
        return self._losses(micro)[1]

    def _losses(self, micro: Batch) -> tuple[Tensor, Stats]:
        scores = self.scores(micro)
        chosen, rejected = scores[::2], scores[1::2]
        losses = reward_loss(chosen, rejected, micro.extra["margin"][::2], self.centering)
        return losses, {
            "loss": mean_of(losses),
            "accuracy": share_right(chosen - rejected),
            "margin": mean_of(chosen - rejected),
            "score_chosen": mean_of(chosen),
            "score_rejected": mean_of(rejected),
        }

    def observe(self, micro: Batch) -> Stats:
        return {}

    def check(self, micro: Batch, step: int) -> None: ...

    def warnings(self, figures: Mapping[str, float]) -> Iterator[str]:
        return iter(())

    def go_on(self, stats: Stats) -> bool:
        return True

    def state(self) -> dict[str, float]:
        return {}

    def restore(self, state: Mapping[str, float]) -> None:
        assert not state, "a reward model keeps no state"
