"""What rows, pairs and prompts are looked at for alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowrank_tune.config import RecipeConfig, SourceConfig
from lowrank_tune.data import ChatTemplate, InvalidRow, Prompt, Report
from lowrank_tune.data.report import EXAMPLES, SourceReport
from lowrank_tune.data_report.report import DataIssue, Lengths
from lowrank_tune.errors import UserError

LEAKAGE_NOTE = "kept; held-out answers flatter"
BINS = 12  # of the histogram of lengths, about
SHOWN_ROWS = 3
SHOWN_CHARACTERS = 1600
TOO_LONG = ("longer than data.max_length", "longer than data.max_prompt_length")
NO_TARGET = (
    "nothing in it is trained",
    "no assistant turn",
    "no answer",
    "empty answer",
    "no turns",
    "column `answer` is null",
    "column `output` is null",
    "column `solution` is null",
    "column `response` is null",
    "column `completion` is null",
    "column `chosen` is null",
    "column `rejected` is null",
    "no column `chosen`",
    "no column `rejected`",
)


def weighted_by(sources: Sequence[SourceConfig], unit: str = "row") -> str:
    """What decides the mixture, in words."""
    if len(sources) == 1:
        return "one source"
    if sources[0].weight is not None:
        return "weights of the recipe"
    return f"{unit} counts: no source has a weight"


def lengths_of(lengths: NDArray[np.int64], report: Report, max_length: int) -> Lengths:
    """The histogram of lengths in tokens, with what did not fit the limit."""
    sources = (*report.train, *report.validation)
    left_out = sum(
        drop.count for source in sources for reason, drop in source.dropped.items() if reason.startswith(TOO_LONG)
    )
    over = left_out + sum(source.truncated for source in sources)
    longest = max([source.longest for source in sources], default=0)
    if not len(lengths):
        return Lengths(max_length, (0,), (), 0, 0, longest, over)
    width = _round_bin_width(int(lengths.max()) / BINS)
    edges = np.arange(0, int(lengths.max()) + width, width)
    counts, _ = np.histogram(lengths - 0.5, edges)  # a row on an edge belongs to the bin that ends there
    median, p95 = np.percentile(lengths, (50, 95))
    return Lengths(
        max_length,
        tuple(map(int, edges)),
        tuple(map(int, counts)),
        round(median),
        round(p95),
        longest,
        over,
    )


def _round_bin_width(width: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    power: int = 10 ** math.floor(math.log10(max(1.0, width)))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= width)


def dropped_rows(sources: Sequence[SourceReport], always: Sequence[str]) -> list[DataIssue]:
    """One entry a reason, most frequent first; what is `always` told stands there even where no row is."""
    counts: dict[str, list[Any]] = {}
    for source in sources:
        for reason, drop in source.dropped.items():
            entry = counts.setdefault(_issue_kind(reason, "without a target" in always), [0, []])
            entry[0] += drop.count
            entry[1] += drop.locations
    for kind in always:
        if not any(entry.startswith(kind) for entry in counts):
            counts[kind] = [0, []]
    ranked = sorted(counts.items(), key=lambda item: -item[1][0])
    return [DataIssue(kind, count, "dropped", tuple(locations[:EXAMPLES])) for kind, (count, locations) in ranked]


def _issue_kind(reason: str, targets: bool) -> str:
    if reason.startswith(TOO_LONG):
        return f"too long: {reason}"
    if targets and reason.startswith(NO_TARGET):
        return f"without a target: {reason}"
    return reason


def heldout_ids(heldout: Sequence[Prompt], template: ChatTemplate) -> set[tuple[int, ...]]:
    """The held-out questions as the base reads them."""
    prompt_ids: set[tuple[int, ...]] = set()
    for prompt in heldout:
        try:
            prompt_ids.add(tuple(template.prompt(prompt.messages)))
        except (UserError, InvalidRow):
            continue  # it will not be asked either
    return prompt_ids


def example_rows(source_of: NDArray[Any]) -> list[int]:
    """The first of each source, then those that follow in the first one."""
    firsts = np.unique(source_of, return_index=True)[1]
    return list(dict.fromkeys([*map(int, firsts), *range(min(len(source_of), SHOWN_ROWS))]))[:SHOWN_ROWS]


def truncate_middle(text: str, limit: int) -> str:
    """Beginning and end of a long text."""
    if len(text) <= limit:
        return text
    return text[: limit // 2] + " [...] " + text[-limit // 2 :]


def invalid_sources(report: Report, recipe: RecipeConfig) -> list[str]:
    """Sources of which too many rows cannot be used, a sentence each."""
    return [
        fault
        for source in (*report.train, *report.validation)
        if (fault := source.fault(recipe.data.max_invalid_fraction))
    ]
