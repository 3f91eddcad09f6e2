"""What became of the rows: for every source `used + dropped == read`, and each drop has its reason and its lines."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lowrank_tune.batch import Row
from lowrank_tune.errors import UserError

EXAMPLES = 5


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


@dataclass
class SourceReport:
    """One source. `tokens` and `trained_tokens` count used rows, of pairs both sides; `truncated` rows are used,
    shortened.

    `longest` is the longest row in tokens, before any was shortened or dropped; `ground_truths` counts used rows with a
    gold answer.
    """

    name: str
    format: str = ""
    read: int = 0
    used: int = 0
    truncated: int = 0
    truncated_locations: list[str] = field(default_factory=list)
    longest: int = 0
    ground_truths: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    duplicates: int = 0
    weight: float | None = None
    dropped: dict[str, DroppedRows] = field(default_factory=dict)

    def count_dropped(self, reason: str, location: str) -> None:
        """Counts a row that cannot be used."""
        self.dropped.setdefault(reason, DroppedRows()).add(location)

    def count_used(self, rows: Sequence[Row], has_ground_truth: bool) -> None:
        """Counts a row that is used, with all that was made of it."""
        self.used += 1
        self.ground_truths += has_ground_truth
        self.tokens += sum(len(row.input_ids) for row in rows)
        self.trained_tokens += sum(sum(row.completion_mask) for row in rows)

    @property
    def num_dropped(self) -> int:
        return sum(reason.count for reason in self.dropped.values())

    def reasons(self) -> str:
        """The most frequent reasons in words."""
        most = sorted(self.dropped.items(), key=lambda item: -item[1].count)[:3]
        parts = [f"{dropped.count}: {reason} ({_lines(dropped)})" for reason, dropped in most]
        return ", ".join(parts) + (f", and {len(self.dropped) - 3} more reasons" if len(self.dropped) > 3 else "")

    def count_truncated(self, location: str) -> None:
        """Counts a row that is used, shortened."""
        self.truncated += 1
        if len(self.truncated_locations) < EXAMPLES:
            self.truncated_locations.append(location)

    def fault(self, max_invalid_fraction: float) -> str | None:
        """Why training must not begin: too little of the source can be used."""
        limit = self._limit_to_raise()
        if not self.used:
            return f"{self.name}: none of its {self.read} rows can be used: {self.reasons()}" + (limit and f"; {limit}")
        if self.num_dropped > max_invalid_fraction * self.read:
            return (
                f"{self.name}: {self.num_dropped} of {self.read} rows cannot be used: {self.reasons()}; "
                f"{limit or 'correct them'}, or raise `data.max_invalid_fraction` to go on without them"
            )
        return None

    def _limit_to_raise(self) -> str:
        """What to raise where most of the rows that cannot be used are too long, or an empty string."""
        reason = max(self.dropped, key=lambda reason: self.dropped[reason].count, default="")
        limit = re.match(r"longer than (data\.\w+)", reason)
        if self.longest:
            longest = f" (the longest row has {self.longest:,} tokens)"
        else:
            longest = ""
        return f"raise `{limit[1]}`{longest}" if limit else ""

    def check(self, max_invalid_fraction: float) -> None:
        """Raises `UserError` where too little of the source can be used."""
        if (fault := self.fault(max_invalid_fraction)) is not None:
            raise UserError(fault)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SourceReport:
        """Back from JSON."""
        return cls(
            **{**data, "dropped": {reason: DroppedRows(**dropped) for reason, dropped in data["dropped"].items()}}
        )


@dataclass(frozen=True)
class Report:
    """All sources; with preferences a row is a pair.

    `duplicates`: train rows that repeat an earlier one. `shared`: validation rows that also stand in the training rows.
    `expected_tokens`: of all rows of `train`, those set aside included, as the recipe tells.
    """

    train: tuple[SourceReport, ...]
    validation: tuple[SourceReport, ...] = ()
    train_rows: int = 0
    validation_rows: int = 0
    duplicates: int = 0
    shared: int = 0
    mixture: str = ""
    expected_tokens: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @property
    def unit(self) -> str:
        """What is learned from at once: a row or a pair."""
        if any(source.format == "preference" for source in self.train):
            return "pair"
        return "row"

    def lines(self) -> list[str]:
        """As sentences, one a source and one for the whole."""
        lines = []
        for source in (*self.train, *self.validation):
            line = f"{source.name} ({source.format}): {source.used} of {source.read} {self.unit}s, "
            line += f"{source.tokens} tokens, {source.trained_tokens} trained"
            line += f", {source.truncated} truncated" if source.truncated else ""
            lines.append(line + (f"; dropped {source.reasons()}" if source.dropped else ""))
        lines.append(f"{self.train_rows} {self.unit}s to train on, {self.validation_rows} to validate; {self.mixture}")
        return [*lines, *([comparison] if (comparison := self.compare_expected_tokens()) else [])]

    def compare_expected_tokens(self) -> str:
        """The tokens measured beside those that the recipe expects, in words; empty where it expects none."""
        if self.expected_tokens is None:
            return ""
        measured = sum(source.tokens for source in self.train)
        return (
            f"{measured:,} tokens measured, {self.expected_tokens:,} expected "
            f"({100 * (measured / self.expected_tokens - 1):+.1f} %)"
        )


def _lines(dropped: DroppedRows) -> str:
    lines = [location.rpartition(":")[2] for location in dropped.locations]
    return f"line{'s' if len(lines) > 1 else ''} {', '.join(lines)}{' ...' if dropped.count > len(lines) else ''}"
