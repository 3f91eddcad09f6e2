"""Laws of a stage: which evaluation decides what the best step is, and that a resume restores the reward-hacking
detector and the counters of the loop."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from crash import run_fingerprint, small_recipe
from safetensors.torch import load_file

from lowrank_tune import Recipe, run
from lowrank_tune.algorithms import sft as sft_module
from lowrank_tune.algorithms.sft import SFT, sft_loss
from lowrank_tune.assembly.sources import PromptSource
from lowrank_tune.evaluation.pair_losses import ValidationResult
from lowrank_tune.events import Evaluated, Event, StepEnd
from lowrank_tune.generation.completion_lengths import CompletionLengths
from lowrank_tune.runner import RunResult
from lowrank_tune.training.evaluator import StageEvaluator
from lowrank_tune.training.reward_hacking import Divergence, EvalPoint
from lowrank_tune.training.signals import TrainerControl
from lowrank_tune.training.stage import Stage

WARNING = "the reward rises and held-out answers get worse"


def recipe_of(algorithm: str, steps: int, **evaluate: Any) -> Recipe:
    """A small run that saves every step and keeps all of them."""
    data = small_recipe(algorithm, max_steps=steps, save_steps=1, save_total_limit=9, logging_steps=1)
    data["evaluate"] = {**data["evaluate"], "num_completions_to_print": 0, "num_prompts": 1, **evaluate}
    if algorithm == "grpo":
        data["grpo"] = {"beta": 0.0}
        data["rollout"] = {"num_generations": 2, "max_new_tokens": 4, "max_num_seqs": 4}
        data["train"] |= {"prompts_per_step": 2, "micro_batch_size": 4}
    return Recipe.from_dict(data)


def set_validation_losses(monkeypatch: pytest.MonkeyPatch, losses: Sequence[float]) -> None:
    """Replaces what the evaluations of a run measure by these losses, one after the other."""
    left = iter(losses)
    monkeypatch.setattr("lowrank_tune.training.evaluator.validate", lambda *_: ValidationResult({"loss": next(left)}))


def is_final(folder: Path, step: int) -> bool:
    """Whether the run's final adapter is the one that it saved after this step."""
    final, saved = (
        load_file(folder / place / "adapter_model.safetensors")
        for place in ("final", f"checkpoints/step-{step}/policy")
    )
    return final.keys() == saved.keys() and all(final[name].equal(saved[name]) for name in final)


@pytest.fixture
def control(monkeypatch: pytest.MonkeyPatch) -> TrainerControl:
    """The control of the runs of a test."""
    made = TrainerControl()
    monkeypatch.setattr("lowrank_tune.runner.TrainerControl", lambda: made)
    return made


# --- the best step ----------------------------------------------------------------------------------------------------


def test_an_evaluation_on_request_never_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, control: TrainerControl
) -> None:
    """It is the one after step 1, whose loss is the lowest of all and whose adapter is saved too. Step 2 is the best of
    the scheduled ones."""
    set_validation_losses(monkeypatch, [0.5, 1.0, 2.0])
    evaluated: list[Evaluated] = []

    def on_event(event: Event) -> None:
        if isinstance(event, StepEnd) and event.step == 1:
            control.evaluate = True
        if isinstance(event, Evaluated) and "eval_loss" in event.stats:
            evaluated.append(event)

    found = run(recipe_of("sft", 4, eval_steps=2), out=tmp_path / "run", ui="none", on_event=on_event)
    assert [(event.step, event.stats["eval_loss"], event.best) for event in evaluated] == [
        (1, 0.5, False),
        (2, 1.0, True),
        (4, 2.0, False),
    ]
    assert found.summary["best"] == {"step": 2, "loss": 1.0}
    assert is_final(found.folder, 2) and not is_final(found.folder, 1)


@pytest.mark.parametrize(("metric", "best"), [("loss", 1), ("accuracy", 2)])
def test_of_equal_steps_the_first_is_best_by_loss_and_the_last_by_accuracy(
    metric: str, best: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_validation_losses(monkeypatch, [1.0, 1.0])
    monkeypatch.setattr(StageEvaluator, "policy_metrics", lambda self: {"accuracy": 0.5, "repetition": 0.0})
    recipe = recipe_of("sft", 2, eval_steps=1, metric_for_best_model=metric)
    found = run(recipe, out=tmp_path / "run", ui="none")
    assert found.summary["best"]["step"] == best and is_final(found.folder, best)


# --- the reward-hacking detector, in a run that is resumed ------------------------------------------------------------


@pytest.fixture
def hacked_after_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes reward and accuracy diverge as soon as there are four evaluations, that of the reference among them."""

    def diverged(points: Sequence[EvalPoint], reward_range: float) -> Divergence | None:
        return Divergence(1, 0.9, 0.1, (0.2, 0.8)) if len(points) >= 4 else None

    monkeypatch.setattr("lowrank_tune.training.reward_hacking.find_divergence", diverged)


def hacking_recipe(on_reward_hacking: str) -> Recipe:
    return recipe_of("grpo", 4, eval_steps=1, max_new_tokens=4, on_reward_hacking=on_reward_hacking)


def saved_detector(folder: Path, step: int) -> Any:
    return json.loads((folder / "checkpoints" / f"step-{step}" / "state.json").read_text())["watch"]


def hacking_warnings(found: RunResult) -> list[str]:
    return [warning for warning in found.summary["warnings"] if WARNING in warning]


def stopped_after(step: int, recipe: Recipe, out: Path, control: TrainerControl) -> None:
    """Runs the recipe, and asks it to stop after this step."""

    def on_event(event: Event) -> None:
        control.stop = control.stop or (isinstance(event, StepEnd) and event.step == step)

    assert run(recipe, out=out, ui="none", on_event=on_event).status == "interrupted"
    control.stop = False


@pytest.mark.slow
@pytest.mark.usefixtures("hacked_after_three")
def test_a_resumed_run_continues_the_reward_hacking_detector(tmp_path: Path, control: TrainerControl) -> None:
    recipe = hacking_recipe("warn")
    straight = run(recipe, out=tmp_path / "straight", ui="none")
    stopped_after(2, recipe, tmp_path / "resumed", control)
    resumed = run(recipe, out=tmp_path / "resumed", ui="none")
    assert saved_detector(resumed.folder, 4) == saved_detector(straight.folder, 4)
    assert [point[0] for point in saved_detector(straight.folder, 4)["points"]] == [0, 1, 2, 3, 4]
    assert hacking_warnings(resumed) == hacking_warnings(straight) and len(hacking_warnings(straight)) == 1
    assert resumed.summary["hacking"] == straight.summary["hacking"] == {"step": 3, "ended": False}
    assert run_fingerprint(resumed.folder) == run_fingerprint(straight.folder)


@pytest.mark.usefixtures("hacked_after_three")
def test_a_run_that_reward_hacking_ended_takes_no_step_after_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed after the save of its last step, before anything of its end is written."""
    recipe, steps = hacking_recipe("stop"), list[int]()

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def on_event(event: Event) -> None:
        if isinstance(event, StepEnd):
            steps.append(event.step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Stage, "finish", killed)
        run(recipe, out=tmp_path / "run", ui="none", on_event=on_event)
    assert steps == [1, 2, 3] and (tmp_path / "run" / "checkpoints" / "step-3").is_dir()
    resumed = run(recipe, out=tmp_path / "run", ui="none", on_event=on_event)
    assert steps == [1, 2, 3] and resumed.status == "done"
    assert resumed.summary["step"] == 3 and resumed.summary["hacking"] == {"step": 3, "ended": True}


# --- the state of the loop, in a run that is resumed ------------------------------------------------------------------


def saved_loop_state(folder: Path, step: int) -> dict[str, int]:
    state = json.loads((folder / "checkpoints" / f"step-{step}" / "state.json").read_text())["progress"]
    assert isinstance(state, dict)
    return state


def set_nonfinite_steps(monkeypatch: pytest.MonkeyPatch, steps: Sequence[int]) -> None:
    """Gives these steps of a run a loss that is not finite."""
    collect = SFT.collect

    def collect_and_break(algorithm: SFT, step: int) -> Any:
        factor = float("nan") if step + 1 in steps else 1.0
        monkeypatch.setattr(sft_module, "sft_loss", lambda *arguments: factor * sft_loss(*arguments))
        return collect(algorithm, step)

    monkeypatch.setattr(SFT, "collect", collect_and_break)


@pytest.mark.slow
def test_a_resumed_run_continues_all_counters_of_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, control: TrainerControl
) -> None:
    """It is interrupted between steps 2 and 3, which are not finite. The learning rate is so low that no other step
    changes the adapter, for which there is a warning at the third of them, step 5."""
    set_nonfinite_steps(monkeypatch, [2, 3])
    data = small_recipe(max_steps=5, save_steps=1, save_total_limit=9, logging_steps=1, learning_rate=1e-30)
    del data["evaluate"], data["data"]["eval_fraction"]
    recipe = Recipe.from_dict(data)
    straight = run(recipe, out=tmp_path / "straight", ui="none")
    stopped_after(2, recipe, tmp_path / "resumed", control)
    resumed = run(recipe, out=tmp_path / "resumed", ui="none")
    for step in range(1, 6):
        assert saved_loop_state(resumed.folder, step) == saved_loop_state(straight.folder, step), step
    assert all(saved_loop_state(straight.folder, 3).values()), "a counter that is 0 shows nothing"
    assert run_fingerprint(resumed.folder) == run_fingerprint(straight.folder)
    stalled = [warning for warning in straight.summary["warnings"] if "nothing is being learned" in warning]
    assert len(stalled) == 1 and stalled[0] in resumed.summary["warnings"]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_a_resumed_run_starts_its_sequences_in_the_same_order(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, control: TrainerControl
) -> None:
    """Eight sequences have three slots in each step. The second epoch, in which the lengths of each prompt are known,
    begins with step 3; the run is interrupted before and within it."""
    data = small_recipe(algorithm, max_steps=4, save_steps=1, prompts_per_step=2, logging_steps=1)
    del data["evaluate"]
    data["data"]["train"][0]["max_samples"] = 4
    data["rollout"]["max_num_seqs"] = 3
    if algorithm == "grpo":
        data["grpo"] = {"beta": 0.0}
    recipe = Recipe.from_dict(data)
    lengths_by_run: dict[str, list[list[int]]] = {"straight": [], "resumed": []}
    current = "straight"
    expected = CompletionLengths.expected

    def recorded(self: CompletionLengths, prompts: Sequence[Sequence[int]]) -> list[int]:
        lengths_by_run[current].append(expected(self, prompts))
        return lengths_by_run[current][-1]

    use_model = PromptSource.use_model

    def use_model_with_stops(source: PromptSource, *arguments: Any) -> None:
        use_model(source, *arguments)
        assert source.collector is not None
        source.collector.stop_ids |= frozenset(range(0, 10_000, 5))

    monkeypatch.setattr(CompletionLengths, "expected", recorded)
    monkeypatch.setattr(PromptSource, "use_model", use_model_with_stops)
    straight = run(recipe, out=tmp_path / "straight", ui="none")
    current = "resumed"
    stopped_after(2, recipe, tmp_path / "resumed", control)
    stopped_after(3, recipe, tmp_path / "resumed", control)
    resumed = run(recipe, out=tmp_path / "resumed", ui="none")
    assert lengths_by_run["resumed"] == lengths_by_run["straight"]
    assert any(min(lengths) < max(lengths) for lengths in lengths_by_run["straight"][2:]), "the test is blind"
    assert run_fingerprint(resumed.folder) == run_fingerprint(straight.folder)
