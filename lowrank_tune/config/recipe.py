"""One recipe: judged whole, in Python like in a file, with every fault at its line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from pydantic import BaseModel, PrivateAttr, ValidationError, model_validator

from lowrank_tune.config import messages, rules
from lowrank_tune.config.extends import OVERRIDE_POSITION, apply_overrides, parse_overrides, read_recipe
from lowrank_tune.config.raw_settings import Finding
from lowrank_tune.config.schema import RecipeConfig
from lowrank_tune.config.yaml_nodes import Node, Path, SourcePosition, SourceTree, from_python, nearest_node, to_python
from lowrank_tune.errors import ConfigError, ConfigProblem, UserError

MAX_PROBLEMS = 50
NO_MAPPING = "a recipe must be a mapping"


class Recipe(RecipeConfig):
    """One run, complete and without contradictions."""

    _source: SourceTree = PrivateAttr(default_factory=SourceTree)

    @classmethod
    def load(cls, preset_or_path: str | os.PathLike[str], *overrides: str) -> Self:
        """The recipe of a preset or file, with `key=value` overrides. Raises `ConfigError`, all of them at once."""
        tree, problems, stem = read_recipe(os.fspath(preset_or_path))
        if "stages" in tree.value:
            raise UserError(
                f"{stem} is a chain of several runs; `lowrank-tune run` runs it, and load_any or Chain.load loads it"
            )
        return cls.from_tree(tree, problems, stem, overrides)

    @classmethod
    def from_tree(cls, tree: Node, problems: list[ConfigProblem], stem: str, overrides: Sequence[str]) -> Self:
        """The recipe of what was read from a file."""
        apply_overrides(tree, parse_overrides(overrides, problems), problems)
        if "name" not in tree.value:
            tree.value["name"] = Node(run_name(stem), SourcePosition(tree.position.file))
        return cls._check(tree, problems)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The recipe of plain data, as `to_dict` gives it. Raises `ConfigError`."""
        problems: list[ConfigProblem] = []
        tree = from_python(dict(data) if isinstance(data, Mapping) else data, SourcePosition(), problems)
        if not isinstance(tree.value, dict):
            raise ConfigError([ConfigProblem(NO_MAPPING)])
        if "stages" in tree.value:
            raise ConfigError([ConfigProblem("makes this a chain of several runs; use Chain.from_dict", "stages")])
        return cls._check(tree, problems)

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe as plain data, without what does nothing; `from_dict` of it gives this recipe again."""
        data = super().to_dict()
        for path, _ in list(rules.unused_settings(data)):
            section: Any = data
            for step in path[:-1]:
                section = section[step]
            section.pop(path[-1], None)
        return data

    def with_source(self, tree: Node) -> Self:
        """Returns this recipe, with the tree that its settings were read from."""
        self._source = SourceTree(tree)
        return self

    def problem(self, path: Path, message: str) -> ConfigProblem:
        """A fault of a setting, at the line where it is written, or where it would have been."""
        return nearest_node(self._source.root, path).position.problem(message, path)

    @property
    def source_file(self) -> str:
        """The file that it was read from; an empty string where it was made in Python."""
        return self._source.root.position.file

    @model_validator(mode="before")
    @classmethod
    def _without_contradictions(cls, data: Any) -> Any:
        """`Recipe(...)` in Python is judged like a file."""
        raw = _raw_tree(data)
        if problems := [SourcePosition().problem(message, path) for path, message in rules.findings(raw)]:
            raise ConfigError(problems)
        return data

    @classmethod
    def _check(cls, tree: Node, problems: list[ConfigProblem]) -> Self:
        """Types, ranges, unknown keys and contradictions of a tree, together with the faults of reading it."""
        data = to_python(tree)
        problems += [
            nearest_node(tree, path).position.problem(message, path)
            for path, message in problems_in(RecipeConfig, data, rules.findings(data))
        ]
        if problems:
            raise ConfigError(sorted_problems(problems, tree.position.file))
        return cls.model_validate(data).with_source(tree)


def problems_in(model: type[BaseModel], data: Any, findings: Iterable[Finding] = ()) -> dict[tuple[Path, str], None]:
    """Faults of type and range, and those contradictions that are not told by them already."""
    problems: dict[tuple[Path, str], None] = {}
    try:
        model.model_validate(data)
    except ValidationError as failed:
        problems.update(dict.fromkeys(messages.format_errors(model, data, failed)))
    for path, message in findings:
        if not any(path == problem_path for problem_path, _ in problems):
            problems[path, message] = None
    return problems


def run_name(stem: str) -> str:
    """A run's name from its file's."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-")[:64] or "recipe"


def sorted_problems(problems: list[ConfigProblem], first: str) -> list[ConfigProblem]:
    """By file (the named one first, overrides last) and line, each once, and not more than a person reads."""
    unique = list(dict.fromkeys(problems))
    unique.sort(
        key=lambda problem: (
            problem.file == OVERRIDE_POSITION.file,
            problem.file != first,
            problem.file,
            problem.line or 0,
        )
    )
    rest = len(unique) - MAX_PROBLEMS
    if rest <= 0:
        return unique
    return [*unique[:MAX_PROBLEMS], ConfigProblem(f"and {rest} more", file=first)]


def _raw_tree(data: Any) -> Any:
    """Keyword arguments as plain data, defaults left out."""
    if isinstance(data, BaseModel):
        return data.model_dump(mode="json", exclude_unset=True)
    if isinstance(data, dict):
        return {key: _raw_tree(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_raw_tree(value) for value in data]
    return data
