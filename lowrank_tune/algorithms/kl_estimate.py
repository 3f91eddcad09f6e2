"""The KL estimate of KTO: the mean log-ratio to the reference of prompts with the answers of other rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lowrank_tune.algorithms.rollouts import map_micro_batches
from lowrank_tune.batch import Batch, Row, collate
from lowrank_tune.model.roles import Roles

PAD_ID = 0
"""Ids of padding are not read."""
MAX_DISTANCE = 64
"""Rows by which answers are shifted at most, exclusive."""
CHUNK = 256
"""Rows that are padded to one width at a time."""


def rows_of_batch(batch: Batch) -> list[Row]:
    """Returns the rows of a batch without padding."""
    batch = batch.on_cpu
    rows = []
    for index in range(len(batch)):
        attended = batch.attention_mask[index]
        row = Row(
            batch.input_ids[index][attended].tolist(),
            batch.completion_mask[index][attended].tolist(),
        )
        rows.append(row)
    return rows


def mismatched_rows(
    rows: Sequence[Row],
    max_length: int,
    distance: int = 1,
) -> list[Row]:
    """Returns the prompt of each row with the answer of the row `distance` rows later, cut to `max_length` tokens; none
    for a single row. After the last row follows the first."""
    if len(rows) < 2:
        return []
    following = [*rows[distance:], *rows[:distance]]
    return [_join(row, other, max_length) for row, other in zip(rows, following, strict=True)]


def distance_of_prompts(rows: Sequence[Row]) -> int:
    """Returns the smallest distance with which no prompt gets an answer to itself, as rows in the order of the data may
    have the answers to one prompt side by side; without any, that with the fewest of them."""
    prompts = [tuple(map(int, row.input_ids[: _prompt_length(row)])) for row in rows]
    fewest = len(prompts) + 1
    best = 1
    for distance in range(1, min(len(prompts), MAX_DISTANCE)):
        shifted = [*prompts[distance:], *prompts[:distance]]
        num_equal = sum(prompt == other for prompt, other in zip(prompts, shifted, strict=True))
        if num_equal < fewest:
            fewest = num_equal
            best = distance
        if not num_equal:
            break
    return best


def _join(
    row: Row,
    other: Row,
    max_length: int,
) -> Row:
    """Returns the prompt of a row with the answer of another one."""
    prompt_length = _prompt_length(row)
    start = _prompt_length(other)
    input_ids = [*row.input_ids[:prompt_length], *other.input_ids[start:]]
    completion_mask = [*[False] * prompt_length, *other.completion_mask[start:]]
    return Row(input_ids[:max_length], completion_mask[:max_length])


def _prompt_length(row: Row) -> int:
    """Returns the number of tokens before the first trained one."""
    return list(row.completion_mask).index(True)


@dataclass(frozen=True)
class KLEstimator:
    """Computes log-ratios of mismatched rows, without gradient. `micro_tokens`: maximum number of tokens of a pass."""

    roles: Roles
    max_length: int
    micro_tokens: int

    def estimate(self, rows: Sequence[Row], distance: int = 1) -> float:
        """Returns max(0, mean of log p - log ref) of the mismatched rows of these rows; 0 for a single row."""
        mismatched = mismatched_rows(rows, self.max_length, distance)
        total = 0.0
        for start in range(0, len(mismatched), CHUNK):
            batch = collate(mismatched[start : start + CHUNK], PAD_ID)
            total += float((self._logps("policy", batch) - self._logps("reference", batch)).double().sum())
        mean = total / max(1, len(mismatched))
        # `max` would return 0 for NaN, and hide it.
        return mean if math.isnan(mean) else max(0.0, mean)

    def _logps(self, role: str, batch: Batch) -> Tensor:
        """Returns the log-probs of the answers under a role, (B, T) on the CPU."""

        def compute(micro: Batch) -> Tensor:
            return self.roles.logps(role, micro).logps

        return map_micro_batches(
            self.roles,
            batch,
            self.micro_tokens,
            compute,
        )
