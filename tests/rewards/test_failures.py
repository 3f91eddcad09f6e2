"""A failed reward is never counted as 0: the completion leaves its group as if it had not been generated, or the run
stops."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from algorithm_helpers import FakeCollector, completion_rows, one_pass
from hypothesis import given
from hypothesis import strategies as st
from models import CPU, llama_roles, make_batch, perturb
from test_grpo import LOSS_TYPES, grpo_over
from torch import Tensor

from lowrank_tune import Recipe, run
from lowrank_tune import runner as runner_module
from lowrank_tune.algorithms.grpo import group_advantages, zero_std_groups
from lowrank_tune.algorithms.reward_failures import (
    MIN_SAMPLES,
    RewardFailure,
    RewardFailureTracker,
    describe_failures,
)
from lowrank_tune.algorithms.rollouts import RolloutGroups
from lowrank_tune.assembly.rl import RewardScorer, load_train_prompts
from lowrank_tune.batch import RolloutBatch
from lowrank_tune.data import ChatTemplate, PromptExample
from lowrank_tune.data_report import inspect_data
from lowrank_tune.errors import TrainingError, UserError
from lowrank_tune.events import GroupLogged, LogMessage, StepEnd
from lowrank_tune.generation.outputs import Completion
from lowrank_tune.model.base import load_tokenizer
from lowrank_tune.model.roles import Roles
from lowrank_tune.rewards import Score
from lowrank_tune.rewards.workers.worker import format_exception
from lowrank_tune.stats import to_floats
from lowrank_tune.training.signals import TrainerControl

LOST = RewardFailure("answer", "error", "because")
LATE = RewardFailure("answer", "timeout", "too slow")

# --- advantages -------------------------------------------------------------------------------------------------------

GROUPS = st.integers(1, 6).flatmap(
    lambda n: st.lists(
        st.lists(st.tuples(st.floats(-50, 50, width=32), st.booleans()), min_size=n, max_size=n), min_size=1, max_size=4
    )
)


@given(GROUPS)
def test_advantages_equal_those_without_the_dropped_completion(groups: list[list[tuple[float, bool]]]) -> None:
    rewards = torch.tensor(
        [[value if has_reward else math.nan for value, has_reward in group] for group in groups], dtype=torch.float64
    )
    scored = torch.tensor([[has_reward for _, has_reward in group] for group in groups])
    for divide in (True, False):
        found = group_advantages(rewards, divide, scored)
        assert not found.isnan().any() and not found[~scored].any()
        for number, group in enumerate(groups):
            left = np.array([value for value, has_reward in group if has_reward])
            mine = found[number, scored[number]]
            assert bool(zero_std_groups(rewards, scored)[number]) == (len(left) < 2 or bool(np.ptp(left) <= 1e-6))
            if len(left) < 2 or np.ptp(left) <= 1e-6:
                assert not mine.any()
                continue
            expected = (left - left.mean()) / (left.std() + 1e-4 if divide else 1.0)
            assert np.allclose(mine.numpy(), expected, rtol=1e-6, atol=1e-6 * abs(expected).max())
            assert torch.equal(mine, group_advantages(torch.tensor(left)[None], divide)[0])


def test_groups_without_failures_have_the_same_advantages_to_the_bit() -> None:
    rewards = torch.randn(7, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    every = torch.ones(7, 9, dtype=torch.bool)
    assert torch.equal(group_advantages(rewards, True, every), group_advantages(rewards)) and torch.equal(
        zero_std_groups(rewards, every), zero_std_groups(rewards)
    )


# --- through a model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def roles() -> Roles:
    found = llama_roles(16, lower=["sft"])
    perturb(found, "sft", size=0.05)
    perturb(found, "policy", size=0.05, seed=2)
    return found


class DroppingCollector(FakeCollector):
    """GRPO on the same completions, some of them without a reward; or, with `never`, without those completions."""

    def __init__(self, roles: Any, rewards: Any, lost: Sequence[int] = (), never: bool = False, **how: Any) -> None:
        super().__init__(roles, rewards, **how)
        self.lost, self.never = lost, never

    def logps(self, role: str, batch: RolloutBatch) -> Tensor:
        """Computes each row alone at its own width, so that rounding does not depend on the other rows."""
        found = torch.zeros(batch.input_ids.shape)
        for i in range(len(batch)):
            alone = super().logps(role, batch.select_rows(torch.tensor([i])))
            found[i, : alone.shape[1]] = alone[0]
        return found

    def collect(self, step: int, draw: int, count: int | None = None) -> RolloutGroups:
        rewards = torch.tensor(self.rewards[draw][:count], dtype=torch.float64)
        groups, n = rewards.shape
        rows, masks = completion_rows(groups, n, seed=100 * step + draw)
        unscored = [LOST if i in self.lost else None for i in range(groups * n)]
        if self.never:
            kept = [i for i in range(groups * n) if i not in self.lost]
            rows, masks, rewards = (
                [rows[i] for i in kept],
                [masks[i] for i in kept],
                rewards.flatten()[kept].view(groups, -1),
            )
            n, unscored = rewards.shape[1], [None] * len(kept)
        gone = torch.tensor([one is not None for one in unscored]).view_as(rewards)
        rewards = rewards.masked_fill(gone, math.nan)
        batch = RolloutBatch(**make_batch(rows, masks).tensors())
        batch.sampler_logps = self.logps("policy", batch)
        prompts = [PromptExample([2], f"prompt {draw}.{group}", None, {}) for group in range(groups)]
        self.failures.count(unscored)
        return RolloutGroups(
            batch=batch,
            rewards=rewards,
            reward_components=rewards.view(-1, 1),
            truncated=torch.tensor([i in self.cut for i in range(len(rows))]),
            reward_names=self.reward_names,
            texts=[str(i) for i in range(len(rows))],
            prompts=prompts,
            timings={"rollout_seconds": 2.0},
            failed_rewards=unscored,
        )


def with_failures(
    roles: Roles,
    lost: Sequence[int],
    rewards: Any,
    never: bool = False,
    kind: str = "grpo",
    most: float = 1.0,
    **how: Any,
) -> Any:
    algorithm = grpo_over(roles, kind, **how)
    algorithm.collector = DroppingCollector(roles, rewards, lost, never)
    algorithm.collector.failures = RewardFailureTracker(most)
    return algorithm


THREE = [[[1.0, 0.0, 0.3, 0.2], [0.2, 0.9, 0.4, 0.1]]]


@pytest.mark.parametrize("kind", LOSS_TYPES)
@pytest.mark.parametrize(
    "how",
    [{"beta": 0.3}, {"beta": 0.3, "kl_in_reward": True}, {"num_iterations": 2}, {"truncated_completions": "penalize"}],
)
def test_the_step_equals_one_without_the_dropped_completion(roles: Roles, kind: str, how: dict[str, Any]) -> None:
    found = []
    for never in (False, True):
        algorithm = with_failures(roles, [2, 5], THREE, never, kind, **how)
        experience = algorithm.collect(0)
        figures = {
            name: value
            for name, value in to_floats(experience.stats).items()
            if name not in ("completions/mean_length", "reward_errors")
        }
        found.append((experience.batch.sequence_advantages, figures, *one_pass(algorithm, experience.batch)))
    mine, alone = found
    assert torch.equal(mine[0], alone[0]) and mine[1] == pytest.approx(alone[1], abs=1e-12)
    assert mine[2] == alone[2] and torch.equal(mine[3], alone[3]) and mine[4] == alone[4] and mine[3].any()


def test_a_group_that_lost_its_first_row_begins_with_the_next(roles: Roles) -> None:
    """Else its rows would count as part of the group before, and the prompt would be read once per row."""
    algorithm = with_failures(roles, [4, 5, 9], [THREE[0] + THREE[0][:1]])
    rollouts = algorithm.collector.collect(0, 0)
    rollouts.batch.shared_prefix = torch.tensor([0, 3, 3, 3] * 3)
    assert rollouts.scored_rows().shared_prefix.tolist() == [0, 3, 3, 3, 0, 3, 0, 3, 3]


@pytest.mark.parametrize("how", ["keep", "drop", "resample"])
def test_groups_with_too_many_failures_are_uninformative(roles: Roles, how: str) -> None:
    """Groups with four, one and no completion left; if groups with zero std are replaced, also in the next draws."""
    rewards = [[[1.0, 0.0, 0.3, 0.2]] * 3] * 4
    algorithm = with_failures(roles, [4, 5, 6, 8, 9, 10, 11], rewards, zero_std_groups=how, beta=0.1)
    experience = algorithm.collect(0)
    loss, gradient, _ = one_pass(algorithm, experience.batch)
    assert math.isfinite(loss) and not gradient.isnan().any() and gradient.any()
    assert len(experience.batch) == {"keep": 5, "drop": 4, "resample": 12}[how]
    stats = to_floats(experience.stats)
    assert (
        stats["frac_reward_zero_std"] == pytest.approx({"resample": 3 / 6}.get(how, 2 / 3))
        and stats["reward_errors"] >= 7
    )
    assert stats["reward_std"] == pytest.approx(
        np.std([1, 0, 0.3, 0.2]) * {"resample": 3 / 5}.get(how, 1 / 2), abs=1e-6
    )


@pytest.mark.parametrize("how", ["keep", "drop", "resample"])
def test_step_whose_rewards_all_fail_changes_no_weight(roles: Roles, how: str) -> None:
    algorithm = with_failures(roles, range(8), THREE * 4, zero_std_groups=how, beta=0.5)
    experience = algorithm.collect(0)
    loss, gradient, _ = one_pass(algorithm, experience.batch)
    assert loss == 0.0 and not gradient.any() and math.isnan(to_floats(experience.stats)["reward"])
    assert any("failed" in message for message in algorithm.diagnostics(to_floats(experience.stats)))


# --- counting ---------------------------------------------------------------------------------------------------------


def test_too_many_failures_stop_the_run_and_few_do_not() -> None:
    failures = RewardFailureTracker(0.01)
    failures.count([LOST, LATE])  # two of two: too few to judge a verifier by
    with pytest.raises(
        TrainingError,
        match=r"3 of 103 completions \(2\.9%\).*rollout\.max_reward_failure_rate, 0\.01.*`answer` failed on 1.*because",
    ):
        failures.count([*[None] * 100, LOST])
    assert MIN_SAMPLES == 3
    failures = RewardFailureTracker(0.01)
    for _ in range(40):
        failures.count([*[None] * 99, LOST])  # just 1 %
    with pytest.raises(TrainingError):
        failures.count([LOST])
    RewardFailureTracker(1.0).count([LOST] * 50)
    with pytest.raises(TrainingError):
        RewardFailureTracker(0.0).count([*[None] * 9999, *[LOST] * 3])


def test_counts_are_logged_from_the_first_failure_on_and_saved() -> None:
    failures = RewardFailureTracker(1.0)
    failures.count([None] * 9)
    assert failures.stats([]) == {}
    failures.count([None, LATE, LATE])
    assert to_floats(failures.stats([LATE, LATE])) == {"reward_timeouts": 2.0} and to_floats(failures.stats([])) == {
        "reward_timeouts": 0.0
    }
    again = RewardFailureTracker(0.1)
    again.restore(json.loads(json.dumps(failures.state())))
    assert (again.completions, again.timeouts, again.errors, again.max_failure_rate) == (12, 2, 0, 0.1)
    RewardFailureTracker().restore({})  # a checkpoint of an earlier version
    [message] = describe_failures([LATE, LATE], 64)
    assert (
        message.startswith("the reward `answer` failed on completions")
        and "2 of 64" in message
        and "too slow" in message
    )


# --- whole runs -------------------------------------------------------------------------------------------------------

MINE = """
import time
def some(completion, row):
    if len(completion) % 4 == 1:
        raise ValueError("a length of one too many")
    return len(completion) % 3
def slow(completion, row):
    time.sleep(60 if len(completion) == 3 else 0)
    return 1.0
"""


def small(**more: Any) -> dict[str, Any]:
    return {
        "name": "failing",
        "algorithm": "grpo",
        "base": {"model": "tiny-tutor"},
        "adapters": {"policy": {"r": 4}},
        "data": {"train": [{"dataset": "builtin:arithmetic", "max_samples": 20}]},
        "rewards": [{"name": "answer"}, {"name": "./mine.py:some", "weight": 0.1, "on_error": "drop"}],
        "rollout": {"num_generations": 4, "max_new_tokens": 10, "max_reward_failure_rate": 1.0},
        "grpo": {"zero_std_groups": "keep"},
        "train": {
            "max_steps": 4,
            "prompts_per_step": 3,
            "micro_batch_size": 12,
            "learning_rate": 5e-3,
            "save_steps": 2,
            "gradient_checkpointing": False,
        },
        **more,
    }


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of `mine.py`. The check of the rewards, which would refuse such a reward, is switched off."""
    monkeypatch.setenv("LOWRANK_TUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lowrank_tune.assembly.sources.check_reference_rewards", lambda *given: None)
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def run_with_events(recipe: dict[str, Any], out: Path) -> tuple[Any, list[Any]]:
    events: list[Any] = []
    return run(Recipe.from_dict(recipe), out=out, ui="none", device=CPU, on_event=events.append), events


def figures(events: Sequence[Any]) -> list[dict[str, float]]:
    unsteady = {"tokens_per_second", "memory_gib", "rollout_seconds", "reward_seconds"}
    return [
        {k: v for k, v in event.stats.items() if k not in unsteady} for event in events if isinstance(event, StepEnd)
    ]


@pytest.mark.slow
def test_a_run_drops_counts_and_warns_and_resumes_the_same(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, events = run_with_events(small(), place / "one")
    steps = figures(events)
    lost = sum(step.get("reward_errors", 0) for step in steps)
    assert (
        outcome.summary["status"] == "done"
        and 0 < lost < 48
        and all(math.isfinite(value) for step in steps for value in step.values())
    )
    [warned] = [
        event.message for event in events if isinstance(event, LogMessage) and "failed on completions" in event.message
    ]
    assert "`some`" in warned and "a length of one too many" in warned and "mine.py:5" in warned
    shown = [one for event in events if isinstance(event, GroupLogged) for one in event.completions]
    for one in shown:
        assert ("unscored" in one) == (len(one["text"]) % 4 == 1) == (one["reward"] is None)
    assert any("unscored" in one for one in shown), "the test saw nothing"
    page = (place / "one" / "report.html").read_text(encoding="utf-8")
    assert "not scored: some: " in page and "a reward failed" in page

    monkeypatch.setattr(runner_module, "TrainerControl", lambda: Interrupted(events_so_far))
    events_so_far: list[Any] = []
    recipe = Recipe.from_dict(small())
    first = run(recipe, out=place / "two", ui="none", device=CPU, on_event=events_so_far.append)
    assert first.status == "interrupted"
    monkeypatch.undo()
    monkeypatch.chdir(place)
    monkeypatch.setenv("LOWRANK_TUNE_CACHE", str(place / "cache"))
    monkeypatch.setattr("lowrank_tune.assembly.sources.check_reference_rewards", lambda *given: None)
    rest: list[Any] = []
    run(recipe, out=place / "two", ui="none", device=CPU, on_event=rest.append)
    assert figures(events_so_far) + figures(rest) == steps
    states = [
        json.loads((place / name / "checkpoints" / "step-4" / "state.json").read_text())["algorithm"]
        for name in ("one", "two")
    ]
    assert states[0] == states[1] and states[0].pop("lengths")["completions"] == 48
    assert states[0] == {"completions": 48, "errors": lost, "timeouts": 0}


class Interrupted(TrainerControl):
    """Stops after the second step."""

    def __init__(self, events: list[Any]) -> None:
        object.__setattr__(self, "seen", events)
        super().__init__()

    @property
    def stop(self) -> bool:  # type: ignore[override]
        return sum(isinstance(event, StepEnd) for event in self.seen) >= 2  # type: ignore[attr-defined]

    @stop.setter
    def stop(self, value: bool) -> None: ...


def test_a_users_function_stops_the_run_by_default(place: Path) -> None:
    with pytest.raises(TrainingError, match="mine.py:5.*on the completion .* of the prompt"):
        run_with_events(small(rewards=[{"name": "answer"}, {"name": "./mine.py:some"}]), place / "run")


def test_a_builtin_verifier_drops_by_default_and_stops_above_its_share(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lowrank_tune.rewards.math.answer.AnswerReward.score_one",
        lambda self, item: (
            Score(None, "error", f"planted {len(item.completion)}")
            if len(item.completion) % 2 == 1
            else Score(len(item.completion) % 3 / 2, "graded")
        ),
    )
    rollout = small()["rollout"]
    _, events = run_with_events(small(rewards=[{"name": "answer"}]), place / "run")
    assert sum(step.get("reward_errors", 0) for step in figures(events)) >= MIN_SAMPLES
    with pytest.raises(
        TrainingError,
        match=r"could not be scored, more than rollout\.max_reward_failure_rate, 0\.01; .*`answer` failed.*planted",
    ):
        run_with_events(
            small(rewards=[{"name": "answer"}], rollout=rollout | {"max_reward_failure_rate": 0.01}), place / "second"
        )
    with pytest.raises(TrainingError, match="planted"):
        run_with_events(
            small(
                rewards=[{"name": "answer", "on_error": "stop"}], rollout={"num_generations": 4, "max_new_tokens": 10}
            ),
            place / "third",
        )


def test_a_timeout_is_counted_separately(place: Path) -> None:
    recipe = Recipe.from_dict(small(rewards=[{"name": "./mine.py:slow", "on_error": "drop"}]))
    scoring = RewardScorer(recipe, Marks())  # type: ignore[arg-type]
    try:
        scoring.scorer.timeout_seconds = 0.3
        for key, text in enumerate(("ab", "abc", "abcd")):
            scoring.submit(key, PromptExample([2], "asked", None, {}), text, Completion(0, key, [5, 1], "stop"))
        found = scoring.collect()
    finally:
        scoring.close()
    late = found[1]
    assert (
        found[0] == found[2] == [1.0]
        and isinstance(late, RewardFailure)
        and late.verdict == "timeout"
        and "0.3 s" in late.reason
    )


def test_rows_that_no_reward_could_judge_by_are_data_faults(place: Path) -> None:
    """Found among all rows before anything is generated: dropped and reported with their lines, or refused if there are
    many."""
    prose = "a very long story of many words that no rule whatsoever can compare with anything that is written"
    golds = ["5", prose, "7", "", "8", "9", "10", "11"]
    (place / "rows.jsonl").write_text(
        "\n".join(json.dumps({"question": f"{n}?", "gold": gold, "answer": "x"}) for n, gold in enumerate(golds))
    )
    data = {"train": [{"dataset": "rows.jsonl", "ground_truth": "gold"}], "max_invalid_fraction": 0.3}
    recipe = Recipe.from_dict(
        small(rewards=[{"name": "math_answer"}, {"name": "length", "target_tokens": 9}], data=data)
    )
    template, events = ChatTemplate.from_tokenizer(load_tokenizer(recipe.base)), list[Any]()
    found = load_train_prompts(recipe, template, events.append)
    assert [one.ground_truth for one in found.examples] == ["5", "7", "8", "9", "10", "11"]
    [line] = [event.message for event in events if isinstance(event, LogMessage) and event.level == "warning"]
    assert "line 2" in line and "line 4" in line and line.count("`math_answer` cannot use the row") == 2
    assert any(
        "`math_answer`" in issue.description and issue.count == 1
        for issue in inspect_data(recipe, lambda event: None).issues
    )
    few = Recipe.from_dict({**recipe.to_dict(), "data": {**data, "max_invalid_fraction": 0.1}})
    with pytest.raises(UserError, match="2 of 8 rows cannot be used.*`math_answer` cannot use the row"):
        load_train_prompts(few, template, events.append)


class Marks:
    def special_tokens_in(self, ids: Sequence[int]) -> bool:
        return False


def test_an_exception_without_a_message_is_its_name() -> None:
    assert format_exception(MemoryError(), "reward.py") == "raised MemoryError"
    assert format_exception(ValueError("boom"), "reward.py") == "raised ValueError: boom"
