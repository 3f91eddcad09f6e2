"""GRPO: group relative policy optimization (arXiv:2402.03300, equations 3 and 4) and its variants, selected by
`loss_type`.

n completions y_i of one prompt have rewards R_i;  A_i = (R_i - mean R) / (std R + 1e-4), with the population's standard
deviation of the group. rho_it = p(y_it) / p_old(y_it), where old is the policy that drew the completions. N is the
number of completions in the step.

    L = sum_it w_it [ -min(rho A, clip(rho, 1 - low, 1 + high) A) + lambda KL(p || ref) ]

grpo      w = 1 / (N |y_i|): every completion has the same weight
dapo      w = 1 / (tokens of the step): every token has the same weight; high 0.28                    arXiv:2503.14476
dr_grpo   w = 1 / (N max_new_tokens), A = R - mean R: no division by length or standard deviation     arXiv:2503.20783
gspo      weights of grpo, rho of the whole sequence: exp of the mean log-ratio per token             arXiv:2507.18071
cispo     weights of dapo, -sg(min(rho, high)) A log p: the weight is clipped, every token keeps its
          gradient; high 5                                                                            arXiv:2506.13585

A completion whose reward failed (`reward_failures.py`) leaves its group before anything is computed. A group whose
rewards are all equal (within 1e-6), or with fewer than two completions left, has A = 0 exactly. KL in the loss per
token, d = log ref - log p: k3_ratio (e^d - d - 1) rho, which has the gradient of KL(p || ref); k3 without rho; k2 d^2 /
2; exact, over the whole vocabulary. KL in the reward: R_i is reduced by lambda sum_t (log p_old - log ref).

Metrics: `reward` is R before any KL, `reward_std` its standard deviation in a group, `rewards/NAME/mean` each reward;
`frac_reward_zero_std` is the share of groups without signal; `completions/mean_length` is in tokens per completion,
`completions/clipped_ratio` the share that is cut at the limit; `kl` is the KL to the reference in nats per token;
`entropy` is in nats; `clip_ratio` is the share of tokens whose gradient the clip stops;
`sampling/sampling_logp_difference/mean` is the mean |log p - log p_sampler| in the first pass; `loss` is L;
`rollout_seconds` and `reward_seconds` are the times of collecting; `reward_errors` and `reward_timeouts` count the
completions of the step whose reward failed, from the first failure on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowrank_tune.algorithms.base import AlgorithmContext, LossTerm, StepBatch
from lowrank_tune.algorithms.reference_check import full_vocab_kl_metric
from lowrank_tune.algorithms.rollouts import (
    RolloutAlgorithm,
    RolloutCollector,
    RolloutGroups,
    check_sampler_mismatch,
)
from lowrank_tune.batch import RolloutBatch, required
from lowrank_tune.functional import apply_mask, clipped_policy_loss, kl_k3, masked_mean, token_mean_weights
from lowrank_tune.stats import Stats, WeightedMean, add_stats

if TYPE_CHECKING:  # an algorithm must run where pydantic is not installed (benchmarks/gpu.py)
    from lowrank_tune.config import GRPOConfig

STD_EPS = 1e-4
REWARD_EPS = 1e-6
DEFAULT_EPSILON_HIGH = {"dapo": 0.28, "cispo": 5.0}
"""Upper clip by `loss_type`; `epsilon` for all others."""
REWARD_INCREASE = 0.05
"""With a reward this much above that of the first step the policy has learned something."""
ZERO_STD_WARNING = 0.8
"""Share of groups without signal from which on a warning is due."""
MAX_RESAMPLES = 4
"""Maximum number of draws in one step, if groups with equal rewards are replaced."""


def zero_std_groups(rewards: Tensor, scored: Tensor | None = None) -> Tensor:
    """Returns the groups without signal, (groups,) bool: all `scored` rewards (groups, n) are equal, or fewer than two
    are left."""
    if scored is None:
        return rewards.amax(dim=1) - rewards.amin(dim=1) <= REWARD_EPS
    lowest = torch.where(scored, rewards, torch.inf).amin(dim=1)
    highest = torch.where(scored, rewards, -torch.inf).amax(dim=1)
    return highest - lowest <= REWARD_EPS


def group_advantages(
    rewards: Tensor,
    scale_by_std: bool = True,
    scored: Tensor | None = None,
) -> Tensor:
    """Returns the advantages of each group, (groups, n) fp32, from its rewards (groups, n). Exactly 0 for a group of
    equal rewards, and for completions that are not `scored`, which leave their group."""
    rewards = rewards.double()
    if scored is not None and not bool(scored.all()):
        advantages = torch.zeros(rewards.shape)
        for group in scored.any(dim=1).nonzero().flatten().tolist():
            remaining = scored[group]
            remaining_rewards = rewards[group, remaining][None]
            advantages[group, remaining] = group_advantages(remaining_rewards, scale_by_std)[0]
        return advantages
    centered = rewards - rewards.mean(dim=1, keepdim=True)
    if scale_by_std:
        centered = centered / (rewards.std(dim=1, keepdim=True, correction=0) + STD_EPS)
    return torch.where(zero_std_groups(rewards)[:, None], torch.zeros_like(centered), centered).float()


def policy_loss(
    loss_type: str,
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    epsilon_low: float,
    epsilon_high: float,
) -> tuple[Tensor, Tensor]:
    """Returns the loss of each token and whether the clip stopped its gradient; (B, T) each. logps, old_logps and mask
    are (B, T), advantages (B,)."""
    log_ratio = apply_mask(logps - old_logps, mask)
    if loss_type == "gspo":
        lengths = mask.sum(dim=1, keepdim=True).clamp_min(1)
        mean_log_ratio = log_ratio.sum(dim=1, keepdim=True) / lengths
        log_ratio = mean_log_ratio.expand_as(log_ratio)
    advantages = advantages[:, None]
    if loss_type == "cispo":
        ratio = log_ratio.exp()
        clipped_ratio = ratio.detach().clamp_max(epsilon_high)
        is_clipped = (ratio > epsilon_high) & mask
        return apply_mask(-clipped_ratio * advantages * logps, mask), is_clipped
    return clipped_policy_loss(
        log_ratio,
        advantages,
        mask,
        epsilon_low,
        epsilon_high,
    )


def kl_penalty(
    estimator: str,
    logps: Tensor,
    old_logps: Tensor,
    reference_logps: Tensor,
    mask: Tensor,
) -> Tensor:
    """Returns the estimate of KL(p || ref) for each token, (B, T). All tensors are (B, T)."""
    if estimator == "k2":
        return apply_mask(reference_logps - logps, mask).square() / 2
    k3 = kl_k3(logps, reference_logps, mask)
    if estimator == "k3_ratio":
        return k3 * apply_mask(logps - old_logps, mask).exp()
    return k3


@dataclass
class GRPOBatch(StepBatch[RolloutBatch]):
    """The rollouts of a step, passed over `num_iterations` times."""

    num_iterations: int = 1

    def minibatches(self) -> Iterator[RolloutBatch]:
        for _ in range(self.num_iterations):
            yield self.batch


class GRPO(RolloutAlgorithm):
    """Group relative policy optimization."""

    def __init__(
        self,
        context: AlgorithmContext,
        settings: GRPOConfig,
        collector: RolloutCollector,
    ) -> None:
        super().__init__(context, collector)
        self.settings = settings
        if settings.epsilon_high is None:
            self.epsilon_high = DEFAULT_EPSILON_HIGH.get(settings.loss_type, settings.epsilon)
        else:
            self.epsilon_high = settings.epsilon_high
        self._is_first_pass = True
        self._num_rows = 1
        self._skip_update = False
        self._first_reward: float | None = None

    def collect(self, step: int) -> StepBatch[RolloutBatch]:
        draws = self._draw_rollouts(step)
        stats = _rollout_stats(draws)
        groups = RolloutGroups.concat(draws, self.collector.pad_id)
        stats |= self.record_failures(groups)
        groups = self._select_trained_groups(groups)
        scale_by_std = self.settings.loss_type != "dr_grpo"
        advantages = group_advantages(groups.shaped_rewards, scale_by_std, groups.scored)
        self.collector.log_group(step, groups, advantages)
        batch = self._training_batch(groups, advantages)
        if self.settings.num_iterations > 1 and self.settings.old_logprobs_from == "recomputed":
            batch.old_logps = self.collector.logps("policy", batch)
        self._is_first_pass = True
        return GRPOBatch(batch, stats, self.settings.num_iterations)

    def _draw_rollouts(self, step: int) -> list[RolloutGroups]:
        """Returns the rollouts of a step: one draw; with `zero_std_groups: resample` further draws, as long as groups
        with a signal are missing."""
        draws = [self._draw(step, 0)]
        if self.settings.zero_std_groups != "resample":
            return draws
        num_wanted = draws[0].num_groups
        while len(draws) < MAX_RESAMPLES:
            num_missing = num_wanted - sum(int((~_without_signal(draw)).sum()) for draw in draws)
            if num_missing == 0:
                break
            draws.append(self._draw(step, len(draws), num_missing))
        return draws

    def _draw(
        self,
        step: int,
        draw: int,
        num_prompts: int | None = None,
    ) -> RolloutGroups:
        """Returns one draw with its shaped rewards: minus the KL, if it is part of the reward, and minus the penalty of
        truncated completions."""
        settings = self.settings
        groups = self.collector.collect(step, draw, num_prompts)
        batch = groups.batch
        if settings.beta and (settings.kl_in_reward or settings.kl_estimator != "exact"):
            batch.reference_logps = self.collector.logps("reference", batch)
        if settings.beta and settings.kl_in_reward:
            sampler_logps = required(batch.sampler_logps)
            log_ratio = sampler_logps - required(batch.reference_logps)
            kl = apply_mask(log_ratio, batch.loss_mask).sum(dim=1)
            groups.shaped_rewards = groups.shaped_rewards - settings.beta * kl.view_as(groups.shaped_rewards)
        if settings.truncated_completions == "penalize":
            truncated = groups.truncated.view_as(groups.shaped_rewards).float()
            groups.shaped_rewards = groups.shaped_rewards - settings.missing_eos_penalty * truncated
        return groups

    def _select_trained_groups(self, groups: RolloutGroups) -> RolloutGroups:
        """Returns the groups that are trained: those with a signal, or all with a reward for `zero_std_groups: keep`.

        Without any, all groups are returned and the update is skipped: the gradient of the KL alone would be noise, and
        Adam would move at its full rate.
        """
        if self.settings.zero_std_groups == "keep":
            trained = groups.scored.any(dim=1)
        else:
            trained = ~_without_signal(groups)
        self._skip_update = not bool(trained.any())
        if self._skip_update or bool(trained.all()):
            return groups
        return groups.select_groups(trained)

    def _training_batch(self, groups: RolloutGroups, advantages: Tensor) -> RolloutBatch:
        """Returns the rows with a reward, with their advantages."""
        batch = groups.batch
        batch.sequence_advantages = advantages.flatten()
        if self.settings.truncated_completions == "mask":
            batch.completion_mask &= ~groups.truncated[:, None]
        if self._skip_update or bool(groups.scored.all()):
            return batch
        return groups.scored_rows()

    def token_weights(self, batch: RolloutBatch) -> Tensor:
        loss_mask = batch.loss_mask
        self._num_rows = len(batch)
        if self._skip_update:
            return torch.zeros(loss_mask.shape)
        loss_type = self.settings.loss_type
        if loss_type in ("dapo", "cispo"):
            return token_mean_weights(loss_mask)
        if loss_type == "dr_grpo":
            return loss_mask.float() / self.collector.max_new_tokens / len(batch)
        lengths = loss_mask.sum(dim=1, keepdim=True).clamp_min(1)
        return loss_mask.float() / lengths / len(batch)

    def compute_losses(self, micro: RolloutBatch) -> Iterator[LossTerm]:
        settings = self.settings
        loss_mask = micro.loss_mask
        output = self.context.roles.logps("policy", micro, self.collector.temperature)
        logps = output.logps
        old_logps = self._old_logps(micro, logps)
        per_token, is_clipped = policy_loss(
            settings.loss_type,
            logps,
            old_logps,
            required(micro.sequence_advantages),
            loss_mask,
            settings.epsilon,
            self.epsilon_high,
        )
        if settings.beta and not settings.kl_in_reward:
            per_token = per_token + settings.beta * self._kl_penalty(micro, logps, old_logps)
        weights = apply_mask(required(micro.token_weights), loss_mask)
        loss = (apply_mask(per_token, loss_mask) * weights).sum()
        stats = {
            "entropy": masked_mean(output.entropy, loss_mask),
            "clip_ratio": masked_mean(is_clipped.float(), loss_mask),
        }
        if micro.reference_logps is not None:
            stats["kl"] = masked_mean(kl_k3(logps, micro.reference_logps, loss_mask), loss_mask)
        if self._is_first_pass:
            mismatch = (logps - required(micro.sampler_logps)).abs()
            stats["sampling/sampling_logp_difference/mean"] = masked_mean(mismatch, loss_mask)
        stats["loss"] = WeightedMean(loss.detach(), len(micro) / self._num_rows)
        yield LossTerm(loss, stats)

    def _old_logps(self, micro: RolloutBatch, logps: Tensor) -> Tensor:
        """Returns the log-probs of the policy that drew the completions, (B, T). In a single pass the policy has not
        changed since, and its own are used."""
        if self.settings.old_logprobs_from == "sampler":
            return required(micro.sampler_logps)
        if micro.old_logps is None:
            return logps.detach()
        return micro.old_logps

    def _kl_penalty(
        self,
        micro: RolloutBatch,
        logps: Tensor,
        old_logps: Tensor,
    ) -> Tensor:
        """Returns KL(policy || reference) of each token with a gradient, (B, T)."""
        if self.settings.kl_estimator == "exact":
            temperature = self.collector.temperature
            return self.context.roles.full_vocab_kl(
                "policy",
                "reference",
                micro,
                temperature,
                gradient=True,
            )
        reference_logps = required(micro.reference_logps)
        return kl_penalty(
            self.settings.kl_estimator,
            logps,
            old_logps,
            reference_logps,
            micro.loss_mask,
        )

    def should_continue(self, stats: Stats) -> bool:
        self._is_first_pass = False
        return True

    def step_metrics(self, micro: RolloutBatch) -> Stats:
        if micro.reference_logps is not None:
            return {}  # `compute_losses` computes `kl` in every step
        return full_vocab_kl_metric(self.context, micro, self.collector.temperature)

    def check_metrics(self, metrics: Mapping[str, float]) -> None:
        mismatch = metrics.get("sampling/sampling_logp_difference/mean", 0.0)
        check_sampler_mismatch(mismatch, self.settings.max_logprob_mismatch, "grpo.max_logprob_mismatch")

    def diagnostics(self, metrics: Mapping[str, float]) -> Iterator[str]:
        yield from super().diagnostics(metrics)
        reward = metrics["reward"]
        if math.isnan(reward):
            return
        if self._first_reward is None:
            self._first_reward = reward
        # Groups whose completions have all become correct need no warning.
        has_learned = reward > self._first_reward + REWARD_INCREASE
        zero_std_share = metrics["frac_reward_zero_std"]
        if zero_std_share >= ZERO_STD_WARNING and not has_learned:
            yield (
                f"most groups have equal rewards and give no gradient, {zero_std_share:.0%} of this step's: the task "
                "is too hard or too easy, or groups too small; look at the rewards, raise rollout.num_generations, or "
                "begin from an SFT adapter"
            )


def _without_signal(groups: RolloutGroups) -> Tensor:
    return zero_std_groups(groups.shaped_rewards, groups.scored)


def _rollout_stats(draws: Sequence[RolloutGroups]) -> Stats:
    """Returns the metrics of all draws of a step: means, and sums of the timings."""
    stats: Stats = {}
    for groups in draws:
        add_stats(stats, groups.stats())
        num_zero_std = zero_std_groups(groups.rewards, groups.scored).sum()
        add_stats(stats, {"frac_reward_zero_std": WeightedMean(num_zero_std, groups.num_groups)})
    for name in draws[0].timings:
        stats[name] = WeightedMean(stats[name].total, 1)
    return stats
