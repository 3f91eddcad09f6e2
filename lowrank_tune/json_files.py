"""JSON objects in files that a person may have edited, read without errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
