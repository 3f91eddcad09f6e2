"""Settings of the algorithms that draw their own completions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lowrank_tune.config.base import Fraction, PositiveInt, Settings


class RolloutConfig(Settings):
    """How completions are drawn in training: from the full distribution, without top-k or top-p."""

    num_generations: Annotated[int, Field(ge=1, le=1024)] = 8
    """Completions per prompt, a group; at least 2 for grpo."""
    max_new_tokens: PositiveInt = 256
    """Maximum length of a completion in tokens."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Temperature of sampling, and of all log-probs of the update."""
    max_num_seqs: PositiveInt = 64
    """Maximum number of sequences decoded at once."""
    max_reward_failure_rate: Fraction = 0.01
    """Stops the run if the rewards failed on more than this share of its completions, from the third failure on."""


class GRPOConfig(Settings):
    """Settings of `algorithm: grpo`."""

    loss_type: Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo"] = "grpo"
    """`grpo`; `dapo` (mean over tokens); `dr_grpo` (no division by standard deviation or length); `gspo` (ratio of
    whole sequences); `cispo` (clipped weights)."""
    epsilon: Annotated[float, Field(gt=0.0)] = 0.2
    """Clip range of the ratio to the policy that drew the completions; only its lower side if `epsilon_high` is
    given."""
    epsilon_high: Annotated[float, Field(gt=0.0)] | None = None
    """Upper side of the clip range. Default: `epsilon`; 0.28 for `dapo`; 5 for `cispo`, where it is the maximum
    weight."""
    beta: Annotated[float, Field(ge=0.0)] = 0.05
    """Weight of the KL to the reference."""
    kl_in_reward: bool = False
    """Subtracts the KL from the reward of a completion, instead of adding it to the loss of each token."""
    kl_estimator: Literal["k3_ratio", "k3", "k2", "exact"] = "k3_ratio"
    """Estimator of the KL in the loss: `k3_ratio` (k3 times the ratio, which has the gradient of KL(policy ||
    reference)), `k3`, `k2`, or `exact` over the whole vocabulary."""
    num_iterations: PositiveInt = 1
    """Passes over each rollout batch."""
    old_logprobs_from: Literal["recomputed", "sampler"] = "recomputed"
    """Old log-probs of the ratio: `recomputed` by the policy, or those of the `sampler`."""
    max_logprob_mismatch: Annotated[float, Field(gt=0.0)] = 0.1
    """Stops the run if the log-probs of the sampler and of the policy differ by more than this, in nats per token on
    average."""
    truncated_completions: Literal["keep", "mask", "penalize"] = "keep"
    """A completion cut at `rollout.max_new_tokens`: `keep` trains it as it is, `mask` leaves it out of the loss,
    `penalize` subtracts `missing_eos_penalty` from its reward."""
    missing_eos_penalty: Annotated[float, Field(gt=0.0)] = 1.0
    """Penalty for `truncated_completions: penalize`."""
    zero_std_groups: Literal["keep", "drop", "resample"] = "drop"
    """A group of equal rewards has no advantage: `keep` it for its KL, `drop` it from the update, or `resample` other
    prompts in its place."""


class PPOConfig(Settings):
    """Settings of `algorithm: ppo`."""

    cliprange: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Clip range of the ratio to the policy that drew the completions."""
    entropy: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of an entropy bonus; needs a second pass through the output head."""
    num_ppo_epochs: PositiveInt = 4
    """Passes over each rollout batch."""
    num_mini_batches: PositiveInt = 1
    """Optimizer steps per pass, each on its share of the batch."""
    target_kl: Annotated[float, Field(gt=0.0)] | None = None
    """Skips the remaining passes over a batch if the updated policy differs from the one that drew the completions by
    more than this, in nats per token."""
    kl_coef: Annotated[float, Field(ge=0.0)] = 0.05
    """Weight of the KL to the reference, which is part of the reward of every token. With `kl_target`, the initial
    weight."""
    kl_target: Annotated[float, Field(gt=0.0)] | None = None
    """KL to the reference, in nats per token, that the weight is adapted to. Default: the weight is constant."""
    kl_gain: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """Gain of this adaptation: one step changes the weight by at most the share 0.2 * `kl_gain`."""
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Discount factor of later rewards."""
    lam: Fraction = 0.95
    """Lambda of generalized advantage estimation: 1 uses the rewards alone, 0 relies on the value."""
    truncated_completions: Literal["penalize", "bootstrap", "keep"] = "penalize"
    """A completion without an end token: `penalize` subtracts `missing_eos_penalty` from its score; `bootstrap` gives
    it no score and uses the value of what follows; `keep` scores it as it is."""
    missing_eos_penalty: Annotated[float, Field(gt=0.0)] = 1.0
    """Penalty for `truncated_completions: penalize`."""
    critic: Literal["separate", "shared"] = "separate"
    """Value model: `separate` (an adapter with a head of its own) or `shared` (a head on the policy's trunk, whose loss
    updates the policy's adapter too)."""
    critic_init: Literal["policy", "reward"] = "policy"
    """Initial adapter of the value: `policy` (a new one on what is below the policy) or `reward` (a copy of the adapter
    `reward` with its head, which then predicts the weighted score)."""
    value_learning_rate: Annotated[float, Field(gt=0.0)] | None = None
    """Peak learning rate of the value. Default: `train.learning_rate`."""
    vf_coef: Annotated[float, Field(gt=0.0)] = 0.1
    """For `critic: shared`: weight of the value loss beside the policy loss."""
    cliprange_value: Annotated[float, Field(ge=0.0)] = 0.2
    """Clip range of a value around its value at the rollout; 0 for no clipping."""
    max_logprob_mismatch: Annotated[float, Field(gt=0.0)] = 0.1
    """Stops the run if the log-probs of the sampler and of the policy differ by more than this, in nats per token on
    average."""
