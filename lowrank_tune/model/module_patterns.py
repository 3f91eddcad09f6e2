"""The patterns in the configuration of a saved adapter, replaced by the exact names of the modules that they match.

PEFT matches them with Python's `re`, whose time can be exponential in the length of a name. Here RE2 matches them, in
linear time, and PEFT gets only names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import Any

from peft import LoraConfig

from lowrank_tune.errors import UserError
from lowrank_tune.regex import compile_pattern, to_utf8

ALL_LINEAR = "all-linear"
"""The value of `target_modules` that is no pattern."""
MAX_NAMES = 4096
"""Names, or keys of patterns, in one setting."""
MAX_PATTERNS = 256
"""Patterns in one setting. Keys without repetitions and groups are not counted."""
MAX_PATTERN_LENGTH = 2000
MAX_PATTERN_BYTES = 1 << 20
"""Memory of one compiled pattern, which bounds its time for one name."""
WITHOUT_REPETITION = re.compile(r"(?:[\w.|^$-]|\\\.)*")
"""Patterns that `re` matches in linear time, and in which it does not differ from RE2."""
NUMBERED_LAYER = r".*?\.[^.]*\.(?P<idx>\d+)\."
"""What finds the number of a layer if `layers_pattern` is not set. The first number of a name is the layer's."""


def check_patterns(raw: Mapping[str, Any]) -> None:
    """Raises UserError, which begins with the key, for more names or patterns in a configuration file than the limits,
    or for a pattern that RE2 does not support."""
    num_patterns = Counter(key for key, _ in _patterns(raw))
    for key in (
        "target_modules",
        "exclude_modules",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
    ):
        value = raw.get(key) or ()
        if not isinstance(value, str) and len(value) > MAX_NAMES:
            raise UserError(f"{key} has {len(value)} entries, and the limit is {MAX_NAMES}")
        if num_patterns[key] > MAX_PATTERNS:
            raise UserError(f"{key} has more than {MAX_PATTERNS} regular expressions: name the modules instead")
    # after the limits, because each takes time
    for key, pattern in _patterns(raw):
        _compile(key, pattern)


def _patterns(raw: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields each pattern, as `re` would get it, with the key of its setting."""
    for key in ("target_modules", "exclude_modules"):
        value = raw.get(key)
        if isinstance(value, str) and value.lower() != ALL_LINEAR:
            yield key, value
    for pattern in _as_list(raw.get("layers_pattern")):
        yield "layers_pattern", _layer_pattern(pattern)
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in raw.get(key) or ():
            if not WITHOUT_REPETITION.fullmatch(pattern):
                yield key, _suffix_pattern(pattern)


def _compile(key: str, pattern: str) -> Any:
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise UserError(
            f"{key} {pattern!r:.40}... has {len(pattern)} characters, and the limit is {MAX_PATTERN_LENGTH}"
        )
    try:
        return compile_pattern(pattern, max_bytes=MAX_PATTERN_BYTES, captures=True)
    except UserError as error:
        # What follows is advice about rewards.
        reason = str(error).partition("; ")[0]
        raise UserError(f"{key} {pattern!r:.80} {reason}: list the names of the modules instead") from None


def resolve_patterns(config: LoraConfig, names: Sequence[str]) -> LoraConfig:
    """Returns the configuration with names from `names`, those of all modules, in place of its patterns. Raises
    UserError as `check_patterns`, and for target modules that match none."""
    resolved = copy(config)
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() != ALL_LINEAR:
        resolved.target_modules = _exact(_full_matches("target_modules", targets, names), names)
    elif targets and config.layers_to_transform not in (None, []):
        resolved.target_modules = _exact(_targets_in_layers(config, names), names)
    if resolved.target_modules is None and targets:
        raise UserError("its target_modules match no module")
    if isinstance(config.exclude_modules, str):
        resolved.exclude_modules = _exact(_full_matches("exclude_modules", config.exclude_modules, names), names)
    resolved.layers_to_transform = None
    resolved.layers_pattern = None
    resolved.rank_pattern = _by_exact_name("rank_pattern", config.rank_pattern, names)
    resolved.alpha_pattern = _by_exact_name("alpha_pattern", config.alpha_pattern, names)
    return resolved


def _full_matches(
    key: str,
    pattern: str,
    names: Sequence[str],
) -> list[str]:
    compiled = _compile(key, pattern)
    return [name for name in names if compiled.fullmatch(to_utf8(name))]


def _exact(matches: Sequence[str], names: Sequence[str]) -> set[str] | str | None:
    """Returns a value from which PEFT selects exactly these modules."""
    if not matches:
        return None
    # PEFT also selects every module whose name ends with one of the names.
    suffixes = tuple(f".{name}" for name in matches)
    if any(name.endswith(suffixes) for name in set(names).difference(matches)):
        return _alternatives(matches)
    return set(matches)


def _alternatives(names: Sequence[str]) -> str:
    return f"(?:{'|'.join(map(re.escape, names))})"


def _targets_in_layers(config: LoraConfig, names: Sequence[str]) -> list[str]:
    """Returns the modules that the names in `target_modules` select, in the layers of `layers_to_transform`. A module
    whose whole name is listed is selected in every layer."""
    listed = set(config.target_modules or ())
    suffixes = tuple(f".{name}" for name in listed)
    layer_patterns = [_layer_pattern(pattern) for pattern in _as_list(config.layers_pattern)] or [NUMBERED_LAYER]
    patterns = [_compile("layers_pattern", pattern) for pattern in layer_patterns]
    layers = config.layers_to_transform
    wanted = {layers} if isinstance(layers, int) else set(layers or ())
    return [
        name
        for name in names
        if name in listed or (name.endswith(suffixes) and _layer_number(name, patterns) in wanted)
    ]


def _layer_number(name: str, patterns: Sequence[Any]) -> int | None:
    for pattern in patterns:
        match = pattern.match(to_utf8(name))
        if match:
            return int(match.group(b"idx"))
    return None


def _layer_pattern(pattern: str) -> str:
    """Returns what PEFT makes of an entry of `layers_pattern`."""
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


def _suffix_pattern(pattern: str) -> str:
    """Returns what PEFT makes of a key of `rank_pattern` or `alpha_pattern`."""
    return rf"(.*\.)?({pattern})$"


def _by_exact_name(
    key: str,
    values: Mapping[str, Any] | None,
    names: Sequence[str],
) -> dict[str, Any]:
    """Returns the values with exact names as keys, one key for each value. The first pattern that matches decides."""
    if all(map(WITHOUT_REPETITION.fullmatch, values or ())):
        return dict(values or {})
    names_of: dict[Any, list[str]] = {}
    for name, value in value_by_name(key, values, names).items():
        names_of.setdefault(value, []).append(name)
    return {f"^{_alternatives(matches)}": value for value, matches in names_of.items()}


def value_by_name(
    key: str,
    values: Mapping[str, Any] | None,
    names: Sequence[str],
) -> dict[str, Any]:
    """Returns the value of each module that a key of `rank_pattern` or `alpha_pattern` matches. The first key that
    matches decides."""
    compiled = [(_compile(key, _suffix_pattern(pattern)), value) for pattern, value in (values or {}).items()]
    value_of = {}
    for name in names:
        encoded = to_utf8(name)
        value = next((value for pattern, value in compiled if pattern.match(encoded)), None)
        if value is not None:
            value_of[name] = value
    return value_of


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)
