"""From faults that are found after a recipe was read to the lines where the settings are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lowrank_tune import settings
from lowrank_tune.errors import ConfigProblem
from lowrank_tune.recipe.chain import Chain, label_problems
from lowrank_tune.recipe.raw_settings import Finding
from lowrank_tune.recipe.recipe import Recipe, sorted_problems
from lowrank_tune.recipe.yaml_nodes import SourcePosition


def locate(loaded: settings.RecipeConfig | Chain, findings: Mapping[str, Sequence[Finding]]) -> list[ConfigProblem]:
    """The faults of a recipe, or of a chain's stages by name, in the order of their lines. A fault that several stages
    share by one line is reported once."""
    if not isinstance(loaded, Chain):
        problems = _problems_of(loaded, findings.get(loaded.name, ()))
        return sorted_problems(problems, _file_of(loaded))
    problems = label_problems(
        [(stage.name, _problems_of(stage, findings.get(stage.name, ()))) for stage in loaded.stages]
    )
    return sorted_problems(problems, loaded.stages[0].source_file)


def _problems_of(recipe: settings.RecipeConfig, findings: Sequence[Finding]) -> list[ConfigProblem]:
    if isinstance(recipe, Recipe):
        return [recipe.problem(path, message) for path, message in findings]
    return [SourcePosition().problem(message, path) for path, message in findings]


def _file_of(recipe: settings.RecipeConfig) -> str:
    return recipe.source_file if isinstance(recipe, Recipe) else ""
