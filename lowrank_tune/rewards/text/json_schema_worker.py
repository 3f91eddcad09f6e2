"""The worker side of `json_schema` (`json_schema.py`): checks that a text is strict JSON and valid under a schema.

Runs in the worker process; `build_validator` also in the main process, to check the schema before a run. Nothing is
fetched: references must lead within the schema. jsonschema is optional, so it is imported where it is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

MAX_DEPTH = 64  # levels of objects and arrays
MAX_NUMBER_CHARS = 300  # characters; a longer number does not fit a float
MAX_QUOTED_CHARS = 200  # characters of a reason
DATA_KEYWORDS = ("const", "enum", "default", "examples")
"""Keywords whose values are not schemas."""
SIMPLE_VALUES: tuple[Any, ...] = (None, True, 0, "", [], {})


def load(spec: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """Returns the grader of `text`: {valid, why}, with the reason if it is not valid."""
    validator = build_validator(spec["schema"])

    def grade(request: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            value = parse_json(request["text"])
        except ValueError as error:
            return {"valid": False, "why": f"is not JSON: {error}"[:MAX_QUOTED_CHARS]}
        violation = next(validator.iter_errors(value), None)
        if violation is None:
            return {"valid": True, "why": ""}
        path = violation.json_path[:MAX_QUOTED_CHARS]
        return {"valid": False, "why": f"at {path}: {violation.message[:MAX_QUOTED_CHARS]}"}

    return grade


def build_validator(schema: Any) -> Any:
    """Returns the validator of a schema. Raises ValueError, with a predicate, if it is not a schema or refers to
    something that is not in it."""
    from jsonschema import SchemaError, validators
    from jsonschema_specifications import REGISTRY
    from referencing.exceptions import Unresolvable

    if not isinstance(schema, dict | bool):
        raise ValueError("is neither an object nor true or false")
    declared = schema.get("$schema") if isinstance(schema, dict) else None
    default = None if declared else validators.Draft202012Validator
    validator_class = validators.validator_for(schema, default=default)
    if validator_class is None:
        raise ValueError(f"has an unknown `$schema`: {str(declared)[:MAX_QUOTED_CHARS]}")
    try:
        validator_class.check_schema(schema)
        _check_references(schema)
        validator = validator_class(schema, registry=REGISTRY)
        for value in SIMPLE_VALUES:
            validator.is_valid(value)
    except SchemaError as error:
        raise ValueError(f"is not a JSON schema: at {error.json_path}: {error.message[:MAX_QUOTED_CHARS]}") from None
    except Unresolvable as error:
        reference = str(error.ref)[:MAX_QUOTED_CHARS]
        raise ValueError(f"refers to {reference}, which is not in it; nothing is fetched") from None
    except RecursionError:
        raise ValueError("refers to itself without end, or is nested too deeply") from None
    return validator


def _check_references(schema: Any) -> None:
    """Raises Unresolvable if a reference within the schema leads nowhere. References into parts with their own `$id`
    are checked when they are followed."""
    from jsonschema_specifications import REGISTRY
    from referencing import Resource
    from referencing.jsonschema import DRAFT202012

    subschemas = list(_subschemas(schema))
    ids = {subschema["$id"] for subschema in subschemas if isinstance(subschema.get("$id"), str)}
    resource = Resource.from_contents(schema, default_specification=DRAFT202012)
    resolver = REGISTRY.with_resource("", resource).resolver()
    for subschema in subschemas:
        reference = subschema.get("$ref")
        if not isinstance(reference, str):
            continue
        leads_to_id = any(reference.startswith(name) for name in ids)
        is_relative_to_id = reference[:1] == "#" and bool(ids)
        if not leads_to_id and not is_relative_to_id:
            resolver.lookup(reference)


def _subschemas(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
        for key, value in schema.items():
            if key not in DATA_KEYWORDS:
                yield from _subschemas(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _subschemas(value)


def parse_json(text: str) -> Any:
    """Returns the value of a JSON text. Raises ValueError for NaN, a duplicate key, a number that does not fit a float,
    and nesting that is too deep."""
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_no_constant,
            parse_float=_float,
            parse_int=_int,
        )
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [inner for outer in level for inner in _children(outer)]
    if level:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    return value


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    json_object = dict(pairs)
    if len(json_object) != len(pairs):
        raise ValueError("an object has a key twice")
    return json_object


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def _float(text: str) -> float:
    number = float(text) if len(text) <= MAX_NUMBER_CHARS else math.inf
    if not math.isfinite(number):
        raise ValueError("a number is too large or too long")
    return number


def _int(text: str) -> int:
    if len(text) > MAX_NUMBER_CHARS:
        raise ValueError("a number is too large or too long")
    return int(text)
