"""Recipe -> data, base, roles, algorithm: the only place where the floors are wired together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowrank_tune import settings
from lowrank_tune.algorithms.dpo import DPO
from lowrank_tune.algorithms.harvest import Harvester
from lowrank_tune.algorithms.kit import Kit
from lowrank_tune.algorithms.reference import reference_logps
from lowrank_tune.algorithms.reward import Reward
from lowrank_tune.algorithms.sft import SFT
from lowrank_tune.build.learned import ROLE, below_reward
from lowrank_tune.build.online import Scoring, check_rewards, grpo, load_prompts, make_harvester, ppo, try_groups
from lowrank_tune.build.stacks import HEADS, lay_out, lower_of
from lowrank_tune.data import (
    AskedSet,
    Order,
    Prepared,
    Prompt,
    Template,
    TokenStore,
    asked_order,
    collate_units,
    load,
    prompts,
)
from lowrank_tune.data.tokenise import cache_folder
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit, Note, Progress
from lowrank_tune.model import unsloth
from lowrank_tune.model.adapters import SavedAdapter, read_adapter
from lowrank_tune.model.base import Base, hash_of, load_base, load_tokenizer, one_hash
from lowrank_tune.model.heads import KEY
from lowrank_tune.model.memory import keep_to
from lowrank_tune.model.recovery import Limits
from lowrank_tune.model.roles import Roles
from lowrank_tune.types import Algorithm, Batch

ALGORITHMS: dict[str, Callable[[Kit, settings.Recipe], Algorithm]] = {
    "sft": lambda kit, recipe: SFT(kit),
    "reward": lambda kit, recipe: Reward(kit, recipe.reward.centering),
    "dpo": lambda kit, recipe: DPO(kit, recipe.dpo.loss, recipe.dpo.beta, recipe.dpo.label_smoothing, recipe.dpo.sft),
}
ONLINE: dict[str, Callable[[settings.Recipe, Kit, Harvester], Algorithm]] = {"grpo": grpo, "ppo": ppo}
"""Those that write their own rows."""


@dataclass(frozen=True)
class Built:
    """All that one run needs, loaded. `trained` are the roles whose top adapter is trained, each named as its role;
    `hashes` those of the base's tensors before the run; `validation_batch(units)` collates held-out rows; `close` ends
    the workers of the rewards."""

    base: Base
    roles: Roles
    trained: tuple[str, ...]
    template: Template
    data: Prepared | AskedSet
    validation: TokenStore | None
    heldout: list[Prompt]
    algorithm: Algorithm
    steps: int
    reference: str
    hashes: dict[str, str]
    micro_tokens: int
    validation_batch: Callable[[Sequence[int]], Batch]
    close: Callable[[], None] = lambda: None
    rates: Mapping[str, float] = field(default_factory=dict)
    """Of a trained role: what its learning rate is to the run's, where it is another one."""

    @property
    def stop_ids(self) -> frozenset[int]:
        return self.base.end_ids | self.template.end_ids


def build(
    recipe: settings.Recipe,
    emit: Emit,
    device: torch.device | None = None,
    base: Base | None = None,
    fresh: bool = True,
) -> Built:
    """Loads what is cheap to check first: adapters' folders, tokenizer, data, and only then the base, where none is
    given: the stages of a chain share one. A `fresh` run also tries its rewards on completions of its policy. Raises
    UserError."""
    saved = {
        name: read_adapter(wanted.path, f"adapters.{name}.path", head=name == ROLE or name in recipe.aside)
        for name, wanted in recipe.adapters.items()
        if wanted.path
    }
    lay(recipe, saved, emit)
    template = Template.of(base.tokenizer if base else load_tokenizer(recipe.base))
    emit(Note(message=template.describe()))
    if recipe.algorithm in ONLINE:
        return _build_online(recipe, emit, device, base, fresh, saved, template)
    data = load(recipe.data, template, recipe.seed, emit, pairs=recipe.pairs)
    for line in data.report.lines():
        emit(Note(message=line, level="warning" if "; dropped " in line else "info"))
    heldout = _heldout(recipe, template)
    base = base or _load_base(recipe, template, device, emit)
    hashes = base.hashes()
    roles = load_roles(recipe, base, saved, emit)
    micro_tokens = micro_tokens_of(recipe, _longest(recipe))
    collated = {
        store: _collated(store, template.pad_id) for store in (data.train, data.validation) if store is not None
    }
    if recipe.algorithm == "dpo":
        for store, rows in list(collated.items()):
            sums = reference_logps(roles, store, rows, micro_tokens, one_hash(hashes), cache_folder(), emit)
            collated[store] = _with_reference(rows, sums)
    weights = [source.weight for source in recipe.data.train]
    order = Order(data.train.unit_lengths, data.train.unit_source_of, weights, recipe.train, recipe.seed)
    reference = _in_words(roles)
    kit = Kit(
        roles,
        lambda step: collated[data.train](order.rows(step)),
        reference,
        fresh=recipe.adapters[recipe.trained].path is None,
    )
    steps = recipe.train.steps or order.steps_of(recipe.train.epochs or 1.0)
    algorithm = ALGORITHMS[recipe.algorithm](kit, recipe)
    return Built(
        base,
        roles,
        (recipe.trained,),
        template,
        data,
        data.validation,
        heldout,
        algorithm,
        steps,
        reference,
        hashes,
        micro_tokens,
        collated[data.validation] if data.validation is not None else collated[data.train],
    )


def _build_online(
    recipe: settings.Recipe,
    emit: Emit,
    device: torch.device | None,
    base: Base | None,
    fresh: bool,
    saved: Mapping[str, SavedAdapter],
    template: Template,
) -> Built:
    """The same for an algorithm that writes its own rows: prompts and rewards instead of rows."""
    data, heldout = load_prompts(recipe, template, emit), _heldout(recipe, template)
    scoring = Scoring(recipe, template)
    try:
        if not scoring.learned:
            check_rewards(scoring, data, recipe.seed, emit)
        base = base or _load_base(recipe, template, device, emit)
        hashes, roles = base.hashes(), load_roles(recipe, base, saved, emit)
        stop_ids = base.end_ids | template.end_ids
        micro_tokens = micro_tokens_of(recipe, _longest(recipe))
        if scoring.learned:
            scoring.attach(roles, micro_tokens)
            check_rewards(scoring, data, recipe.seed, emit)
        if fresh and recipe.algorithm == "grpo":
            try_groups(recipe, roles, template, data, scoring, stop_ids, emit)
        harvester = make_harvester(recipe, roles, template, data, scoring, stop_ids, micro_tokens, emit)
    except BaseException:
        scoring.close()
        raise
    reference = _in_words(roles)
    kit = Kit(roles, _no_rows, reference, fresh=recipe.adapters[recipe.trained].path is None)
    steps = recipe.train.steps or asked_order(data, recipe.data, recipe.train, recipe.seed).steps_of(
        recipe.train.epochs or 1.0
    )
    trained = (recipe.trained, "value") if recipe.algorithm == "ppo" else (recipe.trained,)
    rates = {"value": (recipe.ppo.value_learning_rate or recipe.train.learning_rate) / recipe.train.learning_rate}
    algorithm = ONLINE[recipe.algorithm](recipe, kit, harvester)
    return Built(
        base,
        roles,
        trained,
        template,
        data,
        None,
        heldout,
        algorithm,
        steps,
        reference,
        hashes,
        micro_tokens,
        _no_units,
        scoring.close,
        rates,
    )


def lay(recipe: settings.Recipe, saved: dict[str, SavedAdapter], emit: Emit) -> None:
    """An adapter that was trained over others lies over the same ones again, told by content; where this recipe loads
    none of them, it is taken with them folded into it. Raises UserError where only some are there. (The reward model
    has a stack of its own.)"""
    contents: dict[str, str] = {}
    for name in [
        name for name in recipe.adapters if name in saved and name not in (*recipe.aside, *({ROLE} - {recipe.trained}))
    ]:
        below, path, key = saved[name].below, str(recipe.adapters[name].path), f"adapters.{name}.path"
        missing = [other for other, content in below.items() if content not in contents]
        if missing and len(missing) < len(below):
            there = ", ".join(other for other in below if other not in missing)
            raise UserError(
                f"{key}: the adapter in {path} was trained over {', '.join(below)}, and this recipe loads only "
                f"{there} below it: "
                f"add `adapters.{missing[0]}.path`, or leave all of them out and it is taken with them folded into it"
            )
        if missing:
            saved[name] = read_adapter(path, key, head=saved[name].head is not None, whole=True)
            emit(Note(message=f"{key}: taken with {', '.join(below)} folded into it, which it was trained over"))
        contents[one_hash({part: hash_of(tensor.float()) for part, tensor in saved[name].tensors.items()})] = name


def _no_rows(step: int) -> Batch:
    raise AssertionError("the policy writes its own rows")


def _no_units(units: Sequence[int]) -> Batch:
    raise AssertionError("there are no held-out rows")


def _load_base(recipe: settings.Recipe, template: Template, device: torch.device | None, emit: Emit) -> Base:
    emit(Progress(what=f"loading {recipe.base.model}", done=0, total=1))
    keep_to(recipe.train.memory_budget_gib)
    if recipe.base.backend == "unsloth":
        base = unsloth.load_base(recipe.base, template.tokenizer, _longest(recipe), device)
    else:
        base = load_base(recipe.base, template.tokenizer, device)
    emit(Progress(what=f"loading {recipe.base.model}", done=1, total=1))
    return base


def _longest(recipe: settings.Recipe) -> int:
    """Tokens of the longest row that is trained on."""
    return (
        recipe.data.max_prompt_length + recipe.rollout.max_new_tokens
        if recipe.algorithm in ONLINE
        else recipe.data.max_length
    )


def micro_tokens_of(recipe: settings.Recipe, longest: int) -> int:
    """Tokens that go through the model at once where no gradient is kept."""
    return min(max(4096, (recipe.train.micro_rows or 4) * longest), 1 << 15)


def _heldout(recipe: settings.Recipe, template: Template) -> list[Prompt]:
    wanted = recipe.evaluate
    if wanted.heldout is None:
        return []
    found = prompts(wanted.heldout, wanted.prompts, recipe.seed, recipe.data.system)
    usable = [prompt for prompt in found if template.spoils(prompt.messages) is None]
    if not usable:
        raise UserError(f"evaluate.heldout: {wanted.heldout.dataset} has no usable row")
    if all(prompt.gold is None for prompt in usable):
        raise UserError("evaluate.heldout: none of its rows has a gold answer; name its column in `gold` or `columns`")
    return usable


def load_roles(recipe: settings.Recipe, base: Base, saved: Mapping[str, SavedAdapter], emit: Emit) -> Roles:
    """The stacks of the recipe over the base (`lay_out`), with the weights of the adapters that were `saved`."""
    top, lower = recipe.trained, lower_of(recipe)
    below = below_reward(saved, lower) if ROLE in recipe.adapters and top != ROLE else []
    configs, stacks = lay_out(recipe, base.model, {name: adapter.config for name, adapter in saved.items()}, below)
    roles = Roles(
        base,
        configs,
        trainable=[top, *recipe.aside],
        stacks=stacks,
        checkpointing=recipe.train.gradient_checkpointing,
        seed=recipe.seed,
        heads=HEADS & stacks.keys(),
        offload=recipe.train.activation_offloading,
    )
    roles.limits = Limits(budget_bytes=int((recipe.train.memory_budget_gib or 0) * 2**30), emit=emit)
    for name, adapter in saved.items():
        roles.load_adapter_tensors(name, adapter.tensors, f"adapters.{name}.path: {adapter.folder}")
        if adapter.base_name not in (None, recipe.base.model, recipe.base.model.partition("@")[0]):
            message = (
                f"the adapter in {adapter.folder} says it was made for {adapter.base_name}, not {recipe.base.model}"
            )
            emit(Note(level="warning", message=message))
    if "value" in configs and "value" not in saved and recipe.ppo.value_from == "reward":
        said = sum(reward.weight for reward in recipe.rewards if reward.use == "reward_model")
        scaled = {key: tensor * said if key == KEY else tensor for key, tensor in saved[ROLE].tensors.items()}
        roles.load_adapter_tensors("value", scaled, f"adapters.{ROLE}.path: {saved[ROLE].folder}")
    if base.backend == "unsloth":
        unsloth.check(roles, top)
        emit(
            Note(
                message="unsloth runs the base, and computes what transformers does; completions are drawn by "
                "transformers' own code"
            )
        )
    if top in saved:
        emit(
            Note(
                message=f"the {top} adapter goes on from {saved[top].folder}: it need not agree with {_in_words(roles)}"
            )
        )
    return roles


def _in_words(roles: Roles) -> str:
    below = [name.removeprefix("lt_") for name in roles.stacks["reference"]]
    return (
        f"the base with the frozen adapter{'s' if len(below) > 1 else ''} {' + '.join(below)}"
        if below
        else "the base, adapters off"
    )


def _collated(store: TokenStore, pad_id: int) -> Callable[[Sequence[int]], Batch]:
    return lambda units: collate_units(store, units, pad_id)


def _with_reference(rows: Callable[[Sequence[int]], Batch], sums: Tensor) -> Callable[[Sequence[int]], Batch]:
    """The same batches with `extra["reference"]`, the log-probs that belong to their rows."""

    def batch(units: Sequence[int]) -> Batch:
        collated = rows(units)
        together = len(collated) // len(units)
        collated.extra["reference"] = sums[[unit * together + i for unit in units for i in range(together)]]
        return collated

    return batch
