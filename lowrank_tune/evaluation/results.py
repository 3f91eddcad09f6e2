"""`evals.jsonl` in a run's folder: one object an evaluation, versioned, never rewritten. Read leniently, since anyone
may have edited it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_tune.checkpoint import as_user_error, replace_nonfinite, write_fully

EVALS = "evals.jsonl"
VERSION = 2


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Adds one evaluation, durably and in one write. Raises UserError or TrainingError with path and reason."""
    data = json.dumps(replace_nonfinite(dict(record)), allow_nan=False).encode("ascii") + b"\n"
    with as_user_error(path):
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(file).st_size
            # a line that a power cut left half must not spoil this one
            if size and os.pread(file, 1, size - 1) != b"\n":
                data = b"\n" + data
            write_fully(file, data)
            os.fsync(file)
        finally:
            os.close(file)


@dataclass(frozen=True)
class MetricValue:
    """A figure of a record with its interval, `low` None where it has none; `prompts` that it is of."""

    value: float
    low: float | None
    high: float | None
    prompts: int


@dataclass(frozen=True)
class EvalRecord:
    """One evaluation as it was written: when, on what, in which settings, and its figures by variant and name."""

    time: float
    origin: str
    settings: Mapping[str, Any]
    prompts: int
    planned: int
    interrupted: bool
    metrics: Mapping[str, Mapping[str, MetricValue]]
    deltas: Mapping[str, Mapping[str, MetricValue]]
    wins: Mapping[str, Mapping[str, MetricValue]]
    shares: Mapping[str, Mapping[str, tuple[float, float, float]]]
    """Wins, ties and losses that belong to `wins`."""
    tasks: Mapping[str, Mapping[str, MetricValue]]
    grader_name: str
    reward_model: str


def read_records(folder: Path) -> list[EvalRecord]:
    """All evaluations in a folder, oldest first; what cannot be read is passed over."""
    try:
        lines = (folder / EVALS).read_bytes().splitlines()
    except OSError:
        return []
    records = []
    for line in lines:
        try:
            data = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(data, dict) and data.get("v") == VERSION and data.get("kind") == "eval":
            records.append(parse_record(data))
    return records


def parse_record(data: Mapping[str, Any]) -> EvalRecord:
    """The record of such an object."""
    metrics, deltas, wins, tasks = (_by_variant(data.get(name)) for name in ("metrics", "deltas", "wins", "tasks"))
    shares = {
        variant: {
            name: (
                _parse_float(win_shares, "wins"),
                _parse_float(win_shares, "ties"),
                _parse_float(win_shares, "losses"),
            )
            for name, win_shares in _as_mapping(variant_wins).items()
            if isinstance(win_shares, Mapping)
        }
        for variant, variant_wins in _as_mapping(data.get("wins")).items()
    }
    dataset = _as_mapping(data.get("dataset"))
    return EvalRecord(
        _parse_float(data, "time"),
        str(dataset.get("origin", "")),
        _as_mapping(data.get("settings")),
        int(_parse_float(dataset, "prompts")),
        int(_parse_float(dataset, "planned")),
        data.get("interrupted") is True,
        metrics,
        deltas,
        wins,
        shares,
        tasks,
        str(data.get("grader", "")),
        str(data.get("reward_model") or ""),
    )


def _by_variant(data: Any) -> dict[str, dict[str, MetricValue]]:
    return {
        str(variant): {
            str(name): _metric_value(raw_metric)
            for name, raw_metric in _as_mapping(variant_metrics).items()
            if isinstance(raw_metric, Mapping) and "value" in raw_metric
        }
        for variant, variant_metrics in _as_mapping(data).items()
    }


def _metric_value(raw_metric: Mapping[str, Any]) -> MetricValue:
    has_interval = all(isinstance(raw_metric.get(end), (int, float)) for end in ("low", "high"))
    low, high = (_parse_float(raw_metric, end) if has_interval else None for end in ("low", "high"))
    return MetricValue(_parse_float(raw_metric, "value"), low, high, int(_parse_float(raw_metric, "prompts")))


def _as_mapping(data: Any) -> Mapping[str, Any]:
    return data if isinstance(data, Mapping) else {}


def _parse_float(data: Mapping[str, Any], name: str) -> float:
    """nan for what is no number; 0 for a count that is none."""
    value = data.get(name)
    if isinstance(value, (int, float)) and abs(value) < 1e300:
        return float(value)
    if name in ("prompts", "planned", "time"):
        return 0.0
    return float("nan")
