"""Wrong answers for the check of the rewards, made from reference answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from lowrank_tune.rewards.base import RewardInput
from lowrank_tune.rewards.math.answer import answers_match

WORDS = "river table silver quickly because of green a the window into carry never paper then".split()


def make_negative_samples(references: Sequence[RewardInput], seed: int = 0) -> list[RewardInput]:
    """Returns for each reference answer: an empty text, random words, a wrong number, its prompt, and the answer of
    the next row with another gold answer (if any)."""
    rng = random.Random(f"garbage-{seed}")
    references = list(references)
    samples = []
    for index, item in enumerate(references):
        random_words = " ".join(rng.choices(WORDS, k=12))
        wrong_number = _wrong_number(item.ground_truth, rng)
        texts = [
            "",
            random_words,
            f"The answer is {wrong_number}.",
            item.prompt,
        ]
        for other in references[index + 1 :] + references[:index]:
            if other.ground_truth != item.ground_truth:
                texts.append(other.completion)
                break
        samples += [
            replace(
                item,
                completion=text,
                tokens=max(1, len(text) // 4),
                ids=(),
            )
            for text in texts
        ]
    return samples


def _wrong_number(ground_truth: str | None, rng: random.Random) -> int:
    number = rng.randint(1000, 9999)
    if ground_truth is not None and answers_match(str(number), ground_truth):
        return number + 1
    return number
