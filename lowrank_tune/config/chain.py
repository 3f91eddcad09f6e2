"""A chain: recipes that run one after the other on one base, with nothing merged.

The policy that a stage trained lies frozen below the policy of every later stage, named by its stage. A reward model
enters no policy's stack.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from lowrank_tune.config import reward_model_rules, rules, unsloth_rules
from lowrank_tune.config.adapter_stack import conflicts, frozen_adapters_of, frozen_stage_names, reward_source_stage
from lowrank_tune.config.base import RunName, Settings
from lowrank_tune.config.chain_layers import HEADER_KEYS, StageDraft, draft_stages
from lowrank_tune.config.extends import Override, apply_overrides, parse_overrides, read_recipe
from lowrank_tune.config.raw_settings import Finding
from lowrank_tune.config.recipe import NO_MAPPING, Recipe, problems_in, run_name, sorted_problems
from lowrank_tune.config.schema import RecipeConfig
from lowrank_tune.config.yaml_nodes import Node, SourcePosition, from_python, nearest_node, to_python
from lowrank_tune.errors import ConfigError, ConfigProblem, UserError


def stage_folder(number: int, name: str) -> str:
    """The name of a stage's folder within that of its chain; stages are numbered from 1."""
    return f"{number}-{name}"


class ChainHeader(Settings):
    """What a chain says of itself."""

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
    """Each is complete in itself and named by its stage, but for the adapters that earlier stages lay below it."""

    def __post_init__(self) -> None:
        """A chain made in Python is judged like a file."""
        data = [stage.to_dict() for stage in self.stages]
        twice = [name for name, count in Counter(stage.name for stage in self.stages).items() if count > 1]
        problems = [ConfigProblem(f"a second stage is called `{name}`", "stages") for name in twice]
        problems += [
            ConfigProblem("is no name for a stage", f"stages.{index}.name")
            for index, stage in enumerate(self.stages)
            if not rules.NAME_PATTERN.fullmatch(stage.name) or stage.name == "base"
        ]
        if not self.stages:
            problems.append(ConfigProblem("must have at least one entry", "stages"))
        for index, stage in enumerate(self.stages):
            frozen_adapters = frozen_stage_names(data, index)
            has_reward_stage = reward_source_stage(data, index) is not None
            findings = [
                *conflicts(data, index),
                *rules.reference_findings(data[index], frozen_adapters),
                *unsloth_rules.findings(data[index], frozen_adapters, has_reward_stage),
            ]
            problems += [SourcePosition().problem(message, ("stages", stage.name, *path)) for path, message in findings]
        if problems:
            raise ConfigError(problems)

    @classmethod
    def load(cls, preset_or_path: str | os.PathLike[str], *overrides: str) -> Self:
        """The chain of a preset or file. `key=value` changes every stage, `stages.NAME.key=value` one. Raises
        `ConfigError`, all at once."""
        tree, problems, stem = read_recipe(os.fspath(preset_or_path))
        if "stages" not in tree.value:
            raise UserError(f"{stem} is a single recipe, without stages; load it with load_any or Recipe.load")
        return cls.from_tree(tree, problems, stem, overrides)

    @classmethod
    def from_tree(cls, tree: Node, problems: list[ConfigProblem], stem: str, overrides: Sequence[str]) -> Self:
        """The chain of what was read from a file."""
        if "name" not in tree.value:
            tree.value["name"] = Node(run_name(stem), SourcePosition(tree.position.file))
        return cls._check(tree, problems, parse_overrides(overrides, problems), files=True)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The chain of plain data, as `to_dict` gives it. Raises `ConfigError`."""
        problems: list[ConfigProblem] = []
        tree = from_python(dict(data) if isinstance(data, Mapping) else data, SourcePosition(), problems)
        if not isinstance(tree.value, dict):
            raise ConfigError([ConfigProblem(NO_MAPPING)])
        if "stages" not in tree.value:
            raise ConfigError(
                [*problems, ConfigProblem("is missing: a single recipe is read by Recipe.from_dict", "stages")]
            )
        return cls._check(tree, problems, [], files=False)

    def to_dict(self) -> dict[str, Any]:
        """The resolved chain as plain data; `from_dict` of it gives this chain again."""
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
        """The recipe of a stage with all that lies below its own adapter; `folders` are those of the finished stages,
        by name."""
        stages = [stage.to_dict() for stage in self.stages]
        own = stages[index]
        trained = self.stages[index].trained_adapter
        frozen = {name: adapter for name, adapter in own["adapters"].items() if name != trained}
        finished = {name: {"path": folders[name]} for name in frozen_stage_names(stages, index)}
        reward_stage = reward_source_stage(stages, index)
        if reward_stage:
            reward_model = {reward_model_rules.REWARD_ADAPTER: {"path": folders[reward_stage]}}
        else:
            reward_model = {}
        adapters = {
            **frozen,
            **frozen_adapters_of(stages, index),
            **finished,
            **reward_model,
            trained: own["adapters"][trained],
        }
        return Recipe.from_dict({**own, "adapters": adapters})

    @classmethod
    def _check(cls, tree: Node, problems: list[ConfigProblem], overrides: Sequence[Override], files: bool) -> Self:
        """Each stage like a recipe of its own, then what they are to each other."""
        header = Node({key: tree.value.pop(key) for key in HEADER_KEYS if key in tree.value}, tree.position)
        apply_overrides(header, [(path, node) for path, node in overrides if path[0] in HEADER_KEYS], problems)
        problems += [
            nearest_node(header, path).position.problem(message, path)
            for path, message in problems_in(ChainHeader, to_python(header))
        ]
        drafts = draft_stages(tree.value.pop("stages"), tree, overrides, problems, files)
        data = [to_python(draft.tree) for draft in drafts]
        for index, draft in enumerate(drafts):
            if not draft.unresolved_parent:
                others = conflicts(data, index) if not any(each.unresolved_parent for each in drafts) else ()
                _check_stage(draft, data[index], [*_findings(data, index), *others])
        problems += _dedupe_problems(drafts)
        if problems:
            raise ConfigError(sorted_problems(problems, tree.position.file))
        head = ChainHeader.model_validate(to_python(header))
        return cls(
            head.name,
            head.description,
            tuple(
                _stage_recipe(each, reward_source_stage(data, index) is not None).with_source(drafts[index].tree)
                for index, each in enumerate(data)
            ),
        )


def _findings(data: Sequence[Mapping[str, Any]], index: int) -> Iterator[Finding]:
    return rules.findings(data[index], frozen_stage_names(data, index), reward_source_stage(data, index) is not None)


def _check_stage(draft: StageDraft, data: Mapping[str, Any], findings: Sequence[Finding]) -> None:
    """The faults of one stage, where its settings stand."""
    messages = problems_in(RecipeConfig, data, findings)
    draft.problems += [nearest_node(draft.tree, path).position.problem(message, path) for path, message in messages]


def _dedupe_problems(drafts: Sequence[StageDraft]) -> list[ConfigProblem]:
    """Faults of the stages whose layers could be read, under their names."""
    return label_problems([(draft.label, draft.problems) for draft in drafts if not draft.unresolved_parent])


def label_problems(problems_by_stage: Sequence[tuple[str, Sequence[ConfigProblem]]]) -> list[ConfigProblem]:
    """Puts the names of the stages into the keys of their faults. A fault of all stages is in a setting that they
    share, and has no name."""
    counts = Counter(problem for _, problems in problems_by_stage for problem in set(problems))
    return [
        problem
        if counts[problem] == len(problems_by_stage) > 1
        else replace(problem, key=".".join(filter(None, ["stages", label, problem.key])))
        for label, problems in problems_by_stage
        for problem in problems
    ]


def _stage_recipe(data: dict[str, Any], has_reward_stage: bool) -> Recipe:
    """A stage that was judged. Its `reference` and, where it `has_reward_stage`, its reward model name what only the
    chain knows of: they are set past the recipe's own rules."""
    claimed = data.get("reference")
    adapters = data.get("adapters") or {}
    if has_reward_stage:
        stands_in = {"adapters": {**adapters, reward_model_rules.REWARD_ADAPTER: {"path": "."}}}
    else:
        stands_in = {}
    recipe = Recipe.model_validate({key: value for key, value in (data | stands_in).items() if key != "reference"})
    own = {name: adapter for name, adapter in recipe.adapters.items() if name != reward_model_rules.REWARD_ADAPTER}
    changes = {
        **({"adapters": own} if has_reward_stage else {}),
        **({"reference": claimed} if claimed is not None else {}),
    }
    if changes:
        return recipe.model_copy(update=changes)
    return recipe
