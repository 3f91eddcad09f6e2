"""Lenient reading of JSON that a run wrote and anyone may have edited. A value of the wrong type counts as missing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_NUMBER = 1e300


def read_json_object(file: Path) -> Mapping[str, Any]:
    """Returns the object in a JSON file, empty if the file is missing or contains something else."""
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return as_mapping(data)


def as_mapping(value: Any) -> Mapping[str, Any]:
    """Returns the value if it is an object, else an empty one."""
    if isinstance(value, Mapping):
        return value
    return {}


def as_number(value: Any, default: float = math.nan) -> float:
    """Returns `value` as a float, or `default` if it is not a finite number."""
    if isinstance(value, (int, float)) and abs(value) < MAX_NUMBER:
        return float(value)
    return default


def get_number(
    data: Mapping[str, Any],
    name: str,
    default: float = 0.0,
) -> float:
    """Returns the number under `name`, or `default` if it is not a finite number."""
    return as_number(data.get(name), default)


def get_mapping(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Returns the object under `name`, or an empty one."""
    return as_mapping(data.get(name))


def get_list(data: Mapping[str, Any], name: str) -> list[Any]:
    """Returns the list under `name`, or an empty one."""
    value = data.get(name)
    return value if isinstance(value, list) else []


def get_objects(data: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """Returns the objects of the list under `name`; other entries are left out."""
    return [entry for entry in get_list(data, name) if isinstance(entry, Mapping)]
