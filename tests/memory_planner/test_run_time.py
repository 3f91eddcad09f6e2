"""The run-time estimate: the time of a kernel worked out by hand, and laws of the hours."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from lowrank_tune.cli import app
from lowrank_tune.config import RecipeConfig, load_any
from lowrank_tune.errors import UserError
from lowrank_tune.memory_planner.gpu_specs import FASTEST, GPUS, LAUNCH_SECONDS, SLOWEST, GpuSpec
from lowrank_tune.memory_planner.kernel_costs import Kernel, KernelKind
from lowrank_tune.memory_planner.planned_gpu import gpu_named, planned_gpu, spec_of_device
from lowrank_tune.memory_planner.rollouts import DecodingSpec
from lowrank_tune.memory_planner.roofline import PhaseTime, kernel_seconds, parts_on, phase_time
from lowrank_tune.memory_planner.run_length import RunLength, Span, run_length
from lowrank_tune.memory_planner.run_time import RunTimeModel, sum_of_hours
from lowrank_tune.memory_planner.step_costs import PhaseCost
from lowrank_tune.ui.views.run_time import duration

GPU = gpu_named("4090")
GIB = 1 << 30


def gpu_of(bandwidth: float, tflops: float) -> GpuSpec:
    return replace(GPU, bandwidth_gb_s=bandwidth, half_tflops=tflops)


def test_a_kernel_takes_the_time_of_its_bytes_of_its_flops_or_the_least() -> None:
    """1,000 GB/s at 85 % and 100 TFLOP/s at 80 % or 70 %."""
    gpu = gpu_of(1000, 100)
    assert kernel_seconds(Kernel(KernelKind.ELEMENTWISE, 850_000_000), gpu) == pytest.approx(1e-3)
    assert kernel_seconds(Kernel(KernelKind.GEMM, 850_000, 80 * 10**9), gpu) == pytest.approx(1e-3)
    assert kernel_seconds(Kernel(KernelKind.FLASH, 850_000, 70 * 10**9), gpu) == pytest.approx(1e-3)
    assert kernel_seconds(Kernel(KernelKind.GEMM, 8, 8), gpu) == 2e-6


def test_the_slower_of_host_and_gpu_determines_a_phase() -> None:
    few = phase_time({Kernel(KernelKind.ELEMENTWISE, GIB): 10}, GPU)
    assert few.seconds == few.gpu_seconds and not few.is_host_bound
    many = phase_time({Kernel(KernelKind.ELEMENTWISE, 4): 1000}, GPU)
    assert many.seconds == many.host_seconds == pytest.approx(1000 * LAUNCH_SECONDS) and many.is_host_bound
    assert few.then(many).seconds == few.seconds + many.seconds > max(few.gpu_seconds, many.host_seconds)
    assert few.times(3) == few.then(few).then(few)


def test_a_packed_weight_is_unpacked_for_many_rows() -> None:
    """Three kernels unpack a weight: its scales, their offset, and its elements, to 2 bytes each."""
    few = Kernel(KernelKind.NF4, 9_000_000, 10, (16, 4096, 4096))
    assert list(parts_on(few, GPU)) == [few]
    rows = 8192
    flops = 2 * rows * 4096 * 4096
    parts = list(parts_on(Kernel(KernelKind.NF4, 9_000_000, flops, (rows, 4096, 4096)), GPU))
    assert [part.kind for part in parts] == [KernelKind.ELEMENTWISE] * 3 + [KernelKind.GEMM]
    elements = 4096 * 4096
    assert parts[2].num_bytes == elements * (0.5 + 4 / 64 + 2)
    assert parts[3] == Kernel(KernelKind.GEMM, 2 * (elements + 2 * rows * 4096), flops)


def test_bitsandbytes_fuses_more_rows_for_a_wide_output() -> None:
    wide = Kernel(KernelKind.NF4, 1, 1, (100, 14336, 4096))
    assert len(list(parts_on(wide, GPU))) == 1
    assert len(list(parts_on(replace(wide, mnk=(100, 4096, 14336)), GPU))) == 4
    assert len(list(parts_on(wide, gpu_named("h100")))) == 4


def recipe(*overrides: str) -> RecipeConfig:
    loaded = load_any("tiny-sft", *overrides)
    assert isinstance(loaded, RecipeConfig)
    return loaded


def grpo(*overrides: str) -> RecipeConfig:
    loaded = load_any("tiny-grpo", *overrides)
    assert isinstance(loaded, RecipeConfig)
    return loaded


def costs(*names: str) -> dict[str, PhaseCost]:
    """Phases of one GiB and 1,000 tokens each."""
    return {name: PhaseCost(name, 1000, {Kernel(KernelKind.ELEMENTWISE, GIB): 1.0}) for name in names}


SFT = costs("update", "optimizer", "validation")
DECODING = costs("rollout: reading", "rollout: placing", "rollout: average step", "rollout: longest step")
ROLLOUTS = {"rollout": DecodingSpec("policy", 64, 32, 100, 8, 16, 1 << 40)}


def hours(length: RunLength, gpu: GpuSpec = GPU, **kinds: Any) -> Span:
    found = RunTimeModel(kinds.get("recipe", recipe()), gpu, kinds.get("costs", SFT), kinds.get("rollouts", {}))
    total = found.run_time(length).hours
    assert total is not None
    return total


def tokens(low: float, high: float | None = None, steps: float = 100) -> RunLength:
    return RunLength(steps, Span(low, high or low), "")


def test_hours_of_an_update_by_hand() -> None:
    """Tokens over tokens per second, between the fastest and the slowest; the optimizer takes a 4.096th of a step."""
    model = RunTimeModel(recipe("data.eval_fraction=0"), GPU, costs("update", "optimizer"), {})
    run_time = model.run_time(tokens(1e6, 4e6))
    second = GIB / (1008e9 * 0.85)
    per_token = second * (1 + 1000 / (16 * 256)) / 1000
    assert run_time.update.tokens_per_second == pytest.approx(1 / per_token)
    assert run_time.hours is not None
    assert run_time.hours.low == pytest.approx(1e6 * per_token / 3600 * FASTEST)
    assert run_time.hours.high == pytest.approx(4e6 * per_token / 3600 * SLOWEST)
    million = run_time.update_hours(1e6)
    assert million.low == pytest.approx(run_time.hours.low) and million.high == pytest.approx(run_time.hours.high / 4)


def test_a_rollout_by_hand() -> None:
    """128 completions in 64 slots: two turns of 100 steps each, and the prompts once."""
    all_costs = {**costs("update", "optimizer"), **DECODING}
    model = RunTimeModel(grpo(), GPU, all_costs, ROLLOUTS)
    run_time = model.run_time(None)
    rollout = run_time.phases[0]
    assert rollout.tokens == 128 * 100
    readings = 8 / ROLLOUTS["rollout"].prefill_prompts
    second = GIB / (1008e9 * 0.85)
    assert rollout.time.seconds == pytest.approx(second * (2 * 100 + 2 + readings))
    assert run_time.hours is None and sum_of_hours([run_time]) is None


@given(st.floats(1e3, 1e9), st.floats(1.01, 100), st.floats(1, 1e5))
def test_more_tokens_take_longer(some: float, factor: float, steps: float) -> None:
    fewer = hours(tokens(some, some * factor, steps))
    more = hours(tokens(some * factor, some * factor**2, steps))
    assert fewer.low < more.low and fewer.high < more.high and fewer.low < fewer.high


@given(st.floats(1e9, 1e13), st.floats(1, 10), st.floats(1, 10), st.sampled_from(list(KernelKind)[:-1]))
def test_a_faster_gpu_is_not_slower(flops: float, bandwidth: float, rate: float, kind: KernelKind) -> None:
    kernel = Kernel(kind, round(flops / 100), round(flops))
    faster = gpu_of(GPU.bandwidth_gb_s * bandwidth, GPU.half_tflops * rate)
    assert kernel_seconds(kernel, faster) <= kernel_seconds(kernel, GPU)


def test_more_steps_draw_longer_and_longer_completions_too() -> None:
    both: dict[str, Any] = {"costs": {**costs("update", "optimizer"), **DECODING}, "rollouts": ROLLOUTS}
    short = RunLength(100, Span(1e6, 1e6), "", new_tokens=Span(50, 100))
    whole = hours(short, recipe=grpo(), **both)
    assert hours(replace(short, steps=200), recipe=grpo(), **both).low > whole.low
    assert hours(replace(short, new_tokens=Span(80, 100)), recipe=grpo(), **both).low > whole.low


def test_a_second_pass_of_the_update_takes_its_time_again() -> None:
    only_update = {"costs": costs("update", "optimizer")}
    once = hours(tokens(1e6), recipe=grpo(), **only_update)
    twice = hours(tokens(1e6), recipe=grpo("grpo.num_iterations=2"), **only_update)
    assert twice.low == pytest.approx(2 * once.low)


def test_the_length_of_a_run_is_that_of_its_data() -> None:
    """What `lowrank-tune data tiny-sft` prints, and docs/time-and-cost.md."""
    length = run_length(recipe())
    assert length is not None
    assert length.tokens == Span(4 * 13674, 4 * 13674) and length.steps == 96 and length.epochs == 4


@pytest.mark.parametrize(
    ("overrides", "rows"),
    [
        (["train.num_train_epochs=2"], 20000 * 0.98 * 2),
        (["train.num_train_epochs=null", "train.max_steps=50"], 50 * 16),
        (["data.eval_fraction=0", "data.train.0.max_samples=1000"], 1000),
    ],
)
def test_unknown_rows_are_between_a_quarter_and_the_whole_length(overrides: list[str], rows: float) -> None:
    loaded = load_any("llama-3.1-8b-sft", *overrides)
    assert isinstance(loaded, RecipeConfig)
    length = run_length(loaded)
    assert length is not None and length.steps == rows / 16
    assert length.tokens == Span(rows * 512, rows * 2048)


def test_the_length_of_a_run_with_an_unknown_number_of_rows_is_unknown() -> None:
    loaded = load_any("llama-3.1-8b-sft", "data.train.0.max_samples=null")
    assert isinstance(loaded, RecipeConfig)
    assert run_length(loaded) is None


def test_completions_are_between_half_and_the_whole_of_their_length() -> None:
    loaded = load_any("llama-3.1-8b-grpo")
    assert isinstance(loaded, RecipeConfig)
    length = run_length(loaded)
    assert length is not None and length.steps == 200 and length.new_tokens == Span(256, 512)
    completions = 200 * 16 * 8
    assert length.tokens == Span(completions * (128 + 256), completions * (512 + 512))


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 5090", "5090"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", None),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 3060", None),
    ],
)
def test_a_device_is_known_by_its_whole_name(device: str, name: str | None) -> None:
    found = spec_of_device(device)
    assert (None if found is None else found.name) == name


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_planned_gpu() -> None:
    assert planned_gpu("h100", None).vram_gib == gpu_named("H100").memory_gib
    smaller = planned_gpu("h100", 16.0)
    assert smaller.vram_gib == 16 and smaller.spec == gpu_named("h100")
    default = planned_gpu(None, None)
    assert default.vram_gib == 24 and default.spec == GPU and "no GPU found" in default.note
    assert planned_gpu(None, 8.0).spec == GPU
    assert "no bfloat16" in planned_gpu("t4", None).note
    with pytest.raises(UserError, match="4080: not known; the known ones are 3090, 4090"):
        planned_gpu("4080", None)


def test_a_gpu_without_rates_has_no_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (12 << 30, 12 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA GeForce RTX 3060")
    unknown = planned_gpu(None, None)
    assert unknown.spec is None and unknown.vram_gib == pytest.approx(11.7) and "RTX 3060 are not known" in unknown.note
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA GeForce RTX 5090")
    assert planned_gpu(None, None).spec == gpu_named("5090") and not planned_gpu(None, None).note


def test_durations_have_a_readable_unit() -> None:
    assert duration(Span(1.234, 23.4)) == "1.2 to 23 hours"
    assert duration(Span(0.05, 0.09)) == "3 to 5.4 minutes"
    assert duration(Span(0.001, 0.0025)) == "3.6 to 9 seconds"


def test_times_of_several_stages_are_added() -> None:
    model = RunTimeModel(recipe(), GPU, SFT, {})
    one = model.run_time(tokens(1e6))
    assert one.hours is not None
    assert sum_of_hours([one, one]) == one.hours.times(2) and sum_of_hours([]) is None
    assert sum_of_hours([one, model.run_time(None)]) is None


def test_a_phase_without_kernels_takes_no_time() -> None:
    assert phase_time({}, GPU) == PhaseTime()


def test_the_help_names_every_gpu() -> None:
    text = " ".join(CliRunner().invoke(app, ["plan", "--help"]).output.replace("│", " ").split())
    assert all(spec.name in text for spec in GPUS)


def test_no_gpu_is_planned_for_the_cpu() -> None:
    refused = CliRunner().invoke(app, ["plan", "tiny-sft", "--device", "cpu", "--gpu", "4090"])
    assert refused.exit_code == 2 and "--device cpu plans for the CPU" in refused.output
    cpu = CliRunner().invoke(app, ["plan", "tiny-sft", "--device", "cpu", "--json", "evaluate={}"])
    (stage,) = json.loads(cpu.output)["stages"]
    assert stage["run_time"] is None and stage["vram_bytes"] == 0


@pytest.mark.slow
def test_the_command_prints_hours(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["plan", "llama-3.1-8b-sft", "--gpu", "4090"])
    assert done.exit_code == 0 and "hours (estimate, not measured)" in done.output and "RTX 4090" in done.output
    command = ["plan", "llama-3.1-8b-sft", "--gpu", "h100", "--json"]
    report = json.loads(CliRunner().invoke(app, command).output)
    (stage,) = report["stages"]
    faster = stage["run_time"]
    assert faster["gpu"] == "h100" and faster["label"] == "estimate, not measured" and stage["fits"]
    slower = json.loads(CliRunner().invoke(app, [*command[:3], "4090", "--json"]).output)["stages"][0]["run_time"]
    assert faster["hours"][1] < slower["hours"][1]
    unknown = CliRunner().invoke(app, [*command[:2], "--gpu", "4090", "data.train.0.max_samples=null"])
    assert "a million tokens of the update: " in unknown.output
