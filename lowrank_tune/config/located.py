"""From faults that are found after a recipe was read to the lines where the settings are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import filterfalse

from lowrank_tune.config.chain import Chain, label_problems
from lowrank_tune.config.raw_settings import Finding
from lowrank_tune.config.recipe import Recipe, sorted_problems
from lowrank_tune.config.schema import RecipeConfig
from lowrank_tune.config.yaml_nodes import SourcePosition
from lowrank_tune.errors import ConfigProblem


def locate(loaded: RecipeConfig | Chain, findings: Mapping[str, Sequence[Finding]]) -> list[ConfigProblem]:
    """The faults of a recipe, or of a chain's stages by name, in the order of their lines. A fault that several stages
    have at one line is reported once, with their names where these are not all."""
    if not isinstance(loaded, Chain):
        problems = _problems_of(loaded, findings.get(loaded.name, ()))
        return sorted_problems(problems, _file_of(loaded))
    by_stage = {stage.name: _problems_of(stage, findings.get(stage.name, ())) for stage in loaded.stages}
    shared = _shared_problems(by_stage)
    own = [(name, list(filterfalse(shared.__contains__, problems))) for name, problems in by_stage.items()]
    return sorted_problems([*shared.values(), *label_problems(own)], loaded.stages[0].source_file)


def _shared_problems(by_stage: Mapping[str, Sequence[ConfigProblem]]) -> dict[ConfigProblem, ConfigProblem]:
    """The faults that some stages, but not all, have with the same file, line, key and message: each with the one that
    is reported for them. Without a line nothing shows that they are in one setting."""
    names: dict[ConfigProblem, list[str]] = {}
    for name, problems in by_stage.items():
        for problem in dict.fromkeys(problems):
            names.setdefault(problem, []).append(name)
    return {
        problem: replace(problem, message=f"{problem.message} (stages {', '.join(stages)})")
        for problem, stages in names.items()
        if problem.line is not None and 1 < len(stages) < len(by_stage)
    }


def _problems_of(recipe: RecipeConfig, findings: Sequence[Finding]) -> list[ConfigProblem]:
    if isinstance(recipe, Recipe):
        return [recipe.problem(path, message) for path, message in findings]
    return [SourcePosition().problem(message, path) for path, message in findings]


def _file_of(recipe: RecipeConfig) -> str:
    if isinstance(recipe, Recipe):
        return recipe.source_file
    return ""
