"""DPO: direct preference optimization (arXiv:2305.18290, equation 7) and its relatives, by name.

    a+ = log p(y+ | x) - log ref(y+ | x)      a- = log p(y- | x) - log ref(y- | x)      d = a+ - a-
    L = 1/P sum over pairs loss(d) + s (1/N) sum over the N tokens of all chosen answers of -log p

    sigmoid       -log sigmoid(beta d)
    ipo           (d' - 1 / (2 beta))^2                     arXiv:2310.12036, equation 17; d' from log-probs a token
    hinge         max(0, 1 - beta d)                        SLiC, arXiv:2305.10425
    robust        (-(1 - e) log sigmoid(beta d) + e log sigmoid(-beta d)) / (1 - 2 e)
                                                            arXiv:2403.00409, e the label smoothing
    apo_zero      1 - sigmoid(beta a+) + sigmoid(beta a-)   arXiv:2408.06266
    sigmoid_norm  -log sigmoid(beta d')                     length-normalized: each side divided by its tokens

log p(y | x) sums over the answer's tokens, its end tokens included. The reference is the policy's stack without its
top; its log-probs belong to the data and come with the rows (`extra["reference"]`, (B,)). Rows come as chosen,
rejected, chosen, rejected, and a pair stays in one micro-batch; P and N count the whole optimizer step, so no split
changes the gradient.

Metrics: `loss` is the preference loss without the SFT term; `rewards/chosen` and `rewards/rejected` are beta a+ and
beta a-, `rewards/margins` their difference, `rewards/accuracies` the share of pairs where it is positive (a tie counts
half); `logps_per_token/chosen` and `logps_per_token/rejected` in nats a token; `logps/chosen_delta` is a+ in nats a
token; `kl` is KL(policy || reference) a token over the whole vocabulary, on one micro-batch of a logging step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_tune.algorithms.base import AlgorithmContext, LossTerm, StepBatch
from lowrank_tune.algorithms.reference_check import check_reference
from lowrank_tune.batch import Batch
from lowrank_tune.functional import (
    apply_mask,
    masked_mean,
    mean,
    pair_accuracy,
    sequence_mean_weights,
    token_mean_weights,
)
from lowrank_tune.stats import Stats, WeightedMean

CHOSEN_LOGP_DROP = -0.5
CONSECUTIVE_STEPS = 3
"""Nats a token by which the chosen answers may become less likely than under the reference, for so many steps, before a
person is told."""


def dpo_loss(
    loss_type: str,
    chosen_logratio: Tensor,
    rejected_logratio: Tensor,
    beta: float,
    label_smoothing: float,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
) -> Tensor:
    """Log-ratios a+ and a- (P,), tokens of the answers (P,) -> losses (P,)."""
    difference = chosen_logratio - rejected_logratio
    if loss_type in ("ipo", "sigmoid_norm"):
        difference = chosen_logratio / chosen_tokens.clamp_min(1) - rejected_logratio / rejected_tokens.clamp_min(1)
    match loss_type:
        case "sigmoid" | "sigmoid_norm":
            return -F.logsigmoid(beta * difference)
        case "ipo":
            return (difference - 1 / (2 * beta)).square()
        case "hinge":
            return torch.relu(1 - beta * difference)
        case "robust":
            log_sigmoid = F.logsigmoid(beta * difference)
            log_sigmoid_flipped = F.logsigmoid(-beta * difference)
            return (label_smoothing * log_sigmoid_flipped - (1 - label_smoothing) * log_sigmoid) / (
                1 - 2 * label_smoothing
            )
        case "apo_zero":
            return 1 - torch.sigmoid(beta * chosen_logratio) + torch.sigmoid(beta * rejected_logratio)
    raise AssertionError(f"no DPO loss is called {loss_type}")


class DPO:
    """The three verbs. `sft_coef` is the weight s of the SFT term."""

    rows_per_unit = 2

    def __init__(
        self,
        context: AlgorithmContext,
        loss_type: str = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        sft_coef: float = 0.0,
    ) -> None:
        self.context = context
        self.loss_type = loss_type
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.sft_coef = sft_coef
        self._consecutive_drops = 0  # steps in a row

    def collect(self, step: int) -> StepBatch:
        batch = self.context.get_batch(step)
        if self.sft_coef:
            batch.extra["sft_weight"] = token_mean_weights(_chosen_mask(batch.loss_mask))
        return StepBatch(batch)

    def token_weights(self, batch: Batch) -> Tensor:
        return sequence_mean_weights(batch.input_ids)

    def scores(self, micro: Batch) -> Tensor:
        """(B,) the implicit reward of each row: beta times its log-ratio to the reference."""
        return self.beta * (self.context.roles.logps("policy", micro).logps.sum(dim=1) - micro.extra["reference"])

    def compute_losses(self, micro: Batch) -> Iterator[LossTerm]:
        assert micro.token_weights is not None, "weigh comes before terms"
        losses, logps, stats = self._losses(micro)
        loss = (losses * micro.token_weights[::2]).sum()
        if self.sft_coef:
            loss = loss - self.sft_coef * (apply_mask(logps, micro.loss_mask) * micro.extra["sft_weight"]).sum()
        yield LossTerm(loss, stats)

    def eval_metrics(self, micro: Batch) -> Stats:
        return self._losses(micro)[2]

    def _losses(self, micro: Batch) -> tuple[Tensor, Tensor, Stats]:
        """Losses (P,), log-probs (B, T), and the figures."""
        loss_mask = micro.loss_mask
        logps = self.context.roles.logps("policy", micro).logps
        logratio = logps.sum(dim=1) - micro.extra["reference"]
        num_tokens = loss_mask.sum(dim=1)
        chosen_logratio = logratio[::2]
        rejected_logratio = logratio[1::2]
        losses = dpo_loss(
            self.loss_type,
            chosen_logratio,
            rejected_logratio,
            self.beta,
            self.label_smoothing,
            num_tokens[::2],
            num_tokens[1::2],
        )
        stats = {
            "loss": mean(losses),
            "rewards/accuracies": pair_accuracy(chosen_logratio - rejected_logratio),
            "rewards/margins": mean(self.beta * (chosen_logratio - rejected_logratio)),
            "rewards/chosen": mean(self.beta * chosen_logratio),
            "rewards/rejected": mean(self.beta * rejected_logratio),
            "logps_per_token/chosen": masked_mean(logps[::2], loss_mask[::2]),
            "logps_per_token/rejected": masked_mean(logps[1::2], loss_mask[1::2]),
            "logps/chosen_delta": WeightedMean(chosen_logratio.detach().sum(), num_tokens[::2].sum()),
        }
        return losses, logps, stats

    def step_metrics(self, micro: Batch) -> Stats:
        return {"kl": masked_mean(self.context.roles.full_vocab_kl("policy", "reference", micro), micro.loss_mask)}

    def check(self, micro: Batch, step: int) -> None:
        check_reference(
            self.context.roles,
            micro,
            expect_equal=self.context.fresh and step == 0,
            description=self.context.reference_description,
        )

    def iter_warnings(self, metrics: Mapping[str, float]) -> Iterator[str]:
        if metrics["logps/chosen_delta"] < CHOSEN_LOGP_DROP:
            self._consecutive_drops = self._consecutive_drops + 1
        else:
            self._consecutive_drops = 0
        if self._consecutive_drops >= CONSECUTIVE_STEPS:
            yield (
                f"the chosen answers have become less likely than under the reference, by "
                f"{-metrics['logps/chosen_delta']:.2f} nats a token: "
                "the margin grows because both sides are unlearned; raise dpo.beta, lower train.learning_rate, or "
                "set dpo.sft_coef"
            )

    def should_continue(self, stats: Stats) -> bool:
        return True

    def state(self) -> dict[str, float]:
        return {}

    def restore(self, state: Mapping[str, float]) -> None:
        assert not state, "dpo keeps no state"


def _chosen_mask(mask: Tensor) -> Tensor:
    """(B, T) bool: the mask on the chosen rows, the even ones, alone."""
    is_chosen = torch.arange(len(mask), device=mask.device) % 2 == 0
    return mask & is_chosen[:, None]
