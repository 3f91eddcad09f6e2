"""SFT: supervised fine-tuning, the negative log-likelihood of what the assistant says.

    L = -(1 / sum m) sum_t m_t log p(x_t | x_<t)

m_t is 1 on the assistant's tokens, the ones that end its turn included, and the sums run over *all* rows of the
optimizer step: a long answer weighs more than a short one, and no split into micro-batches changes that. B rows, T
tokens; every (B, T) tensor is about the token at its own position.

Metrics: `loss` is L in nats a token; `accuracy` the share of assistant tokens that were the likeliest; `entropy` that
of the prediction, in nats; `kl` is KL(policy || reference) a token over the whole vocabulary, on one micro-batch of a
logging step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from lowrank_tune.algorithms.kit import Kit
from lowrank_tune.algorithms.step_zero import check_reference
from lowrank_tune.maths import mean_over, token_mean_weights, where_says
from lowrank_tune.types import Batch, Experience, Stats, Term


def sft_loss(logps: Tensor, scored: Tensor, weight: Tensor) -> Tensor:
    """logps, scored, weight (B, T) -> the weighted sum of -log p; whatever stands outside the mask is not read."""
    return -(where_says(logps, scored) * where_says(weight, scored)).sum()


class SFT:
    """The three verbs."""

    together = 1

    def __init__(self, kit: Kit) -> None:
        self.kit = kit

    def collect(self, step: int) -> Experience:
        return Experience(self.kit.rows(step))

    def weigh(self, batch: Batch) -> Tensor:
        return token_mean_weights(batch.scored)

    def terms(self, micro: Batch) -> Iterator[Term]:
        assert micro.weight is not None, "weigh comes before terms"
        scored = micro.scored
        logps, entropy, likeliest = self.kit.roles.scored("policy", micro)
        loss = sft_loss(logps, scored, micro.weight)
        stats = {
            "loss": mean_over(-logps, scored),
            "accuracy": mean_over(likeliest.float(), scored),
            "entropy": mean_over(entropy, scored),
        }
        yield Term(loss, stats)

    def measure(self, micro: Batch) -> Stats:
        logps, _, likeliest = self.kit.roles.scored("policy", micro)
        return {"loss": mean_over(-logps, micro.scored), "accuracy": mean_over(likeliest.float(), micro.scored)}

    def check(self, micro: Batch, step: int) -> None:
        if self.kit.fresh and step == 0:  # else the KL that is shown would be that to something else
            check_reference(self.kit.roles, micro, same=True, words=self.kit.reference)

    def warnings(self, figures: Mapping[str, float]) -> Iterator[str]:
        return iter(())

    def observe(self, micro: Batch) -> Stats:
        return {"kl": mean_over(self.kit.roles.exact_kl("policy", "reference", micro), micro.scored)}

    def go_on(self, stats: Stats) -> bool:
        return True

    def state(self) -> dict[str, float]:
        return {}

    def restore(self, state: Mapping[str, float]) -> None:
        assert not state, "sft keeps no state"
