"""Reading of JSON that a run wrote and anyone may have edited, or that comes from elsewhere.

Nesting has a limit, because what reads the values recurses. `read_json_object` and what follows it are lenient: a value
of the wrong type counts as missing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank_tune.regular_files import read_regular_file

MAX_NUMBER = 1e300
MAX_DEPTH = 100
"""Levels of lists and objects in a JSON text."""
MAX_BYTES = 64 << 20
"""The largest JSON file that is read whole, unless a caller names another limit."""


def parse_json(text: str | bytes) -> Any:
    """Returns the value of a JSON text. Raises ValueError for text that is not JSON, and for nesting deeper than
    `MAX_DEPTH`."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    if _num_openings(text) > MAX_DEPTH and is_deeper_than(value, MAX_DEPTH):
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    return value


def _num_openings(text: str | bytes) -> int:
    """Returns the number of brackets that open, which is at least the depth."""
    if isinstance(text, bytes):
        return text.count(b"[") + text.count(b"{")
    return text.count("[") + text.count("{")


def is_deeper_than(value: Any, max_depth: int) -> bool:
    """Returns whether lists and objects are nested in more levels, without recursion."""
    level = [value]
    for _ in range(max_depth):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return False
    return any(isinstance(value, (dict, list)) for value in level)


def _children(value: Any) -> Collection[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def describe_lines(numbers: Sequence[int]) -> str:
    """Returns how many lines of a file these are, and the first of them."""
    if not numbers:
        return "0 lines"
    if len(numbers) == 1:
        return f"1 line (line {numbers[0]})"
    return f"{len(numbers)} lines (the first is line {numbers[0]})"


def read_json(file: Path, max_bytes: int = MAX_BYTES) -> Any:
    """Returns the value in a JSON file. Raises OSError for a file that cannot be read, is not regular, or exceeds the
    limit, and ValueError as `parse_json`."""
    return parse_json(read_regular_file(file, max_bytes))


def read_json_object(file: Path) -> Mapping[str, Any]:
    """Returns the object in a JSON file, empty if the file is missing or contains something else."""
    try:
        data = read_json(file)
    except (OSError, ValueError):
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
