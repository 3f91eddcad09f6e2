"""What became of the rows: for every source `used + dropped == read`, and each drop has its reason and its lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lowrank_tune.errors import UserError
from lowrank_tune.types import Row

EXAMPLES = 5


@dataclass
class Dropped:
    """Rows dropped for one reason: how many, and the first few as `file:line`."""

    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str) -> None:
        """Counts one more."""
        self.count += 1
        if len(self.places) < EXAMPLES:
            self.places.append(place)


@dataclass
class SourceReport:
    """One source. `tokens` and `trained_tokens` count used rows, of pairs both sides; `truncated` rows are used,
    shortened.

    `longest` is the longest row in tokens, before any was shortened or dropped; `golds` counts used rows with a gold
    answer.
    """

    name: str
    format: str = ""
    read: int = 0
    used: int = 0
    truncated: int = 0
    truncated_places: list[str] = field(default_factory=list)
    longest: int = 0
    golds: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    duplicates: int = 0
    weight: float | None = None
    dropped: dict[str, Dropped] = field(default_factory=dict)

    def drop(self, reason: str, place: str) -> None:
        """Counts a row that cannot be used."""
        self.dropped.setdefault(reason, Dropped()).add(place)

    def use(self, rows: Sequence[Row], has_gold: bool) -> None:
        """Counts a row that is used, with all that was made of it."""
        self.used += 1
        self.golds += has_gold
        self.tokens += sum(len(row.ids) for row in rows)
        self.trained_tokens += sum(sum(row.says) for row in rows)

    @property
    def rejected(self) -> int:
        return sum(reason.count for reason in self.dropped.values())

    def reasons(self) -> str:
        """The most frequent reasons in words."""
        most = sorted(self.dropped.items(), key=lambda item: -item[1].count)[:3]
        told = [f"{dropped.count}: {reason} ({_lines(dropped)})" for reason, dropped in most]
        return ", ".join(told) + (f", and {len(self.dropped) - 3} more reasons" if len(self.dropped) > 3 else "")

    def truncate(self, place: str) -> None:
        """Counts a row that is used, shortened."""
        self.truncated += 1
        if len(self.truncated_places) < EXAMPLES:
            self.truncated_places.append(place)

    def fault(self, max_rejected_share: float) -> str | None:
        """Why training must not begin: too little of the source can be used."""
        if not self.used:
            return f"{self.name}: none of its {self.read} rows can be used: {self.reasons()}"
        if self.rejected > max_rejected_share * self.read:
            return (
                f"{self.name}: {self.rejected} of {self.read} rows cannot be used: {self.reasons()}; "
                "mend them, or raise `data.max_rejected_share` to go on without them"
            )
        return None

    def check(self, max_rejected_share: float) -> None:
        """Raises `UserError` where too little of the source can be used."""
        if (fault := self.fault(max_rejected_share)) is not None:
            raise UserError(fault)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SourceReport:
        """Back from JSON."""
        return cls(**{**data, "dropped": {reason: Dropped(**dropped) for reason, dropped in data["dropped"].items()}})


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
        return "pair" if any(source.format == "preference" for source in self.train) else "row"

    def lines(self) -> list[str]:
        """As sentences, one a source and one for the whole."""
        told = []
        for source in (*self.train, *self.validation):
            line = f"{source.name} ({source.format}): {source.used} of {source.read} {self.unit}s, "
            line += f"{source.tokens} tokens, {source.trained_tokens} trained"
            line += f", {source.truncated} truncated" if source.truncated else ""
            told.append(line + (f"; dropped {source.reasons()}" if source.dropped else ""))
        told.append(f"{self.train_rows} {self.unit}s to train on, {self.validation_rows} to validate; {self.mixture}")
        return [*told, *([beside] if (beside := self.expected()) else [])]

    def expected(self) -> str:
        """The tokens measured beside those that the recipe expects, in words; empty where it expects none."""
        if self.expected_tokens is None:
            return ""
        measured = sum(source.tokens for source in self.train)
        return (
            f"{measured:,} tokens measured, {self.expected_tokens:,} expected "
            f"({100 * (measured / self.expected_tokens - 1):+.1f} %)"
        )


def _lines(dropped: Dropped) -> str:
    lines = [place.rpartition(":")[2] for place in dropped.places]
    return f"line{'s' if len(lines) > 1 else ''} {', '.join(lines)}{' ...' if dropped.count > len(lines) else ''}"
