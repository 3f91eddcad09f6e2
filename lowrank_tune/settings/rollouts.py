"""Algorithms that learn from completions of their own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lowrank_tune.settings.common import Fraction, PositiveInt, Settings


class RolloutConfig(Settings):
    """How completions are drawn while training: always from the full distribution."""

    num_generations: Annotated[int, Field(ge=1, le=1024)] = 8
    """Completions of each prompt: a group, for grpo of 2 at least."""
    max_new_tokens: PositiveInt = 256
    """Longest completion in tokens."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Temperature, of sampling and of all log-probs of the update."""
    max_num_seqs: PositiveInt = 64
    """Sequences that are decoded at once."""
    max_reward_failure_rate: Fraction = 0.01
    """Stops the run when the rewards failed on more than this share of its completions, from the third such on."""


class GRPOConfig(Settings):
    """What `algorithm: grpo` optimizes."""

    loss_type: Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo"] = "grpo"
    """GRPO; DAPO's token mean; Dr. GRPO (no division by spread or length); GSPO (ratio of whole sequences); CISPO
    (clipped weights)."""
    epsilon: Annotated[float, Field(gt=0.0)] = 0.2
    """How far the ratio to the sampling policy may move before the gradient stops; the lower bound alone where
    `epsilon_high` is given."""
    epsilon_high: Annotated[float, Field(gt=0.0)] | None = None
    """The upper bound, where it is not `epsilon` (0.28 for `dapo`; for `cispo` the largest weight, 5)."""
    beta: Annotated[float, Field(ge=0.0)] = 0.05
    """Weight of the KL to the reference."""
    kl_in_reward: bool = False
    """Subtracts the KL from the reward of a completion, instead of adding it to the loss of a token."""
    kl_estimator: Literal["k3_ratio", "k3", "k2", "exact"] = "k3_ratio"
    """Of the KL in the loss: k3 times the ratio (the gradient of KL(policy || reference)), k3, k2, or exact over the
    whole vocabulary."""
    num_iterations: PositiveInt = 1
    """Passes over each rollout batch."""
    old_logprobs_from: Literal["recomputed", "sampler"] = "recomputed"
    """The old log-probs of the ratio: computed again by the policy, or those of the sampler."""
    max_logprob_mismatch: Annotated[float, Field(gt=0.0)] = 0.1
    """Nats a token between the sampler's log-probs and the policy's, at which the run stops."""
    truncated_completions: Literal["keep", "mask", "penalize"] = "keep"
    """A completion cut by the limit is trained as it is, left out of the loss, or loses `missing_eos_penalty`."""
    missing_eos_penalty: Annotated[float, Field(gt=0.0)] = 1.0
    """For `truncated_completions: penalize`."""
    zero_std_groups: Literal["keep", "drop", "resample"] = "drop"
    """A group of equal rewards has no advantage: kept for its KL, left out of the update, or replaced by other
    prompts."""


class PPOConfig(Settings):
    """What `algorithm: ppo` optimizes."""

    cliprange: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """How far the ratio to the policy that wrote may move before the gradient stops."""
    entropy: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of an entropy bonus; it costs a second pass through the output head."""
    num_ppo_epochs: PositiveInt = 4
    """Passes over each rollout batch."""
    num_mini_batches: PositiveInt = 1
    """Optimizer steps of each pass, each on its share of the batch."""
    target_kl: Annotated[float, Field(gt=0.0)] | None = None
    """Nats a token between the policy that wrote and the updated one, above which the rest of the passes over a batch
    is left out."""
    kl_coef: Annotated[float, Field(ge=0.0)] = 0.05
    """Weight of the KL to the reference, a part of every token's reward; with `kl_target` where it begins."""
    kl_target: Annotated[float, Field(gt=0.0)] | None = None
    """Nats a token of KL to the reference that the weight is steered to. Without it the weight stays."""
    kl_gain: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """How fast the weight is steered: by a fifth of this a step at most."""
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Discount of what is earned a token later."""
    lam: Fraction = 0.95
    """Generalized advantage estimation: 1 trusts what was earned, 0 the value."""
    truncated_completions: Literal["penalize", "bootstrap", "keep"] = "penalize"
    """A completion without an end loses `missing_eos_penalty`; or has no score, and its value stands for what is to
    come; or is scored as it is."""
    missing_eos_penalty: Annotated[float, Field(gt=0.0)] = 1.0
    """For `truncated_completions: penalize`."""
    critic: Literal["separate", "shared"] = "separate"
    """What values tokens: an adapter with a head of its own, or a head on the policy's trunk, whose loss moves the
    policy's adapter too."""
    critic_init: Literal["policy", "reward"] = "policy"
    """Where the value's adapter begins: fresh on what lies below the policy, or as a copy of the adapter `reward` with
    its head, which then foretells the weighted score."""
    value_learning_rate: Annotated[float, Field(gt=0.0)] | None = None
    """Peak learning rate of the value; `train.learning_rate` where it is not given."""
    vf_coef: Annotated[float, Field(gt=0.0)] = 0.1
    """For `critic: shared`: weight of the value's loss beside the policy's."""
    cliprange_value: Annotated[float, Field(ge=0.0)] = 0.2
    """How far a value may move from what it was at the rollout, before its gradient stops; 0 for any way."""
    max_logprob_mismatch: Annotated[float, Field(gt=0.0)] = 0.1
    """Nats a token between the sampler's log-probs and the policy's, at which the run stops."""
