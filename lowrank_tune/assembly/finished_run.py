"""Finished runs, and the adapters that they saved, loaded over their base again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lowrank_tune.checkpoint.run_format import check_run_format
from lowrank_tune.config import (
    AdapterConfig,
    BaseConfig,
    RecipeConfig,
    default_adapter_name,
    from_dict,
)
from lowrank_tune.data import ChatTemplate
from lowrank_tune.errors import UserError
from lowrank_tune.json_files import read_json_object
from lowrank_tune.model.adapters import (
    STACK,
    SavedAdapter,
    lora_config,
    read_adapter,
    read_stack,
)
from lowrank_tune.model.base import Base, base_hashes, load_tokenizer
from lowrank_tune.model.roles import Roles
from lowrank_tune.model.rotary import RopeFactors, stored_factors


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, or a finished stage of a chain: its folder, its recipe, and its `base.json`."""

    path: Path
    recipe: RecipeConfig
    facts: Mapping[str, Any]

    @property
    def final(self) -> Path:
        return self.path / "final"

    @property
    def base(self) -> BaseConfig:
        """The base at the revision that was used in training."""
        base_config = self.recipe.base
        revision = self.facts.get("revision")
        if isinstance(revision, str) and "@" not in base_config.model:
            return base_config.model_copy(update={"model": f"{base_config.model}@{revision}"})
        return base_config

    @property
    def rope_factors(self) -> RopeFactors:
        """The factors that the run used, if the base's RoPE type is `longrope`."""
        return stored_factors(self.facts)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The base's chat template with the date of the run, built and probed once."""
        return ChatTemplate.from_config(load_tokenizer(self.base), self.recipe.data)

    def fingerprint(self) -> str:
        """Returns a hash of the adapter's files in `final/`."""
        digest = hashlib.blake2b(digest_size=16)
        for file in sorted(self.final.rglob("adapter_*")):
            digest.update(str(file.relative_to(self.final)).encode() + file.read_bytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class ChainStage:
    """A stage of a chain, as the chain's `run.json` lists it."""

    name: str
    algorithm: object
    folder: Path

    @property
    def trains_policy(self) -> bool:
        return default_adapter_name(self.algorithm) == "policy"


def stored_recipe(run: Path) -> Mapping[str, Any]:
    """Returns the recipe in a run's `run.json`. Raises UserError if the folder is not a run of this format."""
    check_run_format(run)
    recipe = read_json_object(run / "run.json").get("recipe")
    if isinstance(recipe, dict):
        return recipe
    if not run.is_dir():
        raise UserError(f"{run}: there is no such run")
    raise UserError(f"{run} is not a run: it contains no readable run.json")


def chain_stages(run: Path, recipe: Mapping[str, Any]) -> list[ChainStage] | None:
    """Returns the stages of a chain in their order, None for the recipe of a single run."""
    listed = recipe.get("stages")
    if not isinstance(listed, list):
        return None
    stages = []
    for number, stage in enumerate(listed, 1):
        if isinstance(stage, dict):
            name = str(stage.get("name"))
            stages.append(ChainStage(name, stage.get("algorithm"), run / f"{number}-{name}"))
    return stages


def load_finished_run(run: Path) -> FinishedRun:
    """Returns a run that trained a policy, of a chain its last stage that did.

    Raises UserError if the folder is not a run, the run has not ended, or it trained no policy.
    """
    recipe = stored_recipe(run)
    stages = chain_stages(run, recipe)
    if stages is not None:
        policy_stages = [stage for stage in stages if stage.trains_policy]
        if not policy_stages:
            raise UserError(f"{run} is a chain without a stage that trained a policy")
        last = policy_stages[-1].folder
        if not last.is_dir():
            raise UserError(
                f"{run} has not ended: its stage {last.name} has not begun; the same command continues the chain"
            )
        return load_finished_run(last)
    if default_adapter_name(recipe.get("algorithm")) != "policy":
        raise UserError(f"{run} trained a reward model, which scores text and does not write it; a policy is needed")
    return _finished(run, recipe)


def load_finished_reward_run(run: Path) -> FinishedRun:
    """Returns a run that trained a reward model, of a chain its last stage that did.

    Raises UserError if the folder is not a run, the run has not ended, or it trained no reward model.
    """
    recipe = stored_recipe(run)
    stages = chain_stages(run, recipe)
    if stages is not None:
        folders = [stage.folder for stage in stages if stage.algorithm == "reward" and stage.folder.is_dir()]
        if not folders:
            raise UserError(f"{run} is a chain without a stage that trained a reward model")
        return load_finished_reward_run(folders[-1])
    algorithm = recipe.get("algorithm")
    if algorithm != "reward":
        raise UserError(f"{run} is a run of {algorithm}; only `algorithm: reward` trains a model that scores responses")
    return _finished(run, recipe)


def _finished(run: Path, recipe: Mapping[str, Any]) -> FinishedRun:
    if not (run / "final").is_dir():
        raise UserError(f"{run} has not ended, so its adapter is incomplete: the same command continues the run")
    return FinishedRun(run, from_dict(dict(recipe)), read_json_object(run / "base.json"))


def check_base(run: FinishedRun, base: Base) -> None:
    """Compares the loaded base with the one of the run, tensor by tensor. Raises UserError if they differ."""
    expected = run.facts.get("tensors")
    device = run.facts.get("device", base.device.type)
    if not isinstance(expected, dict) or not expected:
        raise UserError(f"{run.path / 'base.json'} contains no hashes of the base, so the base cannot be compared")
    if device != base.device.type:
        raise UserError(
            f"{run.path} was trained on {device} and this machine loads the base on {base.device.type}, where its "
            "4-bit weights cannot be compared: merge on the machine of the training"
        )
    hashes = base_hashes(base.model)
    difference = describe_difference(expected, hashes)
    if difference:
        raise UserError(
            f"{base.name} is not the base that {run.path} was trained on: {difference}; restore the base of the "
            "training"
        )


def describe_difference(expected: Mapping[str, str], hashes: Mapping[str, str]) -> str:
    """Returns in words how the tensors of a base, by their hashes, differ from the expected ones; empty if they are the
    same."""
    total = len(expected)
    common = expected.keys() & hashes.keys()
    changed = sorted(name for name in common if expected[name] != hashes[name])
    missing = sorted(expected.keys() - hashes.keys())
    added = sorted(hashes.keys() - expected.keys())
    facts = []
    if changed:
        facts.append(f"{len(changed)} of its {total} tensors differ, among them {changed[0]}")
    if missing:
        facts.append(f"{len(missing)} of its {total} tensors are missing here, among them {missing[0]}")
    if added:
        facts.append(f"{len(added)} tensors were not part of it, among them {added[0]}")
    return "; ".join(facts)


def adapters_in(run: FinishedRun) -> dict[str, SavedAdapter]:
    """Returns the adapters of the policy, lowest first, or one that combines them. Raises UserError."""
    trained = (run.recipe.trained_adapter, *run.recipe.extra_adapters, "reward")
    frozen = [name for name in run.recipe.adapters if name not in trained]
    if frozen and not (run.final / STACK).exists():
        raise UserError(
            f"{run.final} contains the adapter {run.recipe.trained_adapter} without {', '.join(frozen)}, which it was "
            "trained over (an older version of this program wrote it): run the recipe again"
        )
    return adapters_at(run.final, str(run.final))


def adapters_at(folder: Path, key: str) -> dict[str, SavedAdapter]:
    """Returns the adapters of a `final/` folder, or of any adapter's folder, lowest first. Raises UserError with
    `key`."""
    if (folder / STACK).exists():
        stack = read_stack(folder, key)
        if not stack.combined:
            *lower, top = stack.names
            adapters = {name: read_adapter(str(folder / name), key) for name in lower}
            adapters[top] = read_adapter(str(folder), key)
            return adapters
    return {
        "policy": read_adapter(
            str(folder),
            key,
            combined=True,
        )
    }


def roles_of(
    saved: Mapping[str, SavedAdapter],
    base: Base,
    stacks: Mapping[str, list[str]] | None = None,
    heads: Sequence[str] = (),
) -> Roles:
    """Returns saved adapters over their base, without trainable parameters; without `stacks` all of them are the
    policy."""
    if stacks is None:
        stacks = {"policy": list(saved)}
    configs = {name: adapter.config for name, adapter in saved.items()}
    if not configs:
        # PEFT needs an adapter: a new one that is in no stack has no effect
        configs = {"unused": lora_config(AdapterConfig(r=1), base.model)}
    roles = Roles(
        base,
        configs,
        trainable=[],
        stacks=stacks,
        heads=heads,
    )
    for name, adapter in saved.items():
        roles.load_adapter_tensors(name, adapter.tensors, str(adapter.folder))
    return roles
