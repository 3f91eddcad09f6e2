"""Runs that have ended, and the adapters that they left, loaded over their base again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lowrank_tune.checkpoint.run_format import check_run_format
from lowrank_tune.config import BaseConfig, RecipeConfig, default_adapter_name, from_dict
from lowrank_tune.data import ChatTemplate
from lowrank_tune.errors import UserError
from lowrank_tune.model.adapters import STACK, SavedAdapter, read_adapter, read_stack
from lowrank_tune.model.base import Base, base_hashes, load_tokenizer
from lowrank_tune.model.roles import Roles
from lowrank_tune.model.rotary import RopeFactors, stored_factors


@dataclass(frozen=True)
class FinishedRun:
    """A run, or the last stage of a chain that trained a policy: its folder, its recipe, and its `base.json`."""

    path: Path
    recipe: RecipeConfig
    facts: Mapping[str, Any]

    @property
    def final(self) -> Path:
        return self.path / "final"

    @property
    def base(self) -> BaseConfig:
        """The base to load, at the very revision that was trained on."""
        base_config = self.recipe.base
        revision = self.facts.get("revision")
        if isinstance(revision, str) and "@" not in base_config.model:
            pinned = f"{base_config.model}@{revision}"
        else:
            pinned = base_config.model
        return base_config.model_copy(update={"model": pinned})

    @property
    def rope_factors(self) -> RopeFactors:
        """The factors that the run used, where the base's RoPE type is `longrope`."""
        return stored_factors(self.facts)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The base's chat template with the date of the run, built and probed once."""
        return ChatTemplate.from_tokenizer(load_tokenizer(self.base), self.recipe.data.template_date)

    def fingerprint(self) -> str:
        """Of the adapter's files in `final/`."""
        digest = hashlib.blake2b(digest_size=16)
        for file in sorted(self.final.rglob("adapter_*")):
            digest.update(str(file.relative_to(self.final)).encode() + file.read_bytes())
        return digest.hexdigest()


def load_finished_run(run: Path) -> FinishedRun:
    """The run in a folder. Raises UserError where there is none, where it has not ended, or where it trained no
    policy."""
    check_run_format(run)
    recipe = _read_json_object(run / "run.json").get("recipe")
    if not isinstance(recipe, dict):
        raise UserError(
            f"{run}: there is no such run"
            if not run.is_dir()
            else f"{run} is no run: it holds no run.json that can be read"
        )
    if isinstance(recipe.get("stages"), list):
        stages = [stage for stage in recipe["stages"] if isinstance(stage, dict)]
        writers = [
            number for number, stage in enumerate(stages, 1) if default_adapter_name(stage.get("algorithm")) == "policy"
        ]
        if not writers:
            raise UserError(f"{run} is a chain without a stage that trained a policy")
        stage = run / f"{writers[-1]}-{stages[writers[-1] - 1].get('name')}"
        if not stage.is_dir():
            raise UserError(
                f"{run} has not ended: its stage {stage.name} has not begun; the same command that began it goes on "
                f"with it"
            )
        return load_finished_run(stage)
    if default_adapter_name(recipe.get("algorithm")) != "policy":
        raise UserError(f"{run} trained a reward model, which scores and does not write; only a policy can be merged")
    if not (run / "final").is_dir():
        raise UserError(
            f"{run} has not ended, so there is nothing to take yet: the same command that began it goes on with it"
        )
    return FinishedRun(run, from_dict(recipe), _read_json_object(run / "base.json"))


def check_base(run: FinishedRun, base: Base) -> None:
    """Compares the base at hand with the one that was trained, tensor by tensor. Raises UserError where they differ."""
    then = run.facts.get("tensors")
    device = run.facts.get("device", base.device.type)
    if not isinstance(then, dict) or not then:
        raise UserError(
            f"{run.path / 'base.json'} holds no hashes of the base, so nothing tells whether this is the one that "
            f"was trained"
        )
    if device != base.device.type:
        raise UserError(
            f"{run.path} was trained on {device} and this machine would load the base on {base.device.type}, where "
            f"its 4-bit "
            "weights cannot be compared: merge where it was trained"
        )
    now = base_hashes(base.model)
    other = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    if other:
        raise UserError(
            f"{base.name} is not the base that {run.path} was trained on: {len(other)} of its {len(now)} tensors "
            f"differ, "
            f"{other[0]} for one; put the trained one back"
        )


def adapters_in(run: FinishedRun) -> dict[str, SavedAdapter]:
    """The adapters that together are the policy, lowest first: one where they were folded. Raises UserError."""
    final = run.final
    recipe = run.recipe
    key = str(run.final)
    frozen = [
        name for name in recipe.adapters if name not in (recipe.trained_adapter, *recipe.extra_adapters, "reward")
    ]
    if frozen and not (final / STACK).exists():
        raise UserError(
            f"{final} holds the adapter {recipe.trained_adapter} without {', '.join(frozen)}, which it was trained "
            "over (an older version of this program left it so): run the recipe again"
        )
    return adapters_at(final, key)


def adapters_at(folder: Path, key: str) -> dict[str, SavedAdapter]:
    """The same of a `final/` folder, or of any adapter's, wherever it lies."""
    if (folder / STACK).exists() and not (stack := read_stack(folder, key)).combined:
        return {name: read_adapter(str(folder / name), key) for name in stack.names[:-1]} | {
            stack.names[-1]: read_adapter(str(folder), key)
        }
    return {"policy": read_adapter(str(folder), key, combined=True)}


def roles_of(saved: Mapping[str, SavedAdapter], base: Base) -> Roles:
    """The policy over its base, nothing of it trainable."""
    roles = Roles(
        base,
        {name: adapter.config for name, adapter in saved.items()},
        trainable=[],
        stacks={"policy": list(saved)},
    )
    for name, adapter in saved.items():
        roles.load_adapter_tensors(name, adapter.tensors, str(adapter.folder))
    return roles


def _read_json_object(file: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
