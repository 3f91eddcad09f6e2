"""The data of a run: the mixture, lengths, unusable rows, and rows with their loss mask; read from `data.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from lowrank_tune.json_files import (
    get_list,
    get_mapping,
    get_number,
    get_objects,
)
from lowrank_tune.ui.html import render
from lowrank_tune.ui.metrics import SIDE_COUNTS
from lowrank_tune.ui.report.run_log import RunLog
from lowrank_tune.ui.svg import length_histogram

MEASURES = {
    "rows": "rows",
    "tokens": "tokens",
    "trained": "trained tokens",
}
EPOCH_FIGURES = ("rows", "tokens", "trained", "steps")
SIDE_FIGURES = ("pairs", "chosen", "rejected", "margins", *SIDE_COUNTS)
"""How the sides of the training pairs differ in length, which a model could learn instead of quality."""
LABEL_FIGURES = (
    "desirable",
    "undesirable",
    "desirable_tokens",
    "undesirable_tokens",
    "desirable_weight",
    "undesirable_weight",
)
"""How many training answers have each label, their mean lengths, and the weights of both classes."""
LENGTH_FIGURES = {
    "median": "median",
    "p95": "95 % up to",
    "longest": "longest read",
    "limit": "limit",
}


@dataclass(frozen=True)
class Measure:
    """A count and its share of the whole."""

    name: str
    share: float
    count: float


@dataclass(frozen=True)
class Source:
    """A part of the mixture."""

    name: Any
    format: Any
    measures: Sequence[Measure]
    weight: float


@dataclass(frozen=True)
class Issue:
    """A kind of row that could not be used."""

    count: int
    description: Any
    done: Any
    locations: str


@dataclass(frozen=True)
class Example:
    """A row as the model reads it: stretches of text, each with whether it is trained."""

    location: Any
    segments: Sequence[Sequence[Any]]


def data(run_log: RunLog) -> Markup:
    """Returns the section, empty if the run has no `data.json`."""
    report = run_log.data
    if not report:
        return Markup()
    epoch = get_mapping(report, "epoch")
    lengths = get_mapping(report, "lengths")
    sides = get_mapping(report, "sides")
    labels = get_mapping(report, "labels")
    issues = [_issue(issue) for issue in get_objects(report, "issues")]
    examples = [_example(example) for example in get_objects(report, "examples")]
    return render(
        "dataset",
        report=report,
        sources=_sources(report),
        epoch={name: get_number(epoch, name) for name in EPOCH_FIGURES},
        validation_rows=get_number(report, "validation_rows"),
        eos_tokens=_eos_tokens(get_mapping(report, "ends")),
        lengths=[(label, get_number(lengths, name)) for name, label in LENGTH_FIGURES.items()],
        length_svg=_length_svg(lengths),
        sides={name: get_number(sides, name) for name in SIDE_FIGURES},
        side_counts=SIDE_COUNTS,
        labels={name: get_number(labels, name) for name in LABEL_FIGURES},
        issues=issues,
        examples=examples,
    )


def _sources(report: Mapping[str, Any]) -> list[Source]:
    parts = get_objects(report, "parts")
    totals = {key: sum(get_number(part, key) for part in parts) or 1.0 for key in MEASURES}
    sources = []
    for part in parts:
        measures = []
        for key, name in MEASURES.items():
            count = get_number(part, key)
            measures.append(Measure(name, count / totals[key], count))
        sources.append(
            Source(
                part.get("name", ""),
                part.get("format", ""),
                measures,
                get_number(part, "weight"),
            )
        )
    return sources


def _eos_tokens(eos_stats: Mapping[str, Any]) -> dict[str, float] | None:
    """Returns how often each end token is trained, None if none is."""
    if not eos_stats.get("trained"):
        return None
    tokens = get_mapping(eos_stats, "tokens")
    return {str(name): get_number(tokens, name) for name in tokens}


def _length_svg(lengths: Mapping[str, Any]) -> Markup:
    edges = get_list(lengths, "edges")
    counts = get_list(lengths, "counts")
    if len(edges) != len(counts) + 1 or not all(isinstance(value, int) for value in (*edges, *counts)):
        return Markup()
    return length_histogram(
        edges,
        counts,
        int(get_number(lengths, "limit")),
        int(get_number(lengths, "over")),
    )


def _issue(issue: Mapping[str, Any]) -> Issue:
    locations = ", ".join(map(str, get_list(issue, "locations")))
    return Issue(
        int(get_number(issue, "count")),
        issue.get("description", ""),
        issue.get("done", ""),
        locations,
    )


def _example(example: Mapping[str, Any]) -> Example:
    segments = [pair for pair in get_list(example, "segments") if isinstance(pair, list) and len(pair) == 2]
    return Example(example.get("location", ""), segments)
