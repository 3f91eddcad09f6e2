"""Made-up rows of the sizes that are planned for: real ids and masks, of which memory only knows the lengths."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lowrank_tune.assembly import micro_tokens_of
from lowrank_tune.batch import Batch, PairBatch
from lowrank_tune.config import RecipeConfig

DEFAULT_ROWS = 4  # of a micro-batch, where a recipe says nothing


@dataclass(frozen=True)
class Sizes:
    """What goes through the model at once: `units` (rows, pairs, or completions) of a micro-batch, `rows_per_unit` rows
    each, all of `length` tokens, the first `prompt_length` of which are not scored and are common to `group` rows.
    `num_rollouts` completions are collected before an update. `no_grad_tokens` go through at once where no gradient is
    kept."""

    units: int
    length: int
    rows_per_unit: int = 1
    prompt_length: int = 1
    group: int = 1
    num_rollouts: int = 0
    no_grad_tokens: int = 4096

    @property
    def rows(self) -> int:
        return self.units * self.rows_per_unit

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def no_grad_rows(self, max_units: int | None = None) -> int:
        """Rows that go through at once where no gradient is kept."""
        units = max(1, self.no_grad_tokens // (self.length * self.rows_per_unit))
        return (units if max_units is None else min(units, max_units)) * self.rows_per_unit


def sizes_of(recipe: RecipeConfig, units: int | None = None) -> Sizes:
    """The largest micro-batch that a recipe lets through: rows as long as they may be; or one of so many `units`."""
    train = recipe.train
    online = recipe.algorithm in ("grpo", "ppo")
    length = recipe.max_train_length
    rows_per_unit = 2 if recipe.uses_pairs else 1
    if online:
        step = train.prompts_per_step * recipe.rollout.num_generations
    else:
        step = train.global_batch_size or 1 << 20
    num_units = units or train.micro_batch_rows
    if num_units is None and train.micro_batch_tokens is not None:
        # nearly as many rows, a little shorter, fill the budget
        num_units = max(1, -(-train.micro_batch_tokens // (length * rows_per_unit)))
        if num_units > 1:
            length = min(length, train.micro_batch_tokens // (num_units * rows_per_unit))
    num_units = min(num_units or DEFAULT_ROWS, step)
    free = micro_tokens_of(recipe, length)
    sizes = Sizes(
        num_units,
        length,
        rows_per_unit,
        recipe.data.max_prompt_length if online else 1,
        recipe.rollout.num_generations if online else 1,
        no_grad_tokens=free,
    )
    if not online:
        return sizes
    group = recipe.rollout.num_generations
    read = max(num_units, sizes.no_grad_rows())
    return replace(
        sizes,
        prompt_length=min(sizes.prompt_length, length - 1),
        num_rollouts=min(step, -(-read // group) * group),
    )


def batch_of(rows: int, sizes: Sizes) -> Batch:
    """So many rows, and of pairs and groups what they share."""
    ids = (torch.arange(sizes.length)[None] * 7 + torch.arange(rows)[:, None] * 3) % 97
    family = max(sizes.rows_per_unit, sizes.group)
    shared = sizes.prompt_length if sizes.group > 1 or sizes.prompt_length > 1 else 0
    if family > 1 and shared:
        ids[:, :shared] = ids[:1, :shared]
    attention_mask = torch.ones_like(ids, dtype=torch.bool)
    completion_mask = attention_mask.clone()
    completion_mask[:, : sizes.prompt_length] = False
    batch = Batch(ids, attention_mask, completion_mask)
    if family > 1:
        first = torch.arange(rows) % family == 0
        batch.shared_prefix = torch.where(first, 0, shared)
    if sizes.rows_per_unit > 1:
        return PairBatch(**batch.tensors(), margin=torch.zeros(rows), row_indices=torch.arange(rows))
    return batch
