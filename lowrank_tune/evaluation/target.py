"""What is evaluated: a run or a chain with the adapters that it left, an adapter by itself, or a base alone; and the
run whose reward model compares the answers.

All of it stands on one base in memory: each variant is a stack of adapters, `base` the empty one, and a reward model
one with a head.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from lowrank_tune.assembly.finished_run import adapters_in, load_finished_run
from lowrank_tune.assembly.reward_model import REWARD_ROLE
from lowrank_tune.checkpoint.run_format import check_run_format
from lowrank_tune.config import AdapterConfig, BaseConfig, RecipeConfig, default_adapter_name
from lowrank_tune.errors import UserError
from lowrank_tune.evaluation.response_scores import reward_run
from lowrank_tune.events import Emit, LogMessage
from lowrank_tune.model.adapters import (
    CONFIG,
    STACK,
    SavedAdapter,
    adapter_rope_factors,
    lora_config,
    read_adapter,
    read_stack,
)
from lowrank_tune.model.base import BUILTIN_MODEL, Base, base_hashes
from lowrank_tune.model.roles import Roles
from lowrank_tune.model.rotary import RopeFactors, stored_factors

BASE = "base"
REWARD_MODEL_ROLE = "reward_model"
Stack = Mapping[str, SavedAdapter]
"""Adapters by name, lowest first."""


@dataclass(frozen=True)
class EvalRewardModel:
    """A reward model that compares answers: the run that it comes from, its stack, and the hashes of the base that it
    was trained over."""

    run: Path
    base: BaseConfig
    stack: Stack
    facts: Mapping[str, Any]

    @property
    def rope_factors(self) -> RopeFactors | None:
        """The factors of RoPE type `longrope` that it was trained with; None where its run stored none."""
        if self.facts.get("rope_factors"):
            return stored_factors(self.facts)
        return None


@dataclass(frozen=True)
class EvalTarget:
    """`variants` by name, in the order of training; `base` is none of them. `recipe` and `facts` (its `base.json`) are
    those of the last variant's run, where there is one; `folder` is where results are kept."""

    name: str
    kind: Literal["run", "chain", "adapter", "model"]
    base: BaseConfig
    variants: dict[str, Stack]
    folder: Path | None = None
    recipe: RecipeConfig | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    reward_model_stack: Stack = field(default_factory=dict)
    """The stack of the reward model that the recipe's own rewards ask."""
    rope_factors: RopeFactors | None = None
    """The factors of RoPE type `longrope` that it was trained with; None where that is not known."""


def resolve_target(given: str, bits: Literal[4, 16] | None, emit: Emit) -> EvalTarget:
    """Reads what a person named. Raises UserError in one sentence."""
    path = Path(given).expanduser()
    if (path / "run.json").is_file():
        if bits is not None:
            raise UserError(
                f"--bits says how to load a model, and {given} is a run, which brings its own base: leave it out"
            )
        return _target_from_run(path, emit)
    if (path / CONFIG).is_file():
        saved = read_adapter(given, given)
        if saved.base_name is None:
            raise UserError(
                f"{path / CONFIG} does not name its base (base_model_name_or_path), so there is nothing to load it over"
            )
        return EvalTarget(
            path.resolve().name,
            "adapter",
            BaseConfig(model=saved.base_name, bits=bits or 4),
            {"adapter": {"adapter": saved}},
            rope_factors=adapter_rope_factors(given),
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"{given} is neither a run (run.json), nor an adapter ({CONFIG}), nor a model (config.json)")
    if not path.exists() and given != BUILTIN_MODEL and (given.startswith((".", "/", "~")) or given.count("/") != 1):
        raise UserError(
            f"{given}: there is no such run or model; name the folder of a run or a model, `{BUILTIN_MODEL}`, or an "
            "id of the hub"
        )
    return EvalTarget(given, "model", BaseConfig(model=given, bits=bits or 4), {})


def _target_from_run(path: Path, emit: Emit) -> EvalTarget:
    check_run_format(path)
    recipe = _read_json_object(path / "run.json").get("recipe")
    stages = recipe.get("stages") if isinstance(recipe, dict) else None
    if not isinstance(stages, list):
        if isinstance(recipe, dict) and default_adapter_name(recipe.get("algorithm")) != "policy":
            raise UserError(
                f"{path} trained a reward model, which does not answer: score responses with it (`score {path} --file "
                f"FILE`), or compare the answers of another run (`eval RUN --reward-model {path}`)"
            )
        finished = load_finished_run(path)
        variants: dict[str, Stack] = {finished.recipe.algorithm: adapters_in(finished)}
        return EvalTarget(
            path.resolve().name,
            "run",
            finished.base,
            variants,
            path,
            finished.recipe,
            finished.facts,
            _reward_model_stack(finished.recipe),
            finished.rope_factors,
        )
    writers = {
        str(stage.get("name")): path / f"{number}-{stage.get('name')}"
        for number, stage in enumerate(stages, 1)
        if isinstance(stage, dict) and default_adapter_name(stage.get("algorithm")) == "policy"
    }
    ended = {name: load_finished_run(folder) for name, folder in writers.items() if (folder / "final").is_dir()}
    if not ended:
        load_finished_run(path)  # says what is missing
        raise UserError(f"{path} has not ended: none of its stages has left an adapter yet")
    if missing := [name for name in writers if name not in ended]:
        emit(LogMessage(level="warning", message=f"not evaluated, because they have not ended: {', '.join(missing)}"))
    last = list(ended.values())[-1]
    variants = {name: adapters_in(finished) for name, finished in ended.items()}
    return EvalTarget(
        path.resolve().name,
        "chain",
        last.base,
        variants,
        path,
        last.recipe,
        last.facts,
        _reward_model_stack(last.recipe),
        last.rope_factors,
    )


def _reward_model_stack(recipe: RecipeConfig) -> Stack:
    adapter_config = recipe.adapters.get(REWARD_ROLE)
    uses_reward_model = any(reward.name == "reward_model" for reward in recipe.rewards)
    if uses_reward_model and adapter_config is not None:
        return head_stack(str(adapter_config.path), f"adapters.{REWARD_ROLE}.path")
    return {}


def resolve_reward_model(run: Path) -> EvalRewardModel:
    """The reward model of a run, or of a chain's last stage that trained one. Raises UserError where there is none."""
    if not run.is_dir():
        raise UserError(f"--reward-model: {run}: there is no such run")
    recipe, folder = reward_run(run)
    return EvalRewardModel(
        run,
        recipe.base,
        head_stack(str(folder), "--reward-model"),
        _read_json_object(folder / "base.json"),
    )


def head_stack(path: str, key: str) -> Stack:
    """A reward model with all that it was trained over, its own adapter last."""
    given = Path(path).expanduser()
    final = given / "final" if (given / "final" / CONFIG).exists() else given
    if (final / STACK).exists() and not (stack := read_stack(final, key)).combined:
        return {
            **{name: read_adapter(str(final / name), key) for name in stack.names[:-1]},
            REWARD_ROLE: read_adapter(path, key, head=True),
        }
    return {REWARD_ROLE: read_adapter(path, key, head=True, combined=True)}


def roles_for(target: EvalTarget, reward_model: EvalRewardModel | None, base: Base) -> Roles:
    """Every variant over the one base, nothing trainable: `of_NAME` for each of them, `reward` and `reward_model` for
    those that score."""
    stacks: dict[str, list[str]] = {}
    saved: dict[str, SavedAdapter] = {}
    for variant, stack in target.variants.items():
        stacks[role_of(variant)] = [f"{role_of(variant)}_{name}" for name in stack]
        saved |= {f"{role_of(variant)}_{name}": adapter for name, adapter in stack.items()}
    for role, stack in (
        (REWARD_ROLE, target.reward_model_stack),
        (REWARD_MODEL_ROLE, reward_model.stack if reward_model is not None else {}),
    ):
        if stack:
            *frozen, top = stack.items()
            # a head belongs to the adapter of its role's name
            stacks[role] = [*(f"under_{role}_{name}" for name, _ in frozen), role]
            saved |= {**{f"under_{role}_{name}": adapter for name, adapter in frozen}, role: top[1]}
    configs = {name: adapter.config for name, adapter in saved.items()} or {
        "none": lora_config(AdapterConfig(r=1), base.model)
    }
    roles = Roles(
        base,
        configs,
        trainable=[],
        stacks=stacks,
        heads=[role for role in (REWARD_ROLE, REWARD_MODEL_ROLE) if role in stacks],
    )
    for name, adapter in saved.items():
        roles.load_adapter_tensors(name, adapter.tensors, str(adapter.folder))
    return roles


def role_of(variant: str) -> str:
    """The role of a variant: `base` is the empty stack."""
    return BASE if variant == BASE else f"of_{variant}"


def check_bases(target: EvalTarget, reward_model: EvalRewardModel | None, base: Base, emit: Emit) -> None:
    """The base at hand must be, tensor by tensor, the one that each run was trained over. Where a run trained on
    another kind of device its 4-bit weights cannot be compared, and that is told. Raises UserError."""
    named = [(target.name, target.facts)] + (
        [(f"--reward-model {reward_model.run}", reward_model.facts)] if reward_model is not None else []
    )
    now: dict[str, str] = {}
    for who, facts in named:
        then = facts.get("tensors")
        if not isinstance(then, dict) or not then:
            continue
        if facts.get("device") != base.device.type or facts.get("bits", base.bits) != base.bits:
            message = (
                f"{who} was trained on {facts.get('device')} in {facts.get('bits')} bits, and this is "
                f"{base.device.type} in {base.bits}: "
            )
            emit(
                LogMessage(
                    level="warning", message=f"{message}whether the base is the same cannot be told by its weights"
                )
            )
            continue
        now = now or base_hashes(base.model)
        other = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
        if other:
            raise UserError(
                f"{who} was trained over another base than {base.name} as it is here: {len(other)} of {len(now)} "
                f"tensors differ, "
                f"{other[0]} for one"
            )


def check_reward_model(target: EvalTarget, reward_model: EvalRewardModel) -> None:
    """Checks that need no loaded model. Raises UserError."""
    target_base = target.base.model.partition("@")[0]
    reward_base = reward_model.base.model.partition("@")[0]
    if target_base != reward_base:
        raise UserError(
            f"--reward-model: the base of {reward_model.run} is {reward_base}, the base of {target.name} is "
            f"{target_base}: they must be the same"
        )
    ours = target.rope_factors or target.facts.get("rope_factors")
    theirs = reward_model.rope_factors
    if ours and theirs and ours != theirs:
        raise UserError(
            f"--reward-model: {reward_model.run} was trained with the {theirs} factors of RoPE type `longrope` and "
            f"{target.name} with the {ours} ones: one base in memory has one set"
        )


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "CPU"


def _read_json_object(file: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
