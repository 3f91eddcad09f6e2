"""PPO: proximal policy optimization (arXiv:1707.06347) as it is used on language (arXiv:1909.08593, arXiv:2203.02155).

The policy writes completions y; old is that policy, ref the reference. Of token t, over the tokens y_1 ... y_n of one
completion:

    r_t = -lambda (log old(y_t) - log ref(y_t)),   and r_n also has the score R(x, y)
    A_t = delta_t + gamma L A_(t+1),   delta_t = r_t + gamma V_(t+1) - V_t,   G_t = A_t + V_t          GAE, L its `lam`
    a_t = (A_t - mean A) / std A over all tokens of the rollouts

    policy   L = sum_t w_t [ -min(rho a, clip(rho, 1 - c, 1 + c) a) - e H ],   rho_t = p(y_t) / old(y_t), H the entropy
    value    L = sum_t w_t max((v_t - G_t)^2, (clip(v_t, V_t - d, V_t + d) - G_t)^2) / 2

w is 1 / (tokens of the minibatch). V_t is the value of what stands before token t; V_(n+1) is 0 where the completion
ended. One that was cut loses `missing_eos_penalty` (`penalize`), is scored as it is (`keep`), or has no score yet and
V_(n+1) is the value of all that was written (`bootstrap`). Rollouts are passed over `num_ppo_epochs` times in
`num_mini_batches`; once old and policy lie `target_kl` nats a token apart the rest of the passes is left out.

The value is an adapter and an fp32 head of its own beside the policy's adapter, or a head on the policy's trunk. The
two losses are two graphs, one alive at a time: no parameter moves between their backward passes, so the gradients add
up to those of one joint backward, also where the trunk is shared. lambda is fixed, or follows the KL to a target
(arXiv:1909.08593, equation 4), a step at a time.

Metrics: `reward` R before penalties, `rewards/NAME/mean` each reward by itself; `scores` what stands at the last
token; `kl` to the reference and `approx_kl` to old, nats a token, k3; `kl_coef` lambda; `value_loss`;
`explained_variance` of G by V; `value` mean V; `clip_ratio` and `value_clip_ratio` the share of tokens where the clip
stops the gradient; `entropy` nats; `completions/mean_length` tokens a completion; `completions/clipped_ratio` the share
without an end; `sampling/sampling_logp_difference/mean` mean |log old - log p_sampler|; `loss` the policy's L.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowrank_tune.algorithms.base import AlgorithmContext, LossTerm, StepBatch
from lowrank_tune.algorithms.reference_check import check_reference
from lowrank_tune.algorithms.reward_failures import RewardFailure
from lowrank_tune.algorithms.rollouts import RolloutCollector, map_micro_batches
from lowrank_tune.batch import Batch
from lowrank_tune.errors import TrainingError
from lowrank_tune.functional import (
    apply_mask,
    explained_variance,
    gae,
    masked_mean,
    step_seed,
    token_mean_weights,
    whiten,
)
from lowrank_tune.stats import Stats, WeightedMean

MAX_KL_CONTROLLER_ERROR = (
    0.2  # arXiv:1909.08593: a KL far off moves the coefficient no faster than one that is 20 % off
)
TRUNCATED_WARN_FRACTION = 0.8
MINIBATCH_SEED_TAG = 15  # tag of the seed that mixes minibatches; draws of a step are numbered from 0


def token_rewards(
    old_logps: Tensor,
    reference_logps: Tensor,
    mask: Tensor,
    score: Tensor,
    kl_coef: float,
) -> Tensor:
    """old, reference, says (B, T), score (B,) -> what each token earns (B, T): minus its KL, and at the row's last
    token the score."""
    rewards = -kl_coef * apply_mask(old_logps - reference_logps, mask)
    last = mask & (mask.long().flip(1).cumsum(dim=1).flip(1) == 1)
    return rewards + apply_mask(score[:, None].to(rewards.dtype).expand_as(rewards), last)


def policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cliprange: float,
) -> tuple[Tensor, Tensor]:
    """logps, old, advantages, says (B, T) -> the loss of each token and whether the clip stopped its gradient; (B, T)
    each."""
    advantages = apply_mask(advantages, mask)
    ratio = apply_mask(logps - old_logps, mask).exp()
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange)
    is_clipped = (clipped * advantages < ratio * advantages) & mask
    return apply_mask(-torch.minimum(ratio * advantages, clipped * advantages), mask), is_clipped


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    cliprange_value: float,
) -> tuple[Tensor, Tensor]:
    """values, old, returns, says (B, T) -> the loss of each token and whether the clip stopped its gradient; clip 0 for
    none."""
    values, old_values, returns = (apply_mask(tensor, mask) for tensor in (values, old_values, returns))
    unclipped = (values - returns).square() / 2
    if not cliprange_value:
        return unclipped, torch.zeros_like(mask)
    clipped = (
        torch.minimum(torch.maximum(values, old_values - cliprange_value), old_values + cliprange_value) - returns
    ).square() / 2
    return torch.maximum(unclipped, clipped), (clipped > unclipped) & mask


def kl_k3(logps: Tensor, other_logps: Tensor, mask: Tensor) -> Tensor:
    """KL(p || other) of each token from one draw of p: e^d - d - 1, d = log other - log p; never negative, (B, T)."""
    d = apply_mask(other_logps - logps, mask)
    return torch.expm1(d) - d


def adapt_kl_coef(kl_coef: float, kl: float, target: float, gain: float) -> float:
    """The KL's weight in the next step: up where the KL is above its target, down where it is below (arXiv:1909.08593,
    equation 4)."""
    return kl_coef * (1 + gain * max(-MAX_KL_CONTROLLER_ERROR, min(MAX_KL_CONTROLLER_ERROR, kl / target - 1)))


@dataclass
class PPOBatch(StepBatch):
    """The rollouts `num_ppo_epochs` times, each time in other `num_mini_batches` of nearly the same number of rows."""

    num_ppo_epochs: int = 1
    num_mini_batches: int = 1
    seed: int = 0

    def minibatches(self) -> Iterator[Batch]:
        for epoch in range(self.num_ppo_epochs):
            if self.num_mini_batches == 1:
                yield self.batch
                continue
            stream = torch.Generator().manual_seed(step_seed(self.seed, epoch))
            for rows in torch.randperm(len(self.batch), generator=stream).tensor_split(self.num_mini_batches):
                if len(rows):
                    yield self.batch.select_rows(rows.sort().values)


@dataclass
class CriticConfig:
    """What the value is: a role with a scalar head, and how much its loss counts."""

    vf_coef: float = 1.0
    cliprange_value: float = 0.2
    role: str = "value"


@dataclass
class GAEConfig:
    """How rewards are handed back to the tokens before: GAE's two numbers, and what becomes of a completion that was
    cut."""

    gamma: float = 1.0
    lam: float = 0.95
    truncated_completions: str = "penalize"
    missing_eos_penalty: float = 1.0


@dataclass
class KLControlConfig:
    """What holds the policy: lambda, by choice towards a KL in nats a token, and how far one step's passes may go."""

    kl_coef: float = 0.05
    kl_target: float | None = None
    kl_gain: float = 0.1
    target_kl: float | None = None


@dataclass
class UpdateConfig:
    """How a rollout batch is learned from: the policy's clip, the weight of the entropy, passes and minibatches."""

    cliprange: float = 0.2
    entropy_coef: float = 0.0
    num_ppo_epochs: int = 1
    num_mini_batches: int = 1
    max_logprob_mismatch: float = 0.1


@dataclass
class PPO:
    """The three verbs."""

    context: AlgorithmContext
    collector: RolloutCollector
    critic: CriticConfig = field(default_factory=CriticConfig)
    gae_config: GAEConfig = field(default_factory=GAEConfig)
    kl_control: KLControlConfig = field(default_factory=KLControlConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    rows_per_unit: int = 1
    kl_coef: float = field(init=False)
    """lambda of the next step."""
    _num_rows: int = field(init=False, default=1)
    _skip_update: bool = field(init=False, default=False)
    _num_completions: int = field(init=False, default=0)
    _reward_failures: list[RewardFailure] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.kl_coef = self.kl_control.kl_coef

    def collect(self, step: int) -> StepBatch:
        rollout = self.collector.collect(step, 0)
        self._num_completions = len(rollout.failed_rewards)
        self._reward_failures = [failure for failure in rollout.failed_rewards if failure is not None]
        has_reward = rollout.scored.flatten()
        self._skip_update = not bool(has_reward.any())  # then there is nothing to learn, and the step weighs nothing
        if self._skip_update:
            rows = torch.arange(len(has_reward))
        else:
            rows = has_reward.nonzero().squeeze(1)
        if len(rows) == len(has_reward):
            batch = rollout.batch
        else:
            batch = rollout.batch.select_rows(rows)
        loss_mask = batch.loss_mask
        old_logps = self.collector.logps("policy", batch)
        reference_logps = self.collector.logps("reference", batch)
        mismatch = masked_mean((old_logps - batch.extra["sampler"]).abs(), loss_mask)
        self._check_sampler(mismatch.value)
        values, final_values = self._values(batch)
        scores, bootstrap_values = self._terminal_rewards_and_bootstrap_values(
            rollout.shaped_rewards.flatten()[rows].nan_to_num(0.0),
            rollout.truncated[rows],
            final_values,
        )
        rewards = token_rewards(old_logps, reference_logps, loss_mask, scores, self.kl_coef)
        advantages = gae(rewards, values, loss_mask, bootstrap_values, self.gae_config.gamma, self.gae_config.lam)
        returns = apply_mask(values, loss_mask) + advantages
        whitened = whiten(advantages, loss_mask)
        batch.extra |= {"old": old_logps, "values": values, "returns": returns, "advantages": whitened}
        kl = masked_mean(kl_k3(old_logps, reference_logps, loss_mask), loss_mask)
        stats = (
            rollout.stats()
            | self.collector.failures.stats(self._reward_failures)
            | {
                "scores": WeightedMean(scores.sum(), len(scores)),
                "kl": kl,
                "kl_coef": WeightedMean(self.kl_coef, 1),
                "sampling/sampling_logp_difference/mean": mismatch,
                "value": masked_mean(values, loss_mask),
            }
        )
        if (
            explained := explained_variance(values, returns, loss_mask)
        ) == explained:  # no number where all returns are one
            stats["explained_variance"] = WeightedMean(explained, 1)
        row_advantages = torch.zeros(len(has_reward)).index_copy(
            0,
            rows,
            whitened.sum(dim=1) / loss_mask.sum(dim=1).clamp_min(1),
        )
        self.collector.log_group(step, rollout, row_advantages.view_as(rollout.rewards))
        if self.kl_control.kl_target is not None and kl.count:
            self.kl_coef = adapt_kl_coef(self.kl_coef, kl.value, self.kl_control.kl_target, self.kl_control.kl_gain)
        return PPOBatch(
            batch,
            stats,
            self.update.num_ppo_epochs,
            self.update.num_mini_batches,
            self.collector.seed_of(16 * step + MINIBATCH_SEED_TAG),
        )

    def _check_sampler(self, mismatch: float) -> None:
        if mismatch > self.update.max_logprob_mismatch:
            raise TrainingError(
                f"the sampler's log-probs and the policy's differ by {mismatch:.3f} nats a token, more than "
                f"ppo.max_logprob_mismatch, {self.update.max_logprob_mismatch:g}: ratios would compare what was never "
                "drawn"
            )

    def _terminal_rewards_and_bootstrap_values(
        self,
        scores: Tensor,
        truncated: Tensor,
        final_values: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The score at each row's last token, and the value behind it; (B,) each. `final_values` are the values of
        all that was written."""
        zeros = torch.zeros_like(final_values)
        if (
            self.gae_config.truncated_completions == "bootstrap"
        ):  # the outcome is still to come, and the value stands for it
            return torch.where(truncated, torch.zeros_like(scores), scores), torch.where(truncated, final_values, zeros)
        return (
            scores - self.gae_config.missing_eos_penalty * truncated.double()
            if self.gae_config.truncated_completions == "penalize"
            else scores,
            zeros,
        )

    def _values(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The value before each token (B, T), and behind the last one (B,); no gradient, on the CPU."""
        roles, (rows, columns) = self.context.roles, batch.input_ids.shape
        states = torch.zeros(rows, columns)

        def read(units: Sequence[int]) -> Tensor:
            here = slice(units[0], units[-1] + 1)
            part = Batch(batch.input_ids[here], batch.attention_mask[here], batch.completion_mask[here]).to(
                roles.base.device
            )
            with roles.inference_mode():
                return roles.scores(self.critic.role, part).cpu()

        for units, values in map_micro_batches(roles, rows, columns, self.collector.micro_tokens, read):
            states[units[0] : units[-1] + 1] = values
        return shift_right(states), states.gather(1, (batch.lengths - 1).clamp_min(0)[:, None]).squeeze(1)

    def token_weights(self, batch: Batch) -> Tensor:
        self._num_rows = len(batch)
        if self._skip_update:
            return torch.zeros(batch.input_ids.shape)
        return token_mean_weights(batch.loss_mask)

    def compute_losses(self, micro: Batch) -> Iterator[LossTerm]:
        yield self._policy_term(micro)
        yield self._value_term(micro)

    def _policy_term(self, micro: Batch) -> LossTerm:
        assert micro.token_weights is not None, "weigh comes before terms"
        loss_mask = micro.loss_mask
        extra = micro.extra
        entropy_coef = self.update.entropy_coef
        output = self.context.roles.logps(
            "policy",
            micro,
            self.collector.temperature,
            entropy_gradient=entropy_coef > 0,
        )
        per_token, is_clipped = policy_loss(
            output.logps,
            extra["old"],
            extra["advantages"],
            loss_mask,
            self.update.cliprange,
        )
        if entropy_coef:
            per_token = per_token - entropy_coef * apply_mask(output.entropy, loss_mask)
        loss = (per_token * apply_mask(micro.token_weights, loss_mask)).sum()
        return LossTerm(
            loss,
            {
                "loss": WeightedMean(loss.detach(), len(micro) / self._num_rows),
                "entropy": masked_mean(output.entropy, loss_mask),
                "clip_ratio": masked_mean(is_clipped.float(), loss_mask),
                "approx_kl": masked_mean(kl_k3(extra["old"], output.logps, loss_mask), loss_mask),
            },
        )

    def _value_term(self, micro: Batch) -> LossTerm:
        assert micro.token_weights is not None, "weigh comes before terms"
        loss_mask = micro.loss_mask
        extra = micro.extra
        values = shift_right(self.context.roles.scores(self.critic.role, micro))
        per_token, is_clipped = value_loss(
            values,
            extra["values"],
            extra["returns"],
            loss_mask,
            self.critic.cliprange_value,
        )
        loss = self.critic.vf_coef * (per_token * apply_mask(micro.token_weights, loss_mask)).sum()
        return LossTerm(
            loss,
            {
                "value_loss": masked_mean(per_token, loss_mask),
                "value_clip_ratio": masked_mean(is_clipped.float(), loss_mask),
            },
        )

    def eval_metrics(self, micro: Batch) -> Stats:
        raise AssertionError("held-out rows of PPO are questions, not rows")

    def step_metrics(self, micro: Batch) -> Stats:
        return {}  # every step has its KL

    def check(self, micro: Batch, step: int) -> None:
        if self.context.fresh and step == 0:
            check_reference(
                self.context.roles,
                micro,
                expect_equal=True,
                description=self.context.reference_description,
            )

    def iter_warnings(self, metrics: Mapping[str, float]) -> Iterator[str]:
        yield from self.collector.failures.iter_warnings(self._reward_failures, self._num_completions)
        truncated = metrics["completions/clipped_ratio"]
        if truncated > TRUNCATED_WARN_FRACTION:
            yield (
                f"most completions have no end, {truncated:.0%} of this step's: their rewards are not those of whole "
                "answers; raise rollout.max_new_tokens, or begin from an SFT adapter that ends its answers"
            )

    def should_continue(self, stats: Stats) -> bool:
        return self.kl_control.target_kl is None or not stats["approx_kl"].value > self.kl_control.target_kl

    def state(self) -> dict[str, float]:
        return {"coefficient": self.kl_coef, **self.collector.failures.state()}

    def restore(self, state: Mapping[str, float]) -> None:
        self.kl_coef = state["coefficient"]
        self.collector.failures.restore(state)


def shift_right(states: Tensor) -> Tensor:
    """Values of what stands up to each token -> of what stands before it, which is the state that it was written in;
    (B, T)."""
    return torch.nn.functional.pad(states[:, :-1], (1, 0))
