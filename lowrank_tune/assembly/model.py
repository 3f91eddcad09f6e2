"""The base of a recipe, and its roles over it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from lowrank_tune.assembly.reward_model import REWARD_ROLE, reward_model_base
from lowrank_tune.assembly.stacks import ROLES_WITH_HEAD, build_stacks, frozen_adapters
from lowrank_tune.config import RecipeConfig, TrainingConfig
from lowrank_tune.data import ChatTemplate
from lowrank_tune.events import Emit, LogMessage, loading_progress, warning
from lowrank_tune.model import unsloth
from lowrank_tune.model.adapters import SavedAdapter
from lowrank_tune.model.architecture_notes import architecture_notes, architecture_warnings
from lowrank_tune.model.base import Base, load_base
from lowrank_tune.model.compiler_check import missing_for_compile
from lowrank_tune.model.decoding_options import DecodingOptions
from lowrank_tune.model.gpu_memory import budget_of, limit_gpu_memory, read_gpu_memory
from lowrank_tune.model.heads import HEAD_WEIGHT_KEY
from lowrank_tune.model.oom import MemoryLimits
from lowrank_tune.model.roles import Roles
from lowrank_tune.model.rotary import FixedRope, factors_of
from lowrank_tune.model.router_loss import RouterLoss, routers_of

MIN_MICRO_TOKENS = 4096
MAX_MICRO_TOKENS = 1 << 15
DEFAULT_MICRO_BATCH_ROWS = 4


def load_recipe_base(
    recipe: RecipeConfig,
    template: ChatTemplate,
    rope: FixedRope | None,
    device: torch.device | None,
    emit: Emit,
) -> Base:
    """Returns the base of the recipe. Raises UserError if it cannot be loaded."""
    with loading_progress(recipe.base.model, emit):
        if recipe.base.backend == "unsloth":
            return unsloth.load_base(
                recipe.base,
                template.tokenizer,
                recipe.max_train_length,
                device,
            )
        return load_base(
            recipe.base,
            template.tokenizer,
            device,
            rope_factors=factors_of(rope),
        )


def limit_gpu(
    recipe: RecipeConfig,
    budget_bytes: int,
    device: torch.device | None,
) -> int:
    """Limits the GPU memory of this process. Returns the budget in bytes, 0 without a GPU. Raises UserError if the GPU
    has less than the recipe's budget."""
    if device is not None and device.type != "cuda":
        return 0
    memory = read_gpu_memory(device)
    if memory is None:
        return 0
    budget_bytes = budget_of(recipe.train.memory_budget_gib, budget_bytes or memory.budget_bytes)
    limit_gpu_memory(budget_bytes, device)
    return budget_bytes


def micro_tokens_of(recipe: RecipeConfig, max_length: int) -> int:
    """Returns the maximum number of tokens of a forward pass without gradient."""
    rows = recipe.train.micro_batch_rows or DEFAULT_MICRO_BATCH_ROWS
    return min(max(MIN_MICRO_TOKENS, rows * max_length), MAX_MICRO_TOKENS)


def packs_as_tokens(train: TrainingConfig, max_length: int) -> TrainingConfig:
    """Returns the settings with a micro-batch of N packs of documents as N times `max_length` tokens, padding included.
    The documents of a pack are rows of their own, so that a number of rows would limit nothing."""
    if train.micro_batch_tokens is not None:
        return train
    packs = train.micro_batch_rows or DEFAULT_MICRO_BATCH_ROWS
    changes = {"micro_batch_size": None, "micro_batch_tokens": packs * max_length}
    return train.model_copy(update=changes)


def logits_chunk_of(recipe: RecipeConfig) -> int | None:
    """Returns the logits that exist at once, None for the default of the device: `auto` of a run that is not
    planned."""
    if recipe.train.logits_chunk == "auto":
        return None
    return recipe.train.logits_chunk


def should_compile_layers(recipe: RecipeConfig, device: torch.device) -> bool:
    """Returns whether the decoder layers are compiled on a device that has a compiler; with `auto` only on a GPU."""
    setting = recipe.train.torch_compile
    # A compiled layer calls no hook that is added later, and so none of the routers'.
    if recipe.base.backend != "transformers" or recipe.train.mlp_chunks > 1 or recipe.train.router_aux_loss_coef:
        return False
    return setting is True or (setting == "auto" and device.type == "cuda")


def compiles_layers(
    recipe: RecipeConfig,
    device: torch.device,
    emit: Emit,
) -> bool:
    """Returns whether the decoder layers are compiled. Emits what is missing, unless the CPU would be used anyway."""
    setting = recipe.train.torch_compile
    if not should_compile_layers(recipe, device):
        return False
    missing = missing_for_compile(device.type)
    if missing:
        message = f"layers are not compiled (`train.torch_compile`): {missing}"
        emit(LogMessage(message=message) if setting == "auto" else warning(message))
    return not missing


def decoding_options(
    recipe: RecipeConfig,
    device: torch.device,
    emit: Emit,
) -> DecodingOptions:
    """Returns how completions are drawn on a GPU. Emits a warning for what the recipe requires and the CPU has not."""
    on_gpu = device.type == "cuda"
    if recipe.rollout.cuda_graphs is True and not on_gpu:
        emit(warning("`rollout.cuda_graphs: true` has no effect: there are CUDA graphs on a GPU alone"))
    if recipe.rollout.prefix_caching and not on_gpu:
        emit(warning("`rollout.prefix_caching: true` has no effect: pages of keys and values exist on a GPU alone"))
    return DecodingOptions(
        recipe.rollout.sync_every,
        bool(recipe.rollout.cuda_graphs),
        recipe.rollout.prefix_caching and on_gpu,
    )


def load_roles(
    recipe: RecipeConfig,
    base: Base,
    saved: Mapping[str, SavedAdapter],
    emit: Emit,
    gpu_budget_bytes: int = 0,
) -> Roles:
    """Returns the roles of the recipe over the base (`build_stacks`), with the weights of the `saved` adapters.
    `gpu_budget_bytes` is the budget of a recipe that sets none. Raises UserError if an adapter does not fit the
    base."""
    trained = recipe.trained_adapter
    below_reward_model: list[str] = []
    if REWARD_ROLE in recipe.adapters and trained != REWARD_ROLE:
        below_reward_model = reward_model_base(saved, frozen_adapters(recipe))
    loaded_configs = {name: adapter.config for name, adapter in saved.items()}
    configs, stacks = build_stacks(
        recipe,
        base.model,
        loaded_configs,
        below_reward_model,
    )
    roles = Roles(
        base,
        configs,
        trainable=[trained, *recipe.extra_adapters],
        stacks=stacks,
        checkpointing=recipe.train.gradient_checkpointing,
        seed=recipe.seed,
        heads=ROLES_WITH_HEAD & stacks.keys(),
        offload=recipe.train.activation_offloading,
        mlp_chunks=recipe.train.mlp_chunks,
        logits_chunk=logits_chunk_of(recipe),
        torch_compile=compiles_layers(recipe, base.device, emit),
    )
    roles.limits = MemoryLimits(
        budget_bytes=budget_of(recipe.train.memory_budget_gib, gpu_budget_bytes),
        emit=emit,
    )
    roles.decoding = decoding_options(recipe, base.device, emit)
    add_router_loss(recipe, roles)
    for name, adapter in saved.items():
        _load_adapter(
            roles,
            name,
            adapter,
            recipe.base.model,
            emit,
        )
    if "value" in configs and "value" not in saved and recipe.ppo.critic_init == "reward":
        _load_value_from_reward_model(recipe, roles, saved[REWARD_ROLE])
    if base.backend == "unsloth":
        unsloth.check(roles, trained)
    for message in _notes(roles, trained, saved):
        emit(LogMessage(message=message))
    for message in architecture_warnings(base):
        emit(warning(message))
    return roles


def add_router_loss(
    recipe: RecipeConfig,
    roles: Roles,
) -> None:
    """Adds the load-balancing loss of the recipe, if it has one. Raises UserError for a base without routers."""
    coefficient = recipe.train.router_aux_loss_coef
    if coefficient:
        router_loss = RouterLoss(
            routers_of(roles.base.model),
            recipe.trained_adapter,
            coefficient,
        )
        roles.add_router_loss(router_loss)


def _notes(
    roles: Roles,
    trained: str,
    saved: Mapping[str, SavedAdapter],
) -> Iterator[str]:
    """Yields what the user should know about the loaded roles."""
    yield from architecture_notes(roles.base)
    if roles.router_loss is not None:
        yield (
            "with `train.router_aux_loss_coef` rows are padded, beginnings that rows share are computed for each row, "
            "and layers are not compiled"
        )
    if roles.base.backend == "unsloth":
        yield (
            "unsloth runs the base, and computes what transformers does; completions are drawn by transformers' own "
            "code"
        )
    if trained in saved:
        yield (
            f"the {trained} adapter continues from {saved[trained].folder}: it need not agree with "
            f"{describe_reference(roles)}"
        )


def _load_adapter(
    roles: Roles,
    name: str,
    adapter: SavedAdapter,
    base_name: str,
    emit: Emit,
) -> None:
    """Loads the weights of an adapter; warns if they were trained on another base."""
    roles.load_adapter_tensors(name, adapter.tensors, f"adapters.{name}.path: {adapter.folder}")
    if adapter.base_name not in (None, base_name, base_name.partition("@")[0]):
        emit(warning(f"the adapter in {adapter.folder} was made for {adapter.base_name}, not {base_name}"))


def _load_value_from_reward_model(
    recipe: RecipeConfig,
    roles: Roles,
    reward_model: SavedAdapter,
) -> None:
    """Copies the reward model into the value. Its head is multiplied by the weight of the reward, so that it predicts
    the weighted score."""
    weight = sum(reward.weight for reward in recipe.rewards if reward.name == "reward_model")
    tensors = dict(reward_model.tensors)
    tensors[HEAD_WEIGHT_KEY] = tensors[HEAD_WEIGHT_KEY] * weight
    roles.load_adapter_tensors("value", tensors, f"adapters.{REWARD_ROLE}.path: {reward_model.folder}")


def describe_reference(roles: Roles) -> str:
    """Returns which adapters the reference has."""
    names = [name.removeprefix("lt_") for name in roles.stacks["reference"]]
    if not names:
        return "the base, adapters off"
    noun = "adapter" if len(names) == 1 else "adapters"
    return f"the base with the frozen {noun} {' + '.join(names)}"
