"""Made-up rows of the sizes that are planned for: real ids and masks, of which memory only knows the lengths."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lowrank_tune import settings
from lowrank_tune.build import micro_tokens_of
from lowrank_tune.types import Batch

DEFAULT_ROWS = 4  # of a micro-batch, where a recipe says nothing


@dataclass(frozen=True)
class Sizes:
    """What goes through the model at once: `units` (rows, pairs, or completions) of a micro-batch, `together` rows
    each, all of `length` tokens, the first `prompt` of which are not scored and are common to `group` rows. `harvest`
    completions are collected before an update. `free_tokens` go through at once where no gradient is kept."""

    units: int
    length: int
    together: int = 1
    prompt: int = 1
    group: int = 1
    harvest: int = 0
    free_tokens: int = 4096

    @property
    def rows(self) -> int:
        return self.units * self.together

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def free_rows(self, most: int | None = None) -> int:
        """Rows that go through at once where no gradient is kept."""
        units = max(1, self.free_tokens // (self.length * self.together))
        return (units if most is None else min(units, most)) * self.together


def sizes_of(recipe: settings.Recipe, units: int | None = None) -> Sizes:
    """The largest micro-batch that a recipe lets through: rows as long as they may be; or one of so many `units`."""
    train, online = recipe.train, recipe.algorithm in ("grpo", "ppo")
    length = recipe.data.max_prompt_length + recipe.rollout.max_new_tokens if online else recipe.data.max_length
    together = 2 if recipe.pairs else 1
    step = train.prompts_per_step * recipe.rollout.num_generations if online else train.rows_per_step or 1 << 20
    wanted = units or train.micro_rows
    if wanted is None and train.micro_batch_tokens is not None:
        # nearly as many rows, a little shorter, fill the budget
        wanted = max(1, -(-train.micro_batch_tokens // (length * together)))
        if wanted > 1:
            length = min(length, train.micro_batch_tokens // (wanted * together))
    wanted = min(wanted or DEFAULT_ROWS, step)
    free = micro_tokens_of(recipe, length)
    found = Sizes(
        wanted,
        length,
        together,
        recipe.data.max_prompt_length if online else 1,
        recipe.rollout.num_generations if online else 1,
        free_tokens=free,
    )
    if not online:
        return found
    group = recipe.rollout.num_generations
    read = max(wanted, found.free_rows())
    return replace(found, prompt=min(found.prompt, length - 1), harvest=min(step, -(-read // group) * group))


def batch_of(rows: int, sizes: Sizes) -> Batch:
    """So many rows, and of pairs and groups what they share."""
    ids = (torch.arange(sizes.length)[None] * 7 + torch.arange(rows)[:, None] * 3) % 97
    family, shared = max(sizes.together, sizes.group), sizes.prompt if sizes.group > 1 or sizes.prompt > 1 else 0
    if family > 1 and shared:
        ids[:, :shared] = ids[:1, :shared]
    attended = torch.ones_like(ids, dtype=torch.bool)
    says = attended.clone()
    says[:, : sizes.prompt] = False
    batch = Batch(ids, attended, says)
    if family > 1:
        first = torch.arange(rows) % family == 0
        batch.extra["shared"] = torch.where(first, 0, shared)
    if sizes.together > 1:
        batch.extra |= {"margin": torch.zeros(rows), "row": torch.arange(rows)}
    return batch
