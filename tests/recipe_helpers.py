"""Helpers of the tests of recipes: problems as lines, and copies of data with other values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from lowrank_tune.config import RecipeConfig, from_dict, load_any
from lowrank_tune.errors import ConfigError

Steps = tuple[str | int, ...]
Write = Callable[..., str]
"""The fixture `write` of tests/config/conftest.py."""


def problems_of_file(path: str, *overrides: str) -> list[str]:
    """Returns the problems of a recipe or chain in a file. Fails if there is none."""
    with pytest.raises(ConfigError) as caught:
        load_any(path, *overrides)
    return str(caught.value).splitlines()


def problems_of(data: dict[str, Any]) -> list[str]:
    """Returns the problems of a recipe of plain data. Fails if there is none."""
    with pytest.raises(ConfigError) as caught:
        from_dict(data)
    return str(caught.value).splitlines()


def is_setting(key: str) -> bool:
    """Returns whether a dotted key is a setting of a recipe, or a section."""
    section: Any = RecipeConfig
    for step in key.split("."):
        if step not in section.model_fields:
            return False
        section = section.model_fields[step].annotation
    return True


def places(data: Any, path: Steps = ()) -> list[Steps]:
    """Returns the path of every key and entry, of sections too."""
    children: Iterable[tuple[str | int, Any]] = ()
    if isinstance(data, dict):
        children = data.items()
    elif isinstance(data, list):
        children = enumerate(data)
    found: list[Steps] = []
    for key, value in children:
        found += [(*path, key), *places(value, (*path, key))]
    return found


def section_at(data: Any, path: Steps) -> Any:
    """Returns the section that contains the value at a path."""
    for step in path[:-1]:
        data = data[step]
    return data


def with_values(data: dict[str, Any], changes: Iterable[tuple[Steps, Any]]) -> dict[str, Any]:
    """Returns a copy of the data with other values. A change of a section that an earlier change removed is skipped."""
    changed = copy.deepcopy(data)
    for path, value in changes:
        try:
            section_at(changed, path)[path[-1]] = copy.deepcopy(value)
        except (KeyError, IndexError, TypeError):
            continue
    return changed
