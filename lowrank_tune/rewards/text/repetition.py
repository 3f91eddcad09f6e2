"""`repetition`: how little a completion repeats itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lowrank_tune.rewards.base import RewardInput, Score

NGRAM = 4
WORD = re.compile(r"[\u0e00-\u0eff\u2e80-\ua4cf\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]|\w{1,16}|[^\w\s]")
"""A word, a sign, or a letter of a script that sets no spaces. Long words are cut, so that `aaaa...` repeats itself
too."""


@dataclass(frozen=True)
class RepetitionReward:
    """The share of distinct ones among the sequences of `ngram` words, without case: 1 where none comes twice or the
    text is shorter."""

    name: str
    ngram: int = NGRAM
    is_verifier: ClassVar[bool] = False

    def score(self, items: Sequence[RewardInput]) -> list[Score]:
        return [Score(distinct_ngram_fraction(item.completion, self.ngram), "graded") for item in items]


def distinct_ngram_fraction(text: str, ngram: int) -> float:
    """The share of distinct n-grams, in time and memory linear in the text (times `ngram`)."""
    words = [word.casefold() for word in WORD.findall(text)]
    count = len(words) - ngram + 1
    if count > 1:
        return len(set(zip(*(words[start:] for start in range(ngram)), strict=False))) / count
    return 1.0
