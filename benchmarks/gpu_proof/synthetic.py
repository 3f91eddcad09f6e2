"""What a machine without pydantic and `datasets` lacks: stand-ins for settings, and synthetic rows, prompts and
rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowrank_tune.batch import Batch
from lowrank_tune.generation.outputs import Completion

MAX_NEW_TOKENS = 48
"""New tokens of a completion, where a size does not give them."""
STEPS = 4
"""The first and the last step are logging steps (KL to the base, movement); the two between them are timed."""
Rows = Callable[[int], Batch]
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
        batch.extra = {
            "shared": torch.zeros(size.rows, dtype=torch.long),
            "margin": torch.zeros(size.rows),
            "row": torch.arange(size.rows),
        }
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
        batch.extra = {"shared": shared, "margin": torch.zeros(size.rows), "row": torch.arange(size.rows)}
    return batch
