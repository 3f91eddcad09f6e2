"""JSON schemas in a worker: a text is strict JSON, and valid. Nothing is ever fetched: references lead within the
schema alone.

jsonschema is an extra, and therefore imported where it is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

MAX_DEPTH = 64  # levels of objects and arrays
MAX_NUMBER_CHARS = 300  # characters; more is no float
MAX_QUOTED_CHARS = 200  # characters of a reason
DATA_KEYWORDS = ("const", "enum", "default", "examples")
"""Keywords whose values are no schemas."""
SIMPLE_VALUES: tuple[Any, ...] = (None, True, 0, "", [], {})


def load(spec: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """Judges `text`: whether it is `valid`, and `why` not."""
    validator = build_validator(spec["schema"])

    def grade(request: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            value = parse_json(request["text"])
        except ValueError as error:
            return {"valid": False, "why": f"is no JSON: {error}"[:MAX_QUOTED_CHARS]}
        violation = next(validator.iter_errors(value), None)
        return {
            "valid": violation is None,
            "why": ""
            if violation is None
            else f"at {violation.json_path[:MAX_QUOTED_CHARS]}: {violation.message[:MAX_QUOTED_CHARS]}",
        }

    return grade


def build_validator(schema: Any) -> Any:
    """The validator of a schema. Raises ValueError, in words, for what is no schema, or refers to what is not in it."""
    from jsonschema import SchemaError, validators
    from jsonschema_specifications import REGISTRY
    from referencing.exceptions import Unresolvable

    if not isinstance(schema, dict | bool):
        raise ValueError("is neither an object nor true or false")
    declared = schema.get("$schema") if isinstance(schema, dict) else None
    validator_class = validators.validator_for(schema, default=None if declared else validators.Draft202012Validator)
    if validator_class is None:
        raise ValueError(f"has a `$schema` that is not known: {str(declared)[:MAX_QUOTED_CHARS]}")
    try:
        validator_class.check_schema(schema)
        _check_references(schema)
        validator = validator_class(schema, registry=REGISTRY)
        for value in SIMPLE_VALUES:
            validator.is_valid(value)
    except SchemaError as error:
        raise ValueError(f"is no JSON schema: at {error.json_path}: {error.message[:MAX_QUOTED_CHARS]}") from None
    except Unresolvable as error:
        raise ValueError(
            f"refers to {str(error.ref)[:MAX_QUOTED_CHARS]}, which is not in it; nothing is fetched"
        ) from None
    except RecursionError:
        raise ValueError("refers to itself without end, or is nested too deep") from None
    return validator


def _check_references(schema: Any) -> None:
    """References within the schema lead somewhere. Those of parts with an `$id` of their own are told when they are
    followed."""
    from jsonschema_specifications import REGISTRY
    from referencing import Resource
    from referencing.jsonschema import DRAFT202012

    subschemas = list(_subschemas(schema))
    ids = {subschema["$id"] for subschema in subschemas if isinstance(subschema.get("$id"), str)}
    resolver = REGISTRY.with_resource("", Resource.from_contents(schema, default_specification=DRAFT202012)).resolver()
    for subschema in subschemas:
        reference = subschema.get("$ref")
        if (
            isinstance(reference, str)
            and not any(reference.startswith(name) for name in ids)
            and not (reference[:1] == "#" and ids)
        ):
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
    """A text as JSON, strictly: no NaN, no key twice, no number beyond a float, nothing nested too deep. Raises
    ValueError."""
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
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    if level:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    json_object = dict(pairs)
    if len(json_object) != len(pairs):
        raise ValueError("an object has a key twice")
    return json_object


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")


def _float(text: str) -> float:
    number = float(text) if len(text) <= MAX_NUMBER_CHARS else math.inf
    if not math.isfinite(number):
        raise ValueError("a number is too large or too long")
    return number


def _int(text: str) -> int:
    if len(text) > MAX_NUMBER_CHARS:
        raise ValueError("a number is too large or too long")
    return int(text)
