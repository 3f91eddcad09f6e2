"""The report of what will be trained on, as dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lowrank_tune.data import Report
from lowrank_tune.data.stats import PairBalance
from lowrank_tune.data_report.labels import LabelBalance


@dataclass(frozen=True)
class MixturePart:
    """A source in the mixture: what it contains, and what an epoch draws from it. `weight` is its share of the rows
    drawn.

    With preferences a row is a pair, and its tokens are those of both sides. If completions are generated a row is a
    prompt. Rows of plain text are drawn in `packs`; 0 for others. `answers`: the used rows, with labels both answers of
    a pair.
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
    packs: int = 0
    with_reasoning: int = 0
    with_tools: int = 0
    answers: int = 0


@dataclass(frozen=True)
class DataIssue:
    """A fault of some rows: how many, what is done with them, and the locations of the first few."""

    description: str
    count: int
    done: str
    locations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lengths:
    """Rows by length in tokens: `counts[i]` rows have between `edges[i]` + 1 and `edges[i + 1]` tokens. `over` rows
    exceed the limit.

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
    """Whether an end token is trained. `tokens` counts each by its text; in `rows` of `total` rows every answer ends
    with one."""

    trained: bool
    tokens: Mapping[str, int]
    rows: int
    total: int


@dataclass(frozen=True)
class Epoch:
    """One pass over the mixture, and the steps of the run (`all_steps`)."""

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
    """A row as the model will read it: segments of text, each with whether it is trained. The rows of a pair follow
    each other.

    `ground_truth` is the gold answer of a prompt that completions are generated for, if it has one.
    """

    location: str
    tokens: int
    trained: int
    segments: tuple[tuple[bool, str], ...]
    ground_truth: str | None = None


@dataclass(frozen=True)
class DataReport:
    """The whole report. `faults`: why training must not begin, in sentences; empty if it may. `sides`: only for
    preferences. `labels`: only for answers with a label.

    If completions are generated, the data do not determine how an answer ends: `ends` is None, and `completions`
    describes what is generated.
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
    labels: LabelBalance | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON: the keys of `report`, and the other fields beside them."""
        fields = asdict(self)
        del fields["report"]
        return {**self.report.to_dict(), **fields}
