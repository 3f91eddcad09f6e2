"""How many rows were used and dropped: for every source `used + dropped == read`, and each reason has its lines."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lowrank_tune.batch import Row
from lowrank_tune.config import SourceConfig
from lowrank_tune.errors import UserError

EXAMPLES = 5
"""Locations that are kept of each reason."""
ANSWER_INCLUDED = "answer included"
"""The end of the reason for a row that cannot be cut, because its first answer does not fit."""
MAX_REASONS = 3
"""Reasons that a sentence lists."""


def length_cure(reason: str) -> str:
    """Returns what to do about rows that are dropped for their length; for another reason an empty string."""
    limit = re.match(r"longer than (data\.\w+)", reason)
    if limit is None:
        return ""
    cure = f"raise `{limit[1]}`"
    if reason.endswith(ANSWER_INCLUDED):
        return f"no answer is cut: {cure}"
    return cure


@dataclass
class DroppedRows:
    """Rows dropped for one reason: how many, and the first few as `file:line`."""

    count: int = 0
    locations: list[str] = field(default_factory=list)

    def add(self, location: str) -> None:
        """Counts one more."""
        self.count += 1
        if len(self.locations) < EXAMPLES:
            self.locations.append(location)

    def lines(self) -> str:
        """Returns the lines of the first few."""
        lines = [location.rpartition(":")[2] for location in self.locations]
        word = "lines" if len(lines) > 1 else "line"
        more = " ..." if self.count > len(lines) else ""
        return f"{word} {', '.join(lines)}{more}"


@dataclass
class SourceReport:
    """One source. `tokens` and `trained_tokens` count used rows, of pairs both sides; `truncated` rows are used after
    they were shortened.

    `longest` is the longest row in tokens, before any was shortened or dropped; `ground_truths` counts used rows with a
    gold answer, `with_reasoning` and `with_tools` those with reasoning or tools; `desirable` and `undesirable` count
    answers with such a label, of a pair one each.
    """

    name: str
    format: str = ""
    read: int = 0
    used: int = 0
    truncated: int = 0
    truncated_locations: list[str] = field(default_factory=list)
    longest: int = 0
    ground_truths: int = 0
    with_reasoning: int = 0
    with_tools: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    duplicates: int = 0
    desirable: int = 0
    undesirable: int = 0
    weight: float | None = None
    dropped: dict[str, DroppedRows] = field(default_factory=dict)

    def count_dropped(
        self,
        reason: str,
        location: str,
    ) -> None:
        """Counts a row that cannot be used."""
        self.dropped.setdefault(reason, DroppedRows()).add(location)

    def count_used(
        self,
        rows: Sequence[Row],
        has_ground_truth: bool,
    ) -> None:
        """Counts a row that is used, with its tokenized rows."""
        self.used += 1
        self.ground_truths += has_ground_truth
        self.tokens += sum(len(row.input_ids) for row in rows)
        self.trained_tokens += sum(sum(row.completion_mask) for row in rows)

    def count_labels(self, labels: Sequence[bool | None]) -> None:
        """Counts the labels of the answers of a used row."""
        self.desirable += labels.count(True)
        self.undesirable += labels.count(False)

    @property
    def is_labeled(self) -> bool:
        """Whether its answers have labels."""
        return bool(self.desirable or self.undesirable)

    def count_truncated(self, location: str) -> None:
        """Counts a row that is used after it was shortened."""
        self.truncated += 1
        if len(self.truncated_locations) < EXAMPLES:
            self.truncated_locations.append(location)

    @property
    def num_dropped(self) -> int:
        return sum(dropped.count for dropped in self.dropped.values())

    def reasons(self) -> str:
        """Returns the most frequent reasons in words."""
        most_first = sorted(self.dropped.items(), key=lambda item: -item[1].count)
        parts = [f"{dropped.count}: {reason} ({dropped.lines()})" for reason, dropped in most_first[:MAX_REASONS]]
        if len(self.dropped) > MAX_REASONS:
            parts.append(f"and {len(self.dropped) - MAX_REASONS} more reasons")
        return ", ".join(parts)

    def fault(self, max_invalid_fraction: float) -> str | None:
        """Returns why training must not begin: too little of the source can be used. None if it may begin."""
        advice = self._limit_to_raise()
        if not self.used:
            fault = f"{self.name}: none of its {self.read} rows can be used: {self.reasons()}"
            return f"{fault}; {advice}" if advice else fault
        if self.num_dropped > max_invalid_fraction * self.read:
            return (
                f"{self.name}: {self.num_dropped} of {self.read} rows cannot be used: {self.reasons()}; "
                f"{advice or 'correct them'}, or raise `data.max_invalid_fraction` to go on without them"
            )
        return None

    def _limit_to_raise(self) -> str:
        """Returns what to do if the most frequent reason is the length of rows, else an empty string."""
        reason = max(
            self.dropped,
            key=lambda reason: self.dropped[reason].count,
            default="",
        )
        advice = length_cure(reason)
        if advice and self.longest:
            advice += f" (the longest row has {self.longest:,} tokens)"
        return advice

    def check(self, max_invalid_fraction: float) -> None:
        """Raises UserError if too little of the source can be used."""
        fault = self.fault(max_invalid_fraction)
        if fault is not None:
            raise UserError(fault)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SourceReport:
        """Returns a report from the dict of its JSON."""
        dropped = {reason: DroppedRows(**fields) for reason, fields in data["dropped"].items()}
        return cls(**{**data, "dropped": dropped})


@dataclass(frozen=True)
class Packing:
    """How many packs there are, of how many documents (pieces of long ones count), and of how many tokens in all."""

    packs: int
    documents: int
    tokens: int
    max_length: int

    @property
    def efficiency(self) -> float:
        """The share of the room in all packs that has a token."""
        return self.tokens / max(1, self.packs * self.max_length)

    def describe(self) -> str:
        """Returns the counts in words."""
        return (
            f"{self.documents:,} documents in {self.packs:,} packs of up to {self.max_length:,} tokens, "
            f"{100 * self.efficiency:.1f} % full"
        )


@dataclass(frozen=True)
class Report:
    """All sources; with preferences a row is a pair.

    `duplicates`: training rows that repeat an earlier one. `shared`: validation rows that are also training rows.
    `expected_tokens`: the recipe's number for all rows of `data.train`, with those held out for validation.
    """

    train: tuple[SourceReport, ...]
    validation: tuple[SourceReport, ...] = ()
    train_rows: int = 0
    validation_rows: int = 0
    duplicates: int = 0
    shared: int = 0
    mixture: str = ""
    expected_tokens: int | None = None
    packing: Packing | None = None
    """The packs of the documents to train on; None without plain text."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON."""
        return asdict(self)

    @property
    def unit(self) -> str:
        """What is learned from at once: a row or a pair."""
        if any(source.format == "preference" and not source.is_labeled for source in self.train):
            return "pair"
        return "row"

    def lines(self) -> list[str]:
        """Returns one sentence for each source and one for all of them."""
        lines = []
        for source in (*self.train, *self.validation):
            line = f"{source.name} ({source.format}): {self._source_counts(source)}"
            if source.dropped:
                line += f"; dropped {source.reasons()}"
            lines.append(line)
        lines.append(f"{self._total()}; {self.mixture}")
        if self.packing is not None:
            lines.append(self.packing.describe())
        comparison = self.compare_expected_tokens()
        if comparison:
            lines.append(comparison)
        return lines

    def _source_counts(self, source: SourceReport) -> str:
        counts = f"{source.used} of {source.read} {self.unit}s, "
        counts += f"{source.tokens} tokens, {source.trained_tokens} trained"
        if source.is_labeled:
            counts += f", {source.desirable} desirable and {source.undesirable} undesirable answers"
        if source.truncated:
            counts += f", {source.truncated} truncated"
        return counts

    def _total(self) -> str:
        return f"{self.train_rows} {self.unit}s to train on, {self.validation_rows} to validate"

    def compare_expected_tokens(self) -> str:
        """Returns the measured tokens beside those that the recipe expects, in words; empty if it expects none."""
        if self.expected_tokens is None:
            return ""
        measured = sum(source.tokens for source in self.train)
        difference = 100 * (measured / self.expected_tokens - 1)
        return f"{measured:,} tokens measured, {self.expected_tokens:,} expected ({difference:+.1f} %)"


def describe_mixture(
    sources: Sequence[SourceConfig],
    counts: Sequence[int],
    unit: str,
) -> str:
    """Returns the share of each source in words: by its weight, or by its number of units (`counts`)."""
    if len(sources) == 1:
        return "one source"
    total = max(1, sum(counts))
    shares = []
    for source, count in zip(sources, counts, strict=True):
        share = source.weight or count / total
        shares.append(f"{source.dataset} {100 * share:.3g} %")
    basis = f"{unit} counts" if sources[0].weight is None else "weight"
    return f"mixed by {basis}: {', '.join(shares)}"
