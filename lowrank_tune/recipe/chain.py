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

from lowrank_tune import settings
from lowrank_tune.errors import Fault, Faults, UserError
from lowrank_tune.recipe import backend, learned, rules
from lowrank_tune.recipe.layers import Setting, apply, read_recipe, read_settings
from lowrank_tune.recipe.single import NO_MAPPING, Recipe, faults_in, in_order, name_of
from lowrank_tune.recipe.stack import conflicts, finished_below, lender, loaded_below
from lowrank_tune.recipe.stages import HEADING, Draft, drafts
from lowrank_tune.recipe.tree import Node, Place, from_python, nearest, plain
from lowrank_tune.recipe.written import Finding


class Heading(settings.Settings):
    """What a chain says of itself."""

    name: settings.RunName = ""
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
        faults = [Fault(f"a second stage is called `{name}`", "stages") for name in twice]
        faults += [
            Fault("is no name for a stage", f"stages.{index}.name")
            for index, stage in enumerate(self.stages)
            if not rules.NAME.fullmatch(stage.name) or stage.name == "base"
        ]
        if not self.stages:
            faults.append(Fault("must have at least one entry", "stages"))
        for index, stage in enumerate(self.stages):
            below, lent = finished_below(data, index), lender(data, index) is not None
            found = [
                *conflicts(data, index),
                *rules.reference(data[index], below),
                *backend.findings(data[index], below, lent),
            ]
            faults += [Place().fault(message, ("stages", stage.name, *path)) for path, message in found]
        if faults:
            raise Faults(faults)

    @classmethod
    def load(cls, preset_or_path: str | os.PathLike[str], *overrides: str) -> Self:
        """The chain of a preset or file. `key=value` changes every stage, `stages.NAME.key=value` one. Raises `Faults`,
        all at once."""
        tree, faults, stem = read_recipe(os.fspath(preset_or_path))
        if "stages" not in tree.value:
            raise UserError(f"{stem} is a single recipe, without stages; load it with load_any or Recipe.load")
        return cls.of_tree(tree, faults, stem, overrides)

    @classmethod
    def of_tree(cls, tree: Node, faults: list[Fault], stem: str, overrides: Sequence[str]) -> Self:
        """The chain of what was read from a file."""
        if "name" not in tree.value:
            tree.value["name"] = Node(name_of(stem), Place(tree.place.file))
        return cls._judge(tree, faults, read_settings(overrides, faults), files=True)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The chain of plain data, as `to_dict` gives it. Raises `Faults`."""
        faults: list[Fault] = []
        tree = from_python(dict(data) if isinstance(data, Mapping) else data, Place(), faults)
        if not isinstance(tree.value, dict):
            raise Faults([Fault(NO_MAPPING)])
        if "stages" not in tree.value:
            raise Faults([*faults, Fault("is missing: a single recipe is read by Recipe.from_dict", "stages")])
        return cls._judge(tree, faults, [], files=False)

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
        every = [stage.to_dict() for stage in self.stages]
        own, trained = every[index], self.stages[index].trained
        frozen = {name: adapter for name, adapter in own["adapters"].items() if name != trained}
        finished = {name: {"path": folders[name]} for name in finished_below(every, index)}
        lent = lender(every, index)
        judge = {learned.ROLE: {"path": folders[lent]}} if lent else {}
        adapters = {**frozen, **loaded_below(every, index), **finished, **judge, trained: own["adapters"][trained]}
        return Recipe.from_dict({**own, "adapters": adapters})

    @classmethod
    def _judge(cls, tree: Node, faults: list[Fault], overrides: Sequence[Setting], files: bool) -> Self:
        """Each stage like a recipe of its own, then what they are to each other."""
        heading = Node({key: tree.value.pop(key) for key in HEADING if key in tree.value}, tree.place)
        apply(heading, [(path, node) for path, node in overrides if path[0] in HEADING], faults)
        faults += [
            nearest(heading, path).place.fault(message, path) for path, message in faults_in(Heading, plain(heading))
        ]
        made = drafts(tree.value.pop("stages"), tree, overrides, faults, files)
        data = [plain(draft.tree) for draft in made]
        for index, draft in enumerate(made):
            if not draft.lost:
                others = conflicts(data, index) if not any(each.lost for each in made) else ()
                _judge_stage(draft, data[index], [*_findings(data, index), *others])
        faults += _told(made)
        if faults:
            raise Faults(in_order(faults, tree.place.file))
        head = Heading.model_validate(plain(heading))
        return cls(
            head.name,
            head.description,
            tuple(_recipe(each, lender(data, index) is not None) for index, each in enumerate(data)),
        )


def _findings(data: Sequence[Mapping[str, Any]], index: int) -> Iterator[Finding]:
    return rules.findings(data[index], finished_below(data, index), lender(data, index) is not None)


def _judge_stage(draft: Draft, data: Mapping[str, Any], findings: Sequence[Finding]) -> None:
    """The faults of one stage, where its settings stand."""
    told = faults_in(settings.Recipe, data, findings)
    draft.faults += [nearest(draft.tree, path).place.fault(message, path) for path, message in told]


def _told(made: Sequence[Draft]) -> list[Fault]:
    """Faults under the names of their stages; what stands wrong in all of them stands in what they share, and is told
    once."""
    judged = [draft for draft in made if not draft.lost]
    counts = Counter(fault for draft in judged for fault in set(draft.faults))
    return [
        fault
        if counts[fault] == len(judged) > 1
        else replace(fault, key=".".join(filter(None, ["stages", draft.label, fault.key])))
        for draft in judged
        for fault in draft.faults
    ]


def _recipe(data: dict[str, Any], lent: bool) -> Recipe:
    """A stage that was judged. Its `reference` and, where it is `lent`, its reward model name what only the chain knows
    of: they are set past the recipe's own rules."""
    claimed, adapters = data.get("reference"), data.get("adapters") or {}
    stands_in = {"adapters": {**adapters, learned.ROLE: {"path": "."}}} if lent else {}
    recipe = Recipe.model_validate({key: value for key, value in (data | stands_in).items() if key != "reference"})
    own = {name: adapter for name, adapter in recipe.adapters.items() if name != learned.ROLE}
    changes = {**({"adapters": own} if lent else {}), **({"reference": claimed} if claimed is not None else {})}
    return recipe.model_copy(update=changes) if changes else recipe
