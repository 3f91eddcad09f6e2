"""Loading, writing and comparing recipes and chains."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from lowrank_tune.config.chain import Chain
from lowrank_tune.config.extends import read_recipe
from lowrank_tune.config.memory import MEMORY_SETTINGS
from lowrank_tune.config.messages import describe_value
from lowrank_tune.config.model import NAME_PATTERN
from lowrank_tune.config.recipe import Recipe
from lowrank_tune.config.schema import RecipeConfig
from lowrank_tune.config.yaml import dotted, leaves
from lowrank_tune.errors import ConfigError

RESUMABLE_CHANGES = frozenset(
    {
        "name",
        "description",
        "train.max_steps",
        "train.num_train_epochs",
        "train.logging_steps",
        "train.save_steps",
        "train.save_total_limit",
        "evaluate.eval_steps",
        "evaluate.num_completions_to_print",
        "train.report_to",
        "train.project",
        *MEMORY_SETTINGS,
    }
)
"""What a continued run, or a stage of a continued chain, may change: its end, logging and checkpoints, and settings of
memory."""
MISSING = object()


def load(preset_or_path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Returns the recipe of a preset or file, with `key=value` overrides."""
    return Recipe.load(preset_or_path, *overrides)


def load_any(preset_or_path: str | os.PathLike[str], *overrides: str) -> Recipe | Chain:
    """Returns the recipe of a preset or file, or the chain if it has `stages`. Raises ConfigError with all problems."""
    tree, problems, stem = read_recipe(os.fspath(preset_or_path))
    if "stages" in tree.value:
        return Chain.from_tree(tree, problems, stem, overrides)
    return Recipe.from_tree(tree, problems, stem, overrides)


def backends_of(recipe: RecipeConfig | Chain) -> set[str]:
    """Returns the libraries that run the bases of a recipe, or of a chain's stages."""
    return {stage.base.backend for stage in recipe.stages}


def from_dict(data: Mapping[str, Any]) -> Recipe:
    """Returns the recipe of plain data."""
    return Recipe.from_dict(data)


class _Dumper(yaml.SafeDumper):
    """Writes what the strict reader accepts: no aliases, and quotes around text that looks like another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    """Writes plain words as they are, and any other text in double quotes."""
    is_plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9_./@-]*", text) and text.lower() not in ("null", "true", "false")
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str",
        text,
        style=None if is_plain else '"',
    )


_Dumper.add_representer(str, _represent_text)


def dump(recipe: RecipeConfig | Chain) -> str:
    """Returns the resolved recipe or chain as YAML, which loads as an equal one."""
    return yaml.dump(
        recipe.to_dict(),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=120,
    )


def schema() -> dict[str, Any]:
    """Returns the JSON schema of a recipe file, for editors. A key that `extends` may add is not required, and beside
    `stages` no key is."""
    document = copy.deepcopy(RecipeConfig.model_json_schema())
    required = document.pop("required", [])
    extends = {
        "type": "string",
        "description": "Builds on another preset, or on a recipe at a path relative to this file.",
    }
    settable = {"extends": extends, **document["properties"]}
    name = {
        "type": "string",
        "pattern": f"^{NAME_PATTERN.pattern}$",
        "description": "Name of the stage, and of its adapter in later ones.",
    }
    document["$defs"]["Stage"] = {
        "type": "object",
        "additionalProperties": False,
        "properties": {**settable, "name": name},
    }
    stages = {
        "type": "array",
        "minItems": 1,
        "items": {"$ref": "#/$defs/Stage"},
        "description": (
            "A chain: runs one after the other on one base, each policy frozen below the next. All else in this file "
            "is their default."
        ),
    }
    document["properties"] = {**settable, "stages": stages}
    document["anyOf"] = [
        {"required": ["extends"]},
        {"required": ["stages"]},
        {"required": required},
    ]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lowrank_tune recipe",
        **document,
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Returns the changes that a continued run may not have, as `train.learning_rate: was 0.001, is 0.002`; in a chain,
    `stages.dpo.train.learning_rate`."""
    before = _flat(_with_defaults(old))
    after = _flat(new)
    # settings of other stages, or of stages in another order, cannot be compared
    compares_stages = before.get("stages") == after.get("stages")
    changes: list[str] = []
    for key in dict.fromkeys([*before, *after]):
        if key.startswith("stages.") and not compares_stages:
            continue
        is_resumable = re.sub(r"^stages\.[^.]*\.|\.\d+$", "", key) in RESUMABLE_CHANGES
        if not is_resumable and before.get(key, MISSING) != after.get(key, MISSING):
            changes.append(f"{key}: was {_format_value(before, key)}, is {_format_value(after, key)}")
    return changes


def _with_defaults(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a recipe of an earlier version with the defaults of settings that were added since. Returns it unchanged
    if it cannot be read."""
    try:
        return (Chain if "stages" in data else Recipe).from_dict(data).to_dict()
    except ConfigError:
        return data


def _flat(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns every value under its dotted path, those of a stage under its name, and the order of the stages."""
    own = {key: value for key, value in data.items() if key != "stages"}
    flat = {dotted(path): value for path, value in leaves(own)}
    if "stages" not in data:
        return flat
    flat["stages"] = " -> ".join(stage["name"] for stage in data["stages"])
    for stage in data["stages"]:
        for path, value in leaves(stage):
            flat[f"stages.{stage['name']}.{dotted(path)}"] = value
    return flat


def _format_value(data: Mapping[str, Any], key: str) -> str:
    if key in data:
        return describe_value(data[key])
    return "not set"
