"""Rewards of trial completions: hand-worked shares of groups without signal."""

from __future__ import annotations

import pytest

from lowrank_tune.algorithms.reward_failures import RewardFailure
from lowrank_tune.assembly.reward_dry_run import NUM_COMPLETIONS, describe_rewards, weighted_rewards
from lowrank_tune.errors import UserError
from lowrank_tune.events import LogMessage


class FakeScorer:
    def __init__(self, weights, scores):
        self.weights = weights
        self.scores = scores

    def collect(self):
        return self.scores


def messages(scores, weights=(1.0, 0.5)):
    emitted = []
    return weighted_rewards(FakeScorer(list(weights), scores), emitted.append), emitted


def test_rewards_are_weighted_sums():
    rewards, emitted = messages({0: [1.0, 0.0], 3: [0.0, 1.0], 2: [1.0, -1.0]})
    assert rewards == {0: 1.0, 3: 0.5, 2: 0.5}
    assert emitted == []


def test_a_completion_without_a_score_is_no_zero():
    rewards, emitted = messages({0: [1.0, 0.0], 1: RewardFailure("answer", "timeout", "no answer in 5 s")})
    assert rewards == {0: 1.0}
    (message,) = emitted
    assert message.level == "warning"
    assert "1 of 2 trial completions could not be scored" in message.message
    assert "answer" in message.message


def test_rewards_without_a_score_end_the_run():
    failure = RewardFailure("answer", "error", "ValueError: no")
    with pytest.raises(UserError, match="none of 2 trial completions could be scored"):
        messages({0: failure, 1: failure})


def described(passed_by_prompt, num_generations=2):
    """The message for prompts of which so many completions have reward 3 and the rest 1."""
    rewards = {
        prompt * NUM_COMPLETIONS + sample: 3.0 if sample < passed else 1.0
        for prompt, passed in enumerate(passed_by_prompt)
        for sample in range(NUM_COMPLETIONS)
    }
    message = describe_rewards(rewards, len(passed_by_prompt), num_generations)
    assert isinstance(message, LogMessage)
    return message


def test_equal_rewards_have_no_signal():
    message = described([4, 4])
    assert message.level == "warning"
    assert "8 completions of 2 prompts all have reward 3: such groups have no signal" in message.message


def test_share_of_groups_without_signal():
    """Beta(1/2 + 2, 1/2 + 2) twice: E[p ** 2 + (1 - p) ** 2] = 2 * (2.5 * 3.5) / (5 * 6) = 0.583."""
    message = described([2, 2])
    assert message.message == (
        "50% of 8 trial completions have a reward above 2: about 58% of groups of 2 will have zero reward std"
    )
    assert message.level == "info"


def test_most_groups_without_signal_is_a_warning():
    """Prompts that always or never pass: (4.5 * 5.5 + 0.5 * 1.5) / (5 * 6) = 0.85 for each."""
    message = described([4, 0])
    assert "about 85% of groups of 2" in message.message
    assert message.level == "warning"


def test_the_share_is_a_mean_over_prompts():
    """(0.583 + 0.85) / 2 = 0.717, with 6 of 8 completions above the middle. The pooled rate would give 0.58."""
    message = described([4, 2])
    assert message.message.startswith("75% of 8 trial completions have a reward above 2: about 72% of groups of 2")


def test_request_ids_may_come_in_any_order_and_with_gaps():
    rewards = {7: 1.0, 0: 3.0, 1: 3.0, 2: 1.0, 4: 3.0}
    message = describe_rewards(rewards, 2, 2)
    # Prompt 0: 2 of 3; prompt 1: 1 of 2. Mean of the two rates 58 %.
    assert message.message.startswith("58% of 5 trial completions")
