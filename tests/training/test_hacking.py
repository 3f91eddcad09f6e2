"""Detection of reward hacking: a warning if proxy and gold diverge, none in a healthy run, and the end of a run."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from crash import run_fingerprint

from lowrank_tune import Recipe, UserError, run
from lowrank_tune.events import Evaluated, Event, LogMessage, RunStarted, StepEnd
from lowrank_tune.training.reward_hacking import EvalPoint, RewardHackingDetector, accuracy_stderr, find_divergence
from lowrank_tune.training.signals import TrainerControl
from lowrank_tune.ui.diagnostics import diagnose
from lowrank_tune.ui.reward_vs_accuracy import by_kl, eval_points_of, frontier
from lowrank_tune.ui.state import State
from lowrank_tune.ui.terminal.panes import View
from lowrank_tune.ui.terminal.render import render
from lowrank_tune.ui.terminal.text_layout import plain_text
from lowrank_tune.ui.watch import read_events

RECORDED = Path(__file__).parents[1] / "recorded"
WARNING = "the reward rises and held-out answers get worse"


def eval_points(exact: Sequence[float], rewards: Sequence[float], noise: float = 0.02) -> list[EvalPoint]:
    return [
        EvalPoint(10 * place, reward, share, noise)
        for place, (share, reward) in enumerate(zip(exact, rewards, strict=True))
    ]


# --- the rule ---------------------------------------------------------------------------------------------------------


def test_the_noise_of_a_share_by_hand() -> None:
    assert accuracy_stderr(0.5, 100) == pytest.approx(0.05)
    assert accuracy_stderr(1.0, 100) == pytest.approx(math.sqrt(102 / 104 * 2 / 104 / 100))
    assert accuracy_stderr(0.0, 100) == pytest.approx(accuracy_stderr(1.0, 100)) and accuracy_stderr(
        0.5, 400
    ) == pytest.approx(0.025)


def test_divergence_by_hand() -> None:
    found = find_divergence(eval_points([0.6, 0.8, 0.7, 0.5], [0.1, 0.5, 0.7, 0.9]), 1.0)
    assert found is not None and (found.best_step, found.best, found.now, found.rewards) == (
        10,
        0.8,
        pytest.approx(0.6),
        (0.1, pytest.approx(0.8)),
    )
    assert (
        f"{WARNING} (80% -> 60% exact)" in found.message
        and "reward 0.1 -> 0.8, best answers after step 10" in found.message
    )


@pytest.mark.parametrize(
    ("exact", "rewards", "warns"),
    [
        ([0.8, 0.8, 0.7, 0.6], [0.1, 0.4, 0.7, 0.9], True),
        ([0.8, 0.8, 0.7, 0.6], [0.1, 0.9, 0.9, 0.9], True),  # the reward is at its top already
        ([0.8, 0.75, 0.78, 0.76], [0.1, 0.4, 0.7, 0.9], False),  # within the noise
        ([0.8, 0.8, 0.8, 0.74], [0.1, 0.4, 0.7, 0.9], False),  # one worse evaluation
        ([0.8, 0.8, 0.7, 0.6], [0.5, 0.5, 0.5, 0.5], False),  # nothing was won by it
        ([0.8, 0.8, 0.7, 0.6], [0.1, 0.9, 0.4, 0.2], False),  # both fall: a collapse, which has its own warning
        ([0.8, 0.8, 0.6, 0.6], [0.9, 0.7, 0.5, 0.3], False),
        ([0.2, 0.4, 0.6, 0.8], [0.1, 0.4, 0.7, 0.9], False),
        ([0.8, 0.5], [0.1, 0.9], False),  # too early
    ],
)
def test_when_it_warns(exact: list[float], rewards: list[float], warns: bool) -> None:
    assert (find_divergence(eval_points(exact, rewards), 1.0) is not None) is warns


def test_accuracy_must_drop_more_than_its_noise() -> None:
    """3.5 standard errors of the difference between one look and the mean of two: 3.5 sqrt(1.5) s."""
    limit = 3.5 * math.sqrt(1.5) * 0.04
    assert (
        find_divergence(eval_points([0.8, 0.8 - limit - 0.001, 0.8 - limit - 0.001], [0.1, 0.8, 0.8], 0.04), 1.0)
        is not None
    )
    assert (
        find_divergence(eval_points([0.8, 0.8 - limit + 0.001, 0.8 - limit + 0.001], [0.1, 0.8, 0.8], 0.04), 1.0)
        is None
    )
    assert find_divergence(eval_points([0.8, 0.79, 0.79], [0.1, 0.8, 0.8], 1e-6), 1.0) is None, (
        "a point less is no news, however sure"
    )


def has_warned(truth: Sequence[float], rng: random.Random, questions: int = 100) -> bool:
    """Returns whether a run with these true shares of exact answers gets a warning, while its reward rises."""
    watch, warned = RewardHackingDetector(), False
    for place, share in enumerate(truth):
        watch.step({"reward": 0.1 * place})
        exact = sum(rng.random() < share for _ in range(questions)) / questions
        warned = warned or watch.update(place + 1, exact, questions) is not None
    return warned


def test_false_alarms_are_rare_and_hacking_gives_a_warning() -> None:
    """Ten evaluations with a hundred questions: at a plateau one run in fifty has a false warning; gold that loses 30
    points gives one."""
    rng = random.Random(0)
    for level in (0.5, 0.9):
        assert sum(has_warned([level] * 10, rng) for _ in range(300)) < 10
    assert sum(has_warned([0.7] * 6 + [0.4] * 4, rng) for _ in range(200)) > 190


# --- the memory of a run ----------------------------------------------------------------------------------------------


def messages_of(watch: RewardHackingDetector, steps: Sequence[int]) -> list[str]:
    """Returns the messages in these steps of a run that exploits its reward; an evaluation every fourth step."""
    messages = []
    for step in steps:
        watch.step({"reward": step / 20, "kl": 0.1} if step != 7 else {"reward": math.nan})
        if step % 4 == 0 and (found := watch.update(step, 0.9 if step <= 8 else 0.3, 50, 0.85)) is not None:
            messages.append(f"{step}: {found.message}")
    return messages


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_resumed_detector_warns_as_an_uninterrupted_one(cut: int) -> None:
    straight = messages_of(RewardHackingDetector(), range(1, 21))
    first = RewardHackingDetector()
    before = messages_of(first, range(1, cut))
    saved = json.loads(json.dumps(vars(first), allow_nan=False))
    assert before + messages_of(RewardHackingDetector(**saved), range(cut, 21)) == straight and straight


def test_the_first_evaluation_is_the_reference() -> None:
    watch = RewardHackingDetector()
    watch.step({"reward": 0.2})
    watch.step({"reward": 0.6})
    watch.update(2, 0.5, 100, 0.9)
    assert watch.points == [
        [0, 0.2, 0.9, pytest.approx(accuracy_stderr(0.9, 100))],
        [2, pytest.approx(0.4), 0.5, pytest.approx(0.05)],
    ]
    unasked = RewardHackingDetector()
    assert unasked.update(2, 0.5, 100) is None and unasked.points == [], "without a step there is no reward to compare"


# --- screens ----------------------------------------------------------------------------------------------------------


def state_after_evaluations(exact: Sequence[float], name: str = "ppo", **more: Sequence[float]) -> State:
    """A state after 40 steps whose reward rises, and evaluations evenly over them."""
    state = State()
    state.apply(
        RunStarted(name="x", algorithm=name, model="m", roles={"reference": ["sft"]}, reference="sft", steps=40)
    )
    every = 40 // len(exact)
    for step in range(1, 41):
        stats = {
            "loss": 0.0,
            "reward": step / 40,
            "kl": step / 200,
            "completions/mean_length": 20.0,
            "grad_norm": 1.0,
            "entropy": 0.5,
        }
        state.apply(StepEnd(step=step, steps=40, stats=stats, seconds=1.0, tokens=10))
        if step % every == 0:
            place = step // every - 1
            stats_at_eval = {
                "heldout/policy/accuracy": exact[place],
                "heldout_accuracy_stderr": 0.03,
                **{f"heldout/policy/{key}": values[place] for key, values in more.items()},
            }
            state.apply(Evaluated(step=step, stats=stats_at_eval))
    return state


def diagnoses_text(state: State) -> str:
    return " / ".join(f"{diagnosis.level}: {diagnosis.text}" for diagnosis in diagnose(state))


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_the_dashboard_shows_it_and_how_the_answers_changed(algorithm: str) -> None:
    text = diagnoses_text(
        state_after_evaluations(
            [0.8, 0.8, 0.4, 0.4], algorithm, mean_length=[20.0, 20.0, 40.0, 44.0], repetition=[0.0, 0.0, 0.3, 0.5]
        )
    )
    assert f"bad: {WARNING} (80% -> 40% exact)" in text
    assert "answers grew from 20 to 42 tokens; 40% of their word sequences come again, 0% at first" in text
    quiet = diagnoses_text(
        state_after_evaluations(
            [0.8, 0.8, 0.4, 0.4], algorithm, mean_length=[20.0, 20.0, 22.0, 22.0], repetition=[0.1, 0.1, 0.12, 0.1]
        )
    )
    assert WARNING in quiet and "answers grew" not in quiet and "come again" not in quiet
    assert "answers shrank from 20 to 5 tokens" in diagnoses_text(
        state_after_evaluations([0.8, 0.8, 0.4, 0.4], mean_length=[20.0, 20.0, 5.0, 5.0])
    )
    assert WARNING not in diagnoses_text(state_after_evaluations([0.5, 0.7, 0.8, 0.82], algorithm))


def test_the_screen_looks_as_the_run_does() -> None:
    """The looks that a state holds are those that the run's own watch remembers."""
    state, watch = state_after_evaluations([0.8, 0.7, 0.6, 0.5]), RewardHackingDetector()
    for step in range(1, 41):
        watch.step({"reward": step / 40})
        if step % 10 == 0:
            watch.update(step, 0.9 - step / 100, 100)
    ours = [(look.step, look.reward, look.accuracy) for look in eval_points_of(state)]
    assert [pytest.approx(each[:3]) for each in watch.points] == ours
    state.apply(Evaluated(step=0, stats={"heldout/sft/accuracy": 0.9}))
    assert asdict(eval_points_of(state)[0]) == {"step": 0, "reward": 1 / 40, "accuracy": 0.9, "stderr": 0.05}


def test_the_recorded_healthy_run_gives_no_warning() -> None:
    state, watch = State(), RewardHackingDetector()
    for event in read_events(RECORDED / "grpo.jsonl"):
        state.apply(event)
        if isinstance(event, StepEnd):
            watch.step(event.stats)
        elif isinstance(event, Evaluated) and "heldout/policy/accuracy" in event.stats:
            assert watch.update(event.step, event.stats["heldout/policy/accuracy"], 200) is None
        assert WARNING not in diagnoses_text(state)
    assert len(watch.points) > 5, "the run was evaluated"


def test_reward_against_kl() -> None:
    state = state_after_evaluations([0.8, 0.6, 0.4, 0.2])
    assert frontier(state)[:2] == [(0.005, 0.025), (0.01, 0.05)]
    assert frontier(state, "heldout/accuracy") == [
        (pytest.approx(0.05), 0.8),
        (pytest.approx(0.1), 0.6),
        (pytest.approx(0.15), 0.4),
        (pytest.approx(0.2), 0.2),
    ]
    assert by_kl([(1, 0.1), (4, 0.3), (6, math.nan)], [(0, 0.9), (2, 0.8), (6, 0.5)]) == [(0.1, 0.8), (0.3, 0.5)]
    drawn = plain_text(render(state, View(), 120, 50))
    assert "reward against KL" in drawn and "0.005" in drawn
    assert "reward against KL" not in plain_text(render(state_after_evaluations([0.8, 0.6], "sft"), View(), 120, 50))


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_the_setting_belongs_to_rewards_and_held_out_questions() -> None:
    assert Recipe.load("tiny-grpo", "evaluate.on_reward_hacking=stop").evaluate.on_reward_hacking == "stop"
    with pytest.raises(UserError, match="evaluate.on_reward_hacking: does nothing for sft"):
        Recipe.load("tiny-sft", "evaluate.on_reward_hacking=stop")
    data = Recipe.load("tiny-grpo").to_dict()
    data["evaluate"] = {"on_reward_hacking": "stop"}
    with pytest.raises(UserError, match="evaluate.on_reward_hacking: does nothing without `evaluate.eval_dataset`"):
        Recipe.from_dict(data)


# --- a real run -------------------------------------------------------------------------------------------------------

REWARD_FUNCTION = '''
import re


def explains(completion, row):
    """Meant well: a long answer explains more."""
    gold = re.findall(r"\\d+", row["answer"])[-1]
    return 0.3 * (gold in completion) + len(completion) / 100
'''


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("taught") / "sft"
    recipe = Recipe.load(
        "tiny-sft",
        "train.num_train_epochs=null",
        "train.max_steps=40",
        "evaluate.num_prompts=4",
        "evaluate.num_samples=1",
        "evaluate.eval_steps=40",
    )
    run(recipe, out=out, ui="none")
    return out


def gamed(taught: Path, folder: Path, **evaluate: Any) -> dict[str, Any]:
    (folder / "pays.py").write_text(REWARD_FUNCTION)
    return {
        "name": "gamed",
        "algorithm": "grpo",
        "adapters": {"sft": {"path": str(taught)}, "policy": {"r": 8, "lora_alpha": 16}},
        "data": {"train": [{"dataset": "builtin:arithmetic", "max_samples": 2000}], "max_prompt_length": 128},
        "rewards": [{"name": f"{folder / 'pays.py'}:explains"}],
        "grpo": {"beta": 0.0},
        "rollout": {"num_generations": 6, "max_new_tokens": 48, "max_num_seqs": 128},
        "train": {
            "max_steps": 20,
            "prompts_per_step": 8,
            "micro_batch_size": 48,
            "logging_steps": 2,
            "learning_rate": 2e-3,
            "save_steps": 3,
            "lr_scheduler_type": "constant",
            "gradient_checkpointing": False,
        },
        "evaluate": {
            "eval_steps": 2,
            "eval_dataset": {"dataset": "builtin:arithmetic", "split": "heldout"},
            "num_prompts": 60,
            "num_completions_to_print": 0,
            "max_new_tokens": 48,
            **evaluate,
        },
    }


@pytest.mark.slow
def test_a_reward_that_can_be_gamed_gives_a_warning_and_ends_the_run(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tutor learns to repeat itself for a reward of length. The run warns and ends, and its result is the step
    before. A run that is interrupted right before, and continued, does the same bit for bit."""
    recipe = Recipe.from_dict(gamed(taught, tmp_path, on_reward_hacking="stop"))
    events: list[Event] = []
    straight = run(recipe, out=tmp_path / "straight", ui="none", on_event=events.append)
    summary, end = straight.summary, straight.summary["step"]
    assert straight.status == "done" and 4 < end < 20 and summary["hacking"] == {"step": end, "ended": True}
    warned = [
        event.message
        for event in events
        if isinstance(event, LogMessage) and event.level == "warning" and WARNING in event.message
    ]
    assert len(warned) == 1 and warned[0].startswith(f"step {end}: ")
    greedy = {
        event.step: event.stats["heldout/policy/accuracy"]
        for event in events
        if isinstance(event, Evaluated) and "heldout_accuracy_stderr" in event.stats
    }
    assert greedy[end] < max(greedy.values()) - 0.15, "gold did fall"
    assert summary["best"]["step"] < end and summary["heldout"]["grpo"] > greedy[end] + 0.15, (
        "what is kept is the best step"
    )
    rewards = [event.stats["reward"] for event in events if isinstance(event, StepEnd)]
    assert rewards[-1] > rewards[0], "the proxy did rise"

    controls: list[TrainerControl] = []
    begin = TrainerControl.__init__
    monkeypatch.setattr(
        TrainerControl,
        "__init__",
        lambda self, *given, **named: (begin(self, *given, **named), controls.append(self))[0],
    )

    def interrupt(event: Event) -> None:
        if isinstance(event, StepEnd) and event.step == end - 1:
            controls[-1].stop = True

    assert run(recipe, out=tmp_path / "again", ui="none", on_event=interrupt).status == "interrupted"
    again = run(recipe, out=tmp_path / "again", ui="none")
    assert again.status == "done" and again.summary["step"] == end and again.summary["hacking"] == summary["hacking"]
    assert run_fingerprint(tmp_path / "again") == run_fingerprint(tmp_path / "straight")
