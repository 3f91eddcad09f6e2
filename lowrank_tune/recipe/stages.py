"""The stages of a chain, each put together from its layers.

The chain's own settings are the lowest layer of every stage, then comes what the stage extends, then the stage, then
`key=value`, then `stages.NAME.key=value`. A common setting that belongs to the algorithms of other stages (`dpo.beta`
beside an SFT stage) passes a stage by.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

from lowrank_tune.errors import Fault, did_you_mean
from lowrank_tune.recipe.layers import OVERRIDE, Lost, Setting, apply, lay, read_parent
from lowrank_tune.recipe.rules import NAME, USED_BY
from lowrank_tune.recipe.tree import Node, Path, find, remove
from lowrank_tune.recipe.wording import found
from lowrank_tune.settings import trained_by

MOST_STAGES = 8
HEADING = ("name", "description")
"""What a chain says of itself; the rest is for its stages."""


@dataclass
class Draft:
    """A stage on its way from layers to a recipe."""

    index: int
    own: Node
    parent: Node | None = None
    lost: bool = False
    """What it extends cannot be read: it is not judged."""
    name: str = ""
    algorithm: Any = None
    tree: Node = field(init=False)
    faults: list[Fault] = field(default_factory=list)
    """Faults of this stage, under paths of a single recipe."""

    @property
    def label(self) -> str:
        """Its name in paths: its number where it has no name of its own."""
        return self.name or str(self.index)

    @property
    def here(self) -> Path:
        return ("stages", self.label)


def drafts(stages: Node, shared: Node, overrides: Sequence[Setting], faults: list[Fault], files: bool) -> list[Draft]:
    """The stages with all their layers; what cannot be one is told."""
    made = _listed(stages, faults)
    for draft in made:
        if files:
            _inherit(draft, faults)
        _name(draft, shared, made, faults)
    kept = _known(overrides, made, faults)
    for draft in made:
        draft.algorithm = _last(kept, draft) or draft.algorithm
    for draft in made:
        _lay(draft, shared, kept, {each.algorithm for each in made if isinstance(each.algorithm, str)})
    return made


def _listed(stages: Node, faults: list[Fault]) -> list[Draft]:
    if not isinstance(stages.value, list):
        faults.append(stages.place.fault(f"expected a list of recipes, found {found(stages.value)}", ("stages",)))
        return []
    if not 0 < len(stages.value) <= MOST_STAGES:
        message = (
            f"has {len(stages.value)} entries, and a chain has at most {MOST_STAGES}"
            if stages.value
            else "must have at least one entry"
        )
        faults.append(stages.place.fault(message, ("stages",)))
        return []
    for index, node in enumerate(stages.value):
        if not isinstance(node.value, dict):
            faults.append(
                node.place.fault(
                    f"expected a recipe (`key: value` lines), found {found(node.value)}", ("stages", index)
                )
            )
    return [Draft(index, node) for index, node in enumerate(stages.value) if isinstance(node.value, dict)]


def _inherit(draft: Draft, faults: list[Fault]) -> None:
    """Reads what a stage extends."""
    line = draft.own.value.pop("extends", None)
    if line is None or line.value is None:
        return
    path = ("stages", draft.index, "extends")
    try:
        draft.parent = read_parent(line, File(), faults, path)
    except Lost:
        pass
    if draft.parent is not None and "stages" in draft.parent.value:
        faults.append(line.place.fault("is a chain itself, and chains do not nest; name one of its recipes", path))
        draft.parent = None
    draft.lost = draft.parent is None


def _written(draft: Draft, shared: Node, key: str) -> Any:
    """What the layers of a stage say, the upper ones first."""
    layers = (draft.own, draft.parent, shared)
    return next(
        (
            node.value
            for layer in layers
            if layer and (node := find(layer, (key,))) is not None and node.value is not None
        ),
        None,
    )


def _name(draft: Draft, shared: Node, others: Sequence[Draft], faults: list[Fault]) -> None:
    """A stage is called by its `name`, else by its algorithm. A name that cannot be is told, and not taken."""
    draft.algorithm = _written(draft, shared, "algorithm")
    given = find(draft.own, ("name",))
    path: Path = ("stages", draft.index)
    if given is None or given.value is None:
        name, place = draft.algorithm, draft.own.place
        if not isinstance(name, str) or not NAME.fullmatch(name):
            return  # and the algorithm is told
    else:
        name, place, path = given.value, given.place, (*path, "name")
    if name == "base":
        faults.append(place.fault("is no name for a stage: `base` is the base itself", path))
    elif not isinstance(name, str) or not NAME.fullmatch(name):
        told = "small letters, digits and _, a letter first, at most 40"
        faults.append(place.fault(f"is no name for a stage: {told}; found {found(name)}", path))
    elif any(other.name == name for other in others):
        faults.append(place.fault(f"a second stage is called `{name}`; give each a `name` of its own", path))
    else:
        draft.name = name


def _known(overrides: Sequence[Setting], made: Sequence[Draft], faults: list[Fault]) -> list[Setting]:
    """The overrides for stages; those for the chain itself are taken elsewhere, and those for stages that are not there
    are told."""
    names = [draft.name for draft in made if draft.name]
    kept: list[Setting] = []
    for path, node in overrides:
        if why := _unfit(path, names):
            faults.append(OVERRIDE.fault(why, path))
        elif path[0] not in HEADING:
            kept.append((path, node))
    return kept


def _unfit(path: Path, names: list[str]) -> str:
    """Why `stages.NAME.key` cannot be set, or an empty string."""
    if path[0] != "stages":
        return ""
    word = str(path[1]) if len(path) > 1 else ""
    if word and word not in names:
        return f"no stage is called {word!r:.60}{did_you_mean(word, names) or '; there are ' + ', '.join(names)}"
    if len(path) < 3:
        return f"is no single setting; say stages.{word or 'NAME'}.train.steps=100"
    return "cannot be given here; it stands in the file" if path[2] in ("name", "extends", "stages") else ""


def _common(overrides: Sequence[Setting]) -> list[Setting]:
    return [(path, node) for path, node in overrides if path[0] != "stages"]


def _special(overrides: Sequence[Setting], draft: Draft) -> list[Setting]:
    """The overrides for this stage alone. They are a layer above the common ones, wherever they stand."""
    return [(path[2:], node) for path, node in overrides if path[0] == "stages" and str(path[1]) == draft.name]


def _last(overrides: Sequence[Setting], draft: Draft) -> Any:
    """The algorithm that the command line asks for."""
    asked = [*_common(overrides), *_special(overrides, draft)]
    return next((node.value for path, node in reversed(asked) if path == ("algorithm",)), None)


def _lay(draft: Draft, shared: Node, overrides: Sequence[Setting], algorithms: set[str]) -> None:
    """All layers of a stage, each from a copy: a stage never changes what another one reads."""
    foreign = _elsewhere(draft.algorithm, algorithms)
    tree = copy.deepcopy(shared)
    for path in foreign:
        node = find(tree, path)
        if node is not None and (path[0] != "adapters" or find(node, ("path",)) is None):
            remove(tree, path)
    if draft.parent is not None:
        tree = lay(tree, draft.parent)
    tree = lay(tree, draft.own)
    spared = [each for each in foreign if each[0] != "adapters" or find(tree, each) is None]
    common = [
        (path, node) for path, node in _common(overrides) if not any(path[: len(each)] == each for each in spared)
    ]
    for layer in (common, _special(overrides, draft)):
        apply(tree, copy.deepcopy(layer), draft.faults)
    tree.value["name"] = Node(draft.name or "stage", draft.own.place)
    draft.tree = tree


def _elsewhere(algorithm: Any, algorithms: set[str]) -> list[Path]:
    """Settings that other stages of this chain use, and this one does not."""
    settings: list[Path] = [
        tuple(key.split("."))
        for key, users in USED_BY.items()
        if algorithm not in users and not algorithms.isdisjoint(users)
    ]
    trained = {trained_by(each) for each in algorithms} - {trained_by(algorithm)}
    return settings + [("adapters", name) for name in sorted(trained)]
