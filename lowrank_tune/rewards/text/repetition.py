"""`repetition`: rewards completions that repeat themselves little. Runs in the main process."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lowrank_tune.rewards.base import InProcessReward, RewardInput, Score

NGRAM = 4
WORD = re.compile(r"[\u0e00-\u0eff\u2e80-\ua4cf\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]|\w{1,16}|[^\w\s]")
"""A word, a punctuation mark, or a character of a script without spaces. Long words are cut, so that `aaaa...` counts
as a repetition."""


@dataclass(frozen=True)
class RepetitionReward(InProcessReward):
    """graded: the share of distinct sequences among those of `ngram` words, without case; 1 if none occurs twice or the
    text is shorter."""

    ngram: int = NGRAM

    def score_one(self, item: RewardInput) -> Score:
        return Score(distinct_ngram_fraction(item.completion, self.ngram), "graded")


def distinct_ngram_fraction(text: str, ngram: int) -> float:
    """Returns the share of distinct n-grams, in time and memory linear in the text (times `ngram`)."""
    words = [word.casefold() for word in WORD.findall(text)]
    count = len(words) - ngram + 1
    if count <= 1:
        return 1.0
    shifted = [words[start:] for start in range(ngram)]
    return len(set(zip(*shifted, strict=False))) / count
