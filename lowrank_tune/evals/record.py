"""`evals.jsonl` in a run's folder: one object an evaluation, versioned, never rewritten. Read leniently, since anyone
may have edited it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_tune.checkpoint import finite, telling, write_all

EVALS, VERSION = "evals.jsonl", 1


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Adds one evaluation, durably and in one write. Raises UserError or RunFailed with path and reason."""
    data = json.dumps(finite(dict(record)), allow_nan=False).encode("ascii") + b"\n"
    with telling(path):
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(file).st_size
            # a line that a power cut left half must not spoil this one
            if size and os.pread(file, 1, size - 1) != b"\n":
                data = b"\n" + data
            write_all(file, data)
            os.fsync(file)
        finally:
            os.close(file)


@dataclass(frozen=True)
class Figure:
    """A figure of a record with its interval, `low` None where it has none; `prompts` that it is of."""

    value: float
    low: float | None
    high: float | None
    prompts: int


@dataclass(frozen=True)
class Record:
    """One evaluation as it was written: when, on what, in which settings, and its figures by voice and name."""

    time: float
    origin: str
    settings: Mapping[str, Any]
    prompts: int
    planned: int
    interrupted: bool
    figures: Mapping[str, Mapping[str, Figure]]
    changes: Mapping[str, Mapping[str, Figure]]
    wins: Mapping[str, Mapping[str, Figure]]
    shares: Mapping[str, Mapping[str, tuple[float, float, float]]]
    """Wins, ties and losses that belong to `wins`."""
    tasks: Mapping[str, Mapping[str, Figure]]
    right_by: str
    judge: str


def read_records(folder: Path) -> list[Record]:
    """All evaluations in a folder, oldest first; what cannot be read is passed over."""
    try:
        lines = (folder / EVALS).read_bytes().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            data = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(data, dict) and data.get("v") == VERSION and data.get("kind") == "eval":
            found.append(to_record(data))
    return found


def to_record(data: Mapping[str, Any]) -> Record:
    """The record of such an object."""
    figures, changes, wins, tasks = (_by_voice(data.get(name)) for name in ("figures", "changes", "wins", "tasks"))
    shares = {
        voice: {
            name: (_number(one, "wins"), _number(one, "ties"), _number(one, "losses"))
            for name, one in _mapping(several).items()
            if isinstance(one, Mapping)
        }
        for voice, several in _mapping(data.get("wins")).items()
    }
    on = _mapping(data.get("on"))
    return Record(
        _number(data, "time"),
        str(on.get("origin", "")),
        _mapping(data.get("settings")),
        int(_number(on, "prompts")),
        int(_number(on, "planned")),
        data.get("interrupted") is True,
        figures,
        changes,
        wins,
        shares,
        tasks,
        str(data.get("right_by", "")),
        str(data.get("judge") or ""),
    )


def _by_voice(data: Any) -> dict[str, dict[str, Figure]]:
    return {
        str(voice): {
            str(name): _figure(one)
            for name, one in _mapping(several).items()
            if isinstance(one, Mapping) and "value" in one
        }
        for voice, several in _mapping(data).items()
    }


def _figure(one: Mapping[str, Any]) -> Figure:
    known = all(isinstance(one.get(end), (int, float)) for end in ("low", "high"))
    low, high = (_number(one, end) if known else None for end in ("low", "high"))
    return Figure(_number(one, "value"), low, high, int(_number(one, "prompts")))


def _mapping(data: Any) -> Mapping[str, Any]:
    return data if isinstance(data, Mapping) else {}


def _number(data: Mapping[str, Any], name: str) -> float:
    """nan for what is no number; 0 for a count that is none."""
    value = data.get(name)
    if isinstance(value, (int, float)) and abs(value) < 1e300:
        return float(value)
    return 0.0 if name in ("prompts", "planned", "time") else float("nan")
