"""PPO: proximal policy optimization (arXiv:1707.06347) as it is used for language models (arXiv:1909.08593,
arXiv:2203.02155).

The policy draws completions y; old is that policy, ref the reference. For token t of the tokens y_1 ... y_n of one
completion:

    r_t = -lambda (log old(y_t) - log ref(y_t)),   and the score R(x, y) is added to r_n
    A_t = delta_t + gamma L A_(t+1),   delta_t = r_t + gamma V_(t+1) - V_t,   G_t = A_t + V_t          GAE, L is `lam`
    a_t = (A_t - mean A) / std A over all tokens of the rollouts

    policy   L = sum_t w_t [ -min(rho a, clip(rho, 1 - c, 1 + c) a) - e H ],   rho_t = p(y_t) / old(y_t), H the entropy
    value    L = sum_t w_t max((v_t - G_t)^2, (clip(v_t, V_t - d, V_t + d) - G_t)^2) / 2

w is 1 / (tokens of the minibatch). V_t is the value before token t; V_(n+1) is 0 for a completion that ended. For a
truncated completion `missing_eos_penalty` is subtracted from the score (`penalize`), or it is scored as it is (`keep`),
or it has no score and V_(n+1) is the value after its last token (`bootstrap`). The rollouts are passed over
`num_ppo_epochs` times in `num_mini_batches`; once old and policy differ by `target_kl` nats per token the remaining
passes are skipped.

The value is an adapter and an fp32 head of its own beside the policy's adapter, or a head on the policy's trunk. The
two losses are two graphs, one alive at a time: no parameter changes between their backward passes, so the gradients add
up to those of one joint backward pass, also for a shared trunk. lambda is constant, or adapted in each step to a target
of the KL (arXiv:1909.08593, equation 4).

Metrics: `reward` is R before penalties, `rewards/NAME/mean` each reward; `scores` is the score added to the last token;
`kl` to the reference and `approx_kl` to old are in nats per token, k3; `kl_coef` is lambda; `value_loss`;
`explained_variance` is that of G by V; `value` is the mean V; `clip_ratio` and `value_clip_ratio` are the shares of
tokens whose gradient the clip stops; `entropy` is in nats; `completions/mean_length` is in tokens per completion;
`completions/clipped_ratio` is the share without an end; `sampling/sampling_logp_difference/mean` is the mean
|log old - log p_sampler|; `loss` is the policy's L.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowrank_tune.algorithms.base import AlgorithmContext, LossTerm, StepBatch
from lowrank_tune.algorithms.rollouts import (
    RolloutAlgorithm,
    RolloutCollector,
    RolloutGroups,
    check_sampler_mismatch,
    map_micro_batches,
)
from lowrank_tune.batch import Batch, RolloutBatch, required
from lowrank_tune.functional import (
    apply_mask,
    clipped_policy_loss,
    explained_variance,
    gae,
    kl_k3,
    masked_mean,
    step_seed,
    token_mean_weights,
    whiten,
)
from lowrank_tune.stats import Stats, WeightedMean

if TYPE_CHECKING:  # an algorithm must run where pydantic is not installed (benchmarks/gpu.py)
    from lowrank_tune.config import PPOConfig

VALUE_ROLE = "value"
MAX_KL_ERROR = 0.2
"""Clip of the relative error of the KL in its controller (arXiv:1909.08593, equation 4)."""
TRUNCATED_WARN_FRACTION = 0.8
MINIBATCH_SEED_TAG = 15
"""Number of the seed of a step's minibatches; the draws of a step are numbered from 0."""


def token_rewards(
    old_logps: Tensor,
    reference_logps: Tensor,
    mask: Tensor,
    score: Tensor,
    kl_coef: float,
) -> Tensor:
    """Returns the reward of each token, (B, T): minus its KL, plus at the last token of a row the score (B,). All other
    tensors are (B, T)."""
    kl_rewards = -kl_coef * apply_mask(old_logps - reference_logps, mask)
    num_remaining = mask.long().flip(1).cumsum(dim=1).flip(1)
    is_last = mask & (num_remaining == 1)
    scores = score[:, None].to(kl_rewards.dtype).expand_as(kl_rewards)
    return kl_rewards + apply_mask(scores, is_last)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    cliprange_value: float,
) -> tuple[Tensor, Tensor]:
    """Returns the loss of each token and whether the clip stopped its gradient; (B, T) each, as all tensors are.
    `cliprange_value` 0 means no clip."""
    values = apply_mask(values, mask)
    old_values = apply_mask(old_values, mask)
    returns = apply_mask(returns, mask)
    loss = (values - returns).square() / 2
    if not cliprange_value:
        return loss, torch.zeros_like(mask)
    lowest = old_values - cliprange_value
    highest = old_values + cliprange_value
    clipped_values = torch.minimum(torch.maximum(values, lowest), highest)
    clipped_loss = (clipped_values - returns).square() / 2
    is_clipped = (clipped_loss > loss) & mask
    return torch.maximum(loss, clipped_loss), is_clipped


def adapt_kl_coef(
    kl_coef: float,
    kl: float,
    target: float,
    gain: float,
) -> float:
    """Returns the weight of the KL for the next step: higher if the KL is above its target, lower if it is below
    (arXiv:1909.08593, equation 4)."""
    error = kl / target - 1
    clipped_error = max(-MAX_KL_ERROR, min(MAX_KL_ERROR, error))
    return kl_coef * (1 + gain * clipped_error)


def shift_right(states: Tensor) -> Tensor:
    """Returns the value before each token from the value after each token; (B, T), 0 for the first token."""
    return torch.nn.functional.pad(states[:, :-1], (1, 0))


@dataclass
class PPOBatch(StepBatch[RolloutBatch]):
    """The rollouts, passed over `num_ppo_epochs` times, each time in other `num_mini_batches` of nearly the same number
    of rows."""

    num_ppo_epochs: int = 1
    num_mini_batches: int = 1
    seed: int = 0

    def minibatches(self) -> Iterator[RolloutBatch]:
        for epoch in range(self.num_ppo_epochs):
            if self.num_mini_batches == 1:
                yield self.batch
                continue
            generator = torch.Generator().manual_seed(step_seed(self.seed, epoch))
            shuffled = torch.randperm(len(self.batch), generator=generator)
            for rows in shuffled.tensor_split(self.num_mini_batches):
                if len(rows):
                    yield self.batch.select_rows(rows.sort().values)


class PPO(RolloutAlgorithm):
    """Proximal policy optimization."""

    def __init__(
        self,
        context: AlgorithmContext,
        settings: PPOConfig,
        collector: RolloutCollector,
    ) -> None:
        super().__init__(context, collector)
        self.settings = settings
        # lambda of the next step
        self.kl_coef = settings.kl_coef
        self._num_rows = 1
        self._skip_update = False

    def collect(self, step: int) -> StepBatch[RolloutBatch]:
        groups = self.collector.collect(step, 0)
        stats = groups.stats() | self.record_failures(groups)
        rows = self._trained_rows(groups)
        if len(rows) == len(groups.batch):
            batch = groups.batch
        else:
            batch = groups.batch.select_rows(rows)
        stats |= self._compute_advantages(batch, groups, rows)
        self._log_group(step, groups, batch, rows)
        self._adapt_kl_coef(stats["kl"])
        return PPOBatch(
            batch,
            stats,
            self.settings.num_ppo_epochs,
            self.settings.num_mini_batches,
            self.collector.seed_of(16 * step + MINIBATCH_SEED_TAG),
        )

    def _trained_rows(self, groups: RolloutGroups) -> Tensor:
        """Returns the rows with a reward; without any, all rows, and the update is skipped."""
        has_reward = groups.scored.flatten()
        self._skip_update = not bool(has_reward.any())
        if self._skip_update:
            return torch.arange(len(has_reward))
        return has_reward.nonzero().squeeze(1)

    def _compute_advantages(
        self,
        batch: RolloutBatch,
        groups: RolloutGroups,
        rows: Tensor,
    ) -> Stats:
        """Sets log-probs, values, returns and advantages of the batch; returns their metrics. Raises TrainingError if
        the sampler and the policy disagree."""
        loss_mask = batch.loss_mask
        old_logps = self.collector.logps("policy", batch)
        reference_logps = self.collector.logps("reference", batch)
        mismatch = masked_mean((old_logps - required(batch.sampler_logps)).abs(), loss_mask)
        check_sampler_mismatch(mismatch.value, self.settings.max_logprob_mismatch, "ppo.max_logprob_mismatch")
        values, final_values = self._values(batch)
        scores, bootstrap_values = self._final_scores(
            groups.shaped_rewards.flatten()[rows].nan_to_num(0.0),
            groups.truncated[rows],
            final_values,
        )
        rewards = token_rewards(
            old_logps,
            reference_logps,
            loss_mask,
            scores,
            self.kl_coef,
        )
        advantages = gae(
            rewards,
            values,
            loss_mask,
            bootstrap_values,
            self.settings.gamma,
            self.settings.lam,
        )
        returns = apply_mask(values, loss_mask) + advantages
        batch.old_logps = old_logps
        batch.values = values
        batch.returns = returns
        batch.token_advantages = whiten(advantages, loss_mask)
        stats = {
            "scores": WeightedMean(scores.sum(), len(scores)),
            "kl": masked_mean(kl_k3(old_logps, reference_logps, loss_mask), loss_mask),
            "kl_coef": WeightedMean(self.kl_coef, 1),
            "sampling/sampling_logp_difference/mean": mismatch,
            "value": masked_mean(values, loss_mask),
        }
        explained = explained_variance(values, returns, loss_mask)
        if not math.isnan(explained):
            stats["explained_variance"] = WeightedMean(explained, 1)
        return stats

    def _final_scores(
        self,
        scores: Tensor,
        truncated: Tensor,
        final_values: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Returns the score at the last token of each row, and the value after it; (B,) each. `final_values` (B,) are
        the values after the last token."""
        zeros = torch.zeros_like(final_values)
        if self.settings.truncated_completions == "bootstrap":
            # The outcome of a truncated completion is unknown: the value replaces its score.
            scores = torch.where(truncated, torch.zeros_like(scores), scores)
            return scores, torch.where(truncated, final_values, zeros)
        if self.settings.truncated_completions == "penalize":
            scores = scores - self.settings.missing_eos_penalty * truncated.double()
        return scores, zeros

    def _values(self, batch: RolloutBatch) -> tuple[Tensor, Tensor]:
        """Returns the value before each token (B, T), and after the last one (B,); no gradient, on the CPU."""
        roles = self.context.roles
        inputs = Batch(batch.input_ids, batch.attention_mask, batch.completion_mask)

        def compute(micro: Batch) -> Tensor:
            return roles.scores(VALUE_ROLE, micro)

        states = map_micro_batches(
            roles,
            inputs,
            self.collector.micro_tokens,
            compute,
        )
        last = (batch.lengths - 1).clamp_min(0)
        final_values = states.gather(1, last[:, None]).squeeze(1)
        return shift_right(states), final_values

    def _log_group(
        self,
        step: int,
        groups: RolloutGroups,
        batch: RolloutBatch,
        rows: Tensor,
    ) -> None:
        """Logs the mean advantage of each completion, 0 for those without a reward."""
        token_advantages = required(batch.token_advantages)
        means = token_advantages.sum(dim=1) / batch.loss_mask.sum(dim=1).clamp_min(1)
        row_advantages = torch.zeros(len(groups.batch)).index_copy(0, rows, means)
        self.collector.log_group(step, groups, row_advantages.view_as(groups.rewards))

    def _adapt_kl_coef(self, kl: WeightedMean) -> None:
        if self.settings.kl_target is not None and kl.count:
            self.kl_coef = adapt_kl_coef(
                self.kl_coef,
                kl.value,
                self.settings.kl_target,
                self.settings.kl_gain,
            )

    def token_weights(self, batch: RolloutBatch) -> Tensor:
        self._num_rows = len(batch)
        if self._skip_update:
            return torch.zeros(batch.input_ids.shape)
        return token_mean_weights(batch.loss_mask)

    def compute_losses(self, micro: RolloutBatch) -> Iterator[LossTerm]:
        yield self._policy_term(micro)
        yield self._value_term(micro)

    def _policy_term(self, micro: RolloutBatch) -> LossTerm:
        loss_mask = micro.loss_mask
        entropy_coef = self.settings.entropy
        output = self.context.roles.logps(
            "policy",
            micro,
            self.collector.temperature,
            entropy_gradient=entropy_coef > 0,
        )
        old_logps = required(micro.old_logps)
        advantages = apply_mask(required(micro.token_advantages), loss_mask)
        log_ratio = apply_mask(output.logps - old_logps, loss_mask)
        cliprange = self.settings.cliprange
        per_token, is_clipped = clipped_policy_loss(
            log_ratio,
            advantages,
            loss_mask,
            cliprange,
            cliprange,
        )
        if entropy_coef:
            per_token = per_token - entropy_coef * apply_mask(output.entropy, loss_mask)
        loss = _weighted_loss(per_token, micro)
        stats = {
            "loss": WeightedMean(loss.detach(), len(micro) / self._num_rows),
            "entropy": masked_mean(output.entropy, loss_mask),
            "clip_ratio": masked_mean(is_clipped.float(), loss_mask),
            "approx_kl": masked_mean(kl_k3(old_logps, output.logps, loss_mask), loss_mask),
        }
        return LossTerm(loss, stats)

    def _value_term(self, micro: RolloutBatch) -> LossTerm:
        loss_mask = micro.loss_mask
        values = shift_right(self.context.roles.scores(VALUE_ROLE, micro))
        per_token, is_clipped = value_loss(
            values,
            required(micro.values),
            required(micro.returns),
            loss_mask,
            self.settings.cliprange_value,
        )
        # A separate value has an optimizer group of its own, so that a weight would only change its learning rate.
        vf_coef = self.settings.vf_coef if self.settings.critic == "shared" else 1.0
        loss = vf_coef * _weighted_loss(per_token, micro)
        stats = {
            "value_loss": masked_mean(per_token, loss_mask),
            "value_clip_ratio": masked_mean(is_clipped.float(), loss_mask),
        }
        return LossTerm(loss, stats)

    def diagnostics(self, metrics: Mapping[str, float]) -> Iterator[str]:
        yield from super().diagnostics(metrics)
        truncated = metrics["completions/clipped_ratio"]
        if truncated > TRUNCATED_WARN_FRACTION:
            yield (
                f"most completions have no end, {truncated:.0%} of this step's: their rewards are not those of whole "
                "answers; raise rollout.max_new_tokens, or begin from an SFT adapter that ends its answers"
            )

    def should_continue(self, stats: Stats) -> bool:
        if self.settings.target_kl is None:
            return True
        exceeds_target = stats["approx_kl"].value > self.settings.target_kl
        return not exceeds_target

    def state(self) -> dict[str, Any]:
        return {"coefficient": self.kl_coef, **super().state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.kl_coef = state["coefficient"]
        super().restore(state)


def _weighted_loss(per_token: Tensor, micro: RolloutBatch) -> Tensor:
    weights = required(micro.token_weights)
    return (per_token * apply_mask(weights, micro.loss_mask)).sum()
