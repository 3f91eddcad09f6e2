"""What a machine without pydantic and `datasets` lacks: stand-ins for settings, and synthetic rows, prompts and
rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowrank_tune.batch import Batch, PairBatch
from lowrank_tune.generation.outputs import Completion

MAX_NEW_TOKENS = 48
"""New tokens of a completion, where a size does not give them."""
STEPS = 4
"""The first and the last step are logging steps (KL to the base, movement); the two between them are timed."""
Rows = Callable[[int], Any]
"""Returns the rows of a step."""


@dataclass(frozen=True)
class AdapterSettings:
    """Stands for `config.AdapterConfig`, which needs pydantic."""

    r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    target_modules: str = "all-linear"
    use_rslora: bool = False


@dataclass(frozen=True)
class TrainSettings:
    """Stands for `config.TrainingConfig`: what the trainer and the optimizer read."""

    micro_batch_size: int
    micro_batch_tokens: int | None = None
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "constant"
    warmup_steps: int = 0
    optim: str = "adamw"
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    max_nonfinite_steps: int = 1
    logging_steps: int = 1_000_000

    @property
    def micro_batch_rows(self) -> int:
        return self.micro_batch_size


@dataclass(frozen=True)
class RewardModelSettings:
    """Stands for `config.RewardModelConfig`."""

    center_rewards_coefficient: float = 0.01


@dataclass(frozen=True)
class DPOSettings:
    """Stands for `config.DPOConfig`."""

    loss_type: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    sft_coef: float = 0.0


@dataclass(frozen=True)
class GRPOSettings:
    """Stands for `config.GRPOConfig`."""

    loss_type: str = "grpo"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    beta: float = 0.05
    kl_in_reward: bool = False
    kl_estimator: str = "k3_ratio"
    num_iterations: int = 1
    old_logprobs_from: str = "recomputed"
    max_logprob_mismatch: float = 0.1
    truncated_completions: str = "keep"
    missing_eos_penalty: float = 1.0
    zero_std_groups: str = "keep"


@dataclass(frozen=True)
class PPOSettings:
    """Stands for `config.PPOConfig`, with one epoch over each batch of rollouts."""

    cliprange: float = 0.2
    entropy: float = 0.0
    num_ppo_epochs: int = 1
    num_mini_batches: int = 1
    target_kl: float | None = None
    kl_coef: float = 0.05
    kl_target: float | None = None
    kl_gain: float = 0.1
    gamma: float = 1.0
    lam: float = 0.95
    truncated_completions: str = "penalize"
    missing_eos_penalty: float = 1.0
    critic: str = "separate"
    vf_coef: float = 0.1
    cliprange_value: float = 0.2
    max_logprob_mismatch: float = 0.1


@dataclass(frozen=True)
class Size:
    """Rows of a step, rows of a micro-batch, and tokens of a row. For generative algorithms also tokens of a prompt
    (by default half a row, each prompt one token shorter than the one before) and completions per prompt."""

    rows: int
    micro: int
    length: int
    prompt: int | None = None
    group: int | None = None

    @property
    def num_generations(self) -> int:
        return self.group or max(2, self.rows // 2)

    @property
    def max_new_tokens(self) -> int:
        return self.length - self.prompt if self.prompt else min(self.length // 2, MAX_NEW_TOKENS)


@dataclass(frozen=True)
class Prompt:
    """Stands for `data.PromptExample`, whose package needs pydantic."""

    input_ids: list[int]
    text: str = ""
    ground_truth: None = None


class MeanTokenId:
    """A reward that needs no text: the mean token id of a completion, which differs between any two completions."""

    def __init__(self) -> None:
        self.scores: dict[int, list[float]] = {}

    def submit(self, key: int, prompt: Any, text: str, completion: Completion) -> None:
        self.scores[key] = [sum(completion.token_ids) / len(completion.token_ids)]

    def collect(self) -> Mapping[int, Sequence[float]]:
        scores, self.scores = self.scores, {}
        return scores


def full_rows(size: Size, vocab_size: int, together: int = 1) -> Batch:
    """Return rows of random tokens, all of full length and without a shared prefix: what a memory plan is made for."""
    ids = torch.randint(3, vocab_size, (size.rows, size.length), generator=torch.Generator().manual_seed(0))
    attended = torch.ones_like(ids, dtype=torch.bool)
    batch = Batch(ids, attended, attended & (torch.arange(size.length) >= 1))
    if together > 1:
        return to_pairs(batch, torch.zeros(size.rows, dtype=torch.long))
    return batch


def ragged_rows(size: Size, vocab_size: int, together: int = 1) -> Batch:
    """Return rows of random tokens whose second half is trained. Every fourth row is a quarter shorter, so there is
    padding.

    The rows of a pair (`together` 2) share their first half.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocab_size, (size.rows, size.length), generator=generator)
    prompt = size.length // 2
    first = torch.arange(size.rows) // together * together
    ids[:, :prompt] = ids[first, :prompt]
    ids[:, prompt] = 3 + torch.arange(size.rows) % (vocab_size - 3)  # so that the shared prefix ends here
    lengths = torch.tensor([size.length - size.length // 4 * (row % 4 == 3) for row in range(size.rows)])
    positions = torch.arange(size.length)
    attended = positions < lengths[:, None]
    batch = Batch(ids, attended, attended & (positions >= prompt))
    if together > 1:
        shared = torch.where(first == torch.arange(size.rows), 0, prompt)
        return to_pairs(batch, shared)
    return batch


def to_pairs(batch: Batch, shared_prefix: torch.Tensor) -> PairBatch:
    rows = len(batch)
    return PairBatch(
        **batch.tensors(),
        shared_prefix=shared_prefix,
        margin=torch.zeros(rows),
        row_indices=torch.arange(rows),
    )
