"""Generates docs/settings.md from the settings classes: `python scripts/settings_reference.py`.

`--check` writes nothing and exits with 1 if the page differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lowrank_tune.config import RecipeConfig
from lowrank_tune.config.schema import USED_BY

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"
Schema = Mapping[str, Any]

SECTIONS = {
    "base": "BaseConfig",
    "adapters": "AdapterConfig",
    "data": "DataConfig",
    "source": "SourceConfig",
    "train": "TrainingConfig",
    "reward": "RewardModelConfig",
    "dpo": "DPOConfig",
    "kto": "KTOConfig",
    "rewards": "RewardConfig",
    "rollout": "RolloutConfig",
    "grpo": "GRPOConfig",
    "ppo": "PPOConfig",
    "evaluate": "EvaluationConfig",
}
"""The sections of the page, which are its anchors, in their order, and the class of each."""

PATHS = {
    "adapters": "Keys of `adapters.NAME`, for example `adapters.policy.r`.",
    "source": "Keys of each entry of `data.train` and `data.validation`, and of `evaluate.eval_dataset`.",
    "rewards": "Keys of each entry of `rewards`.",
}
"""Where the keys of a section belong, if not under its own name."""

BY_ALGORITHM = {"train.learning_rate"}
"""Settings whose default depends on the algorithm; the description has the values."""

INTRODUCTION = """\
# Settings reference

This page lists every setting of a recipe: its type, its default and its meaning. How a recipe is written is in
[recipes](recipes.md).

The page is generated from the settings classes by `python scripts/settings_reference.py`. `lowrank-tune schema` prints
the same as a JSON schema for editors, and `lowrank-tune presets show tiny-sft --resolved` prints a preset with every
setting that it uses. A setting that an algorithm does not use is refused in a recipe of that algorithm.
"""

MAX_LIMIT = 10**12
"""The limit of all whole numbers, which is left out of their ranges."""


def render() -> str:
    """Returns the page."""
    schema = RecipeConfig.model_json_schema()
    kinds = schema["$defs"]
    parts = [INTRODUCTION, "\n".join(_section("recipe", "", schema, kinds))]
    parts += ["\n".join(_section(name, name, kinds[kind], kinds)) for name, kind in SECTIONS.items()]
    return "\n".join(parts)


def _section(name: str, prefix: str, schema: Schema, kinds: Schema) -> Iterator[str]:
    """Yields the lines of one section: what it is, which algorithms use it, and its table."""
    path = PATHS.get(name, f"Keys of `{name}`." if prefix else "Keys at the top of a recipe.")
    yield f"## {name}\n"
    yield " ".join(f"{schema['description']} {path} {_used_by(prefix)}".split()) + "\n"
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    required = schema.get("required", [])
    for key, field in schema["properties"].items():
        path_of_key = f"{prefix}.{key}" if prefix else key
        default = "by algorithm" if path_of_key in BY_ALGORITHM else _default_text(field, key in required)
        yield f"| `{key}` | {_type_text(field)} | {default} | {_meaning(path_of_key, field, kinds)} |"
    yield ""


def _meaning(path: str, field: Schema, kinds: Schema) -> str:
    """Returns the description of a key for a cell of the table. A field that is described as its class is has none."""
    description = field.get("description") or kinds[_kind(field)]["description"]
    return " ".join(f"{description} {_used_by(path)}".split()).replace("|", "\\|")


def _used_by(path: str) -> str:
    """Returns a sentence about the algorithms that use a setting; an empty string if all of them do."""
    return f"Only for {', '.join(USED_BY[path])}." if path in USED_BY else ""


def _type_text(field: Schema) -> str:
    """Returns the type of a value in words."""
    if "anyOf" in field:
        return " or ".join(_type_text(option) for option in field["anyOf"] if option != {"type": "null"})
    if "$ref" in field:
        anchor = _anchor(field)
        return f"[{anchor}](#{anchor})"
    if "enum" in field or "const" in field:
        return ", ".join(f"`{choice}`" for choice in field.get("enum", [field.get("const")]))
    if field["type"] == "array":
        return f"list of {_type_text(field['items'])}"
    if field["type"] == "object":
        values = next(iter(field.get("patternProperties", {}).values()), field.get("additionalProperties", True))
        return "mapping" if values is True else f"mapping to {_type_text(values)}"
    name = {"boolean": "`true`, `false`", "integer": "integer", "number": "number", "string": "text"}[field["type"]]
    return "date" if field.get("format") == "date" else name + _range_text(field)


def _kind(field: Schema) -> str:
    """Returns the name of the class that a field refers to."""
    return str(field["$ref"].rpartition("/")[2])


def _anchor(field: Schema) -> str:
    """Returns the section of the class that a field refers to."""
    return next(name for name, kind in SECTIONS.items() if kind == _kind(field))


def _range_text(field: Schema) -> str:
    """Returns the range of a number as text; an empty string if it has none."""
    words = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [
        f"{sign} {field[name]:.10g}" for name, sign in words.items() if name in field and field[name] != MAX_LIMIT
    ]
    return f" {', '.join(limits)}" if limits else ""


def _default_text(field: Schema, is_required: bool) -> str:
    """Returns the default of a key as it is written in a recipe."""
    if is_required:
        return "required"
    if "$ref" in field:
        return "its defaults"
    if "default" not in field:
        # the schema has no default of a factory, which is an empty mapping
        return "`{}`"
    default = field["default"]
    if default is None:
        return "none"
    return f"`{default}`" if isinstance(default, str) and default else f"`{json.dumps(default)}`"


def main(arguments: list[str] | None = None) -> int:
    """Writes the page, or with `--check` compares it. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Generate docs/settings.md from the settings classes.")
    parser.add_argument("--check", action="store_true", help="Write nothing; exit with 1 if the page differs.")
    check: bool = parser.parse_args(arguments).check
    if not check:
        PAGE.write_text(render(), encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == render():
        return 0
    print("docs/settings.md differs from the settings: run `python scripts/settings_reference.py`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
