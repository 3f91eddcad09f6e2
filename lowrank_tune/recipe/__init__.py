"""Recipes: YAML to settings and back. Strict: every fault is told at once, with file, line and what was probably meant.

    recipe = Recipe.load("tiny-sft", "train.steps=10")
    faults look like   my.yaml:7: train.learning_rat: unknown key; did you mean `learning_rate`?
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from lowrank_tune import settings
from lowrank_tune.errors import Fault, Faults
from lowrank_tune.recipe import rules, wording
from lowrank_tune.recipe.layers import OVERRIDE, find_preset, preset_names, read_recipe
from lowrank_tune.recipe.tree import Node, Path, Place, dotted, from_python, leaves, nearest, plain

__all__ = ["Recipe", "differences", "dump", "find_preset", "from_dict", "load", "presets", "schema"]

MOST_FAULTS = 50
MAY_CHANGE = frozenset({
    "name", "description", "train.steps", "train.epochs", "train.log_every", "train.save_every", "train.keep",
    "evaluate.every", "evaluate.shown",
})  # fmt: skip
"""What a continued run may set anew: its end, its logging and its saving."""


class Recipe(settings.Recipe):
    """One run, complete and without contradictions."""

    @classmethod
    def load(cls, preset_or_path: str | os.PathLike[str], *overrides: str) -> Self:
        """The recipe of a preset or file, with `key=value` overrides. Raises `Faults`, all of them at once."""
        tree, faults, stem = read_recipe(os.fspath(preset_or_path), overrides)
        if "name" not in tree.value:
            name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-")[:64] or "recipe"
            tree.value["name"] = Node(name, Place(tree.place.file))
        return cls._judge(tree, faults)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The recipe of plain data, as `to_dict` gives it. Raises `Faults`."""
        faults: list[Fault] = []
        tree = from_python(dict(data) if isinstance(data, Mapping) else data, Place(), faults)
        if not isinstance(tree.value, dict):
            raise Faults([Fault("a recipe must be a mapping")])
        return cls._judge(tree, faults)

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe as plain data, without what does nothing; `from_dict` of it gives this recipe again."""
        data = super().to_dict()
        for path, _ in list(rules.idle(data)):
            section: Any = data
            for step in path[:-1]:
                section = section[step]
            section.pop(path[-1], None)
        return data

    @model_validator(mode="before")
    @classmethod
    def _without_contradictions(cls, data: Any) -> Any:
        """`Recipe(...)` in Python is judged like a file."""
        written = _as_written(data)
        if faults := [Place().fault(message, path) for path, message in rules.findings(written)]:
            raise Faults(faults)
        return data

    @classmethod
    def _judge(cls, tree: Node, faults: list[Fault]) -> Self:
        """Types, ranges, unknown keys and contradictions of a tree, together with the faults of reading it."""
        data = plain(tree)
        found: dict[tuple[Path, str], None] = {}
        try:
            settings.Recipe.model_validate(data)
        except ValidationError as failed:
            found.update(dict.fromkeys(wording.sentences(cls, data, failed)))
        for path, message in rules.findings(data):
            if not any(path == each for each, _ in found):
                found[path, message] = None
        faults += [nearest(tree, path).place.fault(message, path) for path, message in found]
        if faults:
            raise Faults(_in_order(faults, tree.place.file))
        return cls.model_validate(data)


def _as_written(data: Any) -> Any:
    """Keyword arguments as plain data, defaults left out."""
    if isinstance(data, BaseModel):
        return data.model_dump(mode="json", exclude_unset=True)
    if isinstance(data, dict):
        return {key: _as_written(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_as_written(value) for value in data]
    return data


def _in_order(faults: list[Fault], first: str) -> list[Fault]:
    """By file (the named one first, overrides last) and line, each once, and not more than a person reads."""
    unique = list(dict.fromkeys(faults))
    unique.sort(key=lambda fault: (fault.file == OVERRIDE.file, fault.file != first, fault.file, fault.line or 0))
    rest = len(unique) - MOST_FAULTS
    return unique if rest <= 0 else [*unique[:MOST_FAULTS], Fault(f"and {rest} more", file=first)]


def load(preset_or_path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a preset or file, with `key=value` overrides."""
    return Recipe.load(preset_or_path, *overrides)


def from_dict(data: Mapping[str, Any]) -> Recipe:
    """The recipe of plain data."""
    return Recipe.from_dict(data)


class _Dumper(yaml.SafeDumper):
    """Writes what the strict reader takes: no aliases, and quotes around text that looks like something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style=_style(text)))


def _style(text: str) -> str | None:
    """Plain where it is a plain word or a sentence of them, else double quotes."""
    return None if re.fullmatch(r"[A-Za-z][A-Za-z0-9_./@-]*", text) and text.lower() not in ("null", "true", "false") else '"'


def dump(recipe: settings.Recipe) -> str:
    """The resolved recipe as YAML; loading it gives the same recipe."""
    return yaml.dump(recipe.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def presets() -> list[tuple[str, str, str]]:
    """Name, description and algorithm of every preset."""
    loaded = [(name, Recipe.load(name)) for name in preset_names()]
    return [(name, recipe.description, recipe.algorithm) for name, recipe in loaded]


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, for editors. What `extends` may bring is not required."""
    made = copy.deepcopy(settings.Recipe.model_json_schema())
    required = made.pop("required", [])
    made["properties"] = {
        "extends": {"type": "string", "description": "Builds on another preset, or on a recipe at a path relative to this file."},
        **made["properties"],
    }
    made["anyOf"] = [{"required": ["extends"]}, {"required": required}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "lowrank_tune recipe", **made}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What a continued run may not change, as `train.learning_rate: was 0.001, is 0.002`."""
    before = {dotted(path): value for path, value in leaves(dict(old))}
    after = {dotted(path): value for path, value in leaves(dict(new))}
    changed = [key for key in dict.fromkeys([*before, *after]) if before.get(key, leaves) != after.get(key, leaves)]
    return [
        f"{key}: was {_said(before, key)}, is {_said(after, key)}"
        for key in changed
        if key not in MAY_CHANGE
    ]  # fmt: skip


def _said(data: Mapping[str, Any], key: str) -> str:
    return wording.found(data[key]) if key in data else "not set"
