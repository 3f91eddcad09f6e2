"""What a machine without pydantic and `datasets` has to make up: settings, rows, prompts, rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowrank_tune.types import Batch, Completion

MOST_NEW = 128
"""Tokens of a completion, where they are not given."""
STEPS = 4
"""The first and the last step are logging steps (KL to the base, movement); the two between them are timed."""
Rows = Callable[[int], Batch]
"""The rows of a step."""


@dataclass(frozen=True)
class Adapter:
    """Stands for `settings.Adapter`, which needs pydantic."""

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str = "all-linear"
    rslora: bool = False


@dataclass(frozen=True)
class Train:
    """Stands for `settings.Train`: what the loop and the optimizer read."""

    micro_batch_size: int
    micro_batch_tokens: int | None = None
    learning_rate: float = 2e-4
    schedule: str = "constant"
    warmup_steps: int = 0
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    max_bad_steps: int = 1
    log_every: int = 1_000_000

    @property
    def micro_rows(self) -> int:
        return self.micro_batch_size


@dataclass(frozen=True)
class Size:
    """Rows of a step, rows that go through the model at once, tokens of a row; where completions are drawn, tokens of a prompt (half a row,
    and each prompt one shorter, where none are given) and completions of one."""

    rows: int
    micro: int
    length: int
    prompt: int | None = None
    group: int | None = None

    @property
    def completions(self) -> int:
        return self.group or max(2, self.rows // 2)

    @property
    def new(self) -> int:
        """Tokens of a completion."""
        return self.length - self.prompt if self.prompt else min(self.length // 2, MOST_NEW)


@dataclass(frozen=True)
class Asked:
    """Stands for `data.Asked`, whose floor needs pydantic."""

    ids: list[int]
    text: str = ""
    gold: None = None


class MeanId:
    """A reward made of ids alone, which no two completions earn alike: the mean id."""

    def __init__(self) -> None:
        self.scores: dict[int, list[float]] = {}

    def submit(self, key: int, asked: Any, text: str, completion: Completion) -> None:
        self.scores[key] = [sum(completion.ids) / len(completion.ids)]

    def collect(self) -> Mapping[int, Sequence[float]]:
        scores, self.scores = self.scores, {}
        return scores


def full_rows(size: Size, vocabulary: int, together: int = 1) -> Batch:
    """Rows of random tokens, all as long as they may be, nothing in common: what a memory plan is made for."""
    ids = torch.randint(3, vocabulary, (size.rows, size.length), generator=torch.Generator().manual_seed(0))
    attended = torch.ones_like(ids, dtype=torch.bool)
    batch = Batch(ids, attended, attended & (torch.arange(size.length) >= 1))
    if together > 1:
        batch.extra = {"shared": torch.zeros(size.rows, dtype=torch.long), "margin": torch.zeros(size.rows), "row": torch.arange(size.rows)}
    return batch


def random_rows(size: Size, vocabulary: int, together: int = 1) -> Batch:
    """Rows of random tokens; the second half of each is the assistant's. Every fourth row is a quarter shorter, so there is padding.

    Rows of a pair (`together` 2) have the first half in common.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (size.rows, size.length), generator=generator)
    prompt = size.length // 2
    first = torch.arange(size.rows) // together * together
    ids[:, :prompt] = ids[first, :prompt]
    ids[:, prompt] = 3 + torch.arange(size.rows) % (vocabulary - 3)  # so that what is in common ends here
    lengths = torch.tensor([size.length - size.length // 4 * (row % 4 == 3) for row in range(size.rows)])
    positions = torch.arange(size.length)
    attended = positions < lengths[:, None]
    batch = Batch(ids, attended, attended & (positions >= prompt))
    if together > 1:
        shared = torch.where(first == torch.arange(size.rows), 0, prompt)
        batch.extra = {"shared": shared, "margin": torch.zeros(size.rows), "row": torch.arange(size.rows)}
    return batch
