"""Completions that must earn little, made from reference answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from lowrank_tune.rewards.answer import agrees
from lowrank_tune.rewards.protocol import Item

WORDS = "river table silver quickly because of green a the window into carry never paper then".split()


def garbage(right: Sequence[Item], seed: int = 0) -> list[Item]:
    """What must earn little: for each reference answer nothing, random words, a wrong number, its prompt again, another
    row's answer."""
    rng = random.Random(f"garbage-{seed}")
    right, found = list(right), []
    for place, item in enumerate(right):
        texts = ["", " ".join(rng.choices(WORDS, k=12)), f"The answer is {_wrong_number(item.gold, rng)}.", item.prompt]
        others = [other for other in right[place + 1 :] + right[:place] if other.gold != item.gold][:1]
        texts += [other.completion for other in others]
        found += [replace(item, completion=text, tokens=max(1, len(text) // 4), ids=()) for text in texts]
    return found


def _wrong_number(gold: str | None, rng: random.Random) -> int:
    number = rng.randint(1000, 9999)
    return number + 1 if gold is not None and agrees(str(number), gold) else number
