"""Made-up rows of the planned sizes, with real ids and masks: memory depends only on their lengths."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lowrank_tune.assembly import micro_tokens_of
from lowrank_tune.batch import Batch, LabeledBatch, PairBatch
from lowrank_tune.config import RecipeConfig

DEFAULT_ROWS = 4
"""Rows of a micro-batch if a recipe does not set them."""


@dataclass(frozen=True)
class Sizes:
    """What the model computes at once: a micro-batch of `units` (rows, pairs, or completions) with `rows_per_unit` rows
    of `length` tokens. The first `prompt_length` tokens are not trained on and are the same in `group` rows.
    `num_rollouts` completions are collected before an update. Passes without gradients have `no_grad_tokens`. Rows that
    are `labeled` are answers with a label."""

    units: int
    length: int
    rows_per_unit: int = 1
    prompt_length: int = 1
    group: int = 1
    num_rollouts: int = 0
    no_grad_tokens: int = 4096
    labeled: bool = False

    @property
    def rows(self) -> int:
        return self.units * self.rows_per_unit

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def no_grad_rows(self) -> int:
        """Rows of a pass without gradients."""
        units = max(1, self.no_grad_tokens // (self.length * self.rows_per_unit))
        return units * self.rows_per_unit


def sizes_of(recipe: RecipeConfig, units: int | None = None) -> Sizes:
    """Returns the sizes of the largest micro-batch that a recipe allows, with the longest rows; or of one with `units`
    units."""
    train = recipe.train
    length = recipe.max_train_length
    rows_per_unit = 2 if recipe.uses_pairs else 1
    step = step_units(recipe, 1 << 20)
    num_units = units or train.micro_batch_rows
    if num_units is None and train.micro_batch_tokens is not None:
        # Rows that are a little shorter fill the budget.
        num_units = max(1, -(-train.micro_batch_tokens // (length * rows_per_unit)))
        if num_units > 1:
            length = min(length, train.micro_batch_tokens // (num_units * rows_per_unit))
    num_units = min(num_units or DEFAULT_ROWS, step)
    sizes = Sizes(
        num_units,
        length,
        rows_per_unit,
        no_grad_tokens=micro_tokens_of(recipe, length),
        labeled=recipe.uses_labels,
    )
    if not recipe.is_online:
        return sizes
    group = recipe.rollout.num_generations
    num_rows = max(num_units, sizes.no_grad_rows)
    return replace(
        sizes,
        group=group,
        prompt_length=min(recipe.data.max_prompt_length, length - 1),
        num_rollouts=min(step, -(-num_rows // group) * group),
    )


def step_units(recipe: RecipeConfig, default: int) -> int:
    """Returns the units of an optimizer step; `default` if the recipe does not set them."""
    if recipe.is_online:
        return recipe.train.prompts_per_step * recipe.rollout.num_generations
    return recipe.train.global_batch_size or default


def batch_of(rows: int, sizes: Sizes) -> Batch:
    """Returns a batch of rows that share their prompts as pairs and groups do."""
    ids = (torch.arange(sizes.length)[None] * 7 + torch.arange(rows)[:, None] * 3) % 97
    family = max(sizes.rows_per_unit, sizes.group)
    shared = 0
    if sizes.group > 1 or sizes.prompt_length > 1:
        shared = sizes.prompt_length
    if family > 1 and shared:
        ids[:, :shared] = ids[:1, :shared]
    attention_mask = torch.ones_like(ids, dtype=torch.bool)
    completion_mask = attention_mask.clone()
    completion_mask[:, : sizes.prompt_length] = False
    batch = Batch(ids, attention_mask, completion_mask)
    if family > 1:
        first = torch.arange(rows) % family == 0
        batch.shared_prefix = torch.where(first, 0, shared)
    if sizes.labeled:
        return LabeledBatch(
            **batch.tensors(),
            labels=torch.arange(rows) % 2 == 0,
            row_indices=torch.arange(rows),
        )
    if sizes.rows_per_unit > 1:
        return PairBatch(
            **batch.tensors(),
            margin=torch.zeros(rows),
            row_indices=torch.arange(rows),
        )
    return batch
