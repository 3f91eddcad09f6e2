"""Counts over a store: the answers of every row and their end tokens, and how the answers of pairs differ besides
their quality."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowrank_tune.data.token_store import IntArray, TokenizedDataset

SLICE = 8192
"""Rows that are counted at a time: a store may be larger than memory."""
LENGTH_BIAS_SHARE = 0.65
"""Share of pairs above which a difference in length is reported."""
MIN_PAIRS = 20
"""The fewest pairs whose share is reported."""


@dataclass(frozen=True)
class TokenStats:
    """One entry a row: tokens trained, tokens before the first of them, answers, and answers without an end token.

    `eos_counts` counts every trained end token by its id.
    """

    trained: IntArray
    prompt: IntArray
    answers: IntArray
    unended: IntArray
    eos_counts: dict[int, int]


def compute_token_stats(rows: TokenizedDataset, end_ids: Collection[int]) -> TokenStats:
    """Counts all rows of a store."""
    # An empty store has one empty slice.
    starts = range(0, max(1, len(rows)), SLICE)
    parts = [_count(*rows.concat_rows(start, start + SLICE), end_ids) for start in starts]
    eos_counts: Counter[int] = Counter()
    for part in parts:
        eos_counts.update(part.eos_counts)
    return TokenStats(
        np.concatenate([part.trained for part in parts]),
        np.concatenate([part.prompt for part in parts]),
        np.concatenate([part.answers for part in parts]),
        np.concatenate([part.unended for part in parts]),
        dict(eos_counts),
    )


def _count(
    input_ids: NDArray[np.int32],
    mask: NDArray[np.bool_],
    lengths: IntArray,
    end_ids: Collection[int],
) -> TokenStats:
    """Counts rows that are concatenated, without a loop over them.

    `input_ids` and `mask` have one entry a token, `lengths` has one a row. Below, `row_*` have one entry a row and
    `answer_*` have one an answer; the values of `*_start`, `*_end` and `*_last` are positions in the tokens.
    """
    num_rows = len(lengths)
    row_end = np.cumsum(lengths)
    row_start = row_end - lengths

    # An answer is an unbroken stretch of trained tokens within one row.
    trained_before = np.roll(mask, 1)
    trained_before[row_start] = False
    trained_after = np.roll(mask, -1)
    trained_after[row_end - 1] = False
    answer_start = np.flatnonzero(mask & ~trained_before)
    answer_last = np.flatnonzero(mask & ~trained_after)
    row_of_answer = np.searchsorted(
        row_end,
        answer_start,
        side="right",
    )

    is_end = mask & np.isin(input_ids, list(end_ids))
    token_ids, counts = np.unique(input_ids[is_end], return_counts=True)
    # End tokens up to each position, so that a difference is the number in a stretch.
    ends_up_to = np.cumsum(is_end)
    ends_in_answer = ends_up_to[answer_last] - ends_up_to[answer_start] + is_end[answer_start]
    is_unended = ends_in_answer == 0

    # In a row without an answer all tokens are the prompt's. Of several answers the first one counts: numpy assigns in
    # order, so that with the answers in reverse the first one of a row is written last.
    row_prompt = lengths.copy()
    row_prompt[row_of_answer[::-1]] = (answer_start - row_start[row_of_answer])[::-1]
    row_trained = np.zeros(0, np.int64)
    if num_rows:
        row_trained = np.add.reduceat(mask.astype(np.int64), row_start)
    return TokenStats(
        trained=row_trained,
        prompt=row_prompt,
        answers=np.bincount(row_of_answer, minlength=num_rows),
        unended=np.bincount(row_of_answer[is_unended], minlength=num_rows),
        eos_counts=dict(
            zip(
                token_ids.tolist(),
                counts.tolist(),
                strict=True,
            )
        ),
    )


@dataclass(frozen=True)
class PairBalance:
    """Pairs to train on by the length of their answers in trained tokens; `chosen` and `rejected` are mean lengths.

    `margins` counts the pairs with a margin. `warning` is a sentence if length alone nearly separates the answers, else
    empty.
    """

    pairs: int
    longer: int
    shorter: int
    equal: int
    chosen: float
    rejected: float
    margins: int
    warning: str


def pair_balance(train: TokenizedDataset, stats: TokenStats) -> PairBalance:
    """Compares the answers of all pairs of a store."""
    chosen = stats.trained[::2]
    rejected = stats.trained[1::2]
    longer = int((chosen > rejected).sum())
    shorter = int((chosen < rejected).sum())
    pairs = train.units
    return PairBalance(
        pairs,
        longer,
        shorter,
        pairs - longer - shorter,
        chosen=int(chosen.sum()) / max(1, pairs),
        rejected=int(rejected.sum()) / max(1, pairs),
        margins=int(np.count_nonzero(train.margins[::2])),
        warning=_length_bias_warning(pairs, longer, shorter),
    )


def _length_bias_warning(
    pairs: int,
    longer: int,
    shorter: int,
) -> str:
    most, word = max((longer, "longer"), (shorter, "shorter"))
    if pairs < MIN_PAIRS or most < LENGTH_BIAS_SHARE * pairs:
        return ""
    return (
        f"in {100 * most / pairs:.0f} % of the pairs the chosen answer is the {word} one: a model can look right by "
        f"preferring what is {word}, whatever its content; watch the length of its answers, or balance the pairs"
    )


def contradictory_pairs(parts: Sequence[TokenizedDataset]) -> list[IntArray]:
    """Returns for each part the pairs that any part also contains with the answers exchanged."""
    hashes_of = [part.conversation_hashes.reshape(-1, 2).tolist() for part in parts]
    seen: set[tuple[int, int]] = set()
    for hashes in hashes_of:
        seen.update((chosen, rejected) for chosen, rejected in hashes)
    contradictory = []
    for hashes in hashes_of:
        is_exchanged = [(rejected, chosen) in seen for chosen, rejected in hashes]
        contradictory.append(np.flatnonzero(is_exchanged))
    return contradictory
