"""The stages of a chain, each put together from its layers.

The chain's own settings are the lowest layer of every stage, then comes what the stage extends, then the stage, then
`key=value`, then `stages.NAME.key=value`. A common setting that belongs to the algorithms of other stages (`dpo.beta`
beside an SFT stage) passes a stage by.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

from lowrank_tune.config.extends import (
    OVERRIDE_POSITION,
    Override,
    ParentNotFound,
    apply_overrides,
    merge_layer,
    read_parent,
)
from lowrank_tune.config.messages import describe_value
from lowrank_tune.config.model import default_adapter_name
from lowrank_tune.config.rules import NAME_PATTERN, USED_BY
from lowrank_tune.config.yaml_nodes import Node, Path, find_node, remove_key
from lowrank_tune.errors import ConfigProblem, did_you_mean

MAX_STAGES = 8
HEADER_KEYS = ("name", "description")
"""What a chain says of itself; the rest is for its stages."""


@dataclass
class StageDraft:
    """A stage on its way from layers to a recipe."""

    index: int
    own: Node
    parent: Node | None = None
    unresolved_parent: bool = False
    """What it extends cannot be read: it is not judged."""
    name: str = ""
    algorithm: Any = None
    tree: Node = field(init=False)
    problems: list[ConfigProblem] = field(default_factory=list)
    """Faults of this stage, under paths of a single recipe."""

    @property
    def label(self) -> str:
        """Its name in paths: its number where it has no name of its own."""
        return self.name or str(self.index)

    @property
    def path(self) -> Path:
        return ("stages", self.label)


def draft_stages(
    stages: Node,
    shared: Node,
    overrides: Sequence[Override],
    problems: list[ConfigProblem],
    files: bool,
) -> list[StageDraft]:
    """The stages with all their layers; what cannot be one is told."""
    drafts = _new_drafts(stages, problems)
    for draft in drafts:
        if files:
            _inherit(draft, problems)
        _set_name(draft, shared, drafts, problems)
    valid_overrides = _checked_overrides(overrides, drafts, problems)
    for draft in drafts:
        draft.algorithm = _algorithm_override(valid_overrides, draft) or draft.algorithm
    for draft in drafts:
        _apply_layers(
            draft,
            shared,
            valid_overrides,
            {each.algorithm for each in drafts if isinstance(each.algorithm, str)},
        )
    return drafts


def _new_drafts(stages: Node, problems: list[ConfigProblem]) -> list[StageDraft]:
    if not isinstance(stages.value, list):
        problems.append(
            stages.position.problem(f"expected a list of recipes, found {describe_value(stages.value)}", ("stages",))
        )
        return []
    if not 0 < len(stages.value) <= MAX_STAGES:
        if stages.value:
            message = f"has {len(stages.value)} entries, and a chain has at most {MAX_STAGES}"
        else:
            message = "must have at least one entry"
        problems.append(stages.position.problem(message, ("stages",)))
        return []
    for index, node in enumerate(stages.value):
        if not isinstance(node.value, dict):
            problems.append(
                node.position.problem(
                    f"expected a recipe (`key: value` lines), found {describe_value(node.value)}", ("stages", index)
                )
            )
    return [StageDraft(index, node) for index, node in enumerate(stages.value) if isinstance(node.value, dict)]


def _inherit(draft: StageDraft, problems: list[ConfigProblem]) -> None:
    """Reads what a stage extends."""
    line = draft.own.value.pop("extends", None)
    if line is None or line.value is None:
        return
    path = ("stages", draft.index, "extends")
    with suppress(ParentNotFound):
        draft.parent = read_parent(line, File(), problems, path)
    if draft.parent is not None and "stages" in draft.parent.value:
        problems.append(
            line.position.problem("is a chain itself, and chains do not nest; name one of its recipes", path)
        )
        draft.parent = None
    draft.unresolved_parent = draft.parent is None


def _layered_value(draft: StageDraft, shared: Node, key: str) -> Any:
    """What the layers of a stage say, the upper ones first."""
    layers = (draft.own, draft.parent, shared)
    return next(
        (
            node.value
            for layer in layers
            if layer and (node := find_node(layer, (key,))) is not None and node.value is not None
        ),
        None,
    )


def _set_name(draft: StageDraft, shared: Node, others: Sequence[StageDraft], problems: list[ConfigProblem]) -> None:
    """A stage is called by its `name`, else by its algorithm. A name that cannot be is told, and not taken."""
    draft.algorithm = _layered_value(draft, shared, "algorithm")
    given = find_node(draft.own, ("name",))
    path: Path = ("stages", draft.index)
    if given is None or given.value is None:
        name = draft.algorithm
        position = draft.own.position
        if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name):
            return  # and the algorithm is told
    else:
        name = given.value
        position = given.position
        path = (*path, "name")
    if name == "base":
        problems.append(position.problem("is no name for a stage: `base` is the base itself", path))
    elif not isinstance(name, str) or not NAME_PATTERN.fullmatch(name):
        rule = "small letters, digits and _, a letter first, at most 40"
        problems.append(position.problem(f"is no name for a stage: {rule}; found {describe_value(name)}", path))
    elif any(other.name == name for other in others):
        problems.append(position.problem(f"a second stage is called `{name}`; give each a `name` of its own", path))
    else:
        draft.name = name


def _checked_overrides(
    overrides: Sequence[Override],
    drafts: Sequence[StageDraft],
    problems: list[ConfigProblem],
) -> list[Override]:
    """The overrides for stages; those for the chain itself are taken elsewhere, and those for stages that are not there
    are told."""
    names = [draft.name for draft in drafts if draft.name]
    valid: list[Override] = []
    for path, node in overrides:
        if reason := _invalid_override(path, names):
            problems.append(OVERRIDE_POSITION.problem(reason, path))
        elif path[0] not in HEADER_KEYS:
            valid.append((path, node))
    return valid


def _invalid_override(path: Path, names: list[str]) -> str:
    """Why `stages.NAME.key` cannot be set, or an empty string."""
    if path[0] != "stages":
        return ""
    word = str(path[1]) if len(path) > 1 else ""
    if word and word not in names:
        return f"no stage is called {word!r:.60}{did_you_mean(word, names) or '; there are ' + ', '.join(names)}"
    if len(path) < 3:
        return f"is no single setting; say stages.{word or 'NAME'}.train.max_steps=100"
    if path[2] in ("name", "extends", "stages"):
        return "cannot be given here; it stands in the file"
    return ""


def _common_overrides(overrides: Sequence[Override]) -> list[Override]:
    return [(path, node) for path, node in overrides if path[0] != "stages"]


def _stage_overrides(overrides: Sequence[Override], draft: StageDraft) -> list[Override]:
    """The overrides for this stage alone. They are a layer above the common ones, wherever they stand."""
    return [(path[2:], node) for path, node in overrides if path[0] == "stages" and str(path[1]) == draft.name]


def _algorithm_override(overrides: Sequence[Override], draft: StageDraft) -> Any:
    """The algorithm that the command line asks for."""
    candidates = [*_common_overrides(overrides), *_stage_overrides(overrides, draft)]
    return next((node.value for path, node in reversed(candidates) if path == ("algorithm",)), None)


def _apply_layers(draft: StageDraft, shared: Node, overrides: Sequence[Override], algorithms: set[str]) -> None:
    """All layers of a stage, each from a copy: a stage never changes what another one reads."""
    foreign = _settings_of_other_stages(draft.algorithm, algorithms)
    tree = copy.deepcopy(shared)
    for path in foreign:
        node = find_node(tree, path)
        if node is not None and (path[0] != "adapters" or find_node(node, ("path",)) is None):
            remove_key(tree, path)
    if draft.parent is not None:
        tree = merge_layer(tree, draft.parent)
    tree = merge_layer(tree, draft.own)
    skipped = [
        foreign_path
        for foreign_path in foreign
        if foreign_path[0] != "adapters" or find_node(tree, foreign_path) is None
    ]
    common = [
        (path, node)
        for path, node in _common_overrides(overrides)
        if not any(path[: len(foreign_path)] == foreign_path for foreign_path in skipped)
    ]
    for layer in (common, _stage_overrides(overrides, draft)):
        apply_overrides(tree, copy.deepcopy(layer), draft.problems)
    tree.value["name"] = Node(draft.name or "stage", draft.own.position)
    draft.tree = tree


def _settings_of_other_stages(algorithm: Any, algorithms: set[str]) -> list[Path]:
    """Settings that other stages of this chain use, and this one does not."""
    settings: list[Path] = [
        tuple(key.split("."))
        for key, users in USED_BY.items()
        if algorithm not in users and not algorithms.isdisjoint(users)
    ]
    trained = {default_adapter_name(each) for each in algorithms} - {default_adapter_name(algorithm)}
    return settings + [("adapters", name) for name in sorted(trained)]
