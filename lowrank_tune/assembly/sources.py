"""Where the rows of a run come from: the training data, or completions that the policy draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowrank_tune.algorithms.reference_logps import reference_logps
from lowrank_tune.algorithms.reward_failures import RewardFailureTracker
from lowrank_tune.algorithms.rollouts import RolloutCollector, RolloutGroups
from lowrank_tune.assembly.labels import label_counts, log_labels
from lowrank_tune.assembly.model import micro_tokens_of
from lowrank_tune.assembly.reward_dry_run import dry_run_rewards
from lowrank_tune.assembly.rl import (
    RewardScorer,
    check_reference_rewards,
    load_train_prompts,
    log_report,
)
from lowrank_tune.batch import Batch, LabeledBatch, PairBatch
from lowrank_tune.config import RecipeConfig
from lowrank_tune.data import (
    ChatTemplate,
    PromptDataset,
    PromptExample,
    PromptSampler,
    TokenizedDataset,
    TokenizedSplits,
    collate_rows,
    load,
)
from lowrank_tune.data.collate import with_labels
from lowrank_tune.data.sampler import row_sampler
from lowrank_tune.data.token_store import IntArray
from lowrank_tune.data.tokenize import cache_folder
from lowrank_tune.events import Emit, GroupLogged
from lowrank_tune.functional import step_seed
from lowrank_tune.model.base import combined_hash
from lowrank_tune.model.roles import Roles

ROLLOUT_SEED_TAG = 1 << 21
"""Differs from the tag of `reward_dry_run`, so that the two use different random numbers."""


@dataclass
class RowCollator:
    """Batches of the rows of a store."""

    store: TokenizedDataset
    pad_id: int
    reference_logps: Tensor | None = None
    """(rows,) log-probs of the reference, of DPO and KTO."""

    def __call__(self, units: Sequence[int]) -> Batch:
        """Returns the rows of these units, padded."""
        return self.collate_rows(self.store.rows_of(np.asarray(units, dtype=np.int64)))

    def collate_rows(self, rows: IntArray) -> Batch:
        """Returns these rows, padded; of pairs both rows."""
        batch = collate_rows(self.store, rows, self.pad_id)
        if self.store.is_labeled:
            batch = with_labels(batch, self.store, rows)
        if self.reference_logps is not None:
            assert isinstance(batch, PairBatch | LabeledBatch), "the reference of DPO and KTO scores pairs and answers"
            batch.reference_sequence_logps = self.reference_logps[torch.from_numpy(rows)]
        return batch


class RowSource:
    """Rows from the training data."""

    data: TokenizedSplits
    collector = None

    def __init__(
        self,
        recipe: RecipeConfig,
        template: ChatTemplate,
        emit: Emit,
    ) -> None:
        """Raises UserError if the data cannot be used."""
        self.recipe = recipe
        self.emit = emit
        self.data = load(
            recipe.data,
            template,
            recipe.seed,
            emit,
            pairs=recipe.uses_pairs,
            labels=recipe.uses_labels,
        )
        log_report(self.data.report, emit)
        self.validation = self.data.validation
        train = self.data.train
        self.label_counts = (0.0, 0.0)
        if recipe.uses_labels:
            self.label_counts = label_counts(train, recipe.data.train)
            log_labels(recipe.kto, self.label_counts, emit)
        self.sampler = row_sampler(
            train,
            recipe.data,
            recipe.train,
            recipe.seed,
        )
        self.collate_train = RowCollator(train, template.pad_id)
        self.collate_validation: RowCollator | None = None
        if self.validation is not None:
            self.collate_validation = RowCollator(self.validation, template.pad_id)

    def check_before_loading(self) -> None:
        """Nothing to check."""

    def use_model(self, roles: Roles, base_hashes: dict[str, str]) -> None:
        """Adds the log-probs of the reference, of DPO and KTO."""
        if self.recipe.algorithm not in ("dpo", "kto"):
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
    label_counts = (0.0, 0.0)

    def __init__(
        self,
        recipe: RecipeConfig,
        template: ChatTemplate,
        emit: Emit,
        fresh: bool,
    ) -> None:
        """Raises UserError if the data cannot be used. A `fresh` run also scores a few completions before its first
        step."""
        self.recipe = recipe
        self.template = template
        self.emit = emit
        self.fresh = fresh
        self.data: PromptDataset = load_train_prompts(recipe, template, emit)
        self.sampler = PromptSampler(
            self.data,
            recipe.data,
            recipe.train,
            recipe.seed,
        )
        self.scorer: RewardScorer | None = None
        self.collector: RolloutCollector | None = None

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
            dry_run_rewards(
                recipe,
                roles,
                self.template,
                self.data,
                self.scorer,
                stop_ids,
                self.emit,
            )
        rollout = recipe.rollout
        self.collector = RolloutCollector(
            roles=roles,
            prompts=self._prompts,
            reward_client=self.scorer,
            reward_names=[weighted_reward.name for weighted_reward in self.scorer.weighted],
            reward_weights=self.scorer.weights,
            decode=self.template.decode,
            stop_ids=stop_ids,
            pad_id=self.template.pad_id,
            num_generations=rollout.num_generations,
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            max_num_seqs=rollout.max_num_seqs,
            micro_tokens=micro_tokens,
            seed_of=self._seed,
            log_group=self._log_group,
            failures=RewardFailureTracker(rollout.max_reward_failure_rate),
        )

    def _check_rewards(self, scorer: RewardScorer) -> None:
        check_reference_rewards(
            scorer,
            self.data,
            self.recipe.rewards_check,
            self.recipe.seed,
            self.emit,
        )

    def _prompts(
        self,
        step: int,
        draw: int,
        count: int | None,
    ) -> list[PromptExample]:
        if draw == 0:
            rows = self.sampler.rows(step)
        else:
            rows = self.sampler.replacement_prompts(step, draw, count or 1)
        return [self.data.examples[row] for row in rows]

    def _seed(self, draw: int) -> int:
        return step_seed(self.recipe.seed, ROLLOUT_SEED_TAG + draw)

    def _log_group(
        self,
        step: int,
        groups: RolloutGroups,
        advantages: Tensor,
    ) -> None:
        """Emits the first group of a step."""
        prompt = groups.prompts[0]
        samples = range(groups.rewards.shape[1])
        event = GroupLogged(
            step=step + 1,
            prompt=prompt.text,
            ground_truth=prompt.ground_truth,
            completions=[_completion_record(groups, advantages, sample) for sample in samples],
        )
        self.emit(event)

    def close(self) -> None:
        """Ends the workers of the rewards."""
        if self.scorer is not None:
            self.scorer.close()


def _completion_record(
    groups: RolloutGroups,
    advantages: Tensor,
    sample: int,
) -> Mapping[str, object]:
    """Returns a completion of the first group, for the event."""
    record = {
        "text": groups.texts[sample],
        "finish_reason": "length" if bool(groups.truncated[sample]) else "stop",
    }
    failure = groups.failed_rewards[sample]
    if failure is not None:
        unscored = f"{failure.reward}: {failure.reason}"
        return {
            **record,
            "reward": None,
            "advantage": None,
            "unscored": unscored,
            "parts": {},
        }
    return {
        **record,
        "reward": float(groups.rewards[0, sample]),
        "advantage": float(advantages[0, sample]),
        "parts": dict(
            zip(
                groups.reward_names,
                groups.reward_components[sample].tolist(),
                strict=True,
            )
        ),
    }
