"""Simulations are stored: the second plan is the first one, without a simulation, and never that of other inputs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from lowrank_tune.config import load_any
from lowrank_tune.memory_planner import cached_simulation, simulation_cache
from lowrank_tune.memory_planner.cached_simulation import cached_kernels, cached_result, code_hash, simulation_key
from lowrank_tune.memory_planner.meta_model import Layer
from lowrank_tune.memory_planner.rollouts import DecodingSpec
from lowrank_tune.memory_planner.simulation import SimulationSpec
from lowrank_tune.memory_planner.simulation_cache import SimulationResult, read_result, write_result
from lowrank_tune.memory_planner.specs import simulation_specs

LAYERS = [Layer(), Layer()]
PEAKS = {("update", "backward", "last"): {"weights": 7, "activations": 5}, ("optimizer", "before"): {"weights": 7}}


def spec_of(*overrides: str) -> SimulationSpec:
    (spec,) = simulation_specs(load_any("tiny-sft", *overrides), "cuda")
    return spec


def simulated(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replaces the simulation; returns the list of its calls."""
    calls: list[Any] = []

    def simulate(*arguments: Any) -> Any:
        calls.append(arguments)
        return PEAKS

    monkeypatch.setattr(cached_simulation, "simulate", simulate)
    return calls


def test_a_stored_result_is_the_simulated_one(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of()
    first = cached_result(spec, LAYERS)
    calls = simulated(monkeypatch)
    again = cached_result(spec, LAYERS)
    assert not calls and again == first and list(again.peaks) == list(first.peaks), "in the order of the program"
    assert [list(peak) for peak in again.peaks.values()] == [list(peak) for peak in first.peaks.values()]


def test_stored_kernels_are_the_counted_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of()
    first = cached_kernels(spec, LAYERS)
    assert sum(first["update"].values()) > 100
    monkeypatch.setattr(cached_simulation, "count_kernels", pytest.fail)
    assert cached_kernels(spec, LAYERS) == first
    assert cached_result(spec, LAYERS).peaks, "another result than the kernels of the same simulation"


@pytest.mark.slow
def test_settings_that_leave_the_key_equal_leave_the_result_equal() -> None:
    others = ("train.gradient_checkpointing=auto", "train.memory_budget_gib=3", "train.memory_check=off", "name=other")
    one, other = spec_of(), spec_of(*others)
    assert simulation_key(one, LAYERS, False) == simulation_key(other, LAYERS, False)
    assert cached_simulation.simulate(one, LAYERS) == cached_simulation.simulate(other, LAYERS)


def with_config(spec: SimulationSpec, **values: Any) -> SimulationSpec:
    config = type(spec.config).from_dict({**spec.config.to_dict(), **values})
    return replace(spec, config=config)


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec_of("train.optim=adamw_8bit"),
        lambda spec: spec_of("adapters.policy.r=3"),
        lambda spec: spec_of("base.bits=16"),
        lambda spec: with_config(spec, vocab_size=99),
        lambda spec: replace(spec, sizes=replace(spec.sizes, length=9)),
        lambda spec: replace(spec, loaded={"sft": LoraConfig(r=4, target_modules=["q_proj"])}),
        lambda spec: replace(spec, reward_base_adapters=["sft"]),
        lambda spec: replace(spec, rollouts={"rollout": DecodingSpec("policy", 2, 3, 4, 5, 6, 7)}),
    ],
)
def test_every_input_changes_the_key(change: Callable[[SimulationSpec], SimulationSpec]) -> None:
    spec = spec_of()
    assert simulation_key(change(spec), LAYERS, False) != simulation_key(spec, LAYERS, False)


def test_layers_code_and_libraries_change_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of()
    keys = [simulation_key(spec, LAYERS, False), simulation_key(spec, LAYERS, True)]
    keys += [simulation_key(spec, [Layer(), Layer(recomputed=False)], False)]
    monkeypatch.setattr(cached_simulation, "library_versions", lambda: {"torch": "0"})
    keys.append(simulation_key(spec, LAYERS, False))
    monkeypatch.setattr(cached_simulation, "code_hash", lambda: "other")
    keys.append(simulation_key(spec, LAYERS, False))
    assert len(set(keys)) == len(keys)


def test_the_hash_of_the_code_is_that_of_all_files(tmp_path: Path) -> None:
    hashes = []
    for text in ("a = 1", "a = 2"):
        (tmp_path / "sub").mkdir(exist_ok=True)
        (tmp_path / "sub" / "module.py").write_text(text, encoding="utf-8")
        code_hash.cache_clear()
        hashes.append(code_hash(tmp_path))
    assert hashes[0] != hashes[1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw.replace(b"7", b"8", 1),
        lambda raw: b"",
        lambda raw: b"[1]",
        lambda raw: b'{"peaks": 3}',
        lambda raw: b"\xff\xfe",
    ],
)
def test_a_damaged_file_is_computed_again(damage: Callable[[bytes], bytes], empty_cache: Path) -> None:
    write_result("key", SimulationResult(PEAKS))
    assert read_result("key") == SimulationResult(PEAKS)
    (file,) = (empty_cache / "simulations").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert read_result("key") is None
    write_result("key", SimulationResult(PEAKS))
    assert read_result("key") == SimulationResult(PEAKS)


def test_a_cache_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_cache: Path
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("LOWRANK_TUNE_CACHE", str(tmp_path / "file"))
    calls = simulated(monkeypatch)
    with pytest.warns(RuntimeWarning, match="LOWRANK_TUNE_CACHE"):
        assert cached_result(spec_of(), LAYERS).peaks == PEAKS
    assert len(calls) == 1


def test_the_oldest_files_are_removed(monkeypatch: pytest.MonkeyPatch, empty_cache: Path) -> None:
    monkeypatch.setattr(simulation_cache, "MAX_FILES", 4)
    folder = empty_cache / "simulations"
    for number in range(5):
        write_result(str(number), SimulationResult(PEAKS))
        if number < 4:
            os.utime(folder / f"{number}.json", (number, number))
    assert sorted(file.name for file in folder.iterdir()) == ["3.json", "4.json"]
