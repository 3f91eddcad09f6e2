"""One recipe: judged whole, in Python like in a file, with every fault at its line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from pydantic import BaseModel, ValidationError, model_validator

from lowrank_tune import settings
from lowrank_tune.errors import Fault, Faults, UserError
from lowrank_tune.recipe import rules, wording
from lowrank_tune.recipe.layers import OVERRIDE, apply, read_recipe, read_settings
from lowrank_tune.recipe.tree import Node, Path, Place, from_python, nearest, plain
from lowrank_tune.recipe.written import Finding

MOST_FAULTS = 50
NO_MAPPING = "a recipe must be a mapping"


class Recipe(settings.Recipe):
    """One run, complete and without contradictions."""

    @classmethod
    def load(cls, preset_or_path: str | os.PathLike[str], *overrides: str) -> Self:
        """The recipe of a preset or file, with `key=value` overrides. Raises `Faults`, all of them at once."""
        tree, faults, stem = read_recipe(os.fspath(preset_or_path))
        if "stages" in tree.value:
            raise UserError(
                f"{stem} is a chain of several runs; `lowrank-tune run` runs it, and load_any or Chain.load loads it"
            )
        return cls.of_tree(tree, faults, stem, overrides)

    @classmethod
    def of_tree(cls, tree: Node, faults: list[Fault], stem: str, overrides: Sequence[str]) -> Self:
        """The recipe of what was read from a file."""
        apply(tree, read_settings(overrides, faults), faults)
        if "name" not in tree.value:
            tree.value["name"] = Node(name_of(stem), Place(tree.place.file))
        return cls._judge(tree, faults)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The recipe of plain data, as `to_dict` gives it. Raises `Faults`."""
        faults: list[Fault] = []
        tree = from_python(dict(data) if isinstance(data, Mapping) else data, Place(), faults)
        if not isinstance(tree.value, dict):
            raise Faults([Fault(NO_MAPPING)])
        if "stages" in tree.value:
            raise Faults([Fault("makes this a chain of several runs; use Chain.from_dict", "stages")])
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
        faults += [
            nearest(tree, path).place.fault(message, path)
            for path, message in faults_in(settings.Recipe, data, rules.findings(data))
        ]
        if faults:
            raise Faults(in_order(faults, tree.place.file))
        return cls.model_validate(data)


def faults_in(model: type[BaseModel], data: Any, findings: Iterable[Finding] = ()) -> dict[tuple[Path, str], None]:
    """Faults of type and range, and those contradictions that are not told by them already."""
    found: dict[tuple[Path, str], None] = {}
    try:
        model.model_validate(data)
    except ValidationError as failed:
        found.update(dict.fromkeys(wording.sentences(model, data, failed)))
    for path, message in findings:
        if not any(path == each for each, _ in found):
            found[path, message] = None
    return found


def name_of(stem: str) -> str:
    """A run's name from its file's."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-")[:64] or "recipe"


def in_order(faults: list[Fault], first: str) -> list[Fault]:
    """By file (the named one first, overrides last) and line, each once, and not more than a person reads."""
    unique = list(dict.fromkeys(faults))
    unique.sort(key=lambda fault: (fault.file == OVERRIDE.file, fault.file != first, fault.file, fault.line or 0))
    rest = len(unique) - MOST_FAULTS
    return unique if rest <= 0 else [*unique[:MOST_FAULTS], Fault(f"and {rest} more", file=first)]


def _as_written(data: Any) -> Any:
    """Keyword arguments as plain data, defaults left out."""
    if isinstance(data, BaseModel):
        return data.model_dump(mode="json", exclude_unset=True)
    if isinstance(data, dict):
        return {key: _as_written(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_as_written(value) for value in data]
    return data
