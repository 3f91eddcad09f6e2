"""A run that is continued has the memory budget, and the values of `auto`, with which it began."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowrank_tune import runner
from lowrank_tune.config import load_any
from lowrank_tune.config.memory import memory_settings
from lowrank_tune.events import Event, LogMessage, StepEnd, is_warning
from lowrank_tune.memory_planner import auto_settings, planner
from lowrank_tune.memory_planner.preflight_check import check_fit
from lowrank_tune.model.gpu_memory import GIB, GpuMemory
from lowrank_tune.model.logprobs import LARGE_CHUNK_LOGITS
from lowrank_tune.preflight.run_memory import MEMORY_FILE, RunMemory, start_memory

FREE = GpuMemory("GPU of a test", 20 * GIB, 24 * GIB)
LESS_FREE = replace(FREE, free_bytes=10 * GIB)
STORED = RunMemory("GPU of a test", 24 * GIB, 20 * GIB, FREE.budget_bytes, {"sft": {"gradient_checkpointing": 3}})


def unfinished(folder: Path, content: Any, with_checkpoint: bool = True) -> Path:
    """A run folder with this `memory.json`."""
    (folder / "run.json").write_text("{}", encoding="utf-8")
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / MEMORY_FILE).write_text(text, encoding="utf-8")
    if with_checkpoint:
        (folder / "checkpoints" / "step-1").mkdir(parents=True)
    return folder


def started(folder: Path, memory: GpuMemory) -> tuple[RunMemory, list[str]]:
    events: list[Event] = []
    found = start_memory(folder, memory, events.append)
    assert all(is_warning(event) for event in events)
    return found, [event.message for event in events if isinstance(event, LogMessage)]


def test_a_run_that_is_continued_has_the_memory_of_its_first_start(tmp_path: Path) -> None:
    folder = unfinished(tmp_path, STORED.to_dict())
    assert started(folder, FREE) == (STORED, [])
    slightly_less = replace(FREE, free_bytes=FREE.free_bytes - GIB // 8)
    assert started(folder, slightly_less) == (STORED, []), "the reserve is for this"
    found, (message,) = started(folder, LESS_FREE)
    assert found == STORED and "continues with it, but only 10.2 GiB are free now" in message


def test_a_smaller_gpu_is_planned_again(tmp_path: Path) -> None:
    folder = unfinished(tmp_path, STORED.to_dict())
    smaller = GpuMemory("small", 11 * GIB, 12 * GIB)
    found, (message,) = started(folder, smaller)
    assert found == RunMemory("small", 12 * GIB, 11 * GIB, smaller.budget_bytes)
    assert "memory is planned again" in message


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"version": 1, "budget_bytes": "much"}', json.dumps({**STORED.to_dict(), "version": 2})],
)
def test_a_file_that_cannot_be_used_is_measured_again(tmp_path: Path, content: str) -> None:
    found, messages = started(unfinished(tmp_path, content), LESS_FREE)
    assert found.budget_bytes == LESS_FREE.budget_bytes and not found.auto and not messages


def test_a_run_without_a_checkpoint_is_measured_again(tmp_path: Path) -> None:
    found, messages = started(unfinished(tmp_path, STORED.to_dict(), with_checkpoint=False), LESS_FREE)
    assert found.budget_bytes == LESS_FREE.budget_bytes and not messages
    assert started(tmp_path / "new", FREE)[0].budget_bytes == FREE.budget_bytes


def made_up_peaks(spec: Any, layers: Any, only_update: bool = False) -> Any:
    """Each layer that is not recomputed needs 6 GiB."""
    stored = sum(not layer.recomputed for layer in layers)
    return {("update", "backward", "last"): {"activations": (1 + 6 * stored) * GIB}}


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (planner, auto_settings):
        monkeypatch.setattr(module, "cached_peaks", made_up_peaks)


@pytest.mark.slow
@pytest.mark.usefixtures("made_up")
def test_values_of_the_first_start_stay_and_settings_of_the_user_are_above_them() -> None:
    auto = "train.gradient_checkpointing=auto"

    def changes(*overrides: str, chosen: Any) -> Any:
        recipe = load_any("tiny-sft", "evaluate={}", "train.logits_chunk=16777216", *overrides)
        return check_fit(recipe, 24.0, lambda event: None, chosen={"tiny-sft": chosen}).changes["tiny-sft"]

    assert changes(auto, chosen={"gradient_checkpointing": 3}) == {"gradient_checkpointing": 3}
    assert changes(auto, chosen={}) == {"gradient_checkpointing": 2}
    assert changes("train.gradient_checkpointing=all", chosen={"gradient_checkpointing": 3}) == {}
    both = changes(auto, "train.micro_batch_size=auto", chosen={"gradient_checkpointing": 3})
    assert both.keys() == {"gradient_checkpointing", "micro_batch_size"} and both["gradient_checkpointing"] == 2


@pytest.mark.usefixtures("made_up")
def test_the_budget_of_a_recipe_replaces_what_is_free() -> None:
    recipe = ("tiny-sft", "evaluate={}", "train.gradient_checkpointing=all")
    assert check_fit(load_any(*recipe), 1.0, lambda event: None).faults
    assert not check_fit(load_any(*recipe, "train.memory_budget_gib=4"), 1.0, lambda event: None).faults


SHORT_RUN = (
    "tiny-sft",
    "evaluate={}",
    "train.max_steps=2",
    "train.save_steps=1",
    "train.gradient_checkpointing=auto",
)


def test_values_are_chosen_again_with_other_settings_of_memory(tmp_path: Path) -> None:
    """A continued run may have a smaller budget, or larger micro-batches."""
    recipe = load_any(*SHORT_RUN)
    values = {"tiny-sft": {"gradient_checkpointing": 3}}
    stored = replace(STORED, auto={}).with_values(recipe.stages, {**values, "other": {"logits_chunk": 2}})
    folder = unfinished(tmp_path, stored.to_dict())
    found, _ = started(folder, FREE)
    assert found.kept_values(recipe.stages) == values
    assert found.kept_values(load_any(*SHORT_RUN, "train.learning_rate=1").stages) == values
    for changed in ("train.memory_budget_gib=9", "train.micro_batch_size=99", "train.activation_offloading=true"):
        assert found.kept_values(load_any(*SHORT_RUN, changed).stages) == {}


def test_stages_that_are_not_planned_keep_their_values() -> None:
    stages = load_any("tiny-preference").stages
    first = replace(STORED, auto={}).with_values(stages, {"sft": {"logits_chunk": 2}, "dpo": {"logits_chunk": 4}})
    later = first.with_values(stages, {"sft": {}, "dpo": {"logits_chunk": 8}})
    assert later.kept_values(stages) == {"sft": {"logits_chunk": 2}, "dpo": {"logits_chunk": 8}}


def start_run(
    folder: Path, free: GpuMemory, used: list[tuple[Any, ...]], patch: pytest.MonkeyPatch, steps: int
) -> list[str]:
    """Runs two steps, or is stopped after fewer. Returns the warnings; appends the recomputed layers, the
    chunk of logits and the budget that the model was loaded with."""
    warnings: list[str] = []
    ended: list[Event] = []
    build = runner.build

    def on_event(event: Event) -> None:
        if isinstance(event, LogMessage) and is_warning(event):
            warnings.append(event.message)
        ended.extend([event] if isinstance(event, StepEnd) else [])
        if len(ended) > steps:
            raise KeyboardInterrupt

    def watched(recipe: Any, *arguments: Any, **named: Any) -> Any:
        built = build(recipe, *arguments, **named)
        used.append((recipe.train.gradient_checkpointing, built.roles.logits_chunk, named["gpu_budget_bytes"]))
        return built

    recipe = load_any(*SHORT_RUN)
    with patch.context() as while_it_runs:
        while_it_runs.setattr(runner, "build", watched)
        while_it_runs.setattr(runner, "read_gpu_memory", lambda device: free)
        if steps == 2:
            runner.run(recipe, out=folder, ui="none", on_event=on_event)
        else:
            with pytest.raises(KeyboardInterrupt):
                runner.run(recipe, out=folder, ui="none", on_event=on_event)
    return warnings


@pytest.mark.slow
@pytest.mark.usefixtures("made_up")
def test_a_run_writes_its_memory_and_continues_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWRANK_TUNE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "run"
    used: list[tuple[Any, ...]] = []
    assert start_run(folder, FREE, used, monkeypatch, 1) == []
    written = json.loads((folder / MEMORY_FILE).read_bytes())
    assert written == {
        "version": 1,
        "gpu": "GPU of a test",
        "total_bytes": 24 * GIB,
        "free_bytes": 20 * GIB,
        "budget_bytes": FREE.budget_bytes,
        "auto": {"tiny-sft": {"gradient_checkpointing": 2, "logits_chunk": LARGE_CHUNK_LOGITS}},
        "settings": {"tiny-sft": memory_settings(load_any(*SHORT_RUN).stages[0])},
    }
    (message,) = start_run(folder, LESS_FREE, used, monkeypatch, 2)
    assert "only 10.2 GiB are free now" in message
    assert json.loads((folder / MEMORY_FILE).read_bytes()) == written
    other = tmp_path / "other"
    start_run(other, LESS_FREE, used, monkeypatch, 2)
    as_it_began = (2, LARGE_CHUNK_LOGITS, FREE.budget_bytes)
    assert used == [as_it_began, as_it_began, (4, LARGE_CHUNK_LOGITS, LESS_FREE.budget_bytes)]
