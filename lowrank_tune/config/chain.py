"""A chain: recipes that run one after the other on one base, with nothing merged.

The policy that a stage trained is frozen below the policy of every later stage, and has the name of its stage. A reward
model is in no policy's stack.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from lowrank_tune.config.adapter_stack import (
    conflicts,
    earlier_stages,
    frozen_adapters_of,
)
from lowrank_tune.config.base import Finding, RunName, Settings
from lowrank_tune.config.chain_layers import HEADER_KEYS, StageDraft, draft_stages
from lowrank_tune.config.extends import Override, apply_overrides, parse_overrides, read_recipe
from lowrank_tune.config.model import NAME_PATTERN, REWARD_ADAPTER
from lowrank_tune.config.recipe import Recipe, problems_at, set_default_name, sorted_problems, tree_of_dict
from lowrank_tune.config.schema import RecipeConfig
from lowrank_tune.config.validate import findings, partial_recipe, type_findings
from lowrank_tune.config.yaml import Node, dotted, to_python
from lowrank_tune.errors import ConfigError, ConfigProblem, UserError


def stage_folder(number: int, name: str) -> str:
    """Returns the name of a stage's folder within that of its chain; stages are numbered from 1."""
    return f"{number}-{name}"


class ChainHeader(Settings):
    """The settings of a chain itself."""

    name: RunName = ""
    description: str = ""


@dataclass(frozen=True)
class Chain:
    """Several runs on one base, complete and without contradictions."""

    name: str
    """Name of the chain and of its folder."""
    description: str
    """One line for `lowrank-tune presets`."""
    stages: tuple[Recipe, ...]
    """Each has the name of its stage, and is complete except for the adapters that earlier stages add below it."""

    def __post_init__(self) -> None:
        """Raises ConfigError with all problems of the stages together. Each was checked by itself."""
        problems = self._name_problems()
        for index, stage in enumerate(self.stages):
            found = [*findings(stage, earlier_stages(self.stages, index)), *conflicts(self.stages, index)]
            for path, message in found:
                problems.append(ConfigProblem(message, dotted(("stages", stage.name, *path))))
        if problems:
            raise ConfigError(problems)

    def _name_problems(self) -> list[ConfigProblem]:
        if not self.stages:
            return [ConfigProblem("must have at least one entry", "stages")]
        problems: list[ConfigProblem] = []
        for name, count in Counter(stage.name for stage in self.stages).items():
            if count > 1:
                problems.append(ConfigProblem(f"a second stage is called `{name}`", "stages"))
        for index, stage in enumerate(self.stages):
            if not NAME_PATTERN.fullmatch(stage.name) or stage.name == "base":
                problems.append(ConfigProblem("is not a name for a stage", f"stages.{index}.name"))
        return problems

    @classmethod
    def load(cls, preset_or_path: str | os.PathLike[str], *overrides: str) -> Self:
        """Returns the chain of a preset or file. `key=value` changes every stage, `stages.NAME.key=value` one. Raises
        ConfigError with all problems."""
        tree, problems, stem = read_recipe(os.fspath(preset_or_path))
        if "stages" not in tree.value:
            raise UserError(f"{stem} is a single recipe, without stages; load it with load_any or Recipe.load")
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
        """Returns the chain of a file that was read, with the problems so far."""
        set_default_name(tree, stem)
        return cls._from_checked_tree(
            tree,
            problems,
            parse_overrides(overrides, problems),
            files=True,
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Returns the chain of plain data, the reverse of `to_dict`. Raises ConfigError with all problems."""
        tree, problems = tree_of_dict(data)
        if "stages" not in tree.value:
            missing = ConfigProblem("is missing: a single recipe is read by Recipe.from_dict", "stages")
            raise ConfigError([*problems, missing])
        return cls._from_checked_tree(
            tree,
            problems,
            [],
            files=False,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the resolved chain as plain data."""
        return {
            "name": self.name,
            "description": self.description,
            "stages": [stage.to_dict() for stage in self.stages],
        }

    @property
    def algorithm(self) -> str:
        """The algorithms of the stages, in words."""
        return " -> ".join(stage.algorithm for stage in self.stages)

    def recipe_of(self, index: int, folders: Mapping[str, str]) -> Recipe:
        """Returns the recipe of a stage with all adapters of its stack. `folders` are those of the finished stages, by
        name."""
        stage = self.stages[index]
        recipe = stage.to_dict()
        adapters = recipe["adapters"]
        trained = adapters.pop(stage.trained_adapter)
        for name, adapter in frozen_adapters_of(self.stages, index).items():
            adapters[name] = {"path": adapter.path}
        earlier = earlier_stages(self.stages, index)
        for name in earlier.frozen_adapters:
            adapters[name] = {"path": folders[name]}
        if earlier.reward_stage is not None:
            adapters[REWARD_ADAPTER] = {"path": folders[earlier.reward_stage]}
        adapters[stage.trained_adapter] = trained
        return Recipe.from_dict(recipe)

    @classmethod
    def _from_checked_tree(
        cls,
        tree: Node,
        problems: list[ConfigProblem],
        overrides: Sequence[Override],
        files: bool,
    ) -> Self:
        """Checks each stage like a single recipe, then the stages together."""
        header = _header_data(tree, overrides, problems)
        drafts = draft_stages(
            tree.value.pop("stages"),
            tree,
            overrides,
            problems,
            files,
        )
        partial_stages = _check_stages(drafts)
        resolved = [(draft.label, draft.problems) for draft in drafts if not draft.unresolved_parent]
        problems += label_problems(resolved)
        if problems:
            raise ConfigError(sorted_problems(problems, tree.position.file))
        stages: list[Recipe] = []
        for index, draft in enumerate(drafts):
            earlier = earlier_stages(partial_stages, index)
            recipe = Recipe.model_validate(to_python(draft.tree), context=earlier)
            stages.append(recipe.with_source(draft.tree))
        return cls(**header, stages=tuple(stages))


def _header_data(
    tree: Node,
    overrides: Sequence[Override],
    problems: list[ConfigProblem],
) -> dict[str, str]:
    """Takes the settings of the chain itself out of its tree, and returns them with their overrides."""
    header = Node({key: tree.value.pop(key) for key in HEADER_KEYS if key in tree.value}, tree.position)
    header_overrides = [(path, node) for path, node in overrides if path[0] in HEADER_KEYS]
    apply_overrides(header, header_overrides, problems)
    data = to_python(header)
    problems += problems_at(header, type_findings(ChainHeader, data))
    return {"name": "", "description": "", **data}


def _check_stages(drafts: Sequence[StageDraft]) -> list[RecipeConfig]:
    """Adds the problems of each stage to its draft, and returns the valid settings of the stages."""
    stages: list[RecipeConfig] = []
    invalid: list[list[Finding]] = []
    for draft in drafts:
        stage, type_problems = partial_recipe(to_python(draft.tree))
        stages.append(stage)
        invalid.append(type_problems)
    is_complete = not any(draft.unresolved_parent for draft in drafts)
    for index, draft in enumerate(drafts):
        found = [*invalid[index], *findings(stages[index], earlier_stages(stages, index))]
        if is_complete:
            found += conflicts(stages, index)
        draft.problems += problems_at(draft.tree, found)
    return stages


def label_problems(problems_by_stage: Sequence[tuple[str, Sequence[ConfigProblem]]]) -> list[ConfigProblem]:
    """Adds the names of the stages to the keys of their problems. A problem of all stages is in a setting that they
    share, and gets no name."""
    counts = Counter(problem for _, problems in problems_by_stage for problem in set(problems))
    labeled: list[ConfigProblem] = []
    for label, problems in problems_by_stage:
        for problem in problems:
            is_shared = counts[problem] == len(problems_by_stage) > 1
            if not is_shared:
                key = ".".join(
                    filter(
                        None,
                        [
                            "stages",
                            label,
                            problem.key,
                        ],
                    )
                )
                problem = replace(problem, key=key)
            labeled.append(problem)
    return labeled


def locate(loaded: RecipeConfig | Chain, found: Mapping[str, Sequence[Finding]]) -> list[ConfigProblem]:
    """Returns findings after loading, about a recipe or by stage of a chain, as problems in the order of their lines.

    A finding of several stages about one line is one problem, with the names of the stages if these are not all.
    """
    if not isinstance(loaded, Chain):
        return sorted_problems(_problems_of(loaded, found), loaded.source_file)
    by_stage = {stage.name: _problems_of(stage, found) for stage in loaded.stages}
    shared = _shared_problems(by_stage)
    own: list[tuple[str, list[ConfigProblem]]] = []
    for name, problems in by_stage.items():
        own.append((name, [problem for problem in problems if problem not in shared]))
    return sorted_problems([*shared.values(), *label_problems(own)], loaded.stages[0].source_file)


def _shared_problems(by_stage: Mapping[str, Sequence[ConfigProblem]]) -> dict[ConfigProblem, ConfigProblem]:
    """Returns the problems that some stages, but not all, have at the same line with the same key and message, and for
    each the problem with their names. Problems without a line may be in different settings."""
    names: dict[ConfigProblem, list[str]] = {}
    for name, problems in by_stage.items():
        for problem in dict.fromkeys(problems):
            names.setdefault(problem, []).append(name)
    shared: dict[ConfigProblem, ConfigProblem] = {}
    for problem, stages in names.items():
        if problem.line is not None and 1 < len(stages) < len(by_stage):
            shared[problem] = replace(problem, message=f"{problem.message} (stages {', '.join(stages)})")
    return shared


def _problems_of(recipe: RecipeConfig, found: Mapping[str, Sequence[Finding]]) -> list[ConfigProblem]:
    return [recipe.problem(path, message) for path, message in found.get(recipe.name, ())]
