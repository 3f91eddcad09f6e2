"""What the reports of rows, of pairs and of prompts share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowrank_tune.config import RecipeConfig, SourceConfig
from lowrank_tune.data import (
    BatchSampler,
    ChatTemplate,
    InvalidRow,
    Prompt,
    Report,
)
from lowrank_tune.data.report import EXAMPLES, DroppedRows, SourceReport, length_cure
from lowrank_tune.data.token_store import IntArray
from lowrank_tune.data_report.report import (
    DataIssue,
    Epoch,
    Lengths,
    MixturePart,
)

LEAKAGE = "asking a held-out question"
LEAKAGE_NOTE = "kept; held-out results will be too good"
BINS = 12
"""Bins of the histogram of lengths, about."""
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
    """Returns what determines the mixture, in words."""
    if len(sources) == 1:
        return "one source"
    if sources[0].weight is not None:
        return "weights of the recipe"
    return f"{unit} counts: no source has a weight"


@dataclass(frozen=True)
class Units:
    """The units that are trained on: the source of each, its tokens and its trained tokens, (N,). `row_sources`: the
    source of each row of the data to train on, if a unit may be several of them."""

    source_of: NDArray[np.int32]
    tokens: IntArray
    trained: IntArray
    row_sources: NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return len(self.source_of)

    def subset(self, indices: IntArray) -> Units:
        """Returns these units, with repetitions."""
        return Units(
            self.source_of[indices],
            self.tokens[indices],
            self.trained[indices],
        )

    def sum_by_source(
        self,
        values: IntArray,
        num_sources: int,
    ) -> list[int]:
        """Returns the sum of a value of the units, by source."""
        sums = np.bincount(
            self.source_of,
            weights=values,
            minlength=num_sources,
        )
        return [int(value) for value in sums]


def can_be_drawn(units: Units, recipe: RecipeConfig) -> bool:
    """Returns whether there are units, and some of each source that has a weight."""
    sources = recipe.data.train
    num_sources = len(np.unique(units.source_of))
    return num_sources > 0 and (sources[0].weight is None or num_sources == len(sources))


def mixture_of(
    recipe: RecipeConfig,
    reports: Sequence[SourceReport],
    units: Units,
    sampler: BatchSampler | None,
) -> tuple[tuple[MixturePart, ...], Epoch]:
    """Returns the parts of the mixture, and the first epoch as training will draw it; nothing is drawn without a
    sampler."""
    drawn = np.zeros(0, np.int64)
    steps = 0
    all_steps = 0
    if sampler is not None:
        steps = sampler.steps_per_epoch
        drawn = np.concatenate([np.array(sampler.rows(step)) for step in range(steps)])
        all_steps = recipe.train.max_steps or sampler.steps_of(recipe.train.num_train_epochs or 1.0)
    epoch = units.subset(drawn)
    counts = np.bincount(units.source_of, minlength=len(reports)).tolist()
    row_sources = units.source_of if units.row_sources is None else units.row_sources
    row_counts = np.bincount(row_sources, minlength=len(reports)).tolist()
    tokens = units.sum_by_source(units.tokens, len(reports))
    trained = units.sum_by_source(units.trained, len(reports))
    drawn_tokens = epoch.sum_by_source(epoch.tokens, len(reports))
    drawn_trained = epoch.sum_by_source(epoch.trained, len(reports))
    parts = []
    for index, report in enumerate(reports):
        weight = recipe.data.train[index].weight
        if weight is None:
            weight = counts[index] / max(1, len(units))
        part = MixturePart(
            report.name,
            report.format,
            report.read,
            report.used,
            report.ground_truths,
            row_counts[index],
            tokens[index],
            trained[index],
            weight,
            drawn_tokens[index],
            drawn_trained[index],
            counts[index] if report.format == "text" else 0,
            report.with_reasoning,
            report.with_tools,
            max(report.used, report.desirable + report.undesirable),
        )
        parts.append(part)
    return tuple(parts), Epoch(
        len(epoch),
        sum(drawn_tokens),
        sum(drawn_trained),
        steps,
        all_steps,
    )


def lengths_of(
    lengths: IntArray,
    report: Report,
    max_length: int,
) -> Lengths:
    """Returns the histogram of lengths in tokens, and how many rows exceed the limit."""
    sources = (*report.train, *report.validation)
    num_over = 0
    for source in sources:
        num_over += source.truncated
        for reason, dropped in source.dropped.items():
            if reason.startswith(TOO_LONG):
                num_over += dropped.count
    longest = max((source.longest for source in sources), default=0)
    maximum = int(lengths.max(initial=0))
    width = _round_bin_width(maximum / BINS)
    edges = np.arange(0, maximum + width, width)
    # A length on an edge belongs to the bin that ends there.
    counts, _ = np.histogram(lengths - 0.5, edges)
    median, p95 = np.percentile(lengths, (50, 95)) if len(lengths) else (0, 0)
    return Lengths(
        max_length,
        tuple(edges.tolist()),
        tuple(counts.tolist()),
        round(median),
        round(p95),
        longest,
        num_over,
    )


def _round_bin_width(width: float) -> int:
    """Returns the next of 1, 2, 5, 10, 20, 50, ..."""
    power: int = 10 ** math.floor(math.log10(max(1.0, width)))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= width)


def dropped_rows(sources: Sequence[SourceReport], always: Sequence[str]) -> list[DataIssue]:
    """Returns one issue for each reason, most frequent first. Those that begin with the words of `always` are there
    even without a row."""
    by_kind: dict[str, DroppedRows] = {}
    cures: dict[str, str] = {}
    for source in sources:
        for reason, dropped in source.dropped.items():
            kind = _issue_kind(reason, "without a target" in always)
            cures[kind] = length_cure(reason)
            total = by_kind.setdefault(kind, DroppedRows())
            total.count += dropped.count
            total.locations += dropped.locations
    for kind in always:
        if not any(known.startswith(kind) for known in by_kind):
            by_kind[kind] = DroppedRows()
    most_first = sorted(by_kind.items(), key=lambda item: -item[1].count)
    return [
        DataIssue(
            kind,
            total.count,
            f"dropped; {cures[kind]}" if cures.get(kind) else "dropped",
            first_few(total.locations),
        )
        for kind, total in most_first
    ]


def first_few(locations: Iterable[str]) -> tuple[str, ...]:
    """Returns the locations that an issue lists."""
    return tuple(locations)[:EXAMPLES]


def _issue_kind(reason: str, has_targets: bool) -> str:
    if reason.startswith(TOO_LONG):
        return f"too long: {reason}"
    if has_targets and reason.startswith(NO_TARGET):
        return f"without a target: {reason}"
    return reason


def heldout_ids(heldout: Sequence[Prompt], template: ChatTemplate) -> set[tuple[int, ...]]:
    """Returns the ids of the held-out prompts, without those that the template cannot render."""
    prompts = template.prompt_many([prompt.messages for prompt in heldout], [prompt.tools for prompt in heldout])
    return {tuple(ids) for ids in prompts if not isinstance(ids, InvalidRow)}


def example_rows(source_of: NDArray[Any]) -> list[int]:
    """Returns the first unit of each source, then those that follow in the first source."""
    _, firsts = np.unique(source_of, return_index=True)
    following = range(min(len(source_of), SHOWN_ROWS))
    unique = dict.fromkeys([*firsts.tolist(), *following])
    return list(unique)[:SHOWN_ROWS]


def truncate_middle(text: str, limit: int) -> str:
    """Returns the beginning and the end of a long text."""
    if len(text) <= limit:
        return text
    return text[: limit // 2] + " [...] " + text[-limit // 2 :]


def invalid_sources(report: Report, recipe: RecipeConfig) -> list[str]:
    """Returns one sentence for each source of which too many rows cannot be used."""
    faults = []
    for source in (*report.train, *report.validation):
        fault = source.fault(recipe.data.max_invalid_fraction)
        if fault is not None:
            faults.append(fault)
    return faults
