"""Sentences for the errors of pydantic, with hints for keys that have another name in other libraries."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lowrank_tune.config.aliases import ALGORITHM_ALIASES, ALIASES, IN_PROCESS_NOTE, NOT_SETTINGS, SOURCE_ALIASES
from lowrank_tune.config.base import Finding, Path, Settings
from lowrank_tune.config.schema import ALGORITHMS, USED_BY
from lowrank_tune.config.yaml import dotted, has_entry

MAX_HINTS = 60
"""Unknown keys that get a hint. The search for the nearest name takes time."""
MAX_LISTED_KEYS = 12

NAME_TEXT = "may have letters, digits, `.`, `_` and `-`, a letter or digit first, at most 64"
LINE_TEXT = "must be one line without control characters"
ERROR_MESSAGES = {
    "finite_number": "must be a finite number, {found}",
    "greater_than": "must be greater than {gt}, {found}",
    "greater_than_equal": "must be at least {ge}, {found}",
    "less_than": "must be smaller than {lt}, {found}",
    "less_than_equal": "must be at most {le}, {found}",
    "too_short": "must have at least one entry",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} letters",
    "string_unicode": "contains half of a surrogate pair, which is not a character",
    "string_pattern_mismatch": "{rule}, {found}",
    "calendar_day": "must be a day as YYYY-MM-DD, {found}",
}
"""Sentences for the types of pydantic's errors. Their fields are those of the error's context, `found` and `rule`."""
TYPE_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
}
TRUE_WORDS = ("yes", "on", "true")
FALSE_WORDS = ("no", "off", "false")


def is_section(kind: Any) -> TypeGuard[type[Settings]]:
    """Returns whether an annotation is the class of a section."""
    return isinstance(kind, type) and issubclass(kind, Settings)


def alternatives(annotation: Any) -> Iterator[Any]:
    """Yields the alternatives of an annotation, without `None` and `Annotated`."""
    if get_origin(annotation) in (Union, types.UnionType):
        for argument in get_args(annotation):
            yield from alternatives(argument)
    elif hasattr(annotation, "__metadata__"):
        yield from alternatives(get_args(annotation)[0])
    elif annotation is not type(None):
        yield annotation


def annotations_at(model: type[BaseModel], path: Path) -> list[Any]:
    """Returns the alternatives of the annotation at a path; an empty list if there is no such path."""
    kinds: list[Any] = [model]
    for step in path:
        kinds = [below for kind in kinds for below in _annotations_below(kind, step)]
    return kinds


def _annotations_below(kind: Any, step: str | int) -> Iterator[Any]:
    if is_section(kind):
        if step in kind.model_fields:
            yield from alternatives(kind.model_fields[str(step)].annotation)
    elif get_origin(kind) is dict:
        yield from alternatives(get_args(kind)[1])
    elif get_origin(kind) is tuple and isinstance(step, int):
        yield from alternatives(get_args(kind)[0])


def keys_at(model: type[BaseModel], path: Path) -> list[str]:
    """Returns the keys of the section at a path."""
    return [key for kind in annotations_at(model, path) if is_section(kind) for key in kind.model_fields]


def all_paths(model: type[BaseModel], path: Path = ()) -> Iterator[Path]:
    """Yields the path of every setting: in lists that of the first entry, in `adapters` that of the policy."""
    for kind in annotations_at(model, path):
        if is_section(kind):
            for key in kind.model_fields:
                yield (*path, key)
                yield from all_paths(model, (*path, key))
        elif get_origin(kind) is tuple:
            yield from all_paths(model, (*path, 0))
        elif get_origin(kind) is dict and path == ("adapters",):
            yield from all_paths(model, (*path, "policy"))


@functools.cache
def setting_locations(model: type[BaseModel], algorithm: str = "") -> dict[str, str]:
    """Returns the dotted path of every key: the first one of this name that the algorithm uses."""
    unused = [key for key, users in USED_BY.items() if algorithm and algorithm not in users]
    locations: dict[str, str] = {}
    for path in map(dotted, all_paths(model)):
        is_unused = any(path == key or path.startswith(f"{key}.") for key in unused)
        if not is_unused:
            locations.setdefault(path.rpartition(".")[2], path)
    return locations


def unknown_key_message(
    model: type[BaseModel],
    path: Path,
    algorithm: str = "",
) -> str:
    """Returns the sentence for an unknown key."""
    word = str(path[-1])
    is_alias = word in ALGORITHM_ALIASES.get(algorithm, {})
    if not is_alias and (word in NOT_SETTINGS or word.startswith("vllm_")):
        return f"unknown key; {NOT_SETTINGS.get(word, IN_PROCESS_NOTE)}"
    keys = keys_at(model, path[:-1])
    nearest = _nearest_setting(model, path, algorithm, keys)
    if nearest:
        return f"unknown key; did you mean `{nearest}`?"
    if 0 < len(keys) <= MAX_LISTED_KEYS:
        return f"unknown key; there are {', '.join(keys)}"
    return "unknown key"


def _nearest_setting(
    model: type[BaseModel],
    path: Path,
    algorithm: str,
    keys: list[str],
) -> str:
    """Returns the setting that an unknown key probably means, or an empty string: an alias, a similar key of this
    section, or a key of another section that is nearly the same."""
    word = str(path[-1])
    if SOURCE_ALIASES.get(word) in keys:
        return SOURCE_ALIASES[word]
    meant = ALGORITHM_ALIASES.get(algorithm, {}).get(word)
    if meant is not None:
        return meant.removeprefix(f"{dotted(path[:-1])}.")
    similar = get_close_matches(word, keys, n=1, cutoff=0.6)
    meant = ALIASES.get(word)
    if meant is not None:
        last = meant.rpartition(".")[2]
        if last in keys:
            return last
        return similar[0] if similar else meant
    if similar:
        return similar[0]
    locations = setting_locations(model, algorithm)
    others = [key for key, location in locations.items() if location != word]
    same = get_close_matches(word, others, n=1, cutoff=0.8)
    return locations[same[0]] if same else ""


def describe_value(value: Any) -> str:
    """Returns a value in words."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, int) and abs(value) >= 10**18:
        return "a number of more than 18 digits"
    if not isinstance(value, (int, float, str)):
        return f"a {type(value).__name__}"
    text = repr(value)
    if isinstance(value, str) and not value.isprintable():
        text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def describe_expected(model: type[BaseModel], path: Path) -> str:
    """Returns the types and choices at a path in words."""
    return " or ".join(map(_describe_annotation, annotations_at(model, path))) or "another value"


def _describe_annotation(kind: Any) -> str:
    if get_origin(kind) is Literal:
        choices = ", ".join(map(str, get_args(kind)))
        return f"one of {choices}" if len(get_args(kind)) > 1 else choices
    if get_origin(kind) is tuple:
        return "a list"
    if get_origin(kind) is dict or is_section(kind):
        return "a mapping (`key: value` lines)"
    return TYPE_NAMES.get(kind, "another value")


def suggestion_for(
    model: type[BaseModel],
    path: Path,
    value: Any,
) -> str:
    """Returns how to correct a value of the wrong type, or an empty string."""
    kinds = annotations_at(model, path)
    if kinds == [str] and isinstance(value, (int, float)):
        return " (put it in quotes)"
    if not isinstance(value, str):
        return ""
    if bool in kinds and value.lower() in TRUE_WORDS:
        return " (write `true`)"
    if bool in kinds and value.lower() in FALSE_WORDS:
        return " (write `false`)"
    choices = [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if len(choices) > 1 and (near := get_close_matches(value, choices, n=1, cutoff=0.6)):
        return f"; did you mean `{near[0]}`?"
    return ""


def format_error(
    model: type[BaseModel],
    error: ErrorDetails,
    path: Path,
    value: Any,
) -> str:
    """Returns one of pydantic's errors as a sentence."""
    expected = describe_expected(model, path)
    found = f"found {describe_value(value)}"
    if error["type"] == "missing":
        has_choices = any(get_origin(kind) is Literal for kind in annotations_at(model, path))
        return f"is missing: {expected}" if has_choices else "is missing"
    template = ERROR_MESSAGES.get(error["type"])
    if template is None:
        return f"expected {expected}, {found}{suggestion_for(model, path, value)}"
    rule = NAME_TEXT if path == ("name",) else LINE_TEXT
    return template.format(
        found=found,
        rule=rule,
        **error.get("ctx", {}),
    )


def format_errors(
    model: type[BaseModel],
    data: Any,
    failed: ValidationError,
) -> Iterator[Finding]:
    """Yields each error once, with its path in the data. (Pydantic adds the alternatives of unions to its paths.)"""
    algorithm = data.get("algorithm") if isinstance(data, dict) else None
    if algorithm not in ALGORITHMS:
        algorithm = ""
    reported: set[Path] = set()
    for error in failed.errors(include_url=False, include_context=True):
        path, value = _locate(data, error["loc"])
        if error["type"] == "missing":
            path = error["loc"]
        if path in reported:
            continue
        reported.add(path)
        if error["type"] != "extra_forbidden":
            yield path, format_error(model, error, path, value)
        elif len(reported) <= MAX_HINTS:
            yield path, unknown_key_message(model, path, algorithm)
        else:
            yield (
                path,
                "unknown key",
            )


def _locate(data: Any, location: Path) -> tuple[Path, Any]:
    """Returns the part of an error's location that the data has, and the value there."""
    path: Path = ()
    value = data
    for step in location:
        if not has_entry(value, step):
            break
        value = value[step]
        path = (*path, step)
    return path, value
