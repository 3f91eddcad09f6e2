"""SFT: supervised fine-tuning, the negative log-likelihood of the assistant's tokens.

    L = -(1 / sum m) sum_t m_t log p(x_t | x_<t)

m_t is 1 for the assistant's tokens, including those that end its turn. The sums run over *all* rows of the optimizer
step: a long answer has more weight than a short one, and the split into micro-batches does not change the gradient. B
rows, T tokens; entry t of every (B, T) tensor is about token t.

Metrics: `loss` is L in nats per token; `mean_token_accuracy` is the share of assistant tokens that the model predicts
as most likely; `entropy` is the entropy of the prediction, in nats; `kl` is KL(policy || reference) per token over the
whole vocabulary, on one micro-batch of a logging step; `perplexity` is exp(L) of held-out rows.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from lowrank_tune.algorithms.base import Algorithm, LossTerm
from lowrank_tune.algorithms.reference_check import check_reference, full_vocab_kl_metric
from lowrank_tune.batch import Batch, required
from lowrank_tune.functional import apply_mask, masked_mean, perplexity, token_mean_weights
from lowrank_tune.stats import Stats


def sft_loss(
    logps: Tensor,
    loss_mask: Tensor,
    token_weights: Tensor,
) -> Tensor:
    """Returns the weighted sum of -log p over the mask; all arguments are (B, T)."""
    return -(apply_mask(logps, loss_mask) * apply_mask(token_weights, loss_mask)).sum()


class SFT(Algorithm[Batch]):
    """Supervised fine-tuning."""

    def token_weights(self, batch: Batch) -> Tensor:
        return token_mean_weights(batch.loss_mask)

    def compute_losses(self, micro: Batch) -> Iterator[LossTerm]:
        loss_mask = micro.loss_mask
        logps, entropy, is_likeliest = self.context.roles.token_logps_and_entropy("policy", micro)
        loss = sft_loss(logps, loss_mask, required(micro.token_weights))
        stats = {
            "loss": masked_mean(-logps, loss_mask),
            "mean_token_accuracy": masked_mean(is_likeliest.float(), loss_mask),
            "entropy": masked_mean(entropy, loss_mask),
        }
        yield LossTerm(loss, stats)

    def eval_metrics(self, micro: Batch) -> Stats:
        logps, _, is_likeliest = self.context.roles.token_logps_and_entropy("policy", micro)
        return {
            "loss": masked_mean(-logps, micro.loss_mask),
            "mean_token_accuracy": masked_mean(is_likeliest.float(), micro.loss_mask),
        }

    def validation_metrics(self, means: dict[str, float]) -> dict[str, float]:
        return {**means, "perplexity": perplexity(means["loss"])}

    def step_metrics(self, micro: Batch) -> Stats:
        return full_vocab_kl_metric(self.context, micro)

    def check(self, micro: Batch, step: int) -> None:
        check_reference(self.context, micro, step)
