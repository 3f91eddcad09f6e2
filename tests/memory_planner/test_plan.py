"""The memory planner: its plan is what the allocator of torch records, for any model, algorithm and checkpointing."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import unquantized_base
from rich.console import Console
from transformers import LlamaConfig
from typer.testing import CliRunner

from lowrank_tune.cli import app
from lowrank_tune.config import load_any
from lowrank_tune.events import Event, LogMessage
from lowrank_tune.generation.cache_memory import gpu_cache_bytes
from lowrank_tune.generation.static_slot_cache import StaticSlotCache
from lowrank_tune.memory_planner import check_fit, plan, planner
from lowrank_tune.memory_planner.extrapolation import Peaks
from lowrank_tune.memory_planner.fit import largest_fitting
from lowrank_tune.memory_planner.meta_model import layers_of
from lowrank_tune.memory_planner.plan_report import Phase, Plan, needed
from lowrank_tune.memory_planner.planner import decoding_phases, peaks_of, phases_in, phases_of, plan_of
from lowrank_tune.memory_planner.rollouts import DecodingSpec
from lowrank_tune.memory_planner.run_length import Span
from lowrank_tune.memory_planner.simulation import SimulationSpec, simulate
from lowrank_tune.memory_planner.sizes import Sizes
from lowrank_tune.memory_planner.specs import simulation_specs
from lowrank_tune.model import configs
from lowrank_tune.ui.views.plan import PlanPrinter, chain_summary, lines

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "plan.py"
CLOSE = 0.03


def off(shape: str, algorithms: list[str], layers: list[str], more: Sequence[str] = ()) -> dict[tuple[str, ...], float]:
    """By how much the planner is off, of each cell. In a process of its own: what is measured is all that a process
    holds, and tensors that other tests left behind, or that die meanwhile, are none of the run's. With one thread, as
    kernels keep scratch for each."""
    command = [
        sys.executable,
        str(BENCHMARK),
        "--shapes",
        shape,
        "--algorithms",
        *algorithms,
        "--layers",
        *layers,
        *more,
    ]
    path = os.pathsep.join([str(BENCHMARK.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in done.stdout.splitlines()
        if line.startswith("|")
    ][2:]
    return {tuple(row[:3]): float(row[4]) / float(row[3]) - 1 for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "layers"),
    [("llama", ["all", "none", "2"]), ("mistral", ["all"]), ("qwen2", ["none"]), ("qwen3", ["2"]), ("gemma2", ["2"])],
)
def test_what_is_planned_is_what_is_measured_everywhere(shape: str, layers: list[str]) -> None:
    """All algorithms with each shape and with each setting. `benchmarks/plan.py` measures all 80 cells."""
    found = off(shape, ["sft", "reward", "dpo", "grpo", "ppo", "rollout"], layers)
    assert len(found) == 5 * len(layers) + 1 and all(abs(one) < CLOSE for one in found.values()), found


@pytest.mark.slow
def test_packed_rows_need_at_most_what_is_planned_for_padded_ones() -> None:
    """Rows of equal lengths, so that packing saves only the shared prompts and their mask: 5 to 8 % of a micro-batch of
    GRPO."""
    found = off("llama", ["dpo", "grpo", "ppo"], ["all", "none"], ["--packed"])
    assert len(found) == 6 and all(-CLOSE < one < 0.1 for one in found.values()), found


def test_plan_needs_neither_weights_nor_a_gpu() -> None:
    (scene,) = simulation_specs(load_any("qwen2.5-7b-sft"), "cuda")
    found = plan_of(scene, 24 << 30, "sft")
    config = configs.config_of("Qwen/Qwen2.5-7B-Instruct")
    assert config is not None and found.layers == config["num_hidden_layers"] and found.fits
    embeddings = 2 * 2 * config["vocab_size"] * config["hidden_size"]
    linear = (
        config["num_hidden_layers"]
        * config["hidden_size"]
        * (2 * config["hidden_size"] + 2 * 512 + 3 * config["intermediate_size"])
    )
    expected = embeddings + linear * (0.5 + 1 / 64 + 4 / 64 / 256)  # NF4 with double quantization: arXiv:2305.14314
    weights = found.peak_phase.bytes["weights"]
    assert abs(weights / expected - 1) < 0.001
    lora = (
        16
        * config["num_hidden_layers"]
        * (
            4 * config["hidden_size"]
            + 2 * (config["hidden_size"] + 512)
            + 3 * (config["hidden_size"] + config["intermediate_size"])
        )
    )
    assert (
        abs(found.peak_phase.bytes["adapters"] / (4 * lora) - 1) < 0.01
        and abs(found.peak_phase.bytes["optimizer"] / (8 * lora) - 1) < 0.01
    )


def llama(tmp_path: Path, **sizes: int) -> str:
    """A recipe of GRPO over a Llama of these sizes, of which there is the configuration alone."""
    common = {
        "vocab_size": 1000,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    LlamaConfig(**common | sizes, tie_word_embeddings=False).save_pretrained(tmp_path)
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"""
algorithm: grpo
base: {{model: {tmp_path}, bits: 4}}
data: {{train: [{{dataset: builtin:arithmetic}}], max_prompt_length: 128}}
rewards: [{{name: answer}}]
rollout: {{num_generations: 8, max_new_tokens: 384, max_num_seqs: 64}}
train: {{max_steps: 2, micro_batch_size: 1, prompts_per_step: 8}}
evaluate: {{eval_dataset: {{dataset: builtin:arithmetic}}, num_prompts: 200, max_new_tokens: 384}}
""",
        encoding="utf-8",
    )
    return str(file)


@pytest.mark.parametrize(
    ("layers", "pages"),
    [(2, False), pytest.param(2, True, marks=pytest.mark.slow), pytest.param(9, False, marks=pytest.mark.slow)],
)
def test_keys_and_values_are_those_of_the_slots(tmp_path: Path, layers: int, pages: bool) -> None:
    """On a GPU: slots * columns * (keys and values) * heads * width * layers in bfloat16, however few layers are
    rehearsed; beside them at most one layer's copy of the prompts for all slots, and their numbers. Where the
    completions of a prompt share pages, which one answer to a question does not, there is one more page for all
    slots."""
    recipe = load_any(llama(tmp_path, num_hidden_layers=layers), f"rollout.prefix_caching={str(pages).lower()}")
    (scene,) = simulation_specs(recipe, "cuda")
    token = 2 * 4 * 32 * 2  # of a layer: keys and values, 4 heads of width 32, 2 bytes
    for name, slots in (("rollout", 64), ("held-out answers", 200)):
        found = next(phase for phase in phases_of(scene, 24 << 30) if phase.name == name)
        columns = 128 + 384 + (256 // slots if pages and name == "rollout" else 0)
        kept = slots * columns * token * layers
        assert kept <= found.bytes["KV cache"] <= kept + slots * 128 * token + 8192, name
        assert found.bytes["activations"] < 64 << 20


def test_what_is_planned_from_few_layers_is_what_all_of_them_hold(tmp_path: Path) -> None:
    (scene,) = simulation_specs(load_any(llama(tmp_path, num_hidden_layers=9)), "cuda")
    scene = replace(scene, rollouts={"rollout": DecodingSpec("policy", 64, 128, 384, 8, 8, 1 << 40)})
    whole = {phase.name: phase.total for phase in phases_in(simulate(scene, layers_of(scene.config, 9)))}
    assert {phase.name: phase.total for phase in phases_in(peaks_of(scene, 9))} == whole


@pytest.mark.slow
@pytest.mark.parametrize("layers", [9])
def test_copies_of_attention_weights_are_planned_where_slots_leave_room(tmp_path: Path, layers: int) -> None:
    """All layers' copies or none, from a simulation of few layers: q, o (256 x 256), k, v (256 x 128) in two bytes, and
    B of rank 16 for each, those of q, k, v as one matrix."""
    (scene,) = simulation_specs(load_any(llama(tmp_path, num_hidden_layers=layers)), "cuda")
    sequence = planner.bytes_per_sequence(scene.config, 512, torch.bfloat16)
    copied = layers * 2 * (2 * 256 * (256 + 128) + 48 * (256 + 2 * 128) + 16 * 256)

    def activations(room: int, slots: int = 64, copies: bool = True) -> int:
        # A fifth is for prompts that wait.
        limit = -(-(slots * sequence + room) * 5 // 4)
        spec = DecodingSpec(
            "policy", slots, 128, 384, 8, 8, limit, sequence_bytes=sequence, layers=layers, copies=copies
        )
        peaks = peaks_of(replace(scene, rollouts={"rollout": spec}), layers)
        return min(peak["activations"] for point, peak in peaks.items() if point[0] == "rollout: step")

    none = activations(copied - layers)
    assert activations(copied) - none == copied
    assert activations(copied, copies=False) == none
    # bitsandbytes reads packed weights for few rows.
    assert activations(copied, slots=8) == activations(0, slots=8)


def test_a_rollout_that_does_not_fit_is_planned_without_copies(
    sixteen_layers: SimulationSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = []

    def peaks_with(spec: SimulationSpec, recomputed: int) -> Peaks:
        decoding = spec.rollouts["rollout"]
        planned.append((decoding.slots, decoding.copies))
        return {("rollout: step",): {"KV cache": decoding.slots << 28, "activations": decoding.copies << 31}}

    monkeypatch.setattr(planner, "peaks_of", peaks_with)
    decoding_phases(sixteen_layers, {"rollout": DecodingSpec("policy", 64, 128, 384, 8, 8, 1 << 40)}, 16, 16 << 30)
    assert planned[0] == (64, True) and len(planned) > 1
    assert all(slots < 64 and not copies for slots, copies in planned[1:])


@pytest.mark.slow
def test_plan_of_too_many_sequences_decodes_fewer_and_at_least_one(tmp_path: Path) -> None:
    """32 MiB a sequence, 64 of them 2 GiB. The engine continues with fewer if memory runs short, so a GPU with room for
    some of them is enough."""
    (scene,) = simulation_specs(
        load_any(llama(tmp_path, num_hidden_layers=16, num_key_value_heads=8, hidden_size=1024)), "cuda"
    )

    def rollout(vram: int) -> Phase:
        (found,) = decoding_phases(scene, {"rollout": DecodingSpec("policy", 64, 128, 384, 8, 8, 1 << 40)}, 16, vram)
        return found

    sequence, most, one = 512 * 2 * 1024 * 2 * 16, rollout(24 << 30), rollout(1)
    assert most.bytes["KV cache"] >= 64 * sequence and one.bytes["KV cache"] < 2 * sequence
    room = one.total + 20 * sequence
    assert one.total + 10 * sequence < rollout(needed(room, "cuda")).total <= room


@pytest.mark.slow
def test_keys_and_values_are_planned_beside_weights_adapters_and_optimizer(tmp_path: Path) -> None:
    """The engine subtracts all three from the memory of the GPU. The adapter is so large that the moments of its
    optimizer exceed the room that remains."""
    recipe = llama(tmp_path, num_hidden_layers=2, hidden_size=1024, intermediate_size=4096, num_key_value_heads=8)
    settings = ["evaluate={}", "adapters.policy.r=1024"]
    many_completions = ["train.prompts_per_step=200", "rollout.max_num_seqs=1600"]
    (spec,) = simulation_specs(load_any(recipe, *settings, *many_completions), "cuda")
    vram = 5 << 29
    phases = {phase.name: phase.bytes for phase in phases_of(spec, vram)}
    resident = sum(phases["update"][purpose] for purpose in ("weights", "adapters", "optimizer"))
    room = gpu_cache_bytes(vram, resident)
    assert room / 2 < phases["rollout"]["KV cache"] <= room < phases["update"]["optimizer"]


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("llama", {}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("mistral", {"sliding_window": 8}),  # one window for all layers, and no `layer_types`
        ("gemma2", {"sliding_window": 8}),
    ],
)
def test_a_sequence_is_planned_with_the_bytes_that_the_cache_keeps_for_it(kind: str, more: dict[str, Any]) -> None:
    model = unquantized_base(kind, **more).model
    for columns in (5, 8, 30):
        store = StaticSlotCache(model)
        store.allocate(3, columns, 1 << 40)
        store.insert(store.prefill([[3, 4, 5]])[0], [0, 0, 0], [0, 1, 2])
        kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in store.cache.layers)
        assert 3 * planner.bytes_per_sequence(model.config, columns, torch.float32) == kept, columns


@pytest.fixture(scope="module")
def sixteen_layers(tmp_path_factory: pytest.TempPathFactory) -> SimulationSpec:
    (spec,) = simulation_specs(load_any(llama(tmp_path_factory.mktemp("llama"), num_hidden_layers=16)), "cuda")
    return spec


@given(
    slots=st.integers(1, 4) | st.integers(1, 64),
    prompts=st.integers(1, 8),
    reading=st.integers(1, 160),
    room=st.floats(0, 1),
)
def test_where_one_sequence_fits_the_rollout_fits(
    sixteen_layers: SimulationSpec, slots: int, prompts: int, reading: int, room: float
) -> None:
    """The highest moment is a step over all slots, or the reading of a few prompts at once: that one becomes lower only
    when there are fewer slots than prompts."""
    each = 512 * 2 * 4 * 32 * 2 * 16  # of 512 tokens: keys and values, 4 heads of width 32, 2 bytes, 16 layers

    def bytes_with(slots: int) -> int:
        return (50 << 20) + max(slots * each, min(slots, prompts) * reading << 20)

    def peaks_with(spec: SimulationSpec, recomputed: int) -> Peaks:
        return {("rollout: step",): {"KV cache": bytes_with(spec.rollouts["rollout"].slots)}}

    least, most = needed(bytes_with(1), "cuda"), needed(bytes_with(slots), "cuda")
    vram = least + int(room * (most - least))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "peaks_of", peaks_with)
        decoding = DecodingSpec("policy", slots, 128, 384, 8, 8, 1 << 40)
        (found,) = decoding_phases(sixteen_layers, {"rollout": decoding}, 16, vram)
    assert needed(found.total, "cuda") <= vram


@pytest.mark.slow
@pytest.mark.parametrize(("torch_compile", "on_the_gpu"), [("false", 1), ("true", 2)])
def test_offloaded_inputs_are_not_planned_on_the_gpu(torch_compile: str, on_the_gpu: int) -> None:
    """Of each layer the input of its rows is in host memory, all but the one that is recomputed, and of compiled layers
    at most one more. The highest point is then at the first layer, when all others have their gradients."""
    rows = ["data.max_length=2048", "train.micro_batch_size=2", f"train.torch_compile={torch_compile}"]

    def planned(offloading: str) -> Plan:
        (spec,) = simulation_specs(
            load_any("qwen2.5-7b-sft", *rows, f"train.activation_offloading={offloading}"), "cuda"
        )
        return plan_of(spec, 24 << 30, "sft")

    plans = {offloading: planned(offloading) for offloading in ("false", "true")}
    config = configs.config_of("Qwen/Qwen2.5-7B-Instruct")
    assert config is not None
    one_input = 2 * 2048 * config["hidden_size"] * 2
    saved = plans["false"].peak - plans["true"].peak
    least = (config["num_hidden_layers"] - on_the_gpu) * one_input - plans["true"].peak_phase.bytes["gradients"]
    assert least <= saved <= (config["num_hidden_layers"] - 1) * one_input


@pytest.fixture
def shared_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A cache of simulations for tests of this file that plan the same recipe and leave the planner as it is."""
    folder = tmp_path_factory.getbasetemp() / "shared-simulations"
    monkeypatch.setenv("LOWRANK_TUNE_CACHE", str(folder))


@pytest.mark.slow
@pytest.mark.usefixtures("shared_cache")
def test_the_command_reports_whether_it_fits() -> None:
    done = CliRunner().invoke(app, ["plan", "tiny-sft", "--vram", "0.85", "evaluate={}"])
    assert done.exit_code == 2 and "does not fit" in done.output
    unknown = CliRunner().invoke(app, ["plan", "qwen2.5-7b-sft", "base.model=./nowhere"])
    assert (
        unknown.exit_code == 2
        and unknown.output.strip().count("\n") == 0
        and "there is no folder ./nowhere" in unknown.output
    )


def stage_plan(name: str, vram_gib: float, advice: str = "", **phases: float) -> Plan:
    """A plan whose phases (`old_and_reference=...`) hold so many GiB of weights."""
    held = tuple(Phase(phase.replace("_", " "), {"weights": round(size * 2**30)}) for phase, size in phases.items())
    return Plan(name, "sft", "a model", 4, "cuda", 2, 2, Sizes(1, 512), held, round(vram_gib * 2**30), advice=advice)


def test_what_fits_is_never_more_than_there_is() -> None:
    """A phase that runs in smaller pieces does not count in the figure beside `fits`."""
    split = stage_plan("", 8, update=6.9, validation=7.18)
    assert split.fits and [phase.name for phase in split.split_phases] == ["validation"]
    assert split.peak_phase.name == "update", "the phase that the figure is of"
    words = [str(line) for line in lines(split)]
    assert words[1].startswith("fits: 7.93 of 8.00 GiB (tensors 6.90,")
    assert words[2] == "validation runs in smaller pieces: at once it needs 8.22 GiB"
    whole = stage_plan("", 9, update=6.9, validation=7.18)
    assert str(lines(whole)[1]).startswith("fits: 8.22 of 9.00 GiB (tensors 7.18,") and not whole.split_phases
    refused = stage_plan("", 7, update=6.9, validation=7.18)
    assert not refused.fits and str(lines(refused)[1]).startswith("does not fit: 7.93 of 7.00 GiB")


def test_the_advice_of_a_stage_names_its_settings() -> None:
    advice = "fits with data.max_length=512 train.micro_batch_tokens=512"
    refused = stage_plan("ppo", 7, advice, update=6.9)
    assert str(lines(refused)[-1]) == advice
    own = "fits with stages.ppo.data.max_length=512 stages.ppo.train.micro_batch_tokens=512"
    assert str(lines(refused, in_chain=True)[-1]) == own


def test_the_summary_of_a_chain_names_the_stage_that_does_not_fit() -> None:
    stages = [stage_plan("a", 24, update=15), stage_plan("b", 7, update=6.9), stage_plan("c", 24, update=14)]
    assert str(chain_summary(stages, None)) == "worst stage: b, 7.93 of 7.00 GiB, does not fit"
    hours = Span(2.0, 8.0)
    assert str(chain_summary(stages[::2], hours)) == (
        "worst stage: a, 16.37 of 24.00 GiB, fits; all stages: 2 to 8 hours (estimate, not measured)"
    )
    assert str(chain_summary([replace(stages[0], vram=0, device="cpu")], None)) == "worst stage: a, 15.00 GiB"


def test_a_chain_ends_with_its_summary_in_one_line() -> None:
    file = io.StringIO()
    printer = PlanPrinter(Console(file=file, width=60), in_chain=True)
    for name in ("first", "second"):
        printer.show(stage_plan(name, 24, update=15), None)
    printer.finish("a note on the GPU")
    assert file.getvalue().splitlines()[-3:] == [
        "a note on the GPU",
        "",
        "worst stage: first, 16.37 of 24.00 GiB, fits",
    ]


@settings(max_examples=50)
@given(needed_bytes=st.integers(0, 1 << 35), more=st.integers(-(1 << 24), 1 << 24))
def test_the_printed_total_is_within_the_printed_memory_only_if_the_plan_fits(needed_bytes: int, more: int) -> None:
    plan = stage_plan("a", 0, update=needed_bytes / 2**30)
    plan = replace(plan, vram=max(1, plan.needed + more))
    verdict, used, memory = re.match(r"(fits|does not fit): ([\d.]+) of ([\d.]+) GiB", str(lines(plan)[1])).groups()  # type: ignore[union-attr]
    assert plan.fits == (plan.needed <= plan.vram) == (verdict == "fits") == (float(used) <= float(memory))
    summary = str(chain_summary([plan], None))
    assert f"{used} of {memory} GiB, {verdict}" in summary


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.usefixtures("shared_cache")
def test_an_assumed_size_is_named() -> None:
    assumed = CliRunner().invoke(app, ["plan", "tiny-sft", "evaluate={}"])
    assert "no GPU found: 24 GiB are assumed" in assumed.output and assumed.exit_code == 0
    given_size = CliRunner().invoke(app, ["plan", "tiny-sft", "evaluate={}", "--vram", "8"])
    assert "assumed" not in given_size.output
    cpu = CliRunner().invoke(app, ["plan", "tiny-sft", "evaluate={}", "--device", "cpu"])
    assert cpu.output.rstrip().endswith("GiB of this machine's memory for tensors")


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 1000), st.integers(1, 50), st.integers(0, 20000))
def test_the_largest_that_fits_is_found(start: int, most: int, fixed: int, each: int, room: int) -> None:
    found = largest_fitting(lambda count: fixed + each * count, start, most, room)
    assert found == max(0, min(most, (room - fixed) // each))


@given(
    start=st.integers(1, 60),
    beyond=st.integers(1, 200),
    more=st.integers(0, 50),
    fixed=st.integers(0, 1000),
    each=st.integers(1, 50),
    spare=st.floats(0, 0.99),
    jump=st.integers(0, 500),
)
def test_a_jump_in_what_is_needed_does_not_end_the_search(
    start: int, beyond: int, more: int, fixed: int, each: int, spare: float, jump: int
) -> None:
    """What is needed grows evenly up to twice the start, where it is asked first; then there is a jump, and it grows
    evenly again. The first guess is too large, and what is found is what trying all numbers finds."""
    most = 2 * start + beyond + more

    def need(count: int) -> int:
        return fixed + each * count + (jump if count > 2 * start else 0)

    room = need(2 * start + beyond) + int(spare * each)
    assert largest_fitting(need, start, most, room) == max(count for count in range(most + 1) if need(count) <= room)


@pytest.mark.usefixtures("shared_cache")
def test_what_cannot_fit_is_refused_before_anything_is_loaded() -> None:
    (fault,) = check_fit(load_any("tiny-sft", "evaluate={}"), 0.85, lambda event: None).faults.values()
    assert re.match(r"does not fit the GPU.*fits with .*train.memory_check=warn", fault)


@pytest.mark.usefixtures("shared_cache")
def test_what_cannot_fit_is_a_warning_where_the_recipe_asks_for_one() -> None:
    events: list[Event] = []
    warned = check_fit(load_any("tiny-sft", "evaluate={}", "train.memory_check=warn"), 0.85, events.append)
    assert warned.changes == {"tiny-sft": {}} and not warned.faults
    assert [event.level for event in events if isinstance(event, LogMessage)] == ["warning"]


@pytest.mark.slow
def test_auto_becomes_numbers() -> None:
    own = ("evaluate={}", "train.micro_batch_size=auto", "train.gradient_checkpointing=auto")
    (changes,) = check_fit(load_any("tiny-sft", *own), 24.0, lambda event: None).changes.values()
    assert changes["gradient_checkpointing"] == 0 and changes["micro_batch_size"] > 4


@pytest.mark.slow
def test_nothing_is_left_as_the_planner_made_it() -> None:
    before = torch.clear_autocast_cache
    list(plan(load_any("tiny-sft", "evaluate={}"), 24.0))
    assert (
        torch.clear_autocast_cache is before
        and torch.ones(1).device.type == "cpu"
        and not torch.is_autocast_enabled("cuda")
    )
