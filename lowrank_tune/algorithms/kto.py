"""KTO: Kahneman-Tversky optimization (arXiv:2402.01306, equations 7 and 8), from answers that are each
desirable or not.

    r = log p(y | x) - log ref(y | x)         z0 = max(0, mean of r over mismatched rows)
    L = 1/B sum over rows w(y) loss(r)

    kto                  desirable: 1 - sigmoid(beta (r - z0))      undesirable: 1 - sigmoid(beta (z0 - r))
    apo_zero_unpaired    the same with z0 = 0                       arXiv:2408.06266

log p(y | x) is a sum over the tokens of the answer, its end tokens included. The reference is the policy's stack
without its top adapter; its log-probs of the rows are computed once for the whole dataset (`reference_logps.py`).

A mismatched row is the prompt of a row with the answer of the next row of the same optimizer step, of the last row with
that of the first, cut to `data.max_length`. z0 estimates KL(p || ref) in nats an answer. It is computed before the
update, over the whole step, by policy and reference without gradient (`kl_estimate.py`); a step of one row has z0 = 0.
Of validation rows z0 is computed over all of them in the order of the store, where the answers to one prompt may be
adjacent: all rows take the answer of the same number of rows later, the first to other prompts. w(y) is
`desirable_weight` or `undesirable_weight`, and B counts the whole optimizer step: so the split into micro-batches does
not change the gradient, and a validation loss does not depend on the size of its batches.

Metrics: `loss` is L; `kl` is z0; `rewards/chosen` and `rewards/rejected` are the means of beta r of the desirable and
the undesirable answers, `rewards/margins` is their difference, `rewards/accuracies` the share of rows whose r has the
sign of its label (0 counts half); `logps/chosen` and `logps/rejected` are means of log p(y | x), `logps/chosen_delta`
is r of the desirable answers in nats per token; `kl_per_token` is KL(policy || reference) per token over the whole
vocabulary, on one micro-batch of a logging step. TRL's KTOTrainer uses these names, except for the last two and
`rewards/accuracies`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lowrank_tune.algorithms.base import Algorithm, AlgorithmContext, LossTerm, StepBatch
from lowrank_tune.algorithms.kl_estimate import KLEstimator, distance_of_prompts, rows_of_batch
from lowrank_tune.algorithms.reference_check import check_reference, fast_path_tolerance, full_vocab_kl_metric
from lowrank_tune.batch import LabeledBatch, required
from lowrank_tune.stats import Stats, WeightedMean

if TYPE_CHECKING:  # an algorithm must run where pydantic is not installed (benchmarks/gpu.py)
    from lowrank_tune.config import KTOConfig
    from lowrank_tune.data import TokenizedDataset

FIRST_LOSS = 0.5
"""Unweighted loss of a policy that equals its reference."""
MAX_FIRST_DIFFERENCE = 1e-3
"""How far the loss of a fresh policy may be from that, apart from rounding, which is far below in fp32."""
MAX_CLASS_RATIO = 4 / 3
"""The most that all desirable answers may weigh relative to all undesirable ones (at least 1): equation 8."""
CHOSEN_LOGP_DROP = -0.5
CONSECUTIVE_STEPS = 3
"""A warning is due if the desirable answers are this much less likely than under the reference, in nats per token, for
so many steps in a row."""
STEPS_WITHOUT_KL = 50
"""A warning is due if the KL estimate is 0, and desirable answers are less likely than under the reference, for so many
steps in a row."""

ClassWeight = float | Literal["auto"]


def kto_loss(
    loss_type: str,
    logratio: Tensor,
    labels: Tensor,
    kl: Tensor,
    beta: float,
) -> Tensor:
    """Returns the loss of each row without its weight, (B,), from the log-ratios r, the labels (bool) and z0, all
    (B,)."""
    match loss_type:
        case "kto":
            advantage = logratio - kl
        case "apo_zero_unpaired":
            advantage = logratio
        case _:
            raise AssertionError(f"no KTO loss is called {loss_type}")
    # 1 - sigmoid(x) = sigmoid(-x), without the rounding of the difference.
    return torch.sigmoid(torch.where(labels, -beta * advantage, beta * advantage))


def class_weights(
    desirable_weight: ClassWeight,
    undesirable_weight: ClassWeight,
    num_desirable: float,
    num_undesirable: float,
) -> tuple[float, float]:
    """Returns the weights of desirable and undesirable answers. Where a weight is `auto`, it is the nearest to 1 with
    which all desirable answers weigh 1 to `MAX_CLASS_RATIO` times as much as all undesirable ones; of two, that of the
    rarer class changes."""
    if not num_desirable or not num_undesirable:
        return _or_one(desirable_weight), _or_one(undesirable_weight)
    ratio = num_desirable / num_undesirable
    if desirable_weight != "auto" and undesirable_weight != "auto":
        return desirable_weight, undesirable_weight
    if desirable_weight == "auto" and (undesirable_weight != "auto" or ratio < 1):
        undesirable = _or_one(undesirable_weight)
        lowest = undesirable / ratio
        return min(max(1.0, lowest), MAX_CLASS_RATIO * lowest), undesirable
    desirable = _or_one(desirable_weight)
    highest = desirable * ratio
    return desirable, min(max(1.0, highest / MAX_CLASS_RATIO), highest)


def _or_one(weight: ClassWeight) -> float:
    return 1.0 if weight == "auto" else weight


class KTO(Algorithm[LabeledBatch]):
    """Kahneman-Tversky optimization."""

    def __init__(
        self,
        context: AlgorithmContext,
        settings: KTOConfig,
        max_length: int,
        micro_tokens: int,
    ) -> None:
        """`max_length`: maximum tokens of a row; `micro_tokens`: of a forward pass without gradient."""
        super().__init__(context)
        self.settings = settings
        self.kl_estimator = KLEstimator(context.roles, max_length, micro_tokens)
        self.desirable_weight, self.undesirable_weight = class_weights(
            settings.desirable_weight,
            settings.undesirable_weight,
            *context.label_counts,
        )
        self._validation_kl = 0.0
        self._consecutive_drops = 0
        self._steps_without_kl = 0

    @property
    def estimates_kl(self) -> bool:
        """Whether the loss contains z0."""
        return self.settings.loss_type == "kto"

    def collect(self, step: int) -> StepBatch[LabeledBatch]:
        step_batch = super().collect(step)
        kl = 0.0
        if self.estimates_kl:
            kl = self.kl_estimator.estimate(rows_of_batch(step_batch.batch))
            step_batch.stats["kl"] = WeightedMean(kl, 1)
        step_batch.batch.kl_estimate = torch.full((len(step_batch.batch),), kl)
        return step_batch

    def token_weights(self, batch: LabeledBatch) -> Tensor:
        return self._class_weights(batch) / len(batch)

    def _class_weights(self, batch: LabeledBatch) -> Tensor:
        """Returns w(y) of each row, (B,) fp32."""
        labels = required(batch.labels)
        weights = torch.full(labels.shape, self.undesirable_weight, device=labels.device)
        return weights.masked_fill(labels, self.desirable_weight)

    def compute_losses(self, micro: LabeledBatch) -> Iterator[LossTerm]:
        logps = self.context.roles.logps("policy", micro).logps
        losses, stats = self._row_losses(logps, micro, required(micro.kl_estimate))
        yield LossTerm((losses * required(micro.token_weights)).sum(), stats)

    def start_validation(self, rows: TokenizedDataset) -> None:
        """Computes z0 of the validation rows."""
        if self.estimates_kl:
            validation_rows = [rows[row] for row in range(len(rows))]
            self._validation_kl = self.kl_estimator.estimate(validation_rows, distance_of_prompts(validation_rows))

    def eval_metrics(self, micro: LabeledBatch) -> Stats:
        stats, _ = self.evaluate_batch(micro)
        return stats

    def evaluate_batch(self, micro: LabeledBatch) -> tuple[Stats, Tensor]:
        logps = self.context.roles.logps("policy", micro).logps
        kl = torch.full((len(micro),), self._validation_kl, device=logps.device)
        losses, stats = self._row_losses(logps, micro, kl)
        if self.estimates_kl:
            stats["kl"] = WeightedMean(kl.sum(), len(micro))
        return stats, (losses * self._class_weights(micro)).detach()

    def scores(self, micro: LabeledBatch) -> Tensor:
        """Returns the implicit reward of each row, (B,): beta times its log-ratio to the reference."""
        logps = self.context.roles.logps("policy", micro).logps
        return self.settings.beta * _logratio(logps, micro)

    def _row_losses(
        self,
        logps: Tensor,
        micro: LabeledBatch,
        kl: Tensor,
    ) -> tuple[Tensor, Stats]:
        """Returns the losses (B,) without weights and the metrics, from the log-probs (B, T) of the policy and z0 of
        each row (B,)."""
        labels = required(micro.labels)
        logratio = _logratio(logps, micro)
        losses = kto_loss(
            self.settings.loss_type,
            logratio,
            labels,
            kl,
            self.settings.beta,
        )
        weighted = (losses * self._class_weights(micro)).detach()
        stats = {
            "loss": WeightedMean(weighted.sum(), len(micro)),
            "rewards/accuracies": _sign_accuracy(logratio, labels),
            **_side_stats("rewards/{side}", self.settings.beta * logratio, micro),
            **_side_stats("logps/{side}", logps.sum(dim=1), micro),
        }
        if "rewards/chosen" in stats:
            num_tokens = micro.loss_mask.sum(dim=1)
            delta = WeightedMean((logratio.detach() * labels).sum(), (num_tokens * labels).sum())
            stats["logps/chosen_delta"] = delta
        return losses, stats

    def derived_metrics(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Returns the margin between the mean rewards of both classes, if there are rows of both."""
        if "rewards/chosen" in metrics and "rewards/rejected" in metrics:
            return {"rewards/margins": metrics["rewards/chosen"] - metrics["rewards/rejected"]}
        return {}

    def step_metrics(self, micro: LabeledBatch) -> Stats:
        return {"kl_per_token": full_vocab_kl_metric(self.context, micro)["kl"]}

    def check(self, micro: LabeledBatch, step: int) -> None:
        logratios = check_reference(self.context, micro, step)
        if logratios is not None:
            self._check_first_loss(logratios.sum(dim=1), micro)

    def _check_first_loss(self, logratio: Tensor, micro: LabeledBatch) -> None:
        """Disables the fast paths if a fresh policy with these log-ratios (B,) does not have the loss `FIRST_LOSS`."""
        beta = self.settings.beta
        losses = kto_loss(
            self.settings.loss_type,
            logratio,
            required(micro.labels),
            required(micro.kl_estimate),
            beta,
        )
        difference = float((losses.mean() - FIRST_LOSS).abs())
        # The rounding errors of tokens are independent.
        num_tokens = float(micro.loss_mask.sum()) / len(micro)
        rounding = beta * fast_path_tolerance(self.context) * math.sqrt(num_tokens)
        # False for NaN.
        if not difference <= MAX_FIRST_DIFFERENCE + rounding:
            self.context.roles.disable_fast_paths(
                f"before the first step the loss is {difference:.1e} from {FIRST_LOSS}, without its weights"
            )

    def diagnostics(self, metrics: Mapping[str, float]) -> Iterator[str]:
        delta = metrics.get("logps/chosen_delta", 0.0)
        self._consecutive_drops = self._consecutive_drops + 1 if delta < CHOSEN_LOGP_DROP else 0
        if self._consecutive_drops >= CONSECUTIVE_STEPS:
            yield (
                f"the desirable answers have become less likely than under the reference, by {-delta:.2f} nats a "
                "token: raise kto.beta or kto.desirable_weight, or lower train.learning_rate"
            )
        is_unlearning = metrics.get("kl") == 0.0 and metrics.get("rewards/chosen", 0.0) < 0.0
        self._steps_without_kl = self._steps_without_kl + 1 if is_unlearning else 0
        if self._steps_without_kl >= STEPS_WITHOUT_KL:
            yield (
                f"the KL estimate has been 0 for {self._steps_without_kl} steps, and desirable answers are less likely "
                "than under the reference: all answers are unlearned; lower train.learning_rate, or raise kto.beta"
            )


def _logratio(logps: Tensor, micro: LabeledBatch) -> Tensor:
    """Returns log p - log ref of each answer, (B,)."""
    return logps.sum(dim=1) - required(micro.reference_sequence_logps)


def _sign_accuracy(logratio: Tensor, labels: Tensor) -> WeightedMean:
    """Returns the share of rows whose log-ratio has the sign of their label. 0 counts half."""
    signed = torch.where(labels, logratio, -logratio).detach()
    num_correct = (signed > 0).float().sum() + 0.5 * (signed == 0).float().sum()
    return WeightedMean(num_correct, len(labels))


def _side_stats(
    name: str,
    values: Tensor,
    micro: LabeledBatch,
) -> Stats:
    """Returns the mean of a value (B,) of the desirable and of the undesirable rows, of each class that has rows."""
    labels = required(micro.labels)
    # Read on the CPU: no wait for the GPU.
    cpu_rows = micro.on_cpu
    assert isinstance(cpu_rows, LabeledBatch)
    num_chosen = int(required(cpu_rows.labels).sum())
    counts = {"chosen": num_chosen, "rejected": len(micro) - num_chosen}
    values = values.detach().float()
    stats: Stats = {}
    for side, mask in (("chosen", labels), ("rejected", ~labels)):
        if counts[side]:
            stats[name.format(side=side)] = WeightedMean(torch.where(mask, values, 0.0).sum(), counts[side])
    return stats
