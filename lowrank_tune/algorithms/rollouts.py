"""Harvesting: completions of a step's prompts, drawn from the policy and scored while others still decode. GRPO's and
PPO's `collect`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lowrank_tune.algorithms.reward_failures import RewardFailure, RewardFailureTracker
from lowrank_tune.batch import Batch
from lowrank_tune.generation import Engine
from lowrank_tune.generation.outputs import Completion
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.model.roles import Roles
from lowrank_tune.stats import Stats, WeightedMean

if TYPE_CHECKING:  # an algorithm must run where pydantic is not installed (benchmarks/gpu.py)
    from lowrank_tune.data import PromptExample


class RewardClient(Protocol):
    """Scores completions on the side: `submit` as each finishes, `collect` waits for the rest. By key a value for each
    reward, or why there is none."""

    def submit(self, key: int, prompt: PromptExample, text: str, completion: Completion) -> None: ...
    def collect(self) -> Mapping[int, Sequence[float] | RewardFailure]: ...


@dataclass
class RolloutBatch:
    """Groups of completions. `batch` has prompt and completion in each row, groups adjacent, with `extra["sampler"]`,
    the log-probs that the completions were drawn with; rewards, and `shaped_rewards`, after penalties (groups, n);
    `reward_components` (B, rewards) before weighting. `failed_rewards` (B of them) says of what no reward can be told
    for why; the other three are nan there."""

    batch: Batch
    rewards: Tensor
    reward_components: Tensor
    truncated: Tensor
    reward_names: Sequence[str]
    texts: list[str]
    prompts: list[PromptExample]
    timings: dict[str, float] = field(default_factory=dict)
    shaped_rewards: Tensor = field(default_factory=lambda: torch.zeros(0))
    failed_rewards: list[RewardFailure | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.shaped_rewards.numel():
            self.shaped_rewards = self.rewards
        self.failed_rewards = self.failed_rewards or [None] * len(self.batch)

    @property
    def scored(self) -> Tensor:
        """(groups, n) bool."""
        return torch.tensor([failure is None for failure in self.failed_rewards]).view_as(self.rewards)

    @property
    def num_groups(self) -> int:
        return len(self.rewards)

    def scored_rows(self) -> Batch:
        """The rows that were scored."""
        rows = self.scored.flatten().nonzero().squeeze(1)
        batch = self.batch.select_rows(rows)
        group = rows // self.rewards.shape[1]
        if "shared" in batch.extra:  # where a group has lost its first row, another one is that now
            is_first = torch.ones_like(rows, dtype=torch.bool).index_put(
                (torch.arange(1, len(rows)),), group[1:] != group[:-1]
            )
            batch.extra["shared"] = batch.extra["shared"].masked_fill(is_first, 0)
        return batch

    def num_informative_groups(self, zero_std_groups: Callable[[Tensor, Tensor], Tensor]) -> int:
        """How many groups have a signal."""
        return self.num_groups - int(zero_std_groups(self.shaped_rewards, self.scored).sum())

    def stats(self) -> Stats:
        """What a person watches, as means. Of rewards, over what was scored."""
        rewards = self.rewards
        scored = self.scored
        lengths = self.batch.completion_mask.sum(dim=1)
        components = self.reward_components
        stds = rewards.std(dim=1, correction=0)
        if not bool(scored.all()):
            scored_groups = [
                group[has_reward] for group, has_reward in zip(rewards, scored, strict=True) if bool(has_reward.any())
            ]
            stds = torch.tensor([float(group.std(correction=0)) for group in scored_groups], dtype=rewards.dtype)
            rewards = rewards[scored]
            components = components[scored.flatten()]
        names = self.reward_names if len(self.reward_names) > 1 else ()
        by_reward = {
            f"rewards/{name}/mean": WeightedMean(components[:, i].sum(), len(components))
            for i, name in enumerate(names)
        }
        return {
            "reward": WeightedMean(rewards.sum(), rewards.numel()),
            "reward_std": WeightedMean(stds.sum(), len(stds)),
            **by_reward,
            "completions/mean_length": WeightedMean(lengths.sum(), len(lengths)),
            "completions/clipped_ratio": WeightedMean(self.truncated.sum(), len(self.truncated)),
            **{name: WeightedMean(value, 1) for name, value in self.timings.items()},
        }

    def select_groups(self, selected: Tensor) -> RolloutBatch:
        """These groups, (groups,) bool."""
        n = self.rewards.shape[1]
        rows = selected.repeat_interleave(n)
        row_indices = rows.nonzero().squeeze(1)
        indices: list[int] = row_indices.tolist()
        batch = self.batch.select_rows(row_indices, self.batch.input_ids.shape[1])
        return RolloutBatch(
            batch,
            self.rewards[selected],
            self.reward_components[rows],
            self.truncated[rows],
            self.reward_names,
            [self.texts[i] for i in indices],
            [prompt for prompt, keep in zip(self.prompts, selected.tolist(), strict=True) if keep],
            self.timings,
            self.shaped_rewards[selected],
            [self.failed_rewards[i] for i in indices],
        )

    @classmethod
    def concat(cls, rollouts: Sequence[RolloutBatch], pad_id: int) -> RolloutBatch:
        """One after the other, padded to one width."""
        if len(rollouts) == 1:
            return rollouts[0]
        width = max(rollout.batch.input_ids.shape[1] for rollout in rollouts)
        batches = [_pad_columns(rollout.batch, width, pad_id) for rollout in rollouts]
        extra = {name: torch.cat([batch.extra[name] for batch in batches]) for name in batches[0].extra}
        input_ids, attention_mask, completion_mask = (
            torch.cat([getattr(batch, name) for batch in batches])
            for name in ("input_ids", "attention_mask", "completion_mask")
        )
        batch = Batch(input_ids, attention_mask, completion_mask, extra=extra)
        rewards, components, truncated, shaped_rewards = (
            torch.cat([getattr(rollout, name) for rollout in rollouts])
            for name in ("rewards", "reward_components", "truncated", "shaped_rewards")
        )
        return cls(
            batch,
            rewards,
            components,
            truncated,
            rollouts[0].reward_names,
            [text for rollout in rollouts for text in rollout.texts],
            [prompt for rollout in rollouts for prompt in rollout.prompts],
            rollouts[0].timings,
            shaped_rewards,
            [failure for rollout in rollouts for failure in rollout.failed_rewards],
        )


def _pad_columns(batch: Batch, width: int, pad_id: int) -> Batch:
    num_columns = width - batch.input_ids.shape[1]

    def wide(tensor: Tensor, value: float) -> Tensor:
        if tensor.ndim > 1:
            return torch.nn.functional.pad(tensor, (0, num_columns), value=value)
        return tensor

    return Batch(
        wide(batch.input_ids, pad_id),
        wide(batch.attention_mask, False),
        wide(batch.completion_mask, False),
        extra={name: wide(tensor, 0.0) for name, tensor in batch.extra.items()},
    )


@dataclass
class RolloutCollector:
    """Draws completions. `prompts(step, draw, count)` gives the prompts of a step: the planned ones, or `count` others
    for a later draw."""

    roles: Roles
    prompts: Callable[[int, int, int | None], list[PromptExample]]
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
    seed_of: Callable[[int], int]
    log_group: Callable[[int, RolloutBatch, Tensor], None] = lambda step, rollout, advantages: None
    """Is told of each step's rollout, with the advantages (groups, n)."""
    failures: RewardFailureTracker = field(default_factory=RewardFailureTracker)

    def collect(self, step: int, draw: int, count: int | None = None) -> RolloutBatch:
        """The completions of a step's prompts, grouped in the prompts' order, with their rewards."""
        start_time = time.perf_counter()
        prompts = self.prompts(step, draw, count)
        sampling = SamplingParams(self.max_new_tokens, self.stop_ids, self.temperature, self.seed_of(step * 16 + draw))
        n = self.num_generations
        done: dict[int, Completion] = {}
        texts: dict[int, str] = {}
        for completion in Engine(self.roles, "policy", self.max_num_seqs).generate(
            [one.input_ids for one in prompts],
            n,
            sampling,
        ):
            key = completion.prompt * n + completion.sample
            if completion.finish_reason == "stop":
                body = completion.token_ids[:-1]
            else:
                body = completion.token_ids
            done[key] = completion
            texts[key] = self.decode(body)
            self.reward_client.submit(key, prompts[completion.prompt], texts[key], completion)
        rollout_end = time.perf_counter()
        scores = self.reward_client.collect()
        failed_rewards = [
            one if isinstance(one := scores[key], RewardFailure) else None for key in range(len(prompts) * n)
        ]
        self.failures.count(failed_rewards)
        reward_components = torch.tensor(
            [_reward_values(scores[key], len(self.reward_weights)) for key in range(len(prompts) * n)],
            dtype=torch.float64,
        )
        rewards = (reward_components @ torch.tensor(list(self.reward_weights), dtype=torch.float64)).view(
            len(prompts), n
        )
        completions = [done[key] for key in range(len(prompts) * n)]
        truncated = torch.tensor([one.finish_reason == "length" for one in completions])
        seconds = {"rollout_seconds": rollout_end - start_time, "reward_seconds": time.perf_counter() - rollout_end}
        batch = _batch([prompts[one.prompt].input_ids for one in completions], completions, self.pad_id)
        ordered_texts = [texts[key] for key in range(len(completions))]
        return RolloutBatch(
            batch,
            rewards,
            reward_components,
            truncated,
            self.reward_names,
            ordered_texts,
            prompts,
            seconds,
            failed_rewards=failed_rewards,
        )

    def logps(self, role: str, batch: Batch) -> Tensor:
        """Log-probs of what was written by a role, no gradient, (B, T) on the CPU."""
        rows, columns = batch.input_ids.shape
        result = torch.zeros(rows, columns)

        def read(units: Sequence[int]) -> Tensor:
            places = torch.tensor(list(units))
            if "shared" in batch.extra:
                shared = {"shared": batch.extra["shared"][places]}
            else:
                shared = {}
            part = Batch(
                batch.input_ids[places],
                batch.attention_mask[places],
                batch.completion_mask[places],
                extra=shared,
            ).to(self.roles.base.device)
            with self.roles.inference_mode():
                return self.roles.logps(role, part, self.temperature).logps.cpu()

        for units, logps in map_micro_batches(self.roles, rows, columns, self.micro_tokens, read):
            result[units[0] : units[-1] + 1] = logps
        return result


def map_micro_batches(
    roles: Roles,
    rows: int,
    columns: int,
    micro_tokens: int,
    function: Callable[[Sequence[int]], Tensor],
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """What `function` makes of neighboring rows, as many at once as fit `micro_tokens` and the memory."""
    at_once = max(1, micro_tokens // columns)
    for start in range(0, rows, at_once):
        yield from roles.limits.split_on_oom(
            "forward_tokens",
            range(start, min(start + at_once, rows)),
            columns,
            function,
        )


def _reward_values(scores: Sequence[float] | RewardFailure, count: int) -> list[float]:
    """Not a number is what nobody can take for a reward."""
    if isinstance(scores, RewardFailure):
        return [math.nan] * count
    return list(scores)


def _batch(prompts: Sequence[Sequence[int]], completions: Sequence[Completion], pad_id: int) -> Batch:
    """Rows of prompt and completion, padded on the right."""
    width = max(
        len(prompt) + len(completion.token_ids) for prompt, completion in zip(prompts, completions, strict=True)
    )
    input_ids = torch.full((len(completions), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    completion_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    sampler = torch.zeros(input_ids.shape)
    shared = torch.zeros(len(completions), dtype=torch.long)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        start = len(prompt)
        end = len(prompt) + len(completion.token_ids)
        input_ids[row, :start] = torch.tensor(list(prompt))
        input_ids[row, start:end] = torch.tensor(completion.token_ids)
        attention_mask[row, :end] = True
        completion_mask[row, start:end] = True
        shared[row] = start if row and completions[row - 1].prompt == completion.prompt else 0
        assert completion.logps is not None, "the engine keeps log-probs"
        sampler[row, start:end] = torch.tensor(completion.logps)
    return Batch(input_ids, attention_mask, completion_mask, extra={"sampler": sampler, "shared": shared})
