"""Where the rows of a run come from: the training data, or completions that the policy draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lowrank_tune.algorithms.base import Algorithm, AlgorithmContext
from lowrank_tune.algorithms.reference_logps import reference_logps
from lowrank_tune.assembly.algorithm import make_algorithm
from lowrank_tune.assembly.model import micro_tokens_of
from lowrank_tune.assembly.reward_dry_run import dry_run_rewards
from lowrank_tune.assembly.rl import (
    RewardScorer,
    check_reference_rewards,
    load_train_prompts,
    log_report,
    make_rollout_collector,
)
from lowrank_tune.batch import Batch, PairBatch, rows_of_units
from lowrank_tune.config import RecipeConfig
from lowrank_tune.data import (
    BatchSampler,
    ChatTemplate,
    PromptDataset,
    TokenizedDataset,
    TokenizedSplits,
    collate_units,
    load,
    make_prompt_sampler,
)
from lowrank_tune.data.tokenize import cache_folder
from lowrank_tune.events import Emit
from lowrank_tune.model.base import combined_hash
from lowrank_tune.model.roles import Roles


@dataclass
class RowCollator:
    """Batches of the rows of a store."""

    store: TokenizedDataset
    pad_id: int
    reference_logps: Tensor | None = None
    """(rows,) log-probs of the reference, of DPO."""

    def __call__(self, units: Sequence[int]) -> Batch:
        """Returns the rows of these units, padded."""
        batch = collate_units(self.store, units, self.pad_id)
        if self.reference_logps is not None:
            assert isinstance(batch, PairBatch), "the reference of DPO scores pairs"
            batch.reference_sequence_logps = self.reference_logps[rows_of_units(units, self.store.rows_per_unit)]
        return batch


class RowSource:
    """Rows from the training data."""

    data: TokenizedSplits

    def __init__(self, recipe: RecipeConfig, template: ChatTemplate, emit: Emit) -> None:
        """Raises UserError if the data cannot be used."""
        self.recipe = recipe
        self.emit = emit
        self.data = load(recipe.data, template, recipe.seed, emit, pairs=recipe.uses_pairs)
        log_report(self.data.report, emit)
        self.validation = self.data.validation
        train = self.data.train
        weights = [source.weight for source in recipe.data.train]
        self.sampler = BatchSampler(train.unit_lengths, train.unit_source_of, weights, recipe.train, recipe.seed)
        self.collate_train = RowCollator(train, template.pad_id)
        self.collate_validation: RowCollator | None = None
        if self.validation is not None:
            self.collate_validation = RowCollator(self.validation, template.pad_id)

    def check_before_loading(self) -> None:
        """Nothing to check."""

    def use_model(self, roles: Roles, base_hashes: dict[str, str]) -> None:
        """Adds the log-probs of the reference, of DPO."""
        if self.recipe.algorithm != "dpo":
            return
        micro_tokens = micro_tokens_of(self.recipe, self.recipe.max_train_length)
        base_hash = combined_hash(base_hashes)
        for collator in (self.collate_train, self.collate_validation):
            if collator is not None:
                collator.reference_logps = reference_logps(
                    roles,
                    collator.store,
                    collator,
                    micro_tokens,
                    base_hash,
                    cache_folder(),
                    self.emit,
                )

    def make_algorithm(self, context: AlgorithmContext) -> Algorithm[Any]:
        return make_algorithm(self.recipe, context)

    def get_batch(self, step: int) -> Batch:
        """Returns the rows of an optimizer step."""
        return self.collate_train(self.sampler.rows(step))

    def close(self) -> None:
        """Nothing to close."""


class PromptSource:
    """Prompts, and rewards of completions that the policy draws."""

    validation = None
    collate_validation = None
    get_batch = None

    def __init__(self, recipe: RecipeConfig, template: ChatTemplate, emit: Emit, fresh: bool) -> None:
        """Raises UserError if the data cannot be used. A `fresh` run also scores a few completions before its first
        step."""
        self.recipe = recipe
        self.template = template
        self.emit = emit
        self.fresh = fresh
        self.data: PromptDataset = load_train_prompts(recipe, template, emit)
        self.sampler = make_prompt_sampler(self.data, recipe.data, recipe.train, recipe.seed)
        self.scorer: RewardScorer | None = None

    def check_before_loading(self) -> None:
        """Starts the rewards and checks them on reference answers, unless a reward needs the base. Raises UserError."""
        self.scorer = RewardScorer(self.recipe, self.template)
        if not self.scorer.reward_models:
            self._check_rewards(self.scorer)

    def use_model(self, roles: Roles, base_hashes: dict[str, str]) -> None:
        """Checks the rewards that need the base, and makes the collector. Raises UserError."""
        assert self.scorer is not None, "check_before_loading comes first"
        recipe = self.recipe
        micro_tokens = micro_tokens_of(recipe, recipe.max_train_length)
        stop_ids = roles.base.end_ids | self.template.end_ids
        if self.scorer.reward_models:
            self.scorer.set_base_model(roles, micro_tokens)
            self._check_rewards(self.scorer)
        if self.fresh and recipe.algorithm == "grpo":
            dry_run_rewards(recipe, roles, self.template, self.data, self.scorer, stop_ids, self.emit)
        self.collector = make_rollout_collector(
            recipe,
            roles,
            self.template,
            self.data,
            self.sampler,
            self.scorer,
            stop_ids,
            micro_tokens,
            self.emit,
        )

    def _check_rewards(self, scorer: RewardScorer) -> None:
        check_reference_rewards(scorer, self.data, self.recipe.rewards_check, self.recipe.seed, self.emit)

    def make_algorithm(self, context: AlgorithmContext) -> Algorithm[Any]:
        return make_algorithm(self.recipe, context, self.collector)

    def close(self) -> None:
        """Ends the workers of the rewards."""
        if self.scorer is not None:
            self.scorer.close()
