"""What all contenders of a comparison train: settings, prompts or pairs in their order, and the folders of a run."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

RANK, ALPHA, MAX_GRAD_NORM, LOGGING_STEPS = 16, 32, 1.0, 10
TEMPERATURE, EPSILON, MAX_NEW_TOKENS = 1.0, 0.2, 48
SFT = "sft"


class Pair(NamedTuple):
    """Token ids of a preference pair."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    def rows(self) -> list[tuple[list[int], list[bool]]]:
        """Returns the chosen and the rejected row: ids, and for each token whether it is of the answer."""
        return [
            (self.prompt + answer, [False] * len(self.prompt) + [True] * len(answer))
            for answer in (self.chosen, self.rejected)
        ]


class GradedPrompt(NamedTuple):
    """Token ids of a prompt, its text as the tokenizer reads it, and the gold answer."""

    ids: list[int]
    text: str
    gold: str


@dataclass(frozen=True)
class Settings:
    """The settings of an algorithm, those of its tiny preset. `units` are the prompts or pairs of a step, `micro` the
    rows or pairs of a micro-batch; adapters are evaluated before the first step and after the steps `evaluated`."""

    algorithm: str
    steps: int
    evaluated: tuple[int, ...]
    units: int
    micro: int
    learning_rate: float
    schedule: str
    beta: float
    num_generations: int = 1
    sft_coef: float = 0.0
    thresholds: dict[str, list[float]] = field(default_factory=dict)
    """Accuracies whose time is reported, by metric."""


SETTINGS = {
    "grpo": Settings(
        algorithm="grpo",
        steps=24,
        evaluated=tuple(range(2, 25, 2)),
        units=16,
        micro=64,
        learning_rate=5e-4,
        schedule="constant",
        beta=0.02,
        num_generations=8,
        thresholds={"sampled": [0.6, 0.8, 0.9, 0.95]},
    ),
    "dpo": Settings(
        algorithm="dpo",
        steps=68,
        evaluated=(2, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 56, 68),
        units=16,
        micro=16,
        learning_rate=1e-3,
        schedule="cosine",
        beta=0.1,
        sft_coef=0.2,
        thresholds={"pairs": [0.7, 0.8, 0.9], "sampled": [0.8]},
    ),
}


def tiny(settings: Settings) -> Settings:
    """Returns settings with which everything runs in seconds."""
    return replace(settings, steps=2, evaluated=(1, 2), units=2, micro=min(2, settings.micro), num_generations=2)


@dataclass(frozen=True)
class Task:
    """One comparison: an algorithm and a seed. `root` holds what all share: the SFT adapter and its merged base."""

    root: Path
    settings: Settings
    seed: int
    threads: int

    @property
    def folder(self) -> Path:
        return self.root / f"{self.settings.algorithm}-{self.seed}"

    @property
    def sft(self) -> Path:
        return self.root / SFT

    @property
    def merged(self) -> Path:
        return self.root / "merged"

    @property
    def first_adapter(self) -> Path:
        """The adapter that all begin with: A random, B zero."""
        return self.folder / "step-0.safetensors"

    def of(self, contender: str) -> Path:
        """Returns the folder of a contender's adapters and figures."""
        return self.folder / contender

    def adapter(self, contender: str, step: int) -> Path:
        """Returns the file of a contender's adapter after a step."""
        return self.of(contender) / f"step-{step}.safetensors" if step else self.first_adapter

    def write_units(self, units: list[Any]) -> None:
        """Writes the prompts or pairs of all steps."""
        (self.folder / "units.json").write_text(json.dumps(units), encoding="utf-8")

    def units(self) -> list[Any]:
        """Returns the prompts or pairs of all steps, in their order."""
        kind = GradedPrompt if self.settings.algorithm == "grpo" else Pair
        return [kind(*unit) for unit in json.loads((self.folder / "units.json").read_text(encoding="utf-8"))]

    def units_of_steps(self) -> Iterator[list[Any]]:
        """Yields the prompts or pairs of each step."""
        units, count = self.units(), self.settings.units
        return (units[start : start + count] for start in range(0, len(units), count))


def shuffled(units: list[Any], count: int, seed: int) -> list[Any]:
    """Returns `count` units in a random order, each once."""
    return random.Random(f"learning-{seed}").sample(units, count)
