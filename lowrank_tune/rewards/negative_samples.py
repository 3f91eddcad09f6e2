"""Wrong answers, made from reference answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from lowrank_tune.rewards.base import RewardInput
from lowrank_tune.rewards.math.answer import answers_match

WORDS = "river table silver quickly because of green a the window into carry never paper then".split()


def make_negative_samples(references: Sequence[RewardInput], seed: int = 0) -> list[RewardInput]:
    """For each reference answer: nothing, random words, a wrong number, its prompt again, another row's answer."""
    rng = random.Random(f"garbage-{seed}")
    references = list(references)
    samples = []
    for index, item in enumerate(references):
        texts = [
            "",
            " ".join(rng.choices(WORDS, k=12)),
            f"The answer is {_wrong_number(item.ground_truth, rng)}.",
            item.prompt,
        ]
        others = [
            other for other in references[index + 1 :] + references[:index] if other.ground_truth != item.ground_truth
        ][:1]
        texts += [other.completion for other in others]
        samples += [replace(item, completion=text, tokens=max(1, len(text) // 4), ids=()) for text in texts]
    return samples


def _wrong_number(ground_truth: str | None, rng: random.Random) -> int:
    number = rng.randint(1000, 9999)
    if ground_truth is not None and answers_match(str(number), ground_truth):
        return number + 1
    return number
