"""One recipe: checked as a whole, from Python as from a file, with every problem at its line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from pydantic import ValidationInfo, model_validator

from lowrank_tune.config.adapter_stack import NO_EARLIER_STAGES
from lowrank_tune.config.base import Finding
from lowrank_tune.config.extends import OVERRIDE_POSITION, apply_overrides, parse_overrides, read_recipe
from lowrank_tune.config.schema import RecipeConfig
from lowrank_tune.config.validate import findings, first_per_path, partial_recipe, unused_settings
from lowrank_tune.config.yaml import Node, SourcePosition, from_python, to_python
from lowrank_tune.errors import ConfigError, ConfigProblem, UserError

MAX_PROBLEMS = 50


class Recipe(RecipeConfig):
    """One run, complete and without contradictions."""

    @classmethod
    def load(cls, preset_or_path: str | os.PathLike[str], *overrides: str) -> Self:
        """Returns the recipe of a preset or file, with `key=value` overrides. Raises ConfigError with all problems."""
        tree, problems, stem = read_recipe(os.fspath(preset_or_path))
        if "stages" in tree.value:
            raise UserError(
                f"{stem} is a chain of several runs; `lowrank-tune run` runs it, and load_any or Chain.load loads it"
            )
        return cls.from_tree(
            tree,
            problems,
            stem,
            overrides,
        )

    @classmethod
    def from_tree(
        cls,
        tree: Node,
        problems: list[ConfigProblem],
        stem: str,
        overrides: Sequence[str],
    ) -> Self:
        """Returns the recipe of a file that was read, with the problems so far."""
        apply_overrides(tree, parse_overrides(overrides, problems), problems)
        set_default_name(tree, stem)
        return cls._from_checked_tree(tree, problems)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Returns the recipe of plain data, the reverse of `to_dict`. Raises ConfigError with all problems."""
        tree, problems = tree_of_dict(data)
        if "stages" in tree.value:
            raise ConfigError([ConfigProblem("makes this a chain of several runs; use Chain.from_dict", "stages")])
        return cls._from_checked_tree(tree, problems)

    def to_dict(self) -> dict[str, Any]:
        """Returns the resolved recipe as plain data, without unused settings."""
        data = super().to_dict()
        complete, _ = partial_recipe(data)
        for path, _ in list(unused_settings(complete)):
            section: Any = data
            for step in path[:-1]:
                section = section[step]
            section.pop(path[-1], None)
        return data

    @model_validator(mode="after")
    def _without_contradictions(self, info: ValidationInfo) -> Self:
        """Raises ConfigError if settings contradict each other or are unused. The context of a stage of a chain is its
        `EarlierStages`."""
        found = findings(self, info.context or NO_EARLIER_STAGES)
        if found:
            raise ConfigError([self.problem(path, message) for path, message in found])
        return self

    @classmethod
    def _from_checked_tree(cls, tree: Node, problems: list[ConfigProblem]) -> Self:
        data = to_python(tree)
        recipe, invalid = partial_recipe(data)
        problems += problems_at(tree, [*invalid, *findings(recipe)])
        if problems:
            raise ConfigError(sorted_problems(problems, tree.position.file))
        return cls.model_validate(data).with_source(tree)


def tree_of_dict(data: Any) -> tuple[Node, list[ConfigProblem]]:
    """Returns plain data as a tree, and its problems. Raises ConfigError if it is not a mapping."""
    problems: list[ConfigProblem] = []
    tree = from_python(dict(data) if isinstance(data, Mapping) else data, SourcePosition(), problems)
    if not isinstance(tree.value, dict):
        raise ConfigError([ConfigProblem("a recipe must be a mapping")])
    return tree, problems


def set_default_name(tree: Node, stem: str) -> None:
    """Names a run after its file if the recipe has no name."""
    if "name" not in tree.value:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-")[:64]
        tree.value["name"] = Node(name or "recipe", SourcePosition(tree.position.file))


def problems_at(tree: Node, found: Iterable[Finding]) -> list[ConfigProblem]:
    """Returns findings as problems at their lines, one for each setting."""
    return [tree.problem(message, path) for path, message in first_per_path(found)]


def sorted_problems(problems: Sequence[ConfigProblem], first_file: str) -> list[ConfigProblem]:
    """Returns each problem once, by file (`first_file` first, overrides last) and line, and at most MAX_PROBLEMS."""

    def position(problem: ConfigProblem) -> tuple[bool, bool, str, int]:
        is_override = problem.file == OVERRIDE_POSITION.file
        return is_override, problem.file != first_file, problem.file, problem.line or 0

    unique = sorted(dict.fromkeys(problems), key=position)
    left_out = len(unique) - MAX_PROBLEMS
    if left_out <= 0:
        return unique
    return [*unique[:MAX_PROBLEMS], ConfigProblem(f"and {left_out} more", file=first_file)]
