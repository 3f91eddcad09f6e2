"""DPO: direct preference optimization (arXiv:2305.18290, equation 7) and its variants, selected by `loss_type`.

    a+ = log p(y+ | x) - log ref(y+ | x)      a- = log p(y- | x) - log ref(y- | x)      d = a+ - a-
    L = 1/P sum over pairs loss(d) + s (1/N) sum over the N tokens of all chosen answers of -log p

    sigmoid       -log sigmoid(beta d)
    ipo           (d' - 1 / (2 beta))^2                     arXiv:2310.12036, equation 17; d' from log-probs per token
    hinge         max(0, 1 - beta d)                        SLiC, arXiv:2305.10425
    robust        (-(1 - e) log sigmoid(beta d) + e log sigmoid(-beta d)) / (1 - 2 e)
                                                            arXiv:2403.00409, e is `label_smoothing`
    apo_zero      1 - sigmoid(beta a+) + sigmoid(beta a-)   arXiv:2408.06266
    sigmoid_norm  -log sigmoid(beta d')                     length-normalized: each side divided by its tokens

log p(y | x) is a sum over the tokens of the answer, its end tokens included. The reference is the policy's stack
without its top adapter; its log-probs are computed once for the whole dataset (`reference_logps.py`). s is `sft_coef`.
The rows are chosen, rejected, chosen, rejected, ..., and a pair stays in one micro-batch. P and N count the whole
optimizer step, so the split into micro-batches does not change the gradient.

Metrics: `loss` is the preference loss without the SFT term; `rewards/chosen` and `rewards/rejected` are beta a+ and
beta a-, `rewards/margins` is their difference, `rewards/accuracies` the share of pairs with a positive one (a tie
counts half); `logps_per_token/chosen` and `logps_per_token/rejected` are in nats per token; `logps/chosen_delta` is a+
in nats per token; `kl` is KL(policy || reference) per token over the whole vocabulary, on one micro-batch of a logging
step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_tune.algorithms.base import Algorithm, AlgorithmContext, LossTerm, StepBatch
from lowrank_tune.algorithms.reference_check import check_reference, fast_path_tolerance, full_vocab_kl_metric
from lowrank_tune.batch import PairBatch, required
from lowrank_tune.functional import (
    apply_mask,
    masked_mean,
    mean,
    pair_accuracy,
    pair_mean_weights,
    token_mean_weights,
)
from lowrank_tune.stats import Stats, WeightedMean

if TYPE_CHECKING:  # an algorithm must run where pydantic is not installed (benchmarks/gpu.py)
    from lowrank_tune.config import DPOConfig

MAX_FIRST_DIFFERENCE = 1e-3
"""How far the loss of a fresh policy may be from ln 2, apart from rounding, which is far below in fp32."""
CHOSEN_LOGP_DROP = -0.5
CONSECUTIVE_STEPS = 3
"""A warning is due if the chosen answers are this much less likely than under the reference, in nats per token, for so
many steps in a row."""


def dpo_loss(
    loss_type: str,
    chosen_logratio: Tensor,
    rejected_logratio: Tensor,
    beta: float,
    label_smoothing: float,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
) -> Tensor:
    """Returns the loss of each pair, (P,), from the log-ratios a+ and a- (P,) and the lengths of the answers (P,)."""
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
            log_sigmoid_swapped = F.logsigmoid(-beta * difference)
            smoothed = label_smoothing * log_sigmoid_swapped - (1 - label_smoothing) * log_sigmoid
            return smoothed / (1 - 2 * label_smoothing)
        case "apo_zero":
            return 1 - torch.sigmoid(beta * chosen_logratio) + torch.sigmoid(beta * rejected_logratio)
    raise AssertionError(f"no DPO loss is called {loss_type}")


class DPO(Algorithm[PairBatch]):
    """Direct preference optimization."""

    rows_per_unit = 2

    def __init__(self, context: AlgorithmContext, settings: DPOConfig) -> None:
        super().__init__(context)
        self.settings = settings
        self._consecutive_drops = 0

    def collect(self, step: int) -> StepBatch[PairBatch]:
        step_batch = super().collect(step)
        if self.settings.sft_coef:
            batch = step_batch.batch
            batch.sft_weights = token_mean_weights(chosen_mask(batch.loss_mask))
        return step_batch

    def token_weights(self, batch: PairBatch) -> Tensor:
        return pair_mean_weights(batch.input_ids)

    def scores(self, micro: PairBatch) -> Tensor:
        """Returns the implicit reward of each row, (B,): beta times its log-ratio to the reference."""
        logps = self.context.roles.logps("policy", micro).logps
        return self.settings.beta * _logratio(logps, micro)

    def compute_losses(self, micro: PairBatch) -> Iterator[LossTerm]:
        logps = self.context.roles.logps("policy", micro).logps
        losses, stats = self._pair_losses(logps, micro)
        weights = required(micro.token_weights)[::2]
        loss = (losses * weights).sum()
        if self.settings.sft_coef:
            sft_weights = required(micro.sft_weights)
            loss = loss - self.settings.sft_coef * (apply_mask(logps, micro.loss_mask) * sft_weights).sum()
        yield LossTerm(loss, stats)

    def eval_metrics(self, micro: PairBatch) -> Stats:
        stats, _ = self.evaluate_batch(micro)
        return stats

    def evaluate_batch(self, micro: PairBatch) -> tuple[Stats, Tensor]:
        logps = self.context.roles.logps("policy", micro).logps
        losses, stats = self._pair_losses(logps, micro)
        return stats, losses.detach()

    def _pair_losses(self, logps: Tensor, micro: PairBatch) -> tuple[Tensor, Stats]:
        """Returns the losses (P,) and the metrics, from the log-probs (B, T) of the policy."""
        beta = self.settings.beta
        loss_mask = micro.loss_mask
        logratio = _logratio(logps, micro)
        num_tokens = loss_mask.sum(dim=1)
        chosen_logratio = logratio[::2]
        rejected_logratio = logratio[1::2]
        losses = dpo_loss(
            self.settings.loss_type,
            chosen_logratio,
            rejected_logratio,
            beta,
            self.settings.label_smoothing,
            num_tokens[::2],
            num_tokens[1::2],
        )
        difference = chosen_logratio - rejected_logratio
        stats = {
            "loss": mean(losses),
            "rewards/accuracies": pair_accuracy(difference),
            "rewards/margins": mean(beta * difference),
            "rewards/chosen": mean(beta * chosen_logratio),
            "rewards/rejected": mean(beta * rejected_logratio),
            "logps_per_token/chosen": masked_mean(logps[::2], loss_mask[::2]),
            "logps_per_token/rejected": masked_mean(logps[1::2], loss_mask[1::2]),
            "logps/chosen_delta": WeightedMean(chosen_logratio.detach().sum(), num_tokens[::2].sum()),
        }
        return losses, stats

    def step_metrics(self, micro: PairBatch) -> Stats:
        return full_vocab_kl_metric(self.context, micro)

    def check(self, micro: PairBatch, step: int) -> None:
        logratios = check_reference(self.context, micro, step)
        if logratios is not None and self.settings.loss_type == "sigmoid":
            self._check_first_loss(logratios.sum(dim=1), micro)

    def _check_first_loss(self, logratios: Tensor, micro: PairBatch) -> None:
        """Disables the fast paths if a fresh policy with these log-ratios (B,) does not have a loss of ln 2."""
        beta = self.settings.beta
        losses = -F.logsigmoid(beta * (logratios[::2] - logratios[1::2]))
        difference = float((losses.mean() - math.log(2)).abs())
        # The rounding errors of tokens are independent.
        num_tokens = float(micro.loss_mask.sum()) / len(micro)
        rounding = beta * fast_path_tolerance(self.context) * math.sqrt(num_tokens)
        # False for NaN.
        if not difference <= MAX_FIRST_DIFFERENCE + rounding:
            self.context.roles.disable_fast_paths(f"before the first step the loss is {difference:.1e} from ln 2")

    def diagnostics(self, metrics: Mapping[str, float]) -> Iterator[str]:
        delta = metrics["logps/chosen_delta"]
        if delta < CHOSEN_LOGP_DROP:
            self._consecutive_drops += 1
        else:
            self._consecutive_drops = 0
        if self._consecutive_drops >= CONSECUTIVE_STEPS:
            yield (
                f"the chosen answers have become less likely than under the reference, by {-delta:.2f} nats a token: "
                "the margin grows because both sides are unlearned; raise dpo.beta, lower train.learning_rate, or "
                "set dpo.sft_coef"
            )


def _logratio(logps: Tensor, micro: PairBatch) -> Tensor:
    """Returns log p - log ref of each answer, (B,)."""
    return logps.sum(dim=1) - required(micro.reference_sequence_logps)


def chosen_mask(mask: Tensor) -> Tensor:
    """Returns the mask of the chosen rows, the even ones; (B, T) bool."""
    is_chosen = torch.arange(len(mask), device=mask.device) % 2 == 0
    return mask & is_chosen[:, None]
