"""Each diagnosis: given for a run with its fault, and not for others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest

from lowrank_tune.algorithms import dpo
from lowrank_tune.events import Evaluated, GroupLogged, LogMessage, RunEnded, RunStarted, StepEnd
from lowrank_tune.ui.diagnostics import diagnose
from lowrank_tune.ui.diagnostics.pairs import CHOSEN_LOGP_DROP
from lowrank_tune.ui.state import State

HEALTHY = {
    "loss": lambda s: 1 / (1 + s / 10),
    "grad_norm": lambda s: 0.5 + 0.1 * math.sin(s),
    "kl": lambda s: s / 100,
    "learning_rate": lambda s: 1e-3,
    "updated_param_fraction": lambda s: 1.0,
    "update_ratio": lambda s: 1e-3,
}
Values = Mapping[str, Callable[[int], float]]


def after(
    steps: int, algorithm: str = "sft", validation: tuple[float, ...] = (), **changed: Callable[[int], float]
) -> State:
    """A state after so many steps of a healthy run with changed statistics."""
    state = State()
    state.apply(RunStarted(name="x", algorithm=algorithm, model="m", roles={}, reference="r", steps=steps))
    values: Values = {**HEALTHY, **changed}
    for step in range(1, steps + 1):
        state.apply(
            StepEnd(
                step=step, steps=steps, stats={name: of(step) for name, of in values.items()}, seconds=1.0, tokens=10
            )
        )
    for index, value in enumerate(validation):
        state.apply(Evaluated(step=10 * (index + 1), stats={"eval_loss": value}))
    return state


PAIRS: Values = {
    "accuracy": lambda s: min(0.95, 0.5 + s / 40),
    "margin": lambda s: s / 10,
    "rewards/accuracies": lambda s: min(0.95, 0.5 + s / 40),
    "rewards/margins": lambda s: s / 10,
    "logps/chosen_delta": lambda s: -s / 100,
}
"""Of a healthy run on pairs."""


def with_evaluation(state: State, **stats: float) -> State:
    state.apply(Evaluated(step=state.step, stats=stats))
    return state


def checked(state: State, *accuracies: float) -> State:
    """The same state after so many validations."""
    for accuracy in accuracies:
        with_evaluation(state, **{"eval_accuracy": accuracy, "eval_rewards/accuracies": accuracy})
    return state


ROLLOUTS: Values = {
    "loss": lambda s: 1e-4,
    "reward": lambda s: min(0.7, 0.2 + s / 50),
    "reward_std": lambda s: 0.4,
    "frac_reward_zero_std": lambda s: 0.2,
    "completions/clipped_ratio": lambda s: 0.05,
    "completions/mean_length": lambda s: 20 + s / 4,
    "entropy": lambda s: 0.3,
    "kl": lambda s: s / 400,
    "sampling/sampling_logp_difference/mean": lambda s: 1e-6,
}
"""Of a healthy run on rewards between 0 and 1."""


def rollout_state(
    steps: int = 40,
    rewards: tuple[float, ...] = (0.0, 1.0),
    exact: tuple[float, ...] = (),
    algorithm: str = "grpo",
    **changed: Callable[[int], float],
) -> State:
    """A state after so many steps of GRPO, whose newest group has these rewards."""
    state = after(steps, algorithm, **{**ROLLOUTS, **changed})
    completions = [
        {"text": "x", "reward": reward, "advantage": 0.0, "finish_reason": "stop", "parts": {}} for reward in rewards
    ]
    state.apply(GroupLogged(step=steps, prompt="p", completions=completions))
    for place, value in enumerate(exact):
        state.apply(Evaluated(step=10 * (place + 1), stats={"heldout/policy/accuracy": value}))
    return state


def diagnoses_text(state: State) -> str:
    return " / ".join(f"{diagnosis.level}: {diagnosis.text}" for diagnosis in diagnose(state))


def test_diagnose_of_a_healthy_a_young_and_a_failed_run() -> None:
    assert diagnoses_text(State()).startswith(": no step yet")
    assert diagnoses_text(after(5)) == ": too early: 5 of the first 20 steps"
    assert diagnoses_text(after(40)).startswith(
        "good: all good: loss 0."
    ) and "validation 0.9 -> 0.5" in diagnoses_text(after(40, validation=(0.9, 0.6, 0.5)))
    failed = after(5)
    failed.apply(RunEnded(status="failed", step=5, seconds=1.0))
    assert "the run failed" in diagnoses_text(failed)


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        (after(40, loss=lambda s: 1.0), "warning: the loss does not fall: 1 at first, 1 now"),
        (after(40, loss=lambda s: 1 + s / 10), "bad: the loss rises"),
        (after(40, loss=lambda s: float("nan") if s == 40 else 1 / s), "bad: loss is not a number"),
        (
            after(40, grad_norm=lambda s: 0.5 if s < 38 else 50.0),
            "bad: the gradient norm explodes: 50, 100 times the usual",
        ),
        (
            after(40, kl=lambda s: 9.0),
            "warning: KL to the reference is 9 nats a token, above 5: lower train",
        ),
        (after(40, "grpo", kl=lambda s: 0.8), "warning: KL to the reference is 0.8 nats a token, above 0.5"),
        (
            after(40, "dpo", kl=lambda s: 3.0, **PAIRS),
            "above 2: raise dpo.beta or lower train.learning_rate",
        ),
        (
            after(40, "dpo", **{**PAIRS, "logps/chosen_delta": lambda s: -s / 60}),
            "bad: the chosen answers are unlearned: 0.65 nats a token less likely than under the reference: raise "
            "dpo.beta",
        ),
        (
            after(40, "dpo", **{**PAIRS, "rewards/accuracies": lambda s: 0.5, "rewards/margins": lambda s: 0.0}),
            "not separated: 50% of the training pairs are right, the margin does not grow: a higher "
            "train.learning_rate",
        ),
        (
            after(40, "dpo", **{**PAIRS, "rewards/accuracies": lambda s: 0.53}),
            "separated: 53% of the training pairs are right, the margin grows slowly",
        ),
        (
            after(40, "reward", **{**PAIRS, "accuracy": lambda s: 0.2}),
            "bad: the rejected answers are preferred: 20% of the training pairs are right: check",
        ),
        (
            after(40, "dpo", loss=lambda s: 0.693, **{**PAIRS, "rewards/accuracies": lambda s: 0.7}),
            "warning: the loss does not fall: 0.693 at first",
        ),
        (
            checked(after(40, "reward", **PAIRS), 0.6, 0.5, 0.52),
            "warning: held-out pairs are not separated: 54% are right, in training 95%: more or",
        ),
        (
            checked(after(40, "reward", **{**PAIRS, "accuracy": lambda s: 0.99}), 0.7, 0.9, 0.8, 0.82),
            "warning: the reward model is confident about its training pairs (99% right) and worse at held-out ones "
            "(90% -> 81%): fewer steps",
        ),
        (
            with_evaluation(after(40, "reward", **PAIRS), **{"pairs/length_correlation": 0.61}),
            "warning: the score follows the length of an answer (correlation +0.61): "
            "longer ones win regardless of their content: balance the lengths in the data",
        ),
        (
            with_evaluation(after(40, "dpo", **PAIRS), **{"pairs/length_correlation": -0.7}),
            "shorter ones win regardless of their content: balance the lengths in the data, "
            "or set dpo.loss_type=sigmoid_norm",
        ),
        (
            rollout_state(kl=lambda s: 0.8),
            "warning: KL to the reference is 0.8 nats a token, above 0.5: raise grpo.beta",
        ),
        (
            rollout_state(entropy=lambda s: 0.3 / s**2, reward=lambda s: min(0.5, 0.2 + s / 50)),
            "nats a token while the reward stalls: the completions are all alike: raise grpo.beta",
        ),
        (
            rollout_state(reward=lambda s: 0.3),
            "warning: the reward does not rise: 0.3 at first, 0.3 now: a higher train.learning_rate",
        ),
        (
            rollout_state(reward=lambda s: 0.8 - s / 60),
            "bad: the reward falls: 0.708 at first, 0.208 now: lower train.learning_rate",
        ),
        (
            rollout_state(frac_reward_zero_std=lambda s: 0.9),
            "warning: 90% of the groups have zero reward std: their completions give no gradient: raise",
        ),
        (
            rollout_state(reward_std=lambda s: 0.005),
            "warning: rewards within a group hardly differ (spread 0.005): raise rollout",
        ),
        (
            rollout_state(
                rewards=(0.0, 0.0), reward=lambda s: 0.0, frac_reward_zero_std=lambda s: 1.0, reward_std=lambda s: 0.0
            ),
            "bad: every completion has the reward 0, so there is nothing to learn: an easier task",
        ),
        (
            rollout_state(
                **{
                    "completions/clipped_ratio": lambda s: s / 100,
                    "completions/mean_length": lambda s: 20.0 + s,
                }
            ),
            "warning: 38% of the completions are cut off by the limit, which grew from 23 to 58 tokens: raise "
            "rollout.max_new_tokens",
        ),
        (
            rollout_state(**{"sampling/sampling_logp_difference/mean": lambda s: 0.05}),
            "warning: sampling and training disagree by 0.05 nats a token",
        ),
        (
            rollout_state(exact=(0.5, 0.7, 0.5, 0.4)),
            "bad: the reward rises and held-out answers get worse (70% -> 45% exact): the reward does not measure",
        ),
        (
            after(40, updated_param_fraction=lambda s: 0.0),
            "bad: nothing is learned: the last step moved 0.0% of the adapter",
        ),
        (after(40, update_ratio=lambda s: 1e-12), "bad: nothing is learned"),
        (
            after(40, skipped_steps=lambda s: 3.0),
            "warning: 3 of 40 steps had no finite loss or gradient and were skipped",
        ),
        (
            after(40, overflowed_steps=lambda s: 3.0),
            "warning: 3 of 40 steps exceeded float16 and were skipped: use a GPU with bfloat16",
        ),
        (
            after(40, validation=(0.9, 0.5, 0.6, 0.6, 0.6)),
            "warning: validation loss rises since step 20 (0.500 -> 0.600): overfitting",
        ),
    ],
)
def test_faulty_run_has_its_diagnosis(state: State, sentence: str) -> None:
    assert sentence in diagnoses_text(state) and "all good" not in diagnoses_text(state)


@pytest.mark.parametrize(
    "state",
    [
        after(40, grad_norm=lambda s: 50.0 if s == 39 else 0.5),  # one high step is noise
        after(40, "grpo", loss=lambda s: 1.0),  # a policy gradient's loss means nothing
        after(40, loss=lambda s: 1e-4),  # nowhere to fall
        after(40, updated_param_fraction=lambda s: 0.1 if s == 40 else 1.0),
        # the schedule's end
        after(
            40, updated_param_fraction=lambda s: 0.0 if s > 35 else 1.0, learning_rate=lambda s: 0.0 if s > 35 else 1e-3
        ),
        after(40, validation=(0.9, 0.5, 0.6, 0.6)),  # two worse ones may be chance
        after(40, validation=(0.9, 0.5, 0.501, 0.502, 0.501)),
        after(40, skipped_steps=lambda s: 0.0),
        after(40, overflowed_steps=lambda s: 2.0, loss_scale=lambda s: 16384.0),
        after(40, "reward", **PAIRS),
        after(40, "dpo", **PAIRS),
        after(40, "dpo", **{**PAIRS, "logps/chosen_delta": lambda s: -0.45}),
        # Accurate from the first step on: the loss cannot fall.
        after(40, "dpo", loss=lambda s: 0.2, **{**PAIRS, "rewards/accuracies": lambda s: 0.97}),
        after(40, accuracy=lambda s: 0.5),  # of tokens: SFT has no pairs
        checked(after(40, "reward", **{**PAIRS, "accuracy": lambda s: 0.99}), 0.88, 0.9, 0.88, 0.88),
        checked(after(40, "dpo", **{**PAIRS, "rewards/accuracies": lambda s: 0.99}), 0.7, 0.9, 0.8, 0.82),
        checked(after(40, "reward", **PAIRS), 0.5),  # one look may be chance
        with_evaluation(after(40, "reward", **PAIRS), **{"pairs/length_correlation": 0.49}),
        rollout_state(),
        # all but solved
        rollout_state(
            reward=lambda s: 0.99,
            entropy=lambda s: 1e-4,
            frac_reward_zero_std=lambda s: 0.95,
            reward_std=lambda s: 0.005,
        ),
        rollout_state(entropy=lambda s: 1e-3, reward=lambda s: s / 60),  # sure, and still learning
        rollout_state(**{"completions/clipped_ratio": lambda s: 0.9 if s == 3 else 0.0}),
        rollout_state(exact=(0.5, 0.7, 0.66, 0.65)),
        rollout_state(rewards=(-5.0, 5.0), reward=lambda s: -2 + s / 10, reward_std=lambda s: 2.0),
        with_evaluation(after(40, "reward", **PAIRS), **{"pairs/length_correlation": math.nan}),
    ],
)
def test_healthy_run_has_no_diagnosis(state: State) -> None:
    assert diagnoses_text(state).startswith("good: all good")


def test_a_run_on_pairs_reports_its_accuracy() -> None:
    assert "95% of the pairs right" in diagnoses_text(after(40, "dpo", **PAIRS))
    assert "81% of the held-out pairs right" in diagnoses_text(checked(after(40, "reward", **PAIRS), 0.7, 0.81))
    assert "right" not in diagnoses_text(after(40, accuracy=lambda s: 0.9))


def test_a_run_on_rewards_reports_its_reward() -> None:
    assert (
        diagnoses_text(rollout_state(exact=(0.25, 0.75)))
        == "good: all good: reward 0.31 -> 0.7, held-out exact 25% -> 75%"
    )
    assert "too early" in diagnoses_text(rollout_state(15, frac_reward_zero_std=lambda s: 1.0))


def test_limit_of_the_chosen_logps_equals_that_of_dpo() -> None:
    """`ui.diagnostics.pairs` cannot import it, because `algorithms.dpo` loads torch."""
    assert CHOSEN_LOGP_DROP == dpo.CHOSEN_LOGP_DROP


def test_dropped_rows_are_no_diagnosis() -> None:
    state = after(40)
    state.apply(
        LogMessage(level="warning", message="a.jsonl (alpaca): 8 of 10 rows; dropped 2: no answer (lines 3, 4)")
    )
    assert "dropped" not in diagnoses_text(state)


def test_most_severe_diagnosis_comes_first() -> None:
    state = after(40, kl=lambda s: 9.0, grad_norm=lambda s: 0.5 if s < 38 else 50.0)
    assert [diagnosis.level for diagnosis in diagnose(state)] == ["bad", "warning"]


def test_diagnoses_of_ppo_name_only_settings_of_ppo() -> None:
    """PPO compares nothing within a group, and no cure is a setting of another algorithm."""

    def of(**changed: Callable[[int], float]) -> str:
        return diagnoses_text(rollout_state(algorithm="ppo", **changed))

    assert "raise ppo.kl_coef" in of(reward=lambda s: 0.8 - s / 60) and "ppo.truncated_completions to penalize" in of(
        **{"completions/clipped_ratio": lambda s: 0.9}
    )
    assert "raise ppo.kl_coef, ppo.entropy" in of(entropy=lambda s: 0.3 / s**2, reward=lambda s: min(0.5, 0.2 + s / 50))
    assert "check the precision" in of(
        **{"sampling/sampling_logp_difference/mean": lambda s: 0.05}
    ) and "groups" not in of(reward_std=lambda s: 0.0)
    falling = {
        "reward": lambda s: 0.8 - s / 60,
        "entropy": lambda s: 0.3 / s**2,
        "sampling/sampling_logp_difference/mean": lambda s: 0.05,
        "completions/clipped_ratio": lambda s: 0.9,
    }
    assert "grpo" not in of(kl=lambda s: 0.8, **falling)
