"""The target of an evaluation: a run or a chain with its adapters, an adapter alone, or a base; and the reward model
that compares the answers.

One base in memory serves all of them. A variant is a stack of adapters, `base` the empty one, and a reward model is a
stack with a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lowrank_tune.assembly.finished_run import (
    ChainStage,
    FinishedRun,
    adapters_in,
    chain_stages,
    describe_difference,
    load_finished_reward_run,
    load_finished_run,
    roles_of,
    stored_recipe,
)
from lowrank_tune.assembly.reward_model import REWARD_ROLE
from lowrank_tune.config import (
    BaseConfig,
    RecipeConfig,
    default_adapter_name,
)
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit, warning
from lowrank_tune.model.adapters import (
    CONFIG,
    STACK,
    SavedAdapter,
    adapter_rope_factors,
    read_adapter,
    read_stack,
)
from lowrank_tune.model.base import Base, base_hashes
from lowrank_tune.model.base_source import BUILTIN_MODEL
from lowrank_tune.model.roles import Roles
from lowrank_tune.model.rotary import RopeFactors, stored_factors

BASE = "base"
REWARD_MODEL_ROLE = "reward_model"
Stack = Mapping[str, SavedAdapter]
"""Adapters by name, lowest first."""


@dataclass(frozen=True)
class EvalRewardModel:
    """A reward model that compares answers: its run, base and stack, and the `base.json` of the run."""

    run: Path
    base: BaseConfig
    stack: Stack
    facts: Mapping[str, Any]

    @property
    def rope_factors(self) -> RopeFactors | None:
        """The factors of RoPE type `longrope` in its training; None if its run stored none."""
        if self.facts.get("rope_factors"):
            return stored_factors(self.facts)
        return None


@dataclass(frozen=True)
class EvalTarget:
    """The models to evaluate.

    `variants` are the tuned ones by name, in the order of training. `recipe` and `facts` (its `base.json`) are those of
    the run of the last variant, if it is a run; `folder` is where results are stored.
    """

    name: str
    kind: Literal["run", "chain", "adapter", "model"]
    base: BaseConfig
    variants: dict[str, Stack]
    folder: Path | None = None
    recipe: RecipeConfig | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    reward_model_stack: Stack = field(default_factory=dict)
    """The stack of the reward model among the rewards of the recipe."""
    rope_factors: RopeFactors | None = None
    """The factors of RoPE type `longrope` in training; None if they are not known."""


def resolve_target(
    given: str,
    bits: Literal[4, 16] | None,
    emit: Emit,
) -> EvalTarget:
    """Returns the target for a folder or the name of a model. Raises UserError."""
    path = Path(given).expanduser()
    if (path / "run.json").is_file():
        if bits is not None:
            raise UserError(
                f"--bits is for models that are not runs, and {given} is a run, which defines its base: leave it out"
            )
        return _target_from_run(path, emit)
    if (path / CONFIG).is_file():
        return _target_from_adapter(given, bits)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"{given} is neither a run (run.json), nor an adapter ({CONFIG}), nor a model (config.json)")
    is_path = given.startswith((".", "/", "~")) or given.count("/") != 1
    if is_path and given != BUILTIN_MODEL and not path.exists():
        raise UserError(
            f"{given}: there is no such run or model; name the folder of a run or a model, `{BUILTIN_MODEL}`, or an "
            "id of the hub"
        )
    return EvalTarget(
        given,
        "model",
        BaseConfig(model=given, bits=bits or 4),
        {},
    )


def _target_from_adapter(given: str, bits: Literal[4, 16] | None) -> EvalTarget:
    folder = Path(given).expanduser()
    saved = read_adapter(given, given)
    if saved.base_name is None:
        raise UserError(
            f"{folder / CONFIG} does not name its base (base_model_name_or_path), so the adapter cannot be loaded"
        )
    return EvalTarget(
        folder.resolve().name,
        "adapter",
        BaseConfig(model=saved.base_name, bits=bits or 4),
        {"adapter": {"adapter": saved}},
        rope_factors=adapter_rope_factors(given),
    )


def _target_from_run(path: Path, emit: Emit) -> EvalTarget:
    recipe = stored_recipe(path)
    stages = chain_stages(path, recipe)
    if stages is not None:
        runs = _finished_stages(path, stages, emit)
        return _run_target(path, "chain", runs)
    if default_adapter_name(recipe.get("algorithm")) != "policy":
        raise UserError(
            f"{path} trained a reward model, which does not answer: score responses with it (`score {path} --file "
            f"FILE`), or compare the answers of another run (`eval RUN --reward-model {path}`)"
        )
    run = load_finished_run(path)
    return _run_target(path, "run", {run.recipe.algorithm: run})


def _finished_stages(
    path: Path,
    stages: list[ChainStage],
    emit: Emit,
) -> dict[str, FinishedRun]:
    """Returns the finished stages of a chain that trained a policy; a warning names the others."""
    runs = {}
    unfinished = []
    for stage in stages:
        if not stage.trains_policy:
            continue
        if (stage.folder / "final").is_dir():
            runs[stage.name] = load_finished_run(stage.folder)
        else:
            unfinished.append(stage.name)
    if not runs:
        # raises the exact reason, if there is one
        load_finished_run(path)
        raise UserError(f"{path} has not ended: none of its stages has written an adapter yet")
    if unfinished:
        emit(warning(f"not evaluated, because they have not ended: {', '.join(unfinished)}"))
    return runs


def _run_target(
    path: Path,
    kind: Literal["run", "chain"],
    runs: Mapping[str, FinishedRun],
) -> EvalTarget:
    """Returns the target of finished runs by the name of their variant."""
    last = list(runs.values())[-1]
    return EvalTarget(
        path.resolve().name,
        kind,
        last.base,
        {name: adapters_in(run) for name, run in runs.items()},
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
    """Returns the reward model of a run, or of the last stage of a chain that trained one. Raises UserError."""
    if not run.is_dir():
        raise UserError(f"--reward-model: {run}: there is no such run")
    finished = load_finished_reward_run(run)
    stack = head_stack(str(finished.path), "--reward-model")
    return EvalRewardModel(
        run,
        finished.recipe.base,
        stack,
        finished.facts,
    )


def head_stack(path: str, key: str) -> Stack:
    """Returns a reward model with the adapters that it was trained over, its own adapter last."""
    final = Path(path).expanduser()
    if (final / "final" / CONFIG).exists():
        final = final / "final"
    if (final / STACK).exists():
        stack = read_stack(final, key)
        if not stack.combined:
            adapters = {name: read_adapter(str(final / name), key) for name in stack.names[:-1]}
            adapters[REWARD_ROLE] = read_adapter(
                path,
                key,
                head=True,
            )
            return adapters
    return {
        REWARD_ROLE: read_adapter(
            path,
            key,
            head=True,
            combined=True,
        )
    }


def roles_for(
    target: EvalTarget,
    reward_model: EvalRewardModel | None,
    base: Base,
) -> Roles:
    """Returns all variants over one base, without trainable parameters: a role for each of them, and the roles `reward`
    and `reward_model` for the reward models."""
    adapters_of_role: dict[str, dict[str, SavedAdapter]] = {}
    for variant, stack in target.variants.items():
        role = role_of(variant)
        adapters_of_role[role] = {f"{role}_{name}": adapter for name, adapter in stack.items()}
    head_stacks = {REWARD_ROLE: target.reward_model_stack}
    if reward_model is not None:
        head_stacks[REWARD_MODEL_ROLE] = reward_model.stack
    heads = [role for role, stack in head_stacks.items() if stack]
    for role in heads:
        *lower, (_, top) = head_stacks[role].items()
        adapters_of_role[role] = {f"under_{role}_{name}": adapter for name, adapter in lower}
        # a head belongs to the adapter with the name of its role
        adapters_of_role[role][role] = top
    stacks = {role: list(adapters) for role, adapters in adapters_of_role.items()}
    saved: dict[str, SavedAdapter] = {}
    for adapters in adapters_of_role.values():
        saved |= adapters
    return roles_of(saved, base, stacks, heads)


def role_of(variant: str) -> str:
    """Returns the role of a variant: `base` is the empty stack."""
    return BASE if variant == BASE else f"of_{variant}"


def check_bases(
    target: EvalTarget,
    reward_model: EvalRewardModel | None,
    base: Base,
    emit: Emit,
) -> None:
    """Compares the loaded base with those that the runs were trained over, tensor by tensor.

    4-bit weights of another kind of device cannot be compared, which is a warning. Raises UserError if a tensor
    differs.
    """
    facts_of = {target.name: target.facts}
    if reward_model is not None:
        facts_of[f"--reward-model {reward_model.run}"] = reward_model.facts
    hashes: dict[str, str] = {}
    for name, facts in facts_of.items():
        expected = facts.get("tensors")
        if not isinstance(expected, dict) or not expected:
            continue
        if facts.get("device") != base.device.type or facts.get("bits", base.bits) != base.bits:
            emit(
                warning(
                    f"{name} was trained on {facts.get('device')} in {facts.get('bits')} bits, and this is "
                    f"{base.device.type} in {base.bits}: its base cannot be compared with this one"
                )
            )
            continue
        hashes = hashes or base_hashes(base.model)
        difference = describe_difference(expected, hashes)
        if difference:
            raise UserError(f"{name} was trained over another base than {base.name} as it is here: {difference}")


def check_reward_model(target: EvalTarget, reward_model: EvalRewardModel) -> None:
    """Checks, without loading a model, that target and reward model can share a base. Raises UserError."""
    target_base = target.base.model.partition("@")[0]
    reward_base = reward_model.base.model.partition("@")[0]
    if target_base != reward_base:
        raise UserError(
            f"--reward-model: the base of {reward_model.run} is {reward_base}, the base of {target.name} is "
            f"{target_base}: they must be the same"
        )
    target_factors = target.rope_factors or target.facts.get("rope_factors")
    reward_factors = reward_model.rope_factors
    if target_factors and reward_factors and target_factors != reward_factors:
        raise UserError(
            f"--reward-model: {reward_model.run} was trained with the {reward_factors} factors of RoPE type `longrope` "
            f"and {target.name} with the {target_factors} ones: one base in memory has one set"
        )
