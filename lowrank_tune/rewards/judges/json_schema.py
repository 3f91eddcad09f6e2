"""JSON schemas in a worker: a text is strict JSON, and valid. Nothing is ever fetched: references lead within the
schema alone.

jsonschema is an extra, and therefore imported where it is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

DEEPEST = 64  # levels of objects and arrays
LONGEST_NUMBER = 300  # characters; more is no float
QUOTED = 200  # characters of a reason
DATA = ("const", "enum", "default", "examples")
"""Keywords whose values are no schemas."""
SIMPLEST: tuple[Any, ...] = (None, True, 0, "", [], {})


def load(job: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """Judges `text`: whether it is `valid`, and `why` not."""
    validator = checked(job["schema"])

    def judge(asked: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            value = parsed(asked["text"])
        except ValueError as error:
            return {"valid": False, "why": f"is no JSON: {error}"[:QUOTED]}
        found = next(validator.iter_errors(value), None)
        return {
            "valid": found is None,
            "why": "" if found is None else f"at {found.json_path[:QUOTED]}: {found.message[:QUOTED]}",
        }

    return judge


def checked(schema: Any) -> Any:
    """The validator of a schema. Raises ValueError, in words, for what is no schema, or refers to what is not in it."""
    from jsonschema import SchemaError, validators
    from jsonschema_specifications import REGISTRY
    from referencing.exceptions import Unresolvable

    if not isinstance(schema, dict | bool):
        raise ValueError("is neither an object nor true or false")
    declared = schema.get("$schema") if isinstance(schema, dict) else None
    kind = validators.validator_for(schema, default=None if declared else validators.Draft202012Validator)
    if kind is None:
        raise ValueError(f"has a `$schema` that is not known: {str(declared)[:QUOTED]}")
    try:
        kind.check_schema(schema)
        _check_references(schema)
        validator = kind(schema, registry=REGISTRY)
        for value in SIMPLEST:
            validator.is_valid(value)
    except SchemaError as error:
        raise ValueError(f"is no JSON schema: at {error.json_path}: {error.message[:QUOTED]}") from None
    except Unresolvable as error:
        raise ValueError(f"refers to {str(error.ref)[:QUOTED]}, which is not in it; nothing is fetched") from None
    except RecursionError:
        raise ValueError("refers to itself without end, or is nested too deep") from None
    return validator


def _check_references(schema: Any) -> None:
    """References within the schema lead somewhere. Those of parts with an `$id` of their own are told when they are
    followed."""
    from jsonschema_specifications import REGISTRY
    from referencing import Resource
    from referencing.jsonschema import DRAFT202012

    parts = list(_parts(schema))
    known = {part["$id"] for part in parts if isinstance(part.get("$id"), str)}
    resolver = REGISTRY.with_resource("", Resource.from_contents(schema, default_specification=DRAFT202012)).resolver()
    for part in parts:
        reference = part.get("$ref")
        if (
            isinstance(reference, str)
            and not any(reference.startswith(name) for name in known)
            and not (reference[:1] == "#" and known)
        ):
            resolver.lookup(reference)


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
        for key, value in schema.items():
            if key not in DATA:
                yield from _parts(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _parts(value)


def parsed(text: str) -> Any:
    """A text as JSON, strictly: no NaN, no key twice, no number beyond a float, nothing nested too deep. Raises
    ValueError."""
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_float, parse_int=_int
        )
    except RecursionError:
        raise ValueError(f"nested deeper than {DEEPEST}") from None
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    if level:
        raise ValueError(f"nested deeper than {DEEPEST}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("an object has a key twice")
    return made


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")


def _float(text: str) -> float:
    number = float(text) if len(text) <= LONGEST_NUMBER else math.inf
    if not math.isfinite(number):
        raise ValueError("a number is too large or too long")
    return number


def _int(text: str) -> int:
    if len(text) > LONGEST_NUMBER:
        raise ValueError("a number is too large or too long")
    return int(text)
