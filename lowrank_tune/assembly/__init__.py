"""Puts a run together: from a recipe to its data, base, roles and algorithm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowrank_tune.algorithms.base import Algorithm, AlgorithmContext
from lowrank_tune.assembly.adapters import check_adapter_lineage, read_adapters
from lowrank_tune.assembly.algorithm import make_algorithm
from lowrank_tune.assembly.model import (
    describe_reference,
    limit_gpu,
    load_recipe_base,
    load_roles,
    micro_tokens_of,
)
from lowrank_tune.assembly.rope import check_heldout_length, select_rope
from lowrank_tune.assembly.sources import PromptSource, RowCollator, RowSource
from lowrank_tune.batch import Batch
from lowrank_tune.config import RecipeConfig
from lowrank_tune.data import (
    ChatTemplate,
    Prompt,
    PromptDataset,
    TokenizedDataset,
    TokenizedSplits,
    accepted_prompts,
    recipe_heldout_prompts,
)
from lowrank_tune.data.token_store import IntArray
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit, LogMessage
from lowrank_tune.model.base import Base, HashedBase, load_tokenizer
from lowrank_tune.model.roles import Roles
from lowrank_tune.model.rotary import FixedRope

__all__ = [
    "RunComponents",
    "build",
    "check_adapter_lineage",
    "load_roles",
    "make_algorithm",
    "micro_tokens_of",
]


@dataclass(frozen=True, kw_only=True)
class RunComponents:
    """All parts of one run, loaded."""

    hashed_base: HashedBase
    """The base, and the hashes of its tensors before the run."""
    roles: Roles
    trained: tuple[str, ...]
    """The roles whose top adapter is trained; the adapters have the names of their roles."""
    template: ChatTemplate
    data: TokenizedSplits | PromptDataset
    validation: TokenizedDataset | None
    heldout: list[Prompt]
    algorithm: Algorithm[Any]
    steps: int
    reference: str
    """Which adapters the reference has."""
    micro_tokens: int
    """Maximum number of tokens of a forward pass without gradient."""
    lr_multipliers: Mapping[str, float]
    """Learning rate of a trained role relative to that of the run, 1 if absent."""
    collate_validation: RowCollator | None
    close: Callable[[], None]
    """Ends the workers of the rewards."""

    @property
    def base(self) -> Base:
        return self.hashed_base.base

    @property
    def base_hashes(self) -> dict[str, str]:
        return self.hashed_base.hashes

    @property
    def stop_ids(self) -> frozenset[int]:
        return self.base.end_ids | self.template.end_ids

    def validation_batch(self, rows: IntArray) -> Batch:
        """Returns these held-out rows, padded; of pairs both rows. The run must have some."""
        assert self.collate_validation is not None, "the run has no held-out rows"
        return self.collate_validation.collate_rows(rows)


def build(
    recipe: RecipeConfig,
    emit: Emit,
    device: torch.device | None = None,
    hashed_base: HashedBase | None = None,
    fresh: bool = True,
    stages: Sequence[RecipeConfig] = (),
    gpu_budget_bytes: int = 0,
) -> RunComponents:
    """Returns the parts of a run. Raises UserError if one cannot be loaded.

    What is cheap to check comes first: the folders of adapters, the tokenizer, the data, and only then the base, if it
    is not given. The `stages` of a chain share one base. A `fresh` run also tries its rewards on completions of its
    policy. On a GPU the run may use `gpu_budget_bytes`, by default what is free now, unless the recipe sets a budget.
    """
    saved = read_adapters(recipe)
    check_adapter_lineage(recipe, saved, emit)
    tokenizer = hashed_base.base.tokenizer if hashed_base else load_tokenizer(recipe.base)
    template = ChatTemplate.from_config(tokenizer, recipe.data)
    emit(LogMessage(message=template.describe()))
    rope = select_rope(stages or (recipe,), emit)
    source = _source(recipe, template, emit, fresh)
    heldout = _heldout_questions(recipe, template, rope)
    try:
        source.check_before_loading()
        gpu_budget_bytes = limit_gpu(recipe, gpu_budget_bytes, device)
        if hashed_base is None:
            hashed_base = HashedBase.of(load_recipe_base(recipe, template, rope, device, emit))
        roles = load_roles(
            recipe,
            hashed_base.base,
            saved,
            emit,
            gpu_budget_bytes,
        )
        source.use_model(roles, hashed_base.hashes)
    except BaseException:
        source.close()
        raise
    epochs = recipe.train.num_train_epochs or 1.0
    return RunComponents(
        hashed_base=hashed_base,
        roles=roles,
        trained=(recipe.trained_adapter, *recipe.extra_adapters),
        template=template,
        data=source.data,
        validation=source.validation,
        heldout=heldout,
        algorithm=_algorithm(recipe, roles, source),
        steps=recipe.train.max_steps or source.sampler.steps_of(epochs),
        reference=describe_reference(roles),
        micro_tokens=micro_tokens_of(recipe, recipe.max_train_length),
        lr_multipliers=_lr_multipliers(recipe),
        collate_validation=source.collate_validation,
        close=source.close,
    )


def _algorithm(
    recipe: RecipeConfig,
    roles: Roles,
    source: RowSource | PromptSource,
) -> Algorithm[Any]:
    """Returns the recipe's algorithm, with its batches."""
    context = AlgorithmContext(
        roles,
        source.get_batch,
        describe_reference(roles),
        fresh=recipe.adapters[recipe.trained_adapter].path is None,
        label_counts=source.label_counts,
    )
    return make_algorithm(recipe, context, source.collector)


def _source(
    recipe: RecipeConfig,
    template: ChatTemplate,
    emit: Emit,
    fresh: bool,
) -> RowSource | PromptSource:
    """Returns where the rows of the recipe, or its prompts, come from."""
    if recipe.is_online:
        return PromptSource(recipe, template, emit, fresh)
    return RowSource(recipe, template, emit)


def _lr_multipliers(recipe: RecipeConfig) -> dict[str, float]:
    """Returns the learning rate of the value relative to that of the run."""
    learning_rate = recipe.train.learning_rate
    value_learning_rate = recipe.ppo.value_learning_rate or learning_rate
    return {"value": value_learning_rate / learning_rate}


def _heldout_questions(
    recipe: RecipeConfig,
    template: ChatTemplate,
    rope: FixedRope | None,
) -> list[Prompt]:
    """Returns the questions of `evaluate.eval_dataset` that the template accepts. Raises UserError if there are none,
    and ConfigError if a row could become too long for the rotary frequencies."""
    dataset = recipe.evaluate.eval_dataset
    if dataset is None:
        return []
    prompts = recipe_heldout_prompts(recipe)
    usable = accepted_prompts(prompts, template)
    if not usable:
        raise UserError(f"evaluate.eval_dataset: {dataset.dataset} has no usable row")
    if all(prompt.ground_truth is None for prompt in usable):
        raise UserError(
            "evaluate.eval_dataset: none of its rows has a gold answer; name its column in `ground_truth` or `columns`"
        )
    if rope is not None:
        longest = max(len(template.prompt(prompt.messages, prompt.tools)) for prompt in usable)
        check_heldout_length(recipe, longest, rope)
    return usable
