"""Recipe -> data, base, roles, algorithm: the only place where the floors are wired together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowrank_tune.algorithms.context import AlgorithmContext
from lowrank_tune.algorithms.dpo import DPO
from lowrank_tune.algorithms.reference_logps import reference_logps
from lowrank_tune.algorithms.reward_model import RewardModeling
from lowrank_tune.algorithms.rollouts import RolloutCollector
from lowrank_tune.algorithms.sft import SFT
from lowrank_tune.assembly.reward_dry_run import dry_run_rewards
from lowrank_tune.assembly.reward_model import REWARD_ROLE, reward_model_base
from lowrank_tune.assembly.rl import (
    RewardScorer,
    check_reference_rewards,
    load_train_prompts,
    make_grpo,
    make_ppo,
    make_rollout_collector,
)
from lowrank_tune.assembly.rope import check_heldout_length, select_rope
from lowrank_tune.assembly.stacks import ROLES_WITH_HEAD, build_stacks, frozen_adapters
from lowrank_tune.config import RecipeConfig
from lowrank_tune.data import (
    BatchSampler,
    ChatTemplate,
    Prompt,
    PromptDataset,
    PromptSampler,
    TokenizedDataset,
    TokenizedSplits,
    collate_units,
    load,
    load_heldout_prompts,
)
from lowrank_tune.data.tokenize import cache_folder
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit, LogMessage, Progress
from lowrank_tune.model import unsloth
from lowrank_tune.model.activation_checkpointing import cap_cuda_memory
from lowrank_tune.model.adapters import SavedAdapter, read_adapter
from lowrank_tune.model.base import Base, combined_hash, hash_of, load_base, load_tokenizer
from lowrank_tune.model.heads import HEAD_WEIGHT_KEY
from lowrank_tune.model.oom import MemoryLimits
from lowrank_tune.model.roles import Roles
from lowrank_tune.model.rotary import FixedRope, factors_of
from lowrank_tune.types import Algorithm, Batch

ALGORITHMS: dict[str, Callable[[AlgorithmContext, RecipeConfig], Algorithm]] = {
    "sft": lambda context, recipe: SFT(context),
    "reward": lambda context, recipe: RewardModeling(context, recipe.reward.center_rewards_coefficient),
    "dpo": lambda context, recipe: DPO(
        context,
        recipe.dpo.loss_type,
        recipe.dpo.beta,
        recipe.dpo.label_smoothing,
        recipe.dpo.sft_coef,
    ),
}
ONLINE_ALGORITHMS: dict[str, Callable[[RecipeConfig, AlgorithmContext, RolloutCollector], Algorithm]] = {
    "grpo": make_grpo,
    "ppo": make_ppo,
}
"""Those that write their own rows."""


@dataclass(frozen=True)
class RunComponents:
    """All that one run needs, loaded. `trained` are the roles whose top adapter is trained, each named as its role;
    `base_hashes` those of the base's tensors before the run; `validation_batch(units)` collates held-out rows; `close`
    ends the workers of the rewards."""

    base: Base
    roles: Roles
    trained: tuple[str, ...]
    template: ChatTemplate
    data: TokenizedSplits | PromptDataset
    validation: TokenizedDataset | None
    heldout: list[Prompt]
    algorithm: Algorithm
    steps: int
    reference: str
    base_hashes: dict[str, str]
    micro_tokens: int
    validation_batch: Callable[[Sequence[int]], Batch]
    close: Callable[[], None] = lambda: None
    lr_multipliers: Mapping[str, float] = field(default_factory=dict)
    """Of a trained role: what its learning rate is to the run's, where it is another one."""

    @property
    def stop_ids(self) -> frozenset[int]:
        return self.base.end_ids | self.template.end_ids


def build(
    recipe: RecipeConfig,
    emit: Emit,
    device: torch.device | None = None,
    base: Base | None = None,
    fresh: bool = True,
    stages: Sequence[RecipeConfig] = (),
) -> RunComponents:
    """Loads what is cheap to check first: adapters' folders, tokenizer, data, and only then the base, where none is
    given: the stages of a chain share one, and `stages` are all of them. A `fresh` run also tries its rewards on
    completions of its policy. Raises UserError."""
    saved = {
        name: read_adapter(
            adapter.path,
            f"adapters.{name}.path",
            head=name == REWARD_ROLE or name in recipe.extra_adapters,
        )
        for name, adapter in recipe.adapters.items()
        if adapter.path
    }
    check_adapter_lineage(recipe, saved, emit)
    template = ChatTemplate.from_tokenizer(
        base.tokenizer if base else load_tokenizer(recipe.base), recipe.data.template_date
    )
    emit(LogMessage(message=template.describe()))
    rope = select_rope(stages or (recipe,), emit)
    if recipe.algorithm in ONLINE_ALGORITHMS:
        return _build_online(recipe, emit, device, base, fresh, saved, template, rope)
    data = load(recipe.data, template, recipe.seed, emit, pairs=recipe.uses_pairs)
    for line in data.report.lines():
        emit(LogMessage(message=line, level="warning" if "; dropped " in line else "info"))
    heldout = _heldout_questions(recipe, template, rope)
    base = base or _load_base(recipe, template, device, emit, rope)
    hashes = base.hashes()
    roles = load_roles(recipe, base, saved, emit)
    micro_tokens = micro_tokens_of(recipe, recipe.max_train_length)
    collate_fns = {
        store: _make_collate(store, template.pad_id) for store in (data.train, data.validation) if store is not None
    }
    if recipe.algorithm == "dpo":
        for store, collate_fn in list(collate_fns.items()):
            sums = reference_logps(roles, store, collate_fn, micro_tokens, combined_hash(hashes), cache_folder(), emit)
            collate_fns[store] = _with_reference(collate_fn, sums)
    weights = [source.weight for source in recipe.data.train]
    sampler = BatchSampler(data.train.unit_lengths, data.train.unit_source_of, weights, recipe.train, recipe.seed)
    reference = _describe_reference(roles)
    context = AlgorithmContext(
        roles,
        lambda step: collate_fns[data.train](sampler.rows(step)),
        reference,
        fresh=recipe.adapters[recipe.trained_adapter].path is None,
    )
    steps = recipe.train.max_steps or sampler.steps_of(recipe.train.num_train_epochs or 1.0)
    algorithm = ALGORITHMS[recipe.algorithm](context, recipe)
    return RunComponents(
        base,
        roles,
        (recipe.trained_adapter,),
        template,
        data,
        data.validation,
        heldout,
        algorithm,
        steps,
        reference,
        hashes,
        micro_tokens,
        collate_fns[data.validation] if data.validation is not None else collate_fns[data.train],
    )


def _build_online(
    recipe: RecipeConfig,
    emit: Emit,
    device: torch.device | None,
    base: Base | None,
    fresh: bool,
    saved: Mapping[str, SavedAdapter],
    template: ChatTemplate,
    rope: FixedRope | None,
) -> RunComponents:
    """The same for an algorithm that writes its own rows: prompts and rewards instead of rows."""
    data = load_train_prompts(recipe, template, emit)
    heldout = _heldout_questions(recipe, template, rope)
    scorer = RewardScorer(recipe, template)
    try:
        if not scorer.reward_models:
            check_reference_rewards(scorer, data, recipe.rewards_check, recipe.seed, emit)
        base = base or _load_base(recipe, template, device, emit, rope)
        hashes = base.hashes()
        roles = load_roles(recipe, base, saved, emit)
        stop_ids = base.end_ids | template.end_ids
        micro_tokens = micro_tokens_of(recipe, recipe.max_train_length)
        if scorer.reward_models:
            scorer.set_base_model(roles, micro_tokens)
            check_reference_rewards(scorer, data, recipe.rewards_check, recipe.seed, emit)
        if fresh and recipe.algorithm == "grpo":
            dry_run_rewards(recipe, roles, template, data, scorer, stop_ids, emit)
        collector = make_rollout_collector(recipe, roles, template, data, scorer, stop_ids, micro_tokens, emit)
    except BaseException:
        scorer.close()
        raise
    reference = _describe_reference(roles)
    context = AlgorithmContext(
        roles,
        _raise_no_rows,
        reference,
        fresh=recipe.adapters[recipe.trained_adapter].path is None,
    )
    steps = recipe.train.max_steps or PromptSampler(data, recipe.data, recipe.train, recipe.seed).steps_of(
        recipe.train.num_train_epochs or 1.0
    )
    trained = (recipe.trained_adapter, "value") if recipe.algorithm == "ppo" else (recipe.trained_adapter,)
    lr_multipliers = {
        "value": (recipe.ppo.value_learning_rate or recipe.train.learning_rate) / recipe.train.learning_rate
    }
    algorithm = ONLINE_ALGORITHMS[recipe.algorithm](recipe, context, collector)
    return RunComponents(
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
        _raise_no_units,
        scorer.close,
        lr_multipliers,
    )


def check_adapter_lineage(recipe: RecipeConfig, saved: dict[str, SavedAdapter], emit: Emit) -> None:
    """An adapter that was trained over others lies over the same ones again, told by content; where this recipe loads
    none of them, it is taken with them folded into it. Raises UserError where only some are there. (The reward model
    has a stack of its own.)"""
    contents: dict[str, str] = {}
    for name in [
        name
        for name in recipe.adapters
        if name in saved and name not in (*recipe.extra_adapters, *({REWARD_ROLE} - {recipe.trained_adapter}))
    ]:
        below = saved[name].frozen_adapters
        path = str(recipe.adapters[name].path)
        key = f"adapters.{name}.path"
        missing = [other for other, content in below.items() if content not in contents]
        if missing and len(missing) < len(below):
            loaded = ", ".join(other for other in below if other not in missing)
            raise UserError(
                f"{key}: the adapter in {path} was trained over {', '.join(below)}, and this recipe loads only "
                f"{loaded} below it: "
                f"add `adapters.{missing[0]}.path`, or leave all of them out and it is taken with them folded into it"
            )
        if missing:
            saved[name] = read_adapter(path, key, head=saved[name].head is not None, combined=True)
            emit(LogMessage(message=f"{key}: taken with {', '.join(below)} folded into it, which it was trained over"))
        contents[combined_hash({part: hash_of(tensor.float()) for part, tensor in saved[name].tensors.items()})] = name


def _raise_no_rows(step: int) -> Batch:
    raise AssertionError("the policy writes its own rows")


def _raise_no_units(units: Sequence[int]) -> Batch:
    raise AssertionError("there are no held-out rows")


def _load_base(
    recipe: RecipeConfig,
    template: ChatTemplate,
    device: torch.device | None,
    emit: Emit,
    rope: FixedRope | None,
) -> Base:
    emit(Progress(description=f"loading {recipe.base.model}", done=0, total=1))
    cap_cuda_memory(recipe.train.memory_budget_gib)
    if recipe.base.backend == "unsloth":
        base = unsloth.load_base(recipe.base, template.tokenizer, recipe.max_train_length, device)
    else:
        base = load_base(recipe.base, template.tokenizer, device, rope_factors=factors_of(rope))
    emit(Progress(description=f"loading {recipe.base.model}", done=1, total=1))
    return base


def micro_tokens_of(recipe: RecipeConfig, max_length: int) -> int:
    """Tokens that go through the model at once where no gradient is kept."""
    return min(max(4096, (recipe.train.micro_batch_rows or 4) * max_length), 1 << 15)


def _heldout_questions(recipe: RecipeConfig, template: ChatTemplate, rope: FixedRope | None) -> list[Prompt]:
    config = recipe.evaluate
    if config.eval_dataset is None:
        return []
    candidates = load_heldout_prompts(config.eval_dataset, config.num_prompts, recipe.seed, recipe.data.system_prompt)
    usable = [prompt for prompt in candidates if template.validate_messages(prompt.messages) is None]
    if not usable:
        raise UserError(f"evaluate.eval_dataset: {config.eval_dataset.dataset} has no usable row")
    if all(prompt.ground_truth is None for prompt in usable):
        raise UserError(
            "evaluate.eval_dataset: none of its rows has a gold answer; name its column in `ground_truth` or `columns`"
        )
    if rope is not None:
        check_heldout_length(recipe, max(len(template.prompt(prompt.messages)) for prompt in usable), rope)
    return usable


def load_roles(recipe: RecipeConfig, base: Base, saved: Mapping[str, SavedAdapter], emit: Emit) -> Roles:
    """The stacks of the recipe over the base (`build_stacks`), with the weights of the adapters that were `saved`."""
    top = recipe.trained_adapter
    lower = frozen_adapters(recipe)
    if REWARD_ROLE in recipe.adapters and top != REWARD_ROLE:
        below = reward_model_base(saved, lower)
    else:
        below = []
    configs, stacks = build_stacks(recipe, base.model, {name: adapter.config for name, adapter in saved.items()}, below)
    roles = Roles(
        base,
        configs,
        trainable=[top, *recipe.extra_adapters],
        stacks=stacks,
        checkpointing=recipe.train.gradient_checkpointing,
        seed=recipe.seed,
        heads=ROLES_WITH_HEAD & stacks.keys(),
        offload=recipe.train.activation_offloading,
    )
    roles.limits = MemoryLimits(budget_bytes=int((recipe.train.memory_budget_gib or 0) * 2**30), emit=emit)
    for name, adapter in saved.items():
        roles.load_adapter_tensors(name, adapter.tensors, f"adapters.{name}.path: {adapter.folder}")
        if adapter.base_name not in (None, recipe.base.model, recipe.base.model.partition("@")[0]):
            message = (
                f"the adapter in {adapter.folder} says it was made for {adapter.base_name}, not {recipe.base.model}"
            )
            emit(LogMessage(level="warning", message=message))
    if "value" in configs and "value" not in saved and recipe.ppo.critic_init == "reward":
        reward_weight = sum(reward.weight for reward in recipe.rewards if reward.name == "reward_model")
        scaled = {
            key: tensor * reward_weight if key == HEAD_WEIGHT_KEY else tensor
            for key, tensor in saved[REWARD_ROLE].tensors.items()
        }
        roles.load_adapter_tensors("value", scaled, f"adapters.{REWARD_ROLE}.path: {saved[REWARD_ROLE].folder}")
    if base.backend == "unsloth":
        unsloth.check(roles, top)
        emit(
            LogMessage(
                message="unsloth runs the base, and computes what transformers does; completions are drawn by "
                "transformers' own code"
            )
        )
    if top in saved:
        emit(
            LogMessage(
                message=f"the {top} adapter goes on from {saved[top].folder}: it need not agree with "
                f"{_describe_reference(roles)}"
            )
        )
    return roles


def _describe_reference(roles: Roles) -> str:
    below = [name.removeprefix("lt_") for name in roles.stacks["reference"]]
    if below:
        return f"the base with the frozen adapter{'s' if len(below) > 1 else ''} {' + '.join(below)}"
    return "the base, adapters off"


def _make_collate(dataset: TokenizedDataset, pad_id: int) -> Callable[[Sequence[int]], Batch]:
    return lambda units: collate_units(dataset, units, pad_id)


def _with_reference(collate: Callable[[Sequence[int]], Batch], sums: Tensor) -> Callable[[Sequence[int]], Batch]:
    """The same batches with `extra["reference"]`, the log-probs that belong to their rows."""

    def batch(units: Sequence[int]) -> Batch:
        collated = collate(units)
        rows_per_unit = len(collated) // len(units)
        collated.extra["reference"] = sums[[unit * rows_per_unit + i for unit in units for i in range(rows_per_unit)]]
        return collated

    return batch
