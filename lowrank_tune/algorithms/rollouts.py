"""Rollouts: completions of the prompts of a step, drawn from the policy and scored while others are still decoded. The
common part of GRPO and PPO."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lowrank_tune.algorithms.base import Algorithm, AlgorithmContext
from lowrank_tune.algorithms.reference_check import check_reference
from lowrank_tune.algorithms.reward_failures import RewardFailure, RewardFailureTracker, describe_failures
from lowrank_tune.batch import Batch, RolloutBatch, concat_batches
from lowrank_tune.errors import TrainingError
from lowrank_tune.functional import weighted_sum
from lowrank_tune.generation import Engine
from lowrank_tune.generation.completion_lengths import CompletionLengths
from lowrank_tune.generation.outputs import Completion
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.model.roles import Roles
from lowrank_tune.stats import Stats, WeightedMean

if TYPE_CHECKING:  # an algorithm must run where pydantic is not installed (benchmarks/gpu.py)
    from lowrank_tune.data import PromptExample


class RewardClient(Protocol):
    """Scores completions in the background."""

    def submit(
        self,
        key: int,
        prompt: PromptExample,
        text: str,
        completion: Completion,
    ) -> None:
        """Begins to score a completion."""

    def collect(self) -> Mapping[int, Sequence[float] | RewardFailure]:
        """Waits for all scores; returns a value for each reward, or the failure, by key."""


@dataclass
class RolloutGroups:
    """Groups of completions: the n completions of each prompt, in B = groups * n adjacent rows."""

    batch: RolloutBatch
    rewards: Tensor
    """(groups, n) float64; nan where a reward failed."""
    reward_components: Tensor
    """(B, rewards) float64: each reward before its weight; nan where a reward failed."""
    truncated: Tensor
    """(B,) bool: cut at the maximum length."""
    reward_names: Sequence[str]
    texts: list[str]
    prompts: list[PromptExample]
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds by name of the metric."""
    shaped_rewards: Tensor = field(default_factory=lambda: torch.zeros(0))
    """(groups, n): rewards minus penalties. Default: the rewards."""
    failed_rewards: list[RewardFailure | None] = field(default_factory=list)
    """For each of B completions the failure that left it without a reward. Default: none failed."""
    wasted_ratio: WeightedMean | None = None
    """Share of the drawn tokens that were dropped, where several tokens are drawn between two reads of the host."""

    def __post_init__(self) -> None:
        if not self.shaped_rewards.numel():
            self.shaped_rewards = self.rewards
        if not self.failed_rewards:
            self.failed_rewards = [None] * len(self.batch)

    @property
    def scored(self) -> Tensor:
        """(groups, n) bool: the completion has a reward."""
        return torch.tensor([failure is None for failure in self.failed_rewards]).view_as(self.rewards)

    @property
    def num_groups(self) -> int:
        return len(self.rewards)

    def scored_rows(self) -> RolloutBatch:
        """Returns the rows with a reward."""
        rows = self.scored.flatten().nonzero().squeeze(1)
        batch = self.batch.select_rows(rows)
        if batch.shared_prefix is not None:
            # The first remaining row of a group is now the one that the others share their prefix with.
            group = rows // self.rewards.shape[1]
            is_first = torch.ones_like(rows, dtype=torch.bool)
            is_first[1:] = group[1:] != group[:-1]
            batch.shared_prefix = batch.shared_prefix.masked_fill(is_first, 0)
        return batch

    def stats(self) -> Stats:
        """Returns the metrics of the completions; those of rewards without completions whose reward failed."""
        scored = self.scored
        rewards = self.rewards[scored]
        stds = self._group_stds()
        lengths = self.batch.completion_mask.sum(dim=1)
        stats = {
            "reward": WeightedMean(rewards.sum(), rewards.numel()),
            "reward_std": WeightedMean(stds.sum(), len(stds)),
        }
        if len(self.reward_names) > 1:
            components = self.reward_components[scored.flatten()]
            for index, name in enumerate(self.reward_names):
                stats[f"rewards/{name}/mean"] = WeightedMean(components[:, index].sum(), len(components))
        stats["completions/mean_length"] = WeightedMean(lengths.sum(), len(lengths))
        stats["completions/clipped_ratio"] = WeightedMean(self.truncated.sum(), len(self.truncated))
        if self.wasted_ratio is not None:
            stats["completions/wasted_ratio"] = self.wasted_ratio
        for name, seconds in self.timings.items():
            stats[name] = WeightedMean(seconds, 1)
        return stats

    def _group_stds(self) -> Tensor:
        """Returns the standard deviation of the rewards of each group that has any."""
        scored = self.scored
        if bool(scored.all()):
            return self.rewards.std(dim=1, correction=0)
        stds = []
        for rewards, has_reward in zip(self.rewards, scored, strict=True):
            if bool(has_reward.any()):
                stds.append(float(rewards[has_reward].std(correction=0)))
        return torch.tensor(stds, dtype=self.rewards.dtype)

    def select_groups(self, selected: Tensor) -> RolloutGroups:
        """Returns the groups of a mask, (groups,) bool."""
        group_indices = selected.nonzero().flatten().tolist()
        rows = selected.repeat_interleave(self.rewards.shape[1]).nonzero().squeeze(1)
        row_indices = rows.tolist()
        return replace(
            self,
            batch=self.batch.select_rows(rows, width=self.batch.input_ids.shape[1]),
            rewards=self.rewards[selected],
            reward_components=self.reward_components[rows],
            truncated=self.truncated[rows],
            texts=[self.texts[row] for row in row_indices],
            prompts=[self.prompts[group] for group in group_indices],
            shaped_rewards=self.shaped_rewards[selected],
            failed_rewards=[self.failed_rewards[row] for row in row_indices],
        )

    @staticmethod
    def concat(draws: Sequence[RolloutGroups], pad_id: int) -> RolloutGroups:
        """Returns the groups of all draws, padded to one width, with the timings of the first."""
        first = draws[0]
        if len(draws) == 1:
            return first
        joined: dict[str, Any] = {"batch": concat_batches([draw.batch for draw in draws], pad_id)}
        for name in ("rewards", "reward_components", "truncated", "shaped_rewards"):
            joined[name] = torch.cat([getattr(draw, name) for draw in draws])
        for name in ("texts", "prompts", "failed_rewards"):
            joined[name] = list(chain.from_iterable(getattr(draw, name) for draw in draws))
        return replace(first, **joined)


def log_nothing(
    step: int,
    groups: RolloutGroups,
    advantages: Tensor,
) -> None:
    """The default of `RolloutCollector.log_group`."""


@dataclass(kw_only=True)
class RolloutCollector:
    """Draws and scores the completions of a step."""

    roles: Roles
    prompts: Callable[[int, int, int | None], list[PromptExample]]
    """`prompts(step, draw, count)` returns the prompts of a step: for draw 0 the planned ones, for later draws `count`
    replacements."""
    reward_client: RewardClient
    reward_names: Sequence[str]
    reward_weights: Sequence[float]
    decode: Callable[[Sequence[int]], str]
    stop_ids: frozenset[int]
    pad_id: int
    num_generations: int
    max_new_tokens: int
    temperature: float
    max_num_seqs: int
    micro_tokens: int
    """Maximum number of tokens of a forward pass without gradient."""
    seed_of: Callable[[int], int]
    """Returns the seed of a draw; the draws of a run are numbered 16 * step + draw."""
    log_group: Callable[[int, RolloutGroups, Tensor], None] = log_nothing
    """Called in each step, with the rollouts and their advantages (groups, n)."""
    failures: RewardFailureTracker = field(default_factory=RewardFailureTracker)
    lengths: CompletionLengths = field(default_factory=CompletionLengths)

    def collect(
        self,
        step: int,
        draw: int,
        count: int | None = None,
    ) -> RolloutGroups:
        """Returns the completions of the prompts, grouped by prompt, with their rewards."""
        start_time = time.perf_counter()
        prompts = self.prompts(step, draw, count)
        engine = Engine(self.roles, "policy", self.max_num_seqs)
        completions, texts = self._generate(engine, prompts, self.seed_of(step * 16 + draw))
        generation_end = time.perf_counter()
        scores = self.reward_client.collect()
        scores_by_row = [scores[row] for row in range(len(completions))]
        timings = {
            "rollout_seconds": generation_end - start_time,
            "reward_seconds": time.perf_counter() - generation_end,
        }
        failed_rewards = [row if isinstance(row, RewardFailure) else None for row in scores_by_row]
        self.failures.count(failed_rewards)
        components = [self._components(row) for row in scores_by_row]
        rewards = [weighted_sum(row, self.reward_weights) for row in components]
        return RolloutGroups(
            batch=rollout_batch([prompt.input_ids for prompt in prompts], completions, self.pad_id),
            rewards=torch.tensor(rewards, dtype=torch.float64).view(len(prompts), self.num_generations),
            reward_components=torch.tensor(components, dtype=torch.float64),
            truncated=torch.tensor([completion.finish_reason == "length" for completion in completions]),
            reward_names=self.reward_names,
            texts=texts,
            prompts=prompts,
            timings=timings,
            failed_rewards=failed_rewards,
            wasted_ratio=engine.wasted_ratio(),
        )

    def _generate(
        self,
        engine: Engine,
        prompts: Sequence[PromptExample],
        seed: int,
    ) -> tuple[list[Completion], list[str]]:
        """Returns the completions and their texts, in the order of the rows. Each is submitted to the rewards as soon
        as it ends, under its row."""
        n = self.num_generations
        sampling = SamplingParams(
            self.max_new_tokens,
            self.stop_ids,
            self.temperature,
            seed,
        )
        prompt_ids = [prompt.input_ids for prompt in prompts]
        expected_lengths = self.lengths.expected(prompt_ids)
        completed: list[tuple[int, Completion, str]] = []
        for completion in engine.generate(prompt_ids, n, sampling, expected_lengths=expected_lengths):
            row = completion.prompt * n + completion.sample
            text = self.decode(completion.content_ids)
            self.reward_client.submit(
                row,
                prompts[completion.prompt],
                text,
                completion,
            )
            completed.append((row, completion, text))
        completed.sort(key=itemgetter(0))
        completions = [completion for _, completion, _ in completed]
        self.lengths.record(prompt_ids, completions)
        return completions, [text for _, _, text in completed]

    def _components(self, scores: Sequence[float] | RewardFailure) -> list[float]:
        """Returns the value of each reward of a completion; nan if one failed, so that it cannot be used by mistake."""
        if isinstance(scores, RewardFailure):
            return [math.nan] * len(self.reward_weights)
        return list(scores)

    def logps(
        self,
        role: str,
        batch: RolloutBatch,
    ) -> Tensor:
        """Returns the log-probs of the completions under a role, without gradient, (B, T) on the CPU."""
        inputs = Batch(
            batch.input_ids,
            batch.attention_mask,
            batch.completion_mask,
            shared_prefix=batch.shared_prefix,
        )

        def compute(micro: Batch) -> Tensor:
            return self.roles.logps(role, micro, self.temperature).logps

        return map_micro_batches(
            self.roles,
            inputs,
            self.micro_tokens,
            compute,
        )


def map_micro_batches(
    roles: Roles,
    inputs: Batch,
    micro_tokens: int,
    function: Callable[[Batch], Tensor],
) -> Tensor:
    """Returns `function` of all rows, (B, T) on the CPU, without gradient; as many rows at once as `micro_tokens` and
    the memory allow."""
    num_rows, columns = inputs.input_ids.shape
    result = torch.zeros(num_rows, columns)

    def compute(rows: Sequence[int]) -> Tensor:
        micro = inputs.select_rows(torch.tensor(list(rows)), width=columns).to(roles.base.device)
        with roles.inference_mode():
            return function(micro).cpu()

    # All rows have the same width, so each batch has consecutive rows.
    for rows, values in roles.limits.forward_batches([columns] * num_rows, micro_tokens, compute):
        result[rows[0] : rows[-1] + 1] = values
    return result


def rollout_batch(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    pad_id: int,
) -> RolloutBatch:
    """Returns a row of prompt and completion for each completion, padded on the right."""
    num_rows = len(completions)
    width = max(len(prompts[completion.prompt]) + len(completion.token_ids) for completion in completions)
    input_ids = torch.full(
        (num_rows, width),
        pad_id,
        dtype=torch.long,
    )
    attention_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    completion_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    sampler_logps = torch.zeros(input_ids.shape)
    shared_prefix = torch.zeros(num_rows, dtype=torch.long)
    for row, completion in enumerate(completions):
        assert completion.logps is not None, "the engine keeps log-probs"
        prompt_ids = prompts[completion.prompt]
        start = len(prompt_ids)
        end = start + len(completion.token_ids)
        input_ids[row, :start] = torch.tensor(list(prompt_ids))
        input_ids[row, start:end] = torch.tensor(completion.token_ids)
        attention_mask[row, :end] = True
        completion_mask[row, start:end] = True
        sampler_logps[row, start:end] = torch.tensor(completion.logps)
        is_first_of_group = row == 0 or completions[row - 1].prompt != completion.prompt
        if not is_first_of_group:
            shared_prefix[row] = start
    return RolloutBatch(
        input_ids,
        attention_mask,
        completion_mask,
        shared_prefix=shared_prefix,
        sampler_logps=sampler_logps,
    )


class RolloutAlgorithm(Algorithm[RolloutBatch]):
    """An algorithm whose policy draws the rows of each step."""

    def __init__(
        self,
        context: AlgorithmContext,
        collector: RolloutCollector,
    ) -> None:
        super().__init__(context)
        self.collector = collector
        self._num_completions = 0
        self._reward_failures: list[RewardFailure] = []

    def record_failures(self, groups: RolloutGroups) -> Stats:
        """Stores the reward failures of a step for its warnings; returns their metrics."""
        self._num_completions = len(groups.failed_rewards)
        self._reward_failures = [failure for failure in groups.failed_rewards if failure is not None]
        return self.collector.failures.stats(self._reward_failures)

    def check(
        self,
        micro: RolloutBatch,
        step: int,
    ) -> None:
        check_reference(self.context, micro, step)

    def diagnostics(self, metrics: Mapping[str, float]) -> Iterator[str]:
        yield from describe_failures(self._reward_failures, self._num_completions)

    def state(self) -> dict[str, Any]:
        return {**self.collector.failures.state(), "lengths": self.collector.lengths.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.collector.failures.restore(state)
        self.collector.lengths.restore(state.get("lengths", {}))


def check_sampler_mismatch(
    mismatch: float,
    limit: float,
    setting: str,
) -> None:
    """Compares the mean |log p - log p_sampler| of a step, nats per token, with its limit. Raises TrainingError above
    it; `setting` is the key of the limit."""
    if mismatch > limit:
        raise TrainingError(
            f"the sampler's log-probs and the policy's differ by {mismatch:.3f} nats a token, more than {setting}, "
            f"{limit:g}: ratios would compare what was never drawn"
        )
