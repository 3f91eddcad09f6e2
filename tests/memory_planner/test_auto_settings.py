"""Values of `auto`: as few layers are recomputed as fit, and the plan never refuses what was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from lowrank_tune.assembly.model import logits_chunk_of
from lowrank_tune.cli import app
from lowrank_tune.config import Chain, list_presets, load_any
from lowrank_tune.events import Event, LogMessage
from lowrank_tune.memory_planner import auto_settings, check_fit, planner
from lowrank_tune.memory_planner.auto_settings import (
    AUTO_MARGIN,
    choose_auto_settings,
    describe_gain,
    fits_with_margin,
)
from lowrank_tune.memory_planner.extrapolation import MIN_LAYERS, Peaks
from lowrank_tune.memory_planner.gpu_specs import GpuSpec
from lowrank_tune.memory_planner.meta_model import Layer
from lowrank_tune.memory_planner.plan_report import GIB, Phase, Plan, needed
from lowrank_tune.memory_planner.planned_gpu import gpu_named
from lowrank_tune.memory_planner.planner import plan_of
from lowrank_tune.memory_planner.roofline import PhaseTime
from lowrank_tune.memory_planner.simulation import SimulationSpec, simulate
from lowrank_tune.memory_planner.specs import simulation_specs
from lowrank_tune.memory_planner.update_times import UpdateTimes, seconds_with
from lowrank_tune.model.logprobs import CHUNK_LOGITS, LARGE_CHUNK_LOGITS

NUM_LAYERS = 9
ROWS_OF_512 = """
algorithm: sft
base: {{model: {folder}, bits: 4}}
data: {{train: [{{dataset: builtin:arithmetic}}], max_length: 512}}
train: {{max_steps: 2, micro_batch_size: {rows}, gradient_checkpointing: {layers}, logits_chunk: {chunk}}}
"""


def spec_of(
    folder: Path, layers: int | str, rows: int | str = 16, chunk: int | str = CHUNK_LOGITS, vocabulary: int = 1000
) -> SimulationSpec:
    """A Llama of nine layers, of which there is the configuration alone."""
    LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=512,
        intermediate_size=1024,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_hidden_layers=NUM_LAYERS,
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    file = folder / "recipe.yaml"
    file.write_text(ROWS_OF_512.format(folder=folder, layers=layers, rows=rows, chunk=chunk), encoding="utf-8")
    (spec,) = simulation_specs(load_any(str(file)), "cuda")
    return spec


def plan_with(folder: Path, layers: int | str, vram: int) -> Plan:
    return plan_of(spec_of(folder, layers), vram, "sft")


def made_up_peaks(spec: SimulationSpec, layers: Sequence[Layer], only_update: bool = False) -> Peaks:
    """Each layer has weights; one that is not recomputed has activations for each row, and each logit has 10 bytes."""
    logits = 10 * ((logits_chunk_of(spec.recipe) or CHUNK_LOGITS) - CHUNK_LOGITS)
    stored = sum(not layer.recomputed for layer in layers)
    activations = spec.sizes.rows * (stored + 1) * 10_000_000
    weights = len(layers) * 1_000_000
    return {
        ("update", "backward", "last"): {
            "weights": len(layers) * 1_000_000,
            "activations": activations,
            "logits": logits,
        },
        ("optimizer", "before"): {"weights": weights},
    }


def made_up_times(spec: SimulationSpec, gpu: GpuSpec | None = None, unpacking: float = 0.0002) -> UpdateTimes:
    """Each pass over a layer takes 1 us a token, and a time to unpack its weights; a recomputed layer has one more."""

    def time(layer: Layer) -> PhaseTime:
        passes = 3 if layer.recomputed else 2
        return PhaseTime(1, 0, 1).times(passes * (unpacking + 1e-6 * spec.sizes.tokens))

    kinds = [Layer(recomputed=True), Layer(recomputed=False)]
    base = time(kinds[0]).then(time(kinds[1])).times(MIN_LAYERS)
    return UpdateTimes(base, {kind: time(kind) for kind in kinds}, spec.sizes.tokens)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the simulation by one that takes no time."""
    for module in (planner, auto_settings):
        monkeypatch.setattr(module, "cached_peaks", made_up_peaks)
    monkeypatch.setattr(auto_settings, "fit_update_times", made_up_times)


def check_all_sizes(tmp_path: Path, num_sizes: int) -> None:
    """Compares the choice with the plans of all numbers of layers, on GPUs of many sizes."""
    by_count = {count: plan_with(tmp_path, count, 1) for count in (0, *range(2, NUM_LAYERS - 1), NUM_LAYERS)}
    spec = spec_of(tmp_path, "auto")
    sizes = [plan.needed for plan in by_count.values()]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 1.5 * sizes[-1], "each layer changes what is needed"
    for vram in range(sizes[-1], round(1.1 * sizes[0]), (sizes[0] - sizes[-1]) // num_sizes):
        written = replace(by_count[NUM_LAYERS], vram=vram)
        choice = choose_auto_settings(spec, written)
        with_room = [count for count, plan in by_count.items() if plan.needed <= vram * (1 - AUTO_MARGIN)]
        expected = min(with_room, default=NUM_LAYERS)
        assert choice.values == {"gradient_checkpointing": expected}
        accepted = replace(by_count[expected], vram=vram)
        assert accepted.fits and choice.plan == accepted, "its plan is that of a recipe with this number"
    too_small = choose_auto_settings(spec, replace(by_count[NUM_LAYERS], vram=sizes[-1] - 1))
    assert too_small.values == {}


@pytest.mark.usefixtures("made_up")
def test_the_fewest_layers_that_fit_are_recomputed_and_the_plan_accepts_them(tmp_path: Path) -> None:
    check_all_sizes(tmp_path, 40)


@pytest.mark.slow
def test_a_simulated_plan_accepts_the_layers_that_auto_chooses(tmp_path: Path) -> None:
    check_all_sizes(tmp_path, 7)


@pytest.mark.usefixtures("made_up")
def test_a_micro_batch_that_is_auto_too_is_no_larger_than_speed_needs(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "auto", "auto")
    choice = choose_auto_settings(spec, plan_of(spec, 24 * GIB, "sft"))
    assert choice.values == {"micro_batch_size": 16, "gradient_checkpointing": 0}, "8,192 tokens"
    assert choice.plan.sizes.units == 16
    little = choose_auto_settings(spec, plan_of(spec, 950_000_000, "sft"))
    assert 4 < little.values["micro_batch_size"] < 16 and little.values["gradient_checkpointing"] == NUM_LAYERS
    assert fits_with_margin(little.plan)
    assert not choose_auto_settings(spec, plan_of(spec, 800_000_000, "sft")).values


@pytest.mark.usefixtures("made_up")
@pytest.mark.parametrize(("unpacking", "expected"), [(0.0002, {4, 8, 16}), (0.01, {16})])
def test_of_all_micro_batches_and_layers_that_fit_the_fastest_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unpacking: float, expected: set[int]
) -> None:
    """Compared with all of them. A smaller micro-batch leaves memory for more layers, and unpacks weights more
    often."""
    times = partial(made_up_times, unpacking=unpacking)
    monkeypatch.setattr(auto_settings, "fit_update_times", times)

    def seconds(spec: SimulationSpec, recomputed: int) -> float:
        return seconds_with(times(spec), spec, recomputed)

    spec = spec_of(tmp_path, "auto", "auto")
    by_rows = {rows: spec_of(tmp_path / str(rows), "auto", rows) for rows in (4, 8, 16)}
    plans = {
        (rows, count): plan_of(spec_of(tmp_path / f"{rows}-{count}", count, rows), 1, "sft")
        for rows in by_rows
        for count in (0, *range(2, NUM_LAYERS - 1), NUM_LAYERS)
    }
    chosen = set()
    for vram in range(round(1.2 * GIB), 3 * GIB, GIB // 16):
        choice = choose_auto_settings(spec, plan_of(spec, vram, "sft"))
        found = (choice.values["micro_batch_size"], choice.values["gradient_checkpointing"])
        room = vram * (1 - AUTO_MARGIN)
        fitting = [key for key, plan in plans.items() if plan.needed <= room]
        speeds = {key: seconds(by_rows[key[0]], key[1]) for key in fitting}
        assert found in fitting and speeds[found] == min(speeds.values())
        assert choice.gain == pytest.approx(seconds(by_rows[16], NUM_LAYERS) / speeds[found])
        chosen.add(found)
    assert {rows for rows, _ in chosen} == expected


@pytest.mark.usefixtures("made_up")
def test_the_gain_is_relative_to_the_largest_micro_batch(tmp_path: Path) -> None:
    """Which is named if another one is chosen."""
    spec = spec_of(tmp_path, "auto", "auto")
    lines = {}
    for vram in (2 * GIB, 3 * GIB):
        choice = choose_auto_settings(spec, plan_of(spec, vram, "sft"), gpu_named("3090"))
        lines[choice.plan.sizes.units] = describe_gain(choice)
    assert {units: line.partition("x as fast as ")[2] for units, line in lines.items()} == {
        8: "a micro-batch of 16 with all recomputed, by count",
        16: "with all recomputed, by count",
    }
    unknown = choose_auto_settings(spec, plan_of(spec, 3 * GIB, "sft"), None)
    assert describe_gain(unknown) == lines[16] + " with the rates of an RTX 4090"


@pytest.mark.usefixtures("made_up")
def test_a_large_chunk_of_logits_takes_memory_that_is_left(tmp_path: Path) -> None:
    """It never costs a recomputed layer: it has only the room that these leave."""
    spec = spec_of(tmp_path, "auto", chunk="auto")
    large = 0
    for vram in range(1_000_000_000, 6_000_000_000, 100_000_000):
        written = plan_of(spec, vram, "sft")
        choice = choose_auto_settings(spec, written)
        fixed = choose_auto_settings(spec_of(tmp_path, "auto"), written)
        if not fixed.values:
            assert not choice.values
            continue
        assert choice.values == {**fixed.values, "logits_chunk": choice.values["logits_chunk"]}
        with_large = needed(fixed.plan.peak + 10 * (LARGE_CHUNK_LOGITS - CHUNK_LOGITS), "cuda")
        fits = with_large <= vram * (1 - AUTO_MARGIN)
        assert choice.values["logits_chunk"] == (LARGE_CHUNK_LOGITS if fits else CHUNK_LOGITS)
        assert choice.plan.fits
        large += fits
    assert 5 < large < 45


@pytest.mark.slow
def test_the_plan_counts_the_chunk_of_logits(tmp_path: Path) -> None:
    """Two or three buffers of a chunk in fp32; a chunk is no larger than all tokens."""
    logits = []
    for chunk in (1 << 23, 1 << 24, 1 << 25):
        spec = spec_of(tmp_path, 2, chunk=chunk, vocabulary=4000)
        peaks = simulate(spec, [Layer(), Layer()], only_update=True)
        logits.append(max(peak.get("logits", 0) for peak in peaks.values()))
    bytes_per_logit = logits[1] / (1 << 24)
    assert 8 <= bytes_per_logit <= 12.1
    assert logits[0] < logits[1] < logits[2] == pytest.approx(bytes_per_logit * 16 * 511 * 4000, rel=0.02)


@pytest.mark.usefixtures("made_up")
def test_auto_does_not_hide_that_rollouts_do_not_fit(tmp_path: Path) -> None:
    plan = plan_with(tmp_path, "auto", 24 * GIB)
    rollout = Phase("rollout", {"KV cache": 30 * GIB})
    assert fits_with_margin(plan) and choose_auto_settings(spec_of(tmp_path, "auto"), plan).values
    assert not choose_auto_settings(spec_of(tmp_path, "auto"), replace(plan, phases=(rollout, *plan.phases))).values
    fills_the_gpu = replace(rollout, bytes={"KV cache": round(22.2 * GIB)})
    assert fits_with_margin(replace(plan, phases=(fills_the_gpu, *plan.phases))), "decoding takes what is left"


@pytest.mark.usefixtures("made_up")
def test_a_run_logs_what_auto_is_and_plan_prints_it_before(tmp_path: Path) -> None:
    spec_of(tmp_path, "auto")
    file = str(tmp_path / "recipe.yaml")
    events: list[Event] = []
    fit = check_fit(load_any(file), 24.0, events.append)
    assert fit.changes == {"recipe": {"gradient_checkpointing": 0}}
    messages = [event.message for event in events if isinstance(event, LogMessage)]
    expected = "recipe: needs 2.3 of 24.0 GiB by plan, most of it in update; auto is train.gradient_checkpointing=0"
    gain = "a micro-batch of 16, 0 of 9 layers recomputed: the update is 1.50x as fast as with all recomputed, by count"
    assert messages == [f"{expected}; {gain} with the rates of an RTX 4090"], "this machine has no GPU"
    command = ["plan", file, "--vram", "24"]
    output = CliRunner().invoke(app, command, env={"COLUMNS": "200"}).output
    assert "auto: a run with this memory has train.gradient_checkpointing=0" in output
    assert gain in output and "with the rates" not in output
    assert "auto:" not in CliRunner().invoke(app, [*command, "train.gradient_checkpointing=0"]).output


@pytest.mark.parametrize("preset", [preset.name for preset in list_presets()])
def test_presets_of_gpus_recompute_as_few_layers_as_fit(preset: str) -> None:
    loaded = load_any(preset)
    stages = loaded.stages if isinstance(loaded, Chain) else (loaded,)
    expected = False if preset.startswith("tiny-") else "auto"
    assert [stage.train.gradient_checkpointing for stage in stages] == [expected] * len(stages)
