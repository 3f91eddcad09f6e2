"""Looking at what was written: plain data of any shape, in which a type may be wrong anywhere."""

from __future__ import annotations

from typing import Any

from lowrank_tune.config.yaml_nodes import Path

Finding = tuple[Path, str]
"""Where something is wrong, and a sentence."""


def get_raw(data: Any, *path: str | int) -> Any:
    """The value at a path, or None; null counts as not written."""
    for step in path:
        if isinstance(data, dict):
            data = data.get(step)
        elif isinstance(data, list) and isinstance(step, int) and step < len(data):
            data = data[step]
        else:
            return None
    return data


def number(value: Any) -> float | None:
    """The value where it is a number; faults of type and range are told elsewhere."""
    if isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1e18):
        return float(value)
    return None


def entries(data: Any, *path: str) -> list[Any]:
    """The list at a path, or an empty one."""
    value = get_raw(data, *path)
    return value if isinstance(value, list) else []
