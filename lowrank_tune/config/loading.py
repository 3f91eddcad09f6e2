"""Loading, writing and comparing recipes and chains."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from lowrank_tune.config import messages
from lowrank_tune.config.chain import Chain
from lowrank_tune.config.extends import read_recipe
from lowrank_tune.config.memory_rules import MEMORY_SETTINGS
from lowrank_tune.config.presets import list_presets
from lowrank_tune.config.recipe import Recipe
from lowrank_tune.config.rules import NAME_PATTERN
from lowrank_tune.config.schema import RecipeConfig
from lowrank_tune.config.yaml_nodes import dotted, leaves
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
"""What a continued run may set anew: its end, its logging and its saving, and what decides over its memory. Of a chain,
each stage may."""


def load(preset_or_path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a preset or file, with `key=value` overrides."""
    return Recipe.load(preset_or_path, *overrides)


def load_any(preset_or_path: str | os.PathLike[str], *overrides: str) -> Recipe | Chain:
    """The recipe of a preset or file, or where it has `stages`, the chain. Raises `ConfigError`, all of them at
    once."""
    tree, problems, stem = read_recipe(os.fspath(preset_or_path))
    kind: type[Recipe] | type[Chain] = Chain if "stages" in tree.value else Recipe
    return kind.from_tree(tree, problems, stem, overrides)


def backends_of(recipe: RecipeConfig | Chain) -> set[str]:
    """Whose code is to run the bases of a recipe, or of a chain's stages."""
    return {stage.base.backend for stage in (recipe.stages if isinstance(recipe, Chain) else (recipe,))}


def from_dict(data: Mapping[str, Any]) -> Recipe:
    """The recipe of plain data."""
    return Recipe.from_dict(data)


class _Dumper(yaml.SafeDumper):
    """Writes what the strict reader takes: no aliases, and quotes around text that looks like something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style=_style(text))
)


def _style(text: str) -> str | None:
    """Plain where it is a plain word or a sentence of them, else double quotes."""
    if re.fullmatch(r"[A-Za-z][A-Za-z0-9_./@-]*", text) and text.lower() not in ("null", "true", "false"):
        return None
    return '"'


def dump(recipe: RecipeConfig | Chain) -> str:
    """The resolved recipe or chain as YAML; loading it gives the same one."""
    return yaml.dump(recipe.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def presets() -> list[tuple[str, str, str]]:
    """Name, description and algorithm of every preset, by name; of a chain, all its algorithms."""
    return sorted((preset.name, preset.description, " -> ".join(preset.algorithms)) for preset in list_presets())


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, for editors. What `extends` may bring is not required; beside `stages` nothing
    is."""
    document = copy.deepcopy(RecipeConfig.model_json_schema())
    required = document.pop("required", [])
    settable = {
        "extends": {
            "type": "string",
            "description": "Builds on another preset, or on a recipe at a path relative to this file.",
        },
        **document["properties"],
    }
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
    document["anyOf"] = [{"required": ["extends"]}, {"required": ["stages"]}, {"required": required}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "lowrank_tune recipe", **document}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What a continued run may not change, as `train.learning_rate: was 0.001, is 0.002`; in a chain,
    `stages.dpo.train.learning_rate`."""
    before = _flat(_with_defaults(old))
    after = _flat(new)
    if before.get("stages") != after.get("stages"):  # other stages, or another order: their settings say nothing then
        before, after = (
            {key: value for key, value in each.items() if not key.startswith("stages.")} for each in (before, after)
        )
    changed = [key for key in dict.fromkeys([*before, *after]) if before.get(key, leaves) != after.get(key, leaves)]
    return [
        f"{key}: was {_format_value(before, key)}, is {_format_value(after, key)}"
        for key in changed
        if re.sub(r"^stages\.[^.]*\.|\.\d+$", "", key) not in RESUMABLE_CHANGES
    ]


def _with_defaults(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recipe as a run left it, with the settings that the kit did not have yet at their defaults; as it is, where it
    cannot be read."""
    try:
        return (Chain if "stages" in data else Recipe).from_dict(data).to_dict()
    except ConfigError:
        return data


def _flat(data: Mapping[str, Any]) -> dict[str, Any]:
    """Every leaf under its dotted path, those of a stage under its name, and the order of the stages."""
    flat = {
        dotted(path): value for path, value in leaves({key: value for key, value in data.items() if key != "stages"})
    }
    if "stages" in data:
        flat["stages"] = " -> ".join(stage["name"] for stage in data["stages"])
        flat |= {
            f"stages.{stage['name']}.{dotted(path)}": value for stage in data["stages"] for path, value in leaves(stage)
        }
    return flat


def _format_value(data: Mapping[str, Any], key: str) -> str:
    if key in data:
        return messages.describe_value(data[key])
    return "not set"
