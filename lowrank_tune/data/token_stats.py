"""What stands in every row of a store, counted without a loop over rows: answers, their end tokens, where the prompt
ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowrank_tune.data.token_store import TokenizedDataset

Numbers = NDArray[np.int64]
SLICE = 8192  # rows at a time: a store may be larger than memory


@dataclass(frozen=True)
class TokenStats:
    """One entry a row: tokens trained, tokens before the first of them, answers, and answers that no end token closes.

    `eos_counts` counts every trained end token by its id.
    """

    trained: Numbers
    prompt: Numbers
    answers: Numbers
    unended: Numbers
    eos_counts: dict[int, int]


def compute_token_stats(rows: TokenizedDataset, end_ids: Collection[int]) -> TokenStats:
    """Counts a store."""
    eos_counts: Counter[int] = Counter()
    parts = [
        _count(*rows.concat_rows(start, start + SLICE), end_ids, eos_counts) for start in range(0, len(rows), SLICE)
    ]
    if parts:
        trained, prompt, answers, unended = zip(*parts, strict=True)
    else:
        trained, prompt, answers, unended = [(np.zeros(0, np.int64),)] * 4
    return TokenStats(
        np.concatenate(trained),
        np.concatenate(prompt),
        np.concatenate(answers),
        np.concatenate(unended),
        dict(eos_counts),
    )


def _count(
    input_ids: NDArray[np.int32],
    mask: NDArray[np.bool_],
    lengths: Numbers,
    end_ids: Collection[int],
    eos_counts: Counter[int],
) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    behind = np.cumsum(lengths)
    starts = behind - lengths
    rows = len(lengths)
    before = np.roll(mask, 1)
    after = np.roll(mask, -1)
    before[starts] = after[behind - 1] = False
    # an answer is an unbroken stretch of what is trained
    opens = np.flatnonzero(mask & ~before)
    closes = np.flatnonzero(mask & ~after)
    row_of = np.searchsorted(behind, opens, side="right")
    is_end = mask & np.isin(input_ids, list(end_ids))
    eos_counts.update(
        {int(token): int(count) for token, count in zip(*np.unique(input_ids[is_end], return_counts=True), strict=True)}
    )
    so_far = np.cumsum(is_end)
    ended = so_far[closes] - so_far[opens] + is_end[opens] > 0
    prompt = lengths.copy()
    prompt[row_of[::-1]] = opens[::-1] - starts[row_of[::-1]]
    if rows:
        trained = np.add.reduceat(mask.astype(np.int64), starts)
    else:
        trained = np.zeros(0, np.int64)
    return trained, prompt, np.bincount(row_of, minlength=rows), np.bincount(row_of[~ended], minlength=rows)
