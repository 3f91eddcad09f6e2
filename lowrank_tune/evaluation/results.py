"""`evals.jsonl` in a run's folder: one versioned object per evaluation, only ever appended. Anyone can edit the file:
damaged lines are left out with a warning, and values that are not valid are ignored."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lowrank_tune.checkpoint import as_user_error, replace_nonfinite, write_fully
from lowrank_tune.json_files import as_mapping, as_number, describe_lines, get_number, parse_json

EVALS = "evals.jsonl"
VERSION = 2
T = TypeVar("T")


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Appends one evaluation durably and in one write. Raises UserError or TrainingError with path and reason."""
    line = json.dumps(replace_nonfinite(dict(record)), allow_nan=False).encode("ascii") + b"\n"
    with as_user_error(path):
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            # an incomplete last line of an earlier crash must not damage this one
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line
            write_fully(descriptor, line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class MetricValue:
    """A metric of a record with its interval, None if it has none, and its number of prompts."""

    value: float
    low: float | None
    high: float | None
    prompts: int


@dataclass(frozen=True)
class WinShares:
    """Fractions of pairs of answers in which the tuned variant is better, equal or worse than the base."""

    wins: float
    ties: float
    losses: float


MetricTable = Mapping[str, Mapping[str, MetricValue]]
"""Metrics by variant and name."""


@dataclass(frozen=True)
class EvalRecord:
    """One evaluation as it was written: when, on which questions, with which settings, and its metrics."""

    time: float
    origin: str
    settings: Mapping[str, Any]
    prompts: int
    planned: int
    interrupted: bool
    metrics: MetricTable
    deltas: MetricTable
    wins: MetricTable
    shares: Mapping[str, Mapping[str, WinShares]]
    """Of the same variants and names as `wins`."""
    tasks: MetricTable
    grader_name: str
    reward_model: str


def read_records(folder: Path) -> list[EvalRecord]:
    """Returns all evaluations in a folder, oldest first, without those of other versions.

    Warns about lines that contain no object, and about a file that cannot be read.
    """
    file = folder / EVALS
    try:
        lines = file.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        _warn(f"{file} cannot be read ({error.strerror or error}), so no evaluation is shown")
        return []
    records = []
    damaged = []
    for number, line in enumerate(lines, start=1):
        data = _object_in(line)
        if data is None:
            damaged.append(number)
        elif data.get("v") == VERSION and data.get("kind") == "eval":
            records.append(parse_record(data))
    if damaged:
        _warn(f"{file} is damaged: {describe_lines(damaged)} cannot be read; evaluations are shown without them")
    return records


def _object_in(line: bytes) -> Mapping[str, Any] | None:
    """Returns the object in a line, an empty one for an empty line, None if the line contains something else."""
    if not line.strip():
        return {}
    try:
        data = parse_json(line)
    except ValueError:
        return None
    return data if isinstance(data, dict) else None


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def parse_record(data: Mapping[str, Any]) -> EvalRecord:
    """Returns the record of an object of `evals.jsonl`; values that are not valid become nan, 0 or empty."""
    dataset = as_mapping(data.get("dataset"))
    return EvalRecord(
        time=get_number(data, "time"),
        origin=str(dataset.get("origin", "")),
        settings=as_mapping(data.get("settings")),
        prompts=int(get_number(dataset, "prompts")),
        planned=int(get_number(dataset, "planned")),
        interrupted=data.get("interrupted") is True,
        metrics=_table(data.get("metrics"), _metric_value),
        deltas=_table(data.get("deltas"), _metric_value),
        wins=_table(data.get("wins"), _metric_value),
        shares=_table(data.get("wins"), _win_shares),
        tasks=_table(data.get("tasks"), _metric_value),
        grader_name=str(data.get("grader", "")),
        reward_model=str(data.get("reward_model") or ""),
    )


def _table(data: Any, parse: Callable[[Mapping[str, Any]], T | None]) -> dict[str, dict[str, T]]:
    """Returns the parsed entries by variant and name, without those that are not valid."""
    table = {}
    for variant, entries in as_mapping(data).items():
        parsed_entries = {}
        for name, entry in as_mapping(entries).items():
            parsed = parse(as_mapping(entry))
            if parsed is not None:
                parsed_entries[str(name)] = parsed
        table[str(variant)] = parsed_entries
    return table


def _metric_value(entry: Mapping[str, Any]) -> MetricValue | None:
    if "value" not in entry:
        return None
    value = as_number(entry["value"])
    prompts = int(get_number(entry, "prompts"))
    low = entry.get("low")
    high = entry.get("high")
    if isinstance(low, (int, float)) and isinstance(high, (int, float)):
        return MetricValue(
            value,
            as_number(low),
            as_number(high),
            prompts,
        )
    return MetricValue(value, None, None, prompts)


def _win_shares(entry: Mapping[str, Any]) -> WinShares:
    return WinShares(as_number(entry.get("wins")), as_number(entry.get("ties")), as_number(entry.get("losses")))
