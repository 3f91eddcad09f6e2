"""What the collector of GRPO and PPO makes of the completions that the engine draws: rewards and masks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from algorithm_helpers import real_collector
from models import VOCAB, llama_roles, perturb

from lowrank_tune.algorithms.base import AlgorithmContext
from lowrank_tune.algorithms.grpo import GRPO
from lowrank_tune.algorithms.ppo import PPO
from lowrank_tune.algorithms.reward_failures import RewardFailure
from lowrank_tune.algorithms.rollouts import RolloutAlgorithm, RolloutCollector
from lowrank_tune.config import GRPOConfig, PPOConfig
from lowrank_tune.data import PromptExample
from lowrank_tune.generation import Engine
from lowrank_tune.generation.outputs import Completion
from lowrank_tune.model.roles import Roles

FAILURE = RewardFailure("length", "timeout", "too slow")


@pytest.fixture(scope="module")
def roles() -> Roles:
    """A policy with a value head on it."""
    stacks = {"policy": ["policy"], "value": ["policy"], "reference": []}
    found = llama_roles(16, trainable=["policy", "value"], stacks=stacks, heads=["value"])
    perturb(found, "policy", size=0.05)
    return found


class RecordingRewards:
    """A reward client with two rewards: the number of tokens, and the row modulo 5. The rewards of `failed_rows` fail.
    Keeps the last completions in `completions`, by row."""

    def __init__(self, failed_rows: Sequence[int] = ()) -> None:
        self.failed_rows = failed_rows
        self.completions: dict[int, Completion] = {}

    def submit(self, key: int, prompt: PromptExample, text: str, completion: Completion) -> None:
        self.completions[key] = completion

    def values(self, row: int) -> list[float]:
        return [float(len(self.completions[row].token_ids)), float(row % 5)]

    def collect(self) -> Mapping[int, Sequence[float] | RewardFailure]:
        return {row: FAILURE if row in self.failed_rows else self.values(row) for row in self.completions}


def collector_with(roles: Roles, client: RecordingRewards, weights: Sequence[float] = (1.0, 1.0)) -> RolloutCollector:
    """Draws 4 completions for each of three prompts; a third of the vocabulary ends one, so that some end early."""
    return replace(
        real_collector(roles),
        reward_client=client,
        reward_names=("length", "row"),
        reward_weights=weights,
        stop_ids=frozenset(range(0, VOCAB, 3)),
        max_new_tokens=4,
    )


def algorithm_over(name: str, collector: RolloutCollector) -> RolloutAlgorithm:
    context = AlgorithmContext(collector.roles, fresh=False)
    if name == "grpo":
        return GRPO(context, GRPOConfig(), collector)
    return PPO(context, PPOConfig(critic="shared"), collector)


@pytest.mark.parametrize("weights", [(1.0, 0.5), (-2.0, 0.25), (0.0, 3.0), (0.0, 0.0)])
def test_the_reward_is_the_weighted_sum_of_its_rewards(roles: Roles, weights: tuple[float, float]) -> None:
    """Exactly, since all numbers are short fractions in binary. A completion whose reward failed has none."""
    client = RecordingRewards(failed_rows=(5,))
    groups = collector_with(roles, client, weights).collect(0, 0)
    assert groups.rewards.shape == (3, 4)
    for row, reward in enumerate(groups.rewards.flatten().tolist()):
        if row == 5:
            assert math.isnan(reward)
            continue
        length, rest = client.values(row)
        assert reward == weights[0] * length + weights[1] * rest, row
        assert groups.reward_components[row].tolist() == [length, rest], "the log has each reward before its weight"


def test_the_mask_of_a_rollout_is_the_completion_with_its_end_token(roles: Roles) -> None:
    client = RecordingRewards()
    groups = collector_with(roles, client).collect(0, 0)
    batch, width = groups.batch, groups.batch.input_ids.shape[1]
    reasons = {completion.finish_reason for completion in client.completions.values()}
    assert reasons == {"stop", "length"}, "the draw has no completion of one of the kinds"
    for row, completion in client.completions.items():
        prompt_ids = list(groups.prompts[row // 4].input_ids)
        start, end = len(prompt_ids), len(prompt_ids) + len(completion.token_ids)
        assert batch.input_ids[row, :end].tolist() == [*prompt_ids, *completion.token_ids]
        assert batch.attention_mask[row].tolist() == [column < end for column in range(width)]
        assert batch.completion_mask[row].tolist() == [start <= column < end for column in range(width)]
        assert batch.sampler_logps[row, start:end].tolist() == pytest.approx(completion.logps, abs=1e-6)
        assert not batch.sampler_logps[row, :start].any() and not batch.sampler_logps[row, end:].any()
        assert bool(groups.truncated[row]) == (completion.finish_reason == "length")


def test_dropped_tokens_are_a_metric_where_several_are_drawn_at_once(
    roles: Roles, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "completions/wasted_ratio" not in collector_with(roles, RecordingRewards()).collect(0, 0).stats()
    init = Engine.__init__

    def buffered(engine: Engine, *arguments: Any, **options: Any) -> None:
        init(engine, *arguments, **options)
        engine.buffered = True

    monkeypatch.setattr(Engine, "__init__", buffered)
    groups = collector_with(roles, RecordingRewards()).collect(0, 0)
    wasted = groups.stats()["completions/wasted_ratio"]
    kept = int(groups.batch.completion_mask.sum()) - len(groups.batch)
    assert wasted.count - wasted.total == kept and wasted.total > 0


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_the_end_token_of_a_completion_is_trained(roles: Roles, algorithm: str) -> None:
    client = RecordingRewards()
    collector = collector_with(roles, client)
    trained = algorithm_over(algorithm, collector)
    batch = trained.collect(0).batch
    weights = trained.token_weights(batch)
    stopped = [row for row, completion in client.completions.items() if completion.finish_reason == "stop"]
    assert stopped
    for row in stopped:
        last = int(batch.attention_mask[row].sum()) - 1
        assert int(batch.input_ids[row, last]) in collector.stop_ids
        assert weights[row, last] > 0 and not torch.any(weights[row, last + 1 :]), row


class OrderedRewards(RecordingRewards):
    """Keeps the order in which completions end too."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[int] = []

    def submit(self, key: int, prompt: PromptExample, text: str, completion: Completion) -> None:
        super().submit(key, prompt, text, completion)
        self.order.append(key)


@pytest.mark.parametrize("name", ["grpo", "ppo"])
@pytest.mark.parametrize("restores", [True, False])
def test_a_resumed_run_has_the_order_of_an_uninterrupted_one(roles: Roles, name: str, restores: bool) -> None:
    """The order in which twelve sequences take five slots depends on the lengths of the epochs before."""

    def algorithm(client: OrderedRewards) -> RolloutAlgorithm:
        return algorithm_over(name, replace(collector_with(roles, client), max_new_tokens=12))

    straight, resumed = OrderedRewards(), OrderedRewards()
    uninterrupted = algorithm(straight)
    uninterrupted.collect(0)
    state = json.loads(json.dumps(uninterrupted.state()))
    straight.order.clear()
    expected = [uninterrupted.collect(step).batch for step in (1, 2)]
    continued = algorithm(resumed)
    if restores:
        continued.restore(state)
    found = [continued.collect(step).batch for step in (1, 2)]
    assert (resumed.order == straight.order) is restores
    assert len(straight.order) == 24
    if restores:
        assert continued.state() == uninterrupted.state()
        for mine, theirs in zip(found, expected, strict=True):
            assert all(mine.tensors()[key].equal(value) for key, value in theirs.tensors().items())


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_checkpoint_without_lengths_is_restored(roles: Roles, name: str) -> None:
    algorithm = algorithm_over(name, collector_with(roles, RecordingRewards()))
    state = algorithm.state()
    del state["lengths"]
    algorithm.collect(0)
    algorithm.restore(state)
    assert algorithm.state()["lengths"]["completions"] == 0
