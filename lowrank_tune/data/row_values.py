"""Values of a row: texts, lists and JSON; and why a row cannot be used."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank_tune.batch import Row
from lowrank_tune.json_files import is_deeper_than, parse_json

RawRow = Mapping[str, Any]
"""A row as a file or data set contains it: its columns."""
Columns = Mapping[str, str]
"""The setting `columns`: from the name of the format to the name in the data."""
LONE_SURROGATE = "a lone surrogate, which UTF-8 cannot encode"
MAX_JSON_DEPTH = 50
"""Levels of lists and objects in tool calls, tool results and tools. Whole rows may have twice as many, and so may the
requests of a chat template, which contain these."""


class InvalidRow(Exception):
    """Why one row cannot be used. The reason is one of a few phrases, by which rows are counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


RawRowOrFault = RawRow | InvalidRow
RowOrFault = Row | InvalidRow
"""A row, or why it cannot be used."""


def is_list(value: Any) -> bool:
    """Returns whether a value is a list of values, and not a text."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def first_present(values: RawRow, *keys: str) -> Any:
    """Returns the first value that is not null."""
    return next((values[key] for key in keys if values.get(key) is not None), None)


def text_of(value: Any, label: str) -> str:
    """Returns a text, or a number as text: 51.0 is "51". Raises InvalidRow."""
    text = _to_text(value)
    if text is None:
        raise InvalidRow(f"the {label} is not text")
    if not is_text(text):
        raise InvalidRow(f"the {label} contains {LONE_SURROGATE}")
    return text


def optional_text_of(value: Any, label: str) -> str:
    """Returns a text as `text_of`; an empty one for null."""
    return "" if value is None else text_of(value, label)


def _to_text(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**400:
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        if value.is_integer() and abs(value) < 1e15:
            return str(int(value))
        return repr(value)
    if is_text_parts(value):
        return "".join(part["text"] for part in value)
    return None


def is_text_parts(value: Any) -> bool:
    """Returns whether a value is a list of content parts of type text, as some multi-modal libraries write them."""
    return is_list(value) and bool(value) and all(map(_is_text_part, value))


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)


def is_text(text: str) -> bool:
    """Returns whether UTF-8 can encode a text. A JSON string may contain lone surrogates, which it cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def json_value(value: Any, label: str) -> Any:
    """Returns the value of a JSON text, or a value as it is without the keys whose value is null.

    In Parquet all objects of a column have the same keys, with null for those that an object does not have. A text
    contains what was written, null included. Raises InvalidRow.
    """
    if not isinstance(value, str):
        _check_depth(value, label)
        return _without_nulls(value)
    try:
        parsed = parse_json(value)
    except json.JSONDecodeError as error:
        raise InvalidRow(f"invalid JSON in {label}") from error
    except ValueError as error:
        raise InvalidRow(f"nesting or a number without limit in {label}") from error
    _check_depth(parsed, label)
    return parsed


def json_text(value: Any, label: str) -> str:
    """Returns a value of `json_value` as JSON, with the keys in their own order. Raises InvalidRow."""
    try:
        text = json.dumps(
            value,
            ensure_ascii=False,
            allow_nan=False,
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRow(f"a value that JSON does not have in {label}") from error
    if not is_text(text):
        raise InvalidRow(LONE_SURROGATE)
    return text


def _check_depth(value: Any, label: str) -> None:
    if is_deeper_than(value, MAX_JSON_DEPTH):
        raise InvalidRow(f"more than {MAX_JSON_DEPTH} levels of nesting in {label}")


def _without_nulls(value: Any) -> Any:
    """Returns a value without the keys of its objects whose value is null. Its depth is limited."""
    if isinstance(value, dict):
        return {key: _without_nulls(child) for key, child in value.items() if child is not None}
    if isinstance(value, list):
        return [_without_nulls(child) for child in value]
    return value
