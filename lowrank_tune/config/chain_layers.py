"""The stages of a chain, each built from its layers.

The lowest layer of every stage are the settings of the chain itself (the common ones). Above them are what the stage
extends, the stage, `key=value`, and `stages.NAME.key=value`. A common setting that only the algorithms of other stages
use (`dpo.beta` beside an SFT stage) is left out of a stage.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

from lowrank_tune.config.base import Path
from lowrank_tune.config.extends import (
    OVERRIDE_POSITION,
    Override,
    ParentNotFound,
    apply_overrides,
    merge_layer,
    read_parent,
)
from lowrank_tune.config.messages import describe_value
from lowrank_tune.config.model import NAME_PATTERN, NAME_RULE, default_adapter_name
from lowrank_tune.config.schema import USED_BY
from lowrank_tune.config.yaml import Node, find_node, remove_key
from lowrank_tune.errors import ConfigProblem, did_you_mean

MAX_STAGES = 8
HEADER_KEYS = ("name", "description")
"""The settings of a chain itself; all others are for its stages."""


@dataclass
class StageDraft:
    """A stage whose layers are not merged yet, or whose tree is not checked yet."""

    index: int
    own: Node
    parent: Node | None = None
    unresolved_parent: bool = False
    """What it extends cannot be read, so that the stage is not checked."""
    name: str = ""
    algorithm: Any = None
    tree: Node = field(init=False)
    problems: list[ConfigProblem] = field(default_factory=list)
    """Problems of this stage, under the paths of a single recipe."""

    @property
    def label(self) -> str:
        """Its name in paths; its number if it has no name."""
        return self.name or str(self.index)


def draft_stages(
    stages: Node,
    shared: Node,
    overrides: Sequence[Override],
    problems: list[ConfigProblem],
    files: bool,
) -> list[StageDraft]:
    """Returns the stages with all their layers, and adds the problems of the others."""
    drafts = _new_drafts(stages, problems)
    for draft in drafts:
        if files:
            _read_parent(draft, problems)
        draft.algorithm = _algorithm_of(draft, shared)
        _set_name(draft, drafts, problems)
    valid_overrides = _checked_overrides(overrides, drafts, problems)
    for draft in drafts:
        draft.algorithm = _algorithm_override(valid_overrides, draft) or draft.algorithm
    algorithms = {draft.algorithm for draft in drafts if isinstance(draft.algorithm, str)}
    for draft in drafts:
        _merge_layers(
            draft,
            shared,
            valid_overrides,
            algorithms,
        )
    return drafts


def _new_drafts(stages: Node, problems: list[ConfigProblem]) -> list[StageDraft]:
    count = len(stages.value) if isinstance(stages.value, list) else 0
    message = ""
    if not isinstance(stages.value, list):
        message = f"expected a list of recipes, found {describe_value(stages.value)}"
    elif count == 0:
        message = "must have at least one entry"
    elif count > MAX_STAGES:
        message = f"has {count} entries, and a chain has at most {MAX_STAGES}"
    if message:
        problems.append(stages.position.problem(message, ("stages",)))
        return []
    drafts: list[StageDraft] = []
    for index, node in enumerate(stages.value):
        if isinstance(node.value, dict):
            drafts.append(StageDraft(index, node))
        else:
            message = f"expected a recipe (`key: value` lines), found {describe_value(node.value)}"
            problems.append(node.position.problem(message, ("stages", index)))
    return drafts


def _read_parent(draft: StageDraft, problems: list[ConfigProblem]) -> None:
    """Reads what a stage extends."""
    node = draft.own.value.pop("extends", None)
    if node is None or node.value is None:
        return
    path = ("stages", draft.index, "extends")
    with suppress(ParentNotFound):
        draft.parent = read_parent(
            node,
            File(),
            problems,
            path,
        )
    if draft.parent is not None and "stages" in draft.parent.value:
        message = "is a chain itself, and chains do not nest; name one of its recipes"
        problems.append(node.position.problem(message, path))
        draft.parent = None
    draft.unresolved_parent = draft.parent is None


def _algorithm_of(draft: StageDraft, shared: Node) -> Any:
    """Returns the algorithm of the highest layer that has one."""
    for layer in filter(None, (draft.own, draft.parent, shared)):
        node = find_node(layer, ("algorithm",))
        if node is not None and node.value is not None:
            return node.value
    return None


def _set_name(
    draft: StageDraft,
    others: Sequence[StageDraft],
    problems: list[ConfigProblem],
) -> None:
    """Names a stage by its `name`, else by its algorithm. Adds a problem if that is not possible."""
    given = find_node(draft.own, ("name",))
    path: Path = ("stages", draft.index)
    name = draft.algorithm
    position = draft.own.position
    if given is not None and given.value is not None:
        name = given.value
        position = given.position
        path = (*path, "name")
    elif not isinstance(name, str) or not NAME_PATTERN.fullmatch(name):
        # the check of the stage reports the algorithm
        return
    if name == "base":
        problems.append(position.problem("is not a name for a stage: `base` is the base itself", path))
    elif not isinstance(name, str) or not NAME_PATTERN.fullmatch(name):
        message = f"is not a name for a stage: {NAME_RULE}; found {describe_value(name)}"
        problems.append(position.problem(message, path))
    elif any(other.name == name for other in others):
        problems.append(position.problem(f"a second stage is called `{name}`; give each a `name` of its own", path))
    else:
        draft.name = name


def _checked_overrides(
    overrides: Sequence[Override],
    drafts: Sequence[StageDraft],
    problems: list[ConfigProblem],
) -> list[Override]:
    """Returns the overrides of stages, and adds a problem for each that is not possible."""
    names = [draft.name for draft in drafts if draft.name]
    valid: list[Override] = []
    for path, node in overrides:
        if reason := _invalid_override(path, names):
            problems.append(OVERRIDE_POSITION.problem(reason, path))
        elif path[0] not in HEADER_KEYS:
            valid.append((path, node))
    return valid


def _invalid_override(path: Path, names: list[str]) -> str:
    """Returns why `stages.NAME.key` cannot be set, or an empty string."""
    if path[0] != "stages":
        return ""
    name = str(path[1]) if len(path) > 1 else ""
    if name and name not in names:
        hint = did_you_mean(name, names) or f"; there are {', '.join(names)}"
        return f"no stage is called {name!r:.60}{hint}"
    if len(path) < 3:
        return f"is not a single setting; write stages.{name or 'NAME'}.train.max_steps=100"
    if path[2] in ("name", "extends", "stages"):
        return "cannot be given here; write it in the file"
    return ""


def _common_overrides(overrides: Sequence[Override]) -> list[Override]:
    return [(path, node) for path, node in overrides if path[0] != "stages"]


def _stage_overrides(overrides: Sequence[Override], draft: StageDraft) -> list[Override]:
    """Returns the overrides of this stage alone. They are a layer above the common ones, in any order."""
    return [(path[2:], node) for path, node in overrides if path[0] == "stages" and str(path[1]) == draft.name]


def _algorithm_override(overrides: Sequence[Override], draft: StageDraft) -> Any:
    """Returns the algorithm that the command line sets, or None."""
    algorithm = None
    for path, node in [*_common_overrides(overrides), *_stage_overrides(overrides, draft)]:
        if path == ("algorithm",):
            algorithm = node.value
    return algorithm


def _merge_layers(
    draft: StageDraft,
    shared: Node,
    overrides: Sequence[Override],
    algorithms: set[str],
) -> None:
    """Merges all layers of a stage, each from a copy, so that no stage changes the layers of another one.

    A setting of other algorithms is left out of the common settings and of the common overrides. The trained adapter of
    another algorithm is left out of the common settings unless it has a `path`, as it is then a frozen adapter of this
    stage too, and out of the common overrides unless this stage has an adapter of its name.
    """
    foreign_settings = list(_foreign_settings(draft.algorithm, algorithms))
    foreign_adapters = list(_foreign_adapters(draft.algorithm, algorithms))
    tree = copy.deepcopy(shared)
    for path in foreign_settings:
        remove_key(tree, path)
    for path in foreign_adapters:
        if find_node(tree, (*path, "path")) is None:
            remove_key(tree, path)
    if draft.parent is not None:
        tree = merge_layer(tree, draft.parent)
    tree = merge_layer(tree, draft.own)
    left_out = [*foreign_settings, *(path for path in foreign_adapters if find_node(tree, path) is None)]
    common = [override for override in _common_overrides(overrides) if not _is_below(override[0], left_out)]
    apply_overrides(tree, copy.deepcopy(common), draft.problems)
    apply_overrides(tree, copy.deepcopy(_stage_overrides(overrides, draft)), draft.problems)
    tree.value["name"] = Node(draft.name or "stage", draft.own.position)
    draft.tree = tree


def _foreign_settings(algorithm: Any, algorithms: set[str]) -> Iterator[Path]:
    """Yields the settings that algorithms of the chain use, and this one does not."""
    for key, users in USED_BY.items():
        if algorithm not in users and not algorithms.isdisjoint(users):
            yield tuple(key.split("."))


def _foreign_adapters(algorithm: Any, algorithms: set[str]) -> Iterator[Path]:
    """Yields the adapters that other algorithms of the chain train."""
    trained = {default_adapter_name(each) for each in algorithms}
    for name in sorted(trained - {default_adapter_name(algorithm)}):
        yield ("adapters", name)


def _is_below(path: Path, parents: Sequence[Path]) -> bool:
    return any(path[: len(parent)] == parent for parent in parents)
