"""GRPO: group relative policy optimization (arXiv:2402.03300, equations 3 and 4) and its relatives, by name.

n completions y_i of one prompt earn R_i;  A_i = (R_i - mean R) / (std R + 1e-4), the population's std over the group.
rho_it = p(y_it) / p_old(y_it), old being the policy that wrote the completions. N completions in the step, m_it what
the policy wrote.

    L = sum_it w_it [ -min(rho A, clip(rho, 1 - low, 1 + high) A) + lambda KL(p || ref) ]

grpo      w = 1 / (N |y_i|): every completion counts alike
dapo      w = 1 / (tokens of the step): every token counts alike; high 0.28                           arXiv:2503.14476
dr_grpo   w = 1 / (N max_new_tokens), A = R - mean R: neither length nor spread divides               arXiv:2503.20783
gspo      grpo's weights, rho of the whole sequence: exp of the mean log-ratio a token                arXiv:2507.18071
cispo     dapo's weights, -sg(min(rho, high)) A log p: the weight is clipped, no gradient is lost;
          high 5                                                                                      arXiv:2506.13585

A completion that no reward can be told for (`reward_failures.py`) leaves its group before anything is counted. A group
whose rewards are all equal (within 1e-6), or that has no two left, has A = 0 exactly. KL in the loss a token, d = log
ref - log p: k3_ratio (e^d - d - 1) rho, whose gradient is that of KL(p || ref); k3 without rho; k2 d^2 / 2; exact, over
the whole vocabulary. KL in the reward: R_i loses lambda sum_t (log p_old - log ref).

Metrics: `reward` R before any KL, `reward_std` its std in a group, `rewards/NAME/mean` each reward by itself;
`frac_reward_zero_std` the share of groups without signal; `completions/mean_length` tokens a completion,
`completions/clipped_ratio` the share cut by the limit; `kl` to the reference, nats a token; `entropy` nats;
`clip_ratio` the share of tokens where the clip stops the gradient; `sampling/sampling_logp_difference/mean` mean
|log p - log p_sampler| in the first pass; `loss` is L; `rollout_seconds` and `reward_seconds` the time of collecting;
`reward_errors` and `reward_timeouts` how many completions of the step a reward failed on, from the first such on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_tune.algorithms.base import AlgorithmContext, LossTerm, StepBatch
from lowrank_tune.algorithms.reference_check import check_reference
from lowrank_tune.algorithms.reward_failures import RewardFailure
from lowrank_tune.algorithms.rollouts import RolloutBatch, RolloutCollector
from lowrank_tune.batch import Batch
from lowrank_tune.errors import TrainingError
from lowrank_tune.functional import apply_mask, masked_mean, token_mean_weights
from lowrank_tune.stats import Stats, WeightedMean, add_stats

STD_EPS = 1e-4
REWARD_EPS = 1e-6
DEFAULT_EPSILON_HIGH = {"dapo": 0.28, "cispo": 5.0}
REWARD_INCREASE = 0.05  # above the first step's reward: something was learned
MAX_RESAMPLES = 4  # rollouts of one step, where groups without a reward std are replaced


def group_advantages(rewards: Tensor, scale_by_std: bool = True, scored: Tensor | None = None) -> Tensor:
    """Rewards (groups, n) -> advantages (groups, n); exactly 0 for a group of equal rewards, and where `scored` is
    False."""
    rewards = rewards.double()
    if scored is not None and not bool(scored.all()):  # such a group is what is left of it
        advantages = torch.zeros(rewards.shape)
        for group in scored.any(dim=1).nonzero().flatten().tolist():
            advantages[group, scored[group]] = group_advantages(rewards[group, scored[group]][None], scale_by_std)[0]
        return advantages
    centered = rewards - rewards.mean(dim=1, keepdim=True)
    if scale_by_std:
        centered = centered / (rewards.std(dim=1, keepdim=True, correction=0) + STD_EPS)
    return torch.where(zero_std_groups(rewards)[:, None], torch.zeros_like(centered), centered).float()


def zero_std_groups(rewards: Tensor, scored: Tensor | None = None) -> Tensor:
    """(groups, n) -> (groups,) bool: all that is `scored` is equal, or one completion at most, so that there is nothing
    to learn from."""
    if scored is not None:
        rewards = torch.where(scored, rewards, torch.inf)
        lowest = rewards.amin(dim=1)
        highest = torch.where(scored, rewards, -torch.inf).amax(dim=1)
        return highest - lowest <= REWARD_EPS
    return rewards.amax(dim=1) - rewards.amin(dim=1) <= REWARD_EPS


def policy_loss(
    loss_type: str,
    logps: Tensor,
    old_logps: Tensor,
    advantage: Tensor,
    mask: Tensor,
    epsilon_low: float,
    epsilon_high: float,
) -> tuple[Tensor, Tensor]:
    """logps, old, says (B, T), advantage (B,) -> the loss of each token and whether the clip stopped its gradient; (B,
    T) each."""
    log_ratio = apply_mask(logps - old_logps, mask)
    if loss_type == "gspo":
        log_ratio = (log_ratio.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp_min(1)).expand_as(
            log_ratio
        )
    ratio = log_ratio.exp()
    advantage = advantage[:, None]
    if loss_type == "cispo":
        clipped_ratio = ratio.detach().clamp_max(epsilon_high)
        return apply_mask(-clipped_ratio * advantage * logps, mask), (ratio > epsilon_high) & mask
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    is_clipped = (clipped * advantage < ratio * advantage) & mask
    return apply_mask(-torch.minimum(ratio * advantage, clipped * advantage), mask), is_clipped


def kl_penalty(
    estimator: str,
    logps: Tensor,
    old_logps: Tensor,
    reference_logps: Tensor,
    mask: Tensor,
) -> Tensor:
    """logps, old, reference (B, T) -> the KL term of each token (B, T)."""
    d = apply_mask(reference_logps - logps, mask)
    if estimator == "k2":
        return d.square() / 2
    k3 = torch.expm1(d) - d
    if estimator == "k3_ratio":
        return k3 * apply_mask(logps - old_logps, mask).exp()
    return k3


@dataclass
class GRPOBatch(StepBatch):
    """The rollouts, `num_iterations` times."""

    num_iterations: int = 1

    def minibatches(self) -> Iterator[Batch]:
        for _ in range(self.num_iterations):
            yield self.batch


class GRPO:
    """The three verbs. `epsilon_low` and `epsilon_high` are the clips, `beta` is lambda."""

    rows_per_unit = 1

    def __init__(
        self,
        context: AlgorithmContext,
        collector: RolloutCollector,
        loss_type: str = "grpo",
        epsilon_low: float = 0.2,
        epsilon_high: float | None = None,
        beta: float = 0.05,
        kl_in_reward: bool = False,
        kl_estimator: str = "k3_ratio",
        num_iterations: int = 1,
        old_logps_source: str = "recomputed",
        max_logprob_mismatch: float = 0.1,
        truncated_completions: str = "keep",
        missing_eos_penalty: float = 1.0,
        zero_std_groups: str = "drop",
    ) -> None:
        self.context = context
        self.collector = collector
        self.loss_type = loss_type
        self.epsilon_low = epsilon_low
        if epsilon_high is None:
            self.epsilon_high = DEFAULT_EPSILON_HIGH.get(loss_type, 0.2)
        else:
            self.epsilon_high = epsilon_high
        self.beta = beta
        self.kl_in_reward = kl_in_reward
        self.kl_estimator = kl_estimator
        self.num_iterations = num_iterations
        self.old_logps_source = old_logps_source
        self.max_logprob_mismatch = max_logprob_mismatch
        self.truncated_completions = truncated_completions
        self.missing_eos_penalty = missing_eos_penalty
        self.zero_std_groups = zero_std_groups
        self._first_pass = True
        self._num_rows = 1
        self._skip_update = False
        self._first_reward: float | None = None
        self._num_completions = 0
        self._reward_failures = list[RewardFailure]()

    def collect(self, step: int) -> StepBatch:
        rollouts = [self._collect_rollouts(step, 0)]
        num_groups = rollouts[0].num_groups
        while (
            self.zero_std_groups == "resample"
            and len(rollouts) < MAX_RESAMPLES
            and (missing := num_groups - sum(h.num_informative_groups(zero_std_groups) for h in rollouts))
        ):
            rollouts.append(self._collect_rollouts(step, len(rollouts), missing))
        stats: Stats = {}
        for rollout in rollouts:
            add_stats(
                stats,
                rollout.stats()
                | {
                    "frac_reward_zero_std": WeightedMean(
                        zero_std_groups(rollout.rewards, rollout.scored).sum(), rollout.num_groups
                    )
                },
            )
        stats |= {name: WeightedMean(stats[name].total, 1) for name in rollouts[0].timings}  # of all draws together
        rollout = RolloutBatch.concat(rollouts, self.collector.pad_id)
        self._num_completions = len(rollout.failed_rewards)
        self._reward_failures = [failure for failure in rollout.failed_rewards if failure is not None]
        stats |= self.collector.failures.stats(self._reward_failures)
        # Where nothing can be told apart the step weighs nothing: what KL alone leaves is noise there, and Adam walks
        # at its full rate.
        if self.zero_std_groups != "keep":
            informative = ~zero_std_groups(rollout.shaped_rewards, rollout.scored)
        else:
            informative = rollout.scored.any(dim=1)
        self._skip_update = not bool(informative.any())
        if not (self._skip_update or bool(informative.all())):
            rollout = rollout.select_groups(informative)
        advantages = group_advantages(rollout.shaped_rewards, self.loss_type != "dr_grpo", rollout.scored)
        self.collector.log_group(step, rollout, advantages)
        batch = self._training_batch(rollout, advantages)
        if self.num_iterations > 1 and self.old_logps_source == "recomputed":
            batch.extra["old"] = self.collector.logps("policy", batch)
        self._first_pass = True
        return GRPOBatch(batch, stats, self.num_iterations)

    def _training_batch(self, rollout: RolloutBatch, advantages: Tensor) -> Batch:
        """What is trained on: the rows that were scored, with their advantages."""
        batch = rollout.batch
        batch.extra["advantage"] = advantages.flatten()
        if self.truncated_completions == "mask":
            batch.completion_mask &= ~rollout.truncated[:, None]
        if self._skip_update or bool(rollout.scored.all()):
            return batch
        return rollout.scored_rows()

    def _collect_rollouts(self, step: int, draw: int, prompts: int | None = None) -> RolloutBatch:
        """Completions with what they earn: reward, minus the penalty of being cut, minus the KL where that stands in
        the reward."""
        rollout = self.collector.collect(step, draw, prompts)
        batch = rollout.batch
        if self.beta:
            if self.kl_in_reward or self.kl_estimator != "exact":
                batch.extra["reference_logps"] = self.collector.logps("reference", batch)
            if self.kl_in_reward:
                k1 = apply_mask(batch.extra["sampler"] - batch.extra["reference_logps"], batch.loss_mask).sum(dim=1)
                rollout.shaped_rewards = rollout.shaped_rewards - self.beta * k1.view_as(rollout.shaped_rewards)
        if self.truncated_completions == "penalize":
            rollout.shaped_rewards = (
                rollout.shaped_rewards
                - self.missing_eos_penalty * rollout.truncated.view_as(rollout.shaped_rewards).float()
            )
        return rollout

    def token_weights(self, batch: Batch) -> Tensor:
        loss_mask = batch.loss_mask
        self._num_rows = len(batch)
        if self._skip_update:
            return torch.zeros(loss_mask.shape)
        if self.loss_type in ("dapo", "cispo"):
            return token_mean_weights(loss_mask)
        lengths = (
            loss_mask.sum(dim=1, keepdim=True).clamp_min(1)
            if self.loss_type != "dr_grpo"
            else self.collector.max_new_tokens
        )
        return loss_mask.float() / lengths / len(batch)

    def compute_losses(self, micro: Batch) -> Iterator[LossTerm]:
        assert micro.token_weights is not None, "weigh comes before terms"
        loss_mask = micro.loss_mask
        extra = micro.extra
        temperature = self.collector.temperature
        output = self.context.roles.logps("policy", micro, temperature)
        logps = output.logps
        entropy = output.entropy
        if self.old_logps_source == "sampler":
            old_logps = extra["sampler"]
        else:
            old_logps = extra.get("old", logps.detach())
        per_token, is_clipped = policy_loss(
            self.loss_type,
            logps,
            old_logps,
            extra["advantage"],
            loss_mask,
            self.epsilon_low,
            self.epsilon_high,
        )
        stats = {
            "entropy": masked_mean(entropy, loss_mask),
            "clip_ratio": masked_mean(is_clipped.float(), loss_mask),
        }
        if self.beta and not self.kl_in_reward:
            if self.kl_estimator == "exact":
                penalty = self.context.roles.full_vocab_kl("policy", "reference", micro, temperature, gradient=True)
            else:
                penalty = kl_penalty(self.kl_estimator, logps, old_logps, extra["reference_logps"], loss_mask)
            per_token = per_token + self.beta * penalty
        if "reference_logps" in extra:
            stats["kl"] = masked_mean(
                kl_penalty("k3", logps, old_logps, extra["reference_logps"], loss_mask), loss_mask
            )
        if self._first_pass:
            stats["sampling/sampling_logp_difference/mean"] = masked_mean((logps - extra["sampler"]).abs(), loss_mask)
        loss = (apply_mask(per_token, loss_mask) * apply_mask(micro.token_weights, loss_mask)).sum()
        yield LossTerm(loss, stats | {"loss": WeightedMean(loss.detach(), len(micro) / self._num_rows)})

    def eval_metrics(self, micro: Batch) -> Stats:
        raise AssertionError("held-out rows of GRPO are questions, not rows")

    def step_metrics(self, micro: Batch) -> Stats:
        if "reference_logps" in micro.extra:
            return {}  # the loss has it on every step
        return {
            "kl": masked_mean(
                self.context.roles.full_vocab_kl("policy", "reference", micro, self.collector.temperature),
                micro.loss_mask,
            )
        }

    def check(self, micro: Batch, step: int) -> None:
        if self.context.fresh and step == 0:
            check_reference(
                self.context.roles,
                micro,
                expect_equal=True,
                description=self.context.reference_description,
            )

    def iter_warnings(self, metrics: Mapping[str, float]) -> Iterator[str]:
        mismatch = metrics.get("sampling/sampling_logp_difference/mean", 0.0)
        if mismatch > self.max_logprob_mismatch:
            raise TrainingError(
                f"the sampler's log-probs and the policy's differ by {mismatch:.3f} nats a token, more than "
                f"grpo.max_logprob_mismatch, {self.max_logprob_mismatch:g}: ratios would compare what was never drawn"
            )
        yield from self.collector.failures.iter_warnings(self._reward_failures, self._num_completions)
        if self._first_reward is None and not math.isnan(metrics["reward"]):
            self._first_reward = metrics["reward"]
        first = math.inf if self._first_reward is None else self._first_reward
        # groups that all became right are no trouble
        if metrics["frac_reward_zero_std"] >= 0.8 and metrics["reward"] <= first + REWARD_INCREASE:
            yield (
                f"most groups have equal rewards and give no gradient, {metrics['frac_reward_zero_std']:.0%} of this "
                "step's: the task is too hard or too easy, or groups too small; look at the rewards, raise "
                "rollout.num_generations, or begin from an SFT adapter"
            )

    def should_continue(self, stats: Stats) -> bool:
        self._first_pass = False
        return True

    def state(self) -> dict[str, float]:
        return self.collector.failures.state()

    def restore(self, state: Mapping[str, float]) -> None:
        self.collector.failures.restore(state)
