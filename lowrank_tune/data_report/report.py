"""The whole picture of what will be trained on, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lowrank_tune.data import Report
from lowrank_tune.data.stats import PairBalance


@dataclass(frozen=True)
class MixturePart:
    """A source in the mixture: what lies in it, and what an epoch draws from it. `weight` is its share of the rows
    drawn.

    With preferences a row is a pair, and its tokens are those of both sides. Where completions are drawn a row is a
    prompt.
    """

    name: str
    format: str
    read: int
    used: int
    ground_truths: int
    rows: int
    tokens: int
    trained: int
    weight: float
    drawn_tokens: int
    drawn_trained: int


@dataclass(frozen=True)
class DataIssue:
    """One thing that is wrong with some rows: how many, what is done with them, and where the first few stand."""

    description: str
    count: int
    done: str
    locations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lengths:
    """Rows by length in tokens: `counts[i]` rows have between `edges[i]` + 1 and `edges[i + 1]` tokens. `over` did not
    fit the limit.

    Each side of a pair counts as a row of its own; `over` counts pairs.
    """

    limit: int
    edges: tuple[int, ...]
    counts: tuple[int, ...]
    median: int
    p95: int
    longest: int
    over: int


@dataclass(frozen=True)
class EosStats:
    """Is the end token trained? `tokens` names each with how often it is; `rows` of all rows have every answer closed
    by one."""

    trained: bool
    tokens: Mapping[str, int]
    rows: int
    total: int


@dataclass(frozen=True)
class Epoch:
    """What one pass over the mixture has, and the steps that follow."""

    rows: int
    tokens: int
    trained: int
    steps: int
    all_steps: int

    @property
    def passes(self) -> float:
        if self.steps:
            return self.all_steps / self.steps
        return 0.0


@dataclass(frozen=True)
class Example:
    """A row as the model will read it: stretches of text, each with whether it is trained. The sides of a pair follow
    each other.

    Of a prompt that completions are drawn for, `ground_truth` is the gold answer, where it has one.
    """

    location: str
    tokens: int
    trained: int
    segments: tuple[tuple[bool, str], ...]
    ground_truth: str | None = None


@dataclass(frozen=True)
class DataReport:
    """The whole picture. `faults`: sentences that say why training must not begin; none where it may. `sides`: only of
    preferences.

    Where completions are drawn nothing says how an answer ends: `ends` is None, and `completions` says what is drawn.
    """

    report: Report
    template: str
    weighted_by: str
    parts: tuple[MixturePart, ...]
    lengths: Lengths
    issues: tuple[DataIssue, ...]
    ends: EosStats | None
    epoch: Epoch
    examples: tuple[Example, ...]
    faults: tuple[str, ...]
    sides: PairBalance | None = None
    completions: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON: the report's own keys, and the picture beside them."""
        return {**self.report.to_dict(), **{name: value for name, value in asdict(self).items() if name != "report"}}
