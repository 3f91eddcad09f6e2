"""SFT: supervised fine-tuning, the negative log-likelihood of what the assistant says.

    L = -(1 / sum m) sum_t m_t log p(x_t | x_<t)

m_t is 1 on the assistant's tokens, the ones that end its turn included, and the sums run over *all* rows of the
optimizer step: a long answer weighs more than a short one, and no split into micro-batches changes that. B rows, T
tokens; every (B, T) tensor is about the token at its own position.

Metrics: `loss` is L in nats a token; `mean_token_accuracy` the share of assistant tokens that were the likeliest;
`entropy` that of the prediction, in nats; `kl` is KL(policy || reference) a token over the whole vocabulary, on one
micro-batch of a logging step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from lowrank_tune.algorithms.base import AlgorithmContext, LossTerm, StepBatch
from lowrank_tune.algorithms.reference_check import check_reference
from lowrank_tune.batch import Batch
from lowrank_tune.functional import apply_mask, masked_mean, token_mean_weights
from lowrank_tune.stats import Stats


def sft_loss(logps: Tensor, loss_mask: Tensor, token_weights: Tensor) -> Tensor:
    """logps, scored, weight (B, T) -> the weighted sum of -log p; whatever stands outside the mask is not read."""
    return -(apply_mask(logps, loss_mask) * apply_mask(token_weights, loss_mask)).sum()


class SFT:
    """The three verbs."""

    rows_per_unit = 1

    def __init__(self, context: AlgorithmContext) -> None:
        self.context = context

    def collect(self, step: int) -> StepBatch:
        return StepBatch(self.context.get_batch(step))

    def token_weights(self, batch: Batch) -> Tensor:
        return token_mean_weights(batch.loss_mask)

    def compute_losses(self, micro: Batch) -> Iterator[LossTerm]:
        assert micro.token_weights is not None, "weigh comes before terms"
        loss_mask = micro.loss_mask
        logps, entropy, likeliest = self.context.roles.token_logps_and_entropy("policy", micro)
        loss = sft_loss(logps, loss_mask, micro.token_weights)
        stats = {
            "loss": masked_mean(-logps, loss_mask),
            "mean_token_accuracy": masked_mean(likeliest.float(), loss_mask),
            "entropy": masked_mean(entropy, loss_mask),
        }
        yield LossTerm(loss, stats)

    def eval_metrics(self, micro: Batch) -> Stats:
        logps, _, likeliest = self.context.roles.token_logps_and_entropy("policy", micro)
        return {
            "loss": masked_mean(-logps, micro.loss_mask),
            "mean_token_accuracy": masked_mean(likeliest.float(), micro.loss_mask),
        }

    def check(self, micro: Batch, step: int) -> None:
        if self.context.fresh and step == 0:  # else the KL that is shown would be that to something else
            check_reference(
                self.context.roles,
                micro,
                expect_equal=True,
                description=self.context.reference_description,
            )

    def iter_warnings(self, metrics: Mapping[str, float]) -> Iterator[str]:
        return iter(())

    def step_metrics(self, micro: Batch) -> Stats:
        return {"kl": masked_mean(self.context.roles.full_vocab_kl("policy", "reference", micro), micro.loss_mask)}

    def should_continue(self, stats: Stats) -> bool:
        return True

    def state(self) -> dict[str, float]:
        return {}

    def restore(self, state: Mapping[str, float]) -> None:
        assert not state, "sft keeps no state"
