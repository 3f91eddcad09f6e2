"""The comparison of the estimated speed with the measured one, with given times."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowrank_tune import run, runner
from lowrank_tune.config import RecipeConfig, load_any
from lowrank_tune.errors import UserError
from lowrank_tune.events import Event, LogMessage, StepEnd
from lowrank_tune.json_files import read_json_object
from lowrank_tune.memory_planner.gpu_specs import GpuSpec
from lowrank_tune.memory_planner.planned_gpu import gpu_named
from lowrank_tune.memory_planner.planner import recomputed_of
from lowrank_tune.memory_planner.roofline import phase_time
from lowrank_tune.memory_planner.run_time import RunTimeModel
from lowrank_tune.memory_planner.specs import simulation_specs
from lowrank_tune.memory_planner.step_costs import step_costs
from lowrank_tune.memory_planner.update_speed import estimated_update_speed
from lowrank_tune.training.speed import MEASURED_STEPS, SpeedComparison


def step(number: int, seconds: float, logged: bool = False, rollout: float = 0.0) -> StepEnd:
    stats = {"rollout_seconds": rollout, "reward_seconds": rollout / 2}
    return StepEnd(step=number, steps=50, stats=stats, seconds=seconds, tokens=1000, logged=logged)


def compared(steps: list[StepEnd], estimated: float = 800.0) -> tuple[SpeedComparison, list[Event]]:
    events: list[Event] = []
    comparison = SpeedComparison(estimated, events.append)
    for each in steps:
        comparison.add(each)
    return comparison, events


def test_twenty_steps_are_measured_without_the_first_and_the_logged_ones() -> None:
    steps = [step(number, 9.0 if number in (1, 5, 10) else 2.0, logged=number in (5, 10)) for number in range(1, 26)]
    comparison, events = compared(steps)
    assert comparison.to_dict() == {
        "estimated_tokens_per_second": 800.0,
        "measured_tokens_per_second": 500.0,
        "ratio": 0.625,
    }
    (event,) = events
    assert isinstance(event, LogMessage)
    assert event.message == ("speed of the update after 20 steps: 500 tokens/s measured, 800 estimated (ratio 0.62)")


def test_nothing_is_compared_before_the_last_of_them() -> None:
    comparison, events = compared([step(number, 2.0) for number in range(1, MEASURED_STEPS)])
    assert comparison.to_dict() == {} and not events


def test_all_steps_count_if_all_are_logged() -> None:
    comparison, _ = compared([step(number, 4.0, logged=True) for number in range(1, MEASURED_STEPS + 1)])
    assert comparison.measured_tokens_per_second == 250


def test_the_seconds_of_collecting_do_not_count() -> None:
    comparison, _ = compared([step(number, 8.0, rollout=4.0) for number in range(1, MEASURED_STEPS + 1)])
    assert comparison.measured_tokens_per_second == 500


@pytest.mark.slow
def test_a_step_of_grpo_is_estimated_with_its_passes_before_the_update() -> None:
    """Per token: the update, and old and reference log-probs once for both passes of the update."""
    loaded = load_any("tiny-grpo", "grpo.num_iterations=2")
    assert isinstance(loaded, RecipeConfig)
    gpu = gpu_named("4090")
    (spec,) = simulation_specs(loaded, "cuda")
    costs = step_costs(spec, recomputed_of(spec), {})
    before = phase_time(costs["old and reference"].kernels, gpu).seconds / costs["old and reference"].tokens
    update = RunTimeModel(loaded, gpu, costs, {}).run_time(None).update
    assert estimated_update_speed(loaded, gpu) == pytest.approx(1 / (1 / update.tokens_per_second + before / 2))


@pytest.mark.slow
def test_the_summary_of_a_run_has_both_speeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def comparison(recipe: object, device: torch.device, emit: object) -> SpeedComparison:
        assert device.type == "cpu"
        return SpeedComparison(1000.0, emit)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "_speed_comparison", comparison)
    settings = ["train.max_steps=21", "train.num_train_epochs=null", "evaluate={}", "train.warmup_steps=2"]
    run("tiny-sft", *settings, out=tmp_path / "run", ui="none")
    speed = read_json_object(tmp_path / "run" / "summary.json")["speed"]
    assert speed["estimated_tokens_per_second"] == 1000 and speed["measured_tokens_per_second"] > 0
    assert speed["ratio"] == pytest.approx(speed["measured_tokens_per_second"] / 1000, abs=1e-3)


def test_a_gpu_with_rates_is_estimated_and_a_fault_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Event] = []
    estimates = iter([1234.0])

    def estimate(recipe: RecipeConfig, gpu: GpuSpec) -> float:
        for value in estimates:
            return value
        raise UserError("no configuration")

    monkeypatch.setattr(runner, "installed_spec", lambda: gpu_named("4090"))
    monkeypatch.setattr(runner, "estimated_update_speed", estimate)
    recipe = load_any("tiny-sft")
    assert isinstance(recipe, RecipeConfig)
    cuda = torch.device("cuda")
    comparison = runner._speed_comparison(recipe, cuda, events.append)
    assert comparison is not None and comparison.estimated_tokens_per_second == 1234 and not events
    assert runner._speed_comparison(recipe, cuda, events.append) is None
    (event,) = events
    assert isinstance(event, LogMessage) and "not estimated: no configuration" in event.message
    unplanned = load_any("tiny-sft", "train.memory_check=off")
    assert isinstance(unplanned, RecipeConfig)
    assert runner._speed_comparison(unplanned, cuda, events.append) is None and len(events) == 1


def test_a_run_without_a_gpu_compares_nothing() -> None:
    assert runner._speed_comparison(load_any("tiny-sft"), torch.device("cpu"), lambda event: None) is None
