"""The GPU proof on the CPU: its checks pass in both arithmetics and can fail, and its figures are those of what it
measures."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from gpu_proof_helpers import CARRIED, SCRIPT, filtered_environment, module, modules, proof
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from lowrank_tune.config import Recipe
from lowrank_tune.errors import TrainingError
from lowrank_tune.model import activation_checkpointing, compiled_layers
from lowrank_tune.model.decoder import Decoder
from lowrank_tune.model.heads import HEAD_WEIGHT_KEY
from lowrank_tune.model.logprobs import Head
from lowrank_tune.model.packed_rows import PackedRows
from lowrank_tune.model.roles import Roles
from lowrank_tune.training.trainer import make_optimizer

ALGORITHMS = ["sft", "reward", "dpo", "ppo", "grpo"]
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    yield from modules()


@pytest.fixture
def base(gpu: ModuleType) -> Any:
    return tiny_base()


def tiny_base(bf16: bool = False) -> Any:
    torch.manual_seed(0)
    return module("base").random_base("tiny", torch.device("cpu"), bf16)


def size() -> Any:
    return module("synthetic").Size(4, 2, 48)


def check(algorithm: str = "sft", base: Any = None, checkpointing: bool = True) -> Any:
    return module("checks").check_algorithm(algorithm, base or tiny_base(), size(), checkpointing)


# --- checks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "algorithm", ["sft", *(pytest.param(name, marks=slow) for name in ("reward", "dpo", "grpo", "ppo"))]
)
def test_checks_pass_in_the_arithmetic_of_a_gpu(gpu: ModuleType, algorithm: str) -> None:
    """bf16 weights under bf16 autocast, which the CPU can do too."""
    base = tiny_base(bf16=True)
    result = check(algorithm, base)
    assert base.model.dtype == torch.bfloat16 and result.failed == []
    if algorithm == "grpo":
        assert 1e-5 < result.figures["sampling_logp_difference"] < 0.05, "it was fp32 after all"


@pytest.mark.parametrize(
    "algorithm", ["dpo", *(pytest.param(name, marks=slow) for name in ALGORITHMS if name != "dpo")]
)
def test_checks_pass_in_fp32(gpu: ModuleType, algorithm: str) -> None:
    result = check(algorithm, checkpointing=algorithm != "sft")
    assert result.failed == [] and len(result.checks) >= 11
    assert result.figures["layer_forwards_per_pass"] == 1.0 + (algorithm != "sft")
    assert result.figures["logits_error"] < 1e-5
    if algorithm in ("reward", "dpo"):
        assert "shared prompts change nothing" in result.checks
        assert min(result.figures[f"update_seconds_{way}"] for way in ("whole_rows", "shared", "packed")) > 0
    if algorithm in ("grpo", "ppo"):
        assert {"policy starts at the base (KL 0)", "sampler and policy agree"} <= set(result.checks)
        assert result.figures["sampling_logp_difference"] < 1e-5
    record = result.record()
    assert record["kind"] == "checks" and module("parts").passed(record)


@slow
def test_missing_recomputation_is_found(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Roles, "_checkpoint", lambda self, wanted, offload: None)
    assert check().failed == ["layers were recomputed"]


@slow
def test_a_changed_base_is_found(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def corrupting(roles: Any, rows: Any, size: Any) -> Any:
        def corrupted(step: int) -> Any:
            named = roles.base.model.named_parameters()
            weight = next(p for name, p in named if "layers.0" in name and p.dtype == torch.uint8)
            weight.data[0] ^= int(step == 2)  # one bit, once
            return rows(step)

        return module("factories").sft(roles, corrupted, size)

    monkeypatch.setitem(module("factories").ALGORITHMS, "sft", corrupting)
    assert check().failed == ["base is unchanged"]


@slow
def test_rounded_logits_are_found(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = Head.logits
    # In fp32, as on a CPU, the check at the load of a base refuses such a head.
    monkeypatch.setattr("lowrank_tune.model.roles.check_head", lambda model, head: None)
    monkeypatch.setattr(Head, "logits", lambda self, *arguments: exact(self, *arguments).bfloat16().float())
    assert check().failed == ["logits left the product in fp32"]


@slow
def test_adapters_that_do_not_change_are_found(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    make = make_optimizer
    run = module("measured_run")
    monkeypatch.setattr(run, "make_optimizer", lambda parameters, *rest: make(parameters[1:], *rest))
    assert check().failed == ["adapters changed"]


@slow
def test_linears_that_are_not_quantized_are_found(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(linear: Any, dtype: torch.dtype, device: torch.device, generator: Any) -> Any:
        layer = torch.nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device, dtype)
        return layer.requires_grad_(False)

    monkeypatch.setattr(module("base"), "quantized_linear", plain)
    assert check().failed == ["linears are 4-bit"]


@slow
def test_a_wrong_reference_is_found(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that is not its reference at the start, in a single element; and stale log-probs in the cache."""

    def different_policy(roles: Any, rows: Any, size: Any) -> Any:
        algorithm = module("factories").dpo(roles, rows, size)
        with torch.no_grad():
            named = roles.named_parameters("policy").items()
            next(parameter for name, parameter in named if "lora_B" in name)[0, 0] = 1e-3
        return algorithm

    def stale_cache(roles: Any, rows: Any, size: Any) -> Any:
        algorithm = module("factories").dpo(roles, rows, size)
        algorithm.context.get_batch(0).reference_sequence_logps[0] += 0.01
        return algorithm

    faults = {
        different_policy: "before the first step policy and reference",
        stale_cache: "cached log-probs of the reference",
    }
    for factory, message in faults.items():
        monkeypatch.setitem(module("factories").ALGORITHMS, "dpo", factory)
        result = check("dpo")
        assert result.failed == ["runs, with the right reference"] and message in result.error


@slow
def test_wrong_log_probs_of_the_sampler_are_found(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(roles: Any, rows: Any, size: Any) -> Any:
        algorithm = module("factories").grpo(roles, rows, size)
        draw = algorithm.collector.collect

        def drawn(*arguments: Any) -> Any:
            rollouts = draw(*arguments)
            rollouts.batch.sampler_logps = rollouts.batch.sampler_logps - 1e-3
            return rollouts

        algorithm.collector.collect = drawn
        return algorithm

    monkeypatch.setitem(module("factories").ALGORITHMS, "grpo", shifted)
    assert check("grpo").failed == ["sampler and policy agree"]


@slow
@pytest.mark.parametrize("as_segments", [False, True])
def test_prompts_that_are_shared_wrongly_are_found(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, as_segments: bool
) -> None:
    """With a mask, and as segments of a packed row."""
    decode = Decoder.run
    num_moved = 0

    def moved(self: Any, ids: Any, mask: Any, positions: Any, segments: Any = None) -> Any:
        """Tokens of a packed row are one position further."""
        nonlocal num_moved
        packed = positions is not None and bool((positions[:, 1:] < positions[:, :-1]).any())
        if packed and as_segments is (segments is not None):
            num_moved += 1
            positions = positions + (positions > 9)
        return decode(self, ids, mask, positions, segments)

    monkeypatch.setattr(Decoder, "run", moved)
    # The kit's own comparisons would find this.
    monkeypatch.setattr(Decoder, "max_shareable_length", 1 << 20)
    monkeypatch.setattr(PackedRows, "_shares_prefixes", True)
    monkeypatch.setattr(Roles, "verify_fast_paths", lambda self, role: None)
    assert check("reward").failed == ["shared prompts change nothing"] and num_moved


@slow
@slow
def test_a_head_that_is_not_saved_is_found(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def zeroed(tensors: Any, file: Any) -> None:
        save_file(
            {name: torch.zeros_like(tensor) if name == HEAD_WEIGHT_KEY else tensor for name, tensor in tensors.items()},
            file,
        )

    monkeypatch.setattr(module("checks"), "save_file", zeroed)
    assert check("reward").failed == ["saved and reloaded, it computes the same"]


@slow
@slow
def test_every_memory_mode_gives_the_same_gradient(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = module("memory_modes")
    result = modes.check_memory_modes(base, size())
    assert result.failed == [] and len(result.checks) == 3
    offloaded = activation_checkpointing._offloaded

    def scaled(checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
        return 1.01 * offloaded(checkpoint, *args, **kwargs)

    monkeypatch.setattr(activation_checkpointing, "_offloaded", scaled)
    failed = modes.check_memory_modes(tiny_base(), size()).failed
    assert failed == ["the same gradient, all recomputed, inputs offloaded"]


@slow
def test_optimizers_change_all_adapters(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that need a GPU are left out; one that skips a parameter is found."""
    modes = module("memory_modes")
    result = modes.check_optimizers(base, ("adamw", "adamw_8bit", "paged_adamw"))
    assert result.checks == {"adamw changes all adapters": True, "adamw_8bit changes all adapters": True}
    monkeypatch.setattr(modes, "make_optimizer", lambda parameters, *rest: make_optimizer(parameters[1:], *rest))
    assert modes.check_optimizers(base, ("adamw",)).failed == ["adamw changes all adapters"]


@slow
def test_recovery_from_too_little_memory(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    oom = module("oom")
    result = oom.check_recovery(base, size(), None)
    assert result.failed == [] and len(result.checks) == 3 and result.figures["out_of_memory_errors"] >= 1
    split = module("synthetic").ragged_rows

    def other_rows(size: Any, vocab_size: int) -> Any:
        """The second and every later step trains on other rows."""
        batch = split(size, vocab_size)
        batch.input_ids = batch.input_ids.roll(len(calls), dims=0)
        calls.append(None)
        return batch

    calls: list[None] = []
    monkeypatch.setattr(oom, "ragged_rows", other_rows)
    monkeypatch.setattr(oom, "shortage", lambda *_: nullcontext())
    failed = oom.check_recovery(base, size(), None).failed
    assert failed == ["memory ran out, and the step continued", "the same gradient after recovery"]


# --- cells, decoding, facts -------------------------------------------------------------------------------------------


@slow
def test_a_cell_and_its_kernels(base: Any) -> None:
    cells = module("cells")
    cell, profile = cells.measure(cells.TINY_MAIN, base, (0.1, 30.0), planned_gib=1e-3, profile=True)
    assert cell["kind"] == "cell" and "failed" not in cell and cell["fits"] and cell["loss_is_finite"]
    assert cell["plan_holds"] is False and not module("parts").passed(cell)
    tokens = cells.TINY_MAIN.units * cells.TINY_MAIN.length
    assert cell["update_tokens_per_second"] * cell["seconds_per_step"] == pytest.approx(tokens, rel=0.05)
    assert 0 < cell["matmul_share"] < 2 and cell["measured_gib"] > 0
    assert profile["kind"] == "profile" and len(profile["kernels"]) == module("profiling").TOP_KERNELS
    # In 2 micro-batches, 2 layers: query, key and value together, the output, gate and up together, and down.
    counts = {kernel["name"]: kernel["count"] for kernel in profile["kernels"]}
    assert counts["_LoraLinearsBackward"] == 2 * 2 * 4
    seconds = [kernel["seconds"] for kernel in profile["kernels"]]
    assert seconds == sorted(seconds, reverse=True) and sum(seconds) <= profile["busy_seconds"]
    assert profile["wall_seconds"] == cell["seconds_per_step"] and profile["launches"] > 28


@slow
def test_a_cell_runs_with_and_without_fast_paths(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = module("cells")
    monkeypatch.setattr(compiled_layers, "BACKEND", "aot_eager")
    compiled = cells.Cell("sft", 4, 2, 48, ragged=True, torch_compile=True)
    (record,) = cells.measure(compiled, base, (0.1, 30.0))
    assert record["fast_paths"] == ["packed rows", "LoRA linears as one function", "compiled layers"]
    assert any(message.startswith("layers compiled in") for message in record["messages"])
    plain = cells.Cell("sft", 4, 2, 48, ragged=True, without=(cells.PACKED_ROWS, cells.LORA_LINEARS))
    (record,) = cells.measure(plain, base, (0.1, 30.0))
    assert record["fast_paths"] == [] and record["cell"].endswith("without LoRA linears as one function")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried 2.00 GiB.\nMore"),
        pytest.param(TrainingError("diverged"), marks=slow),
        pytest.param(KeyError("x"), marks=slow),
    ],
)
def test_an_error_in_a_cell_is_recorded_and_the_next_cell_runs(
    base: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    cells = module("cells")

    def failing(*_: Any, **__: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(cells.measured_run, "run", failing)
        (record,) = cells.measure(cells.TINY_MAIN, base, (0.1, 30.0))
    assert record["failed"].startswith(f"{type(error).__name__}: ") and "\n" not in record["failed"]
    assert not module("parts").passed(record)
    (record,) = cells.measure(cells.TINY_REMAINING[1], base, (0.1, 30.0))
    assert "failed" not in record and record["cell"] == "dpo 1x48"


def test_an_error_of_trl_is_recorded(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trl_baseline, cells = module("trl_baseline"), module("cells")

    def failing(inputs: Any) -> Any:
        raise ImportError("no driver")

    monkeypatch.setitem(trl_baseline.TRAINERS, "sft", failing)
    record = trl_baseline.measure(cells.TINY_MAIN, base)
    assert record["failed"] == "ImportError: no driver" and record["side"] == "TRL"


def test_decoding_is_measured_by_the_difference_of_two_calls(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of calls whose prompt takes 5 s and each further step 0.25 s, and whose profile has 3 + 2 kernels a step."""
    decode, profiling = module("decode"), module("profiling")
    calls: list[tuple[int, int]] = []

    def seconds(self: Any, new_tokens: int) -> float:
        calls.append((self.batch, new_tokens))
        return 5.0 + 0.25 * (new_tokens - 1)

    def profile(self: Any, new_tokens: int) -> Any:
        steps = new_tokens - 1
        return profiling.Profile(busy_seconds=1 + 0.1 * steps, launches=3 + 2 * steps, host_syncs=1 + steps)

    with monkeypatch.context() as patch:
        patch.setattr(decode.Decoding, "seconds", seconds)
        patch.setattr(decode.Decoding, "profile", profile)
        records = list(decode.measure(base, decode.TINY, 30.0))
    assert [record["batch"] for record in records] == [1, 1, 8, 8, 16, 16, 64, 64]
    assert [record["mode"] for record in records[:2]] == ["single steps", "graphs"]
    for record in records:
        assert record["wall_ms_per_step"] == pytest.approx(250) and record["busy_ms_per_step"] == pytest.approx(100)
        assert record["launches_per_step"] == 2 and record["host_syncs_per_step"] == 1
        assert record["tokens_per_second"] == pytest.approx(4 * record["batch"])
    # A measured time of a tiny base can even be negative here, as a difference on a busy machine; a count cannot.
    first = next(decode.measure(base, decode.TINY, 30.0))
    assert first["launches_per_step"] > 28


def test_completions_of_both_kinds_of_steps_are_compared(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal on the CPU; with log-probs and tokens of the buffers changed, the record contains by how much."""
    equality = module("decode_equality")
    record = equality.compare(base, equality.TINY)
    assert record["equal_token_share"] == 1.0 and record["largest_logp_difference"] < 1e-5
    assert record["tokens"] == 5 * 20 and record["replayed_steps"] == 0 and all(record["checks"].values())
    real = equality.completions

    def changed(roles: Any, prompts: Any, size: Any, buffered: bool) -> Any:
        found = real(roles, prompts, size, buffered)
        if buffered:
            found[0].token_ids[15] += 1
            found[1].logps[0] += 0.25
        return found

    monkeypatch.setattr(equality, "completions", changed)
    record = equality.compare(base, equality.TINY)
    assert record["equal_token_share"] == pytest.approx(95 / 100)
    assert record["largest_logp_difference"] == pytest.approx(0.25, abs=1e-5)
    (difference,) = record["first_differences"]
    assert (difference["prompt"], difference["position"]) == (0, 15) and difference["logp_distance"] > 0
    monkeypatch.setattr(equality, "logp_distance", lambda *_: 2.0)
    assert not any(equality.compare(base, equality.TINY)["checks"].values())


def test_facts(gpu: ModuleType, base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a CPU can measure; and one that raises leaves the others."""
    parts, facts = module("parts"), module("facts")
    context = SimpleNamespace(tiny=True, device=torch.device("cpu"), size=size(), base=lambda: base)

    def failing(device: torch.device, sizes: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(facts.FACTS, "mm_out_dtype", failing)
    records = {record["fact"]: record for record in parts.run_facts(context)}
    assert list(records) == [*facts.FACTS, "policy_equals_reference", "gemm_4bit"]
    assert records.pop("mm_out_dtype")["failed"] == "RuntimeError: no such kernel"
    assert all(parts.passed(record) for record in records.values())
    assert records["sdpa_kernels"]["training_backend"] == "FLASH_ATTENTION"
    assert records["sdpa_kernels"]["grouped_decoding_error"] < 1e-6
    assert records["gemm_4bit"]["chosen_error_8"] < 1e-6
    assert records["policy_equals_reference"]["max_difference"] == 0.0


def test_a_policy_that_is_not_the_reference_is_a_failed_fact(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    facts, make = module("facts"), module("factories").make_roles

    def shifted(*arguments: Any) -> Any:
        roles = make(*arguments)
        with torch.no_grad():
            next(p for name, p in roles.named_parameters("policy").items() if "lora_B" in name)[0, 0] = 1e-3
        return roles

    monkeypatch.setattr(facts, "make_roles", shifted)
    record = facts.policy_equals_reference(base, size())
    assert record["max_difference"] > 0 and not module("parts").passed(record)


def test_kernels_are_ordered_and_copies_are_no_launches(gpu: ModuleType) -> None:
    profiling = module("profiling")

    def event(key: str, count: int, microseconds: float, device_type: Any = profiling.DeviceType.CUDA) -> Any:
        return SimpleNamespace(
            key=key, count=count, device_type=device_type, self_device_time_total=microseconds, self_cpu_time_total=1e9
        )

    events = [
        event("gemm", 4, 300.0),
        event("flash", 2, 500.0),
        event("Memcpy HtoD", 3, 50.0),
        event("cudaLaunchKernel", 6, 0.0, profiling.DeviceType.CPU),
    ]
    profile = profiling.Profile()
    profiling.fill(profile, events, torch.device("cuda"))
    assert [kernel["name"] for kernel in profile.kernels] == ["flash", "gemm", "Memcpy HtoD"]
    assert profile.launches == 6 and profile.busy_seconds == pytest.approx(850e-6)


def test_synchronizations_are_counted_by_their_line(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one, also from the same line; other warnings are issued again; the mode is reset after an error."""
    profiling = module("profiling")
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with (
        pytest.warns(UserWarning, match="something else") as issued,
        profiling.counted_syncs(torch.device("cuda")) as places,
    ):
        for line in (3, 3, 9):
            text = "called a synchronizing CUDA operation (Triggered internally.)"
            warnings.warn_explicit(text, UserWarning, "a/kit/loop.py", line)
        warnings.warn_explicit("something else", UserWarning, "a/kit/loop.py", 3)
    assert places == {"kit/loop.py:3": 2, "kit/loop.py:9": 1} and len(issued) == 1
    with pytest.raises(RuntimeError), profiling.counted_syncs(torch.device("cuda")):
        raise RuntimeError
    assert modes == ["warn", "default"] * 2
    with profiling.counted_syncs(torch.device("cpu")) as places:
        warnings.warn_explicit("called a synchronizing CUDA operation", UserWarning, "b.py", 1)
    assert not places


def test_a_profile_contains_the_synchronizations(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    profiling = module("profiling")
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    with profiling.profiled(torch.device("cuda")) as profile:
        warnings.warn_explicit("called a synchronizing CUDA operation", UserWarning, "a/b.py", 7)
    assert profile.host_syncs == 1 and profile.sync_places == {"a/b.py:7": 1} and profile.kernels == []


# --- bases, machine, plans --------------------------------------------------------------------------------------------


def test_the_true_shapes_have_their_sizes(gpu: ModuleType) -> None:
    for shape, billions in (("llama-3.1-8b", 8.03), ("qwen2.5-7b", 7.62), ("qwen3-8b", 8.19), ("mistral-7b", 7.25)):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(module("base").config_of(shape))
        assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(billions * 1e9, rel=2e-3)


@pytest.mark.parametrize("shape", ["llama-3.1-8b", "qwen2.5-7b", "qwen3-8b", "mistral-7b"])
def test_a_base_is_built_as_transformers_builds_one(gpu: ModuleType, shape: str) -> None:
    """The same kinds of module in the same places, with rotary frequencies, of every family; at a small size."""
    config = module("base").config_of(shape)
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 97}
    config.update({**small, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16})
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    built = module("base").build_model(config, torch.device("cpu"), torch.bfloat16)
    expected = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    buffers = [{name: buffer.tolist() for name, buffer in model.named_buffers()} for model in (built, expected)]
    assert buffers[0] == buffers[1]
    for (name, layer), (other, linear) in zip(built.named_modules(), expected.named_modules(), strict=True):
        assert name == other and isinstance(layer, type(linear))
        if isinstance(layer, torch.nn.Linear) and "lm_head" not in name:
            weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            assert weight.shape == linear.weight.shape and weight.dtype == torch.bfloat16
            assert 0.01 < float(weight.float().std()) < 0.03
    assert torch.isfinite(built(input_ids=torch.arange(8)[None]).logits).all()


def test_memory_is_capped_only_on_larger_gpus(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    fractions: list[float] = []
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda fraction, device: fractions.append(fraction)
    )
    for total, cap in ((80e9, 24e9), (16e9, None)):
        properties = argparse.Namespace(total_memory=total)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, properties=properties: properties)
        assert module("machine").cap_memory(torch.device("cuda"), 24.0) == (cap / 2**30 if cap else None)
    assert fractions == [pytest.approx(0.3)]


def test_a_gpu_is_described(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its free memory, the versions of all packages, and the rates that shares are reported of."""
    machine = module("machine")
    properties = SimpleNamespace(name="Card", major=8, minor=9, total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (23 * 2**30, 24 * 2**30))
    monkeypatch.setattr(machine, "matmul_tflops", lambda device: 160.0)
    monkeypatch.setattr(machine, "bandwidth_gbs", lambda device: 900.0)
    monkeypatch.setattr(machine, "PACKAGES", ("torch", "peft", "lowrank_tune.regex", "absent_package"))
    described = machine.describe(torch.device("cuda", 0), 22.0)
    assert described["device"] == "Card" and described["free_gib"] == 23 and described["compute_capability"] == "8.9"
    assert described["peft"].startswith("0.") and described["matmul_tflops"] == 160.0
    assert described["lowrank_tune.regex"] == "unknown" and "absent_package" not in described


def test_every_cell_is_a_recipe(gpu: ModuleType, tmp_path: Path) -> None:
    """With the sizes that are measured; and what was planned elsewhere is found by shape and cell."""
    cells, plans = module("cells"), module("plans")
    for cell in (*cells.PLANNED, cells.REFERENCE):
        recipe = Recipe.from_dict(plans.recipe_of(cell, "qwen2.5-7b"))
        assert recipe.train.micro_batch_size == cell.micro and recipe.train.optim == cell.optimizer
        if cell.algorithm in ("grpo", "ppo"):
            assert recipe.data.max_prompt_length + recipe.rollout.max_new_tokens == cell.length
            assert recipe.train.prompts_per_step * recipe.rollout.num_generations == cell.units
        else:
            assert (recipe.data.max_length, recipe.train.global_batch_size) == (cell.length, cell.units)
    path = tmp_path / "plans.json"
    path.write_text(json.dumps({"shapes": {"qwen2.5-7b": {cells.MAIN.name: {"planned_gib": 12.5}}}}))
    assert plans.read_plans(path, "qwen2.5-7b") == {"sft 4x2048": 12.5}
    assert plans.read_plans(path, "qwen3-8b") == {} and plans.read_plans(None, "qwen2.5-7b") == {}


def test_the_reference_cell_is_what_others_publish(gpu: ModuleType) -> None:
    """Qwen3-8B, r 16 on all seven linears, rows of 2,048 tokens, micro-batch 2 with accumulation 4."""
    cells, synthetic = module("cells"), module("synthetic")
    cell = cells.REFERENCE
    assert (cell.micro, cell.units // cell.micro, cell.length) == (2, 4, 2048) and cell.checkpointing == "all"
    assert synthetic.AdapterSettings.r == 16 and synthetic.AdapterSettings.target_modules == "all-linear"
    assert module("parts").REFERENCE_SHAPE == "qwen3-8b"


@slow
def test_cells_are_planned(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of them: each takes ten seconds."""
    names = ("sft 4x2048", "sft 1x1024 recompute none", "sft 2x4096 offloaded paged_adamw_8bit", "ppo 8x384")
    few = tuple(cell for cell in module("cells").PLANNED if cell.name in names)
    monkeypatch.setattr(gpu, "PLANNED", few)
    path = tmp_path / "plans.json"
    assert gpu.main(["plan", "--shapes", "llama-3.1-8b", "--out", str(path)]) == 0
    found = module("plans").read_plans(path, "llama-3.1-8b")
    assert list(found) == [cell.name for cell in few] and len(few) == len(names)
    assert all(5.5 < gib < 22 for gib in found.values())
    assert found["sft 1x1024 recompute none"] > found["sft 4x2048"] > found["sft 2x4096 offloaded paged_adamw_8bit"]
    assert set(module("plans").read_plans(path, "qwen3-8b")) == {module("cells").REFERENCE.name}


# --- the command line -------------------------------------------------------------------------------------------------


def test_wrong_arguments_and_a_missing_gpu_exit_with_2(
    gpu: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words in ([], ["proof", "--parts", "facts"], ["worker", "--parts", "facts"]):
        assert gpu.main(words) == 2 and "--tiny" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["proof", "--tiny", "--parts", "facts,sftt"])
    assert "no part sftt; the parts are facts, sft, decode" in capsys.readouterr().err
    for words, message in (
        (["--plans", "absent.json"], "there is no file absent.json"),
        (["--json", "absent/r.jsonl"], "cannot write absent/r.jsonl: No such file or directory"),
    ):
        with pytest.raises(SystemExit, match="2"):
            gpu.main(["proof", "--tiny", *words])
        assert message in capsys.readouterr().err


def test_a_proof_in_which_no_part_ran_has_not_passed(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["proof", "--tiny", "--seconds", "1", "--json", str(tmp_path / "r")]) == 1
    printed = capsys.readouterr().out
    assert "0 of 16 parts" in printed and "no part was completed" in printed and printed.count("| skipped |") == 16


def test_the_order_of_the_parts(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """By information per second; paged optimizers, the product and TRL have processes of their own."""
    assert gpu.main(["parts"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    expected = "facts sft decode oom grpo ppo dpo reward product reference cells fast_paths trl no_recompute paged rest"
    assert names == expected.split()
    parts = module("parts")
    # Even at its limits a first call of 120 s reaches its second part, and one of 540 s the product.
    limits, base_s = [part.limit_s for part in parts.PARTS], module("worker").BASE_LIMIT_S
    assert sum(limits[:2]) + base_s <= 120 and sum(limits[:9]) + base_s + 20 <= 540
    assert {part.name for part in parts.PARTS if part.isolated} == {"product", "fast_paths", "trl", "paged"}
    assert parts.BY_NAME["product"].limit_s <= 90 and [part.name for part in parts.select("sft,facts")] == [
        "facts",
        "sft",
    ]


def test_tables(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Every kind of record is in a table; what failed is named."""
    cell = {"kind": "cell", "side": "lowrank_tune", "cell": "sft 4x2048", "base": "b", "planned_gib": 10.0}
    failed = {**cell, "cell": "sft 2x1024", "failed": "OutOfMemoryError: CUDA out of memory"}
    records = [
        {"kind": "machine", "shape": "llama-3.1-8b", "device": "H100", "matmul_tflops": 700.0},
        {"kind": "fact", "fact": "allocator", "expandable_segments": True},
        {**cell, "measured_gib": 10.5, "matmul_share": 0.41, "seconds_per_step": 2.0},
        {**cell, "side": "TRL", "measured_gib": 20.0, "seconds_per_step": 4.0},
        failed,
        {"kind": "decode", "batch": 8, "width": 752, "wall_ms_per_step": 33.3, "bandwidth_share": 0.1},
        {
            "kind": "checks",
            "algorithm": "grpo",
            "checkpointing": True,
            "checks": {"a": True, "b": False},
            "figures": {},
        },
        {"kind": "product", "step": "chat", "answer": "198", "checks": {"chat answers": True}},
        {"kind": "part", "part": "facts", "status": "done", "seconds": 12.0},
        {"kind": "part", "part": "rest", "status": "skipped", "left_s": 4.0, "limit_s": 75.0},
        {"kind": "failed", "part": "oom", "error": "RuntimeError: x"},
    ]
    table = module("tables").markdown(records)
    for text in (
        "10.50 | +5.0%",
        "41%",
        "20.00 | 4.00",
        "OutOfMemoryError: CUDA out of memory",
        "| 8 |",
        "1 of 2 (not: b)",
    ):
        assert text in table, text
    for text in (
        "answer 198 | chat answers: yes",
        "| facts | done | 12.0 s |",
        "needs 75 s, 4 s left",
        "| oom | failed |",
    ):
        assert text in table, text
    started = {"kind": "part", "part": "sft", "status": "started", "limit_s": 50.0, "left_s": 90.0}
    for record in [*records, started, {"kind": "skipped", "part": "trl", "reason": "trl not installed"}]:
        module("tables").print_record(record)
    printed = capsys.readouterr().out
    for text in (
        "facts: done in 12.0 s",
        "rest: skipped, it needs up to 75 s",
        "oom: FAILED, RuntimeError: x",
        "== sft",
    ):
        assert text in printed, text
    assert "trl not installed" in printed


def test_settings_of_a_cell_are_printed_in_its_name_alone(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """A setting that is off looks like a check that failed."""
    cells, tables = module("cells"), module("tables")
    assert {field.name for field in dataclasses.fields(cells.Cell)} == tables.CELL_SETTINGS
    for cell in cells.FAST_PATHS:
        tables.print_record({"kind": "cell", "cell": cell.name, **dataclasses.asdict(cell), "fits": True})
        printed = capsys.readouterr().out
        names = [line.split()[0] for line in printed.splitlines()]
        assert names == ["cell", "cell", "fits"] and cell.name in printed and "NO" not in printed


# --- with the packages of a GPU machine -------------------------------------------------------------------------------


def machine_packages() -> list[str]:
    return list(module("pack").read_machine())


def test_algorithms_import_no_settings_and_no_data() -> None:
    """Both need pydantic, which the machine does not have."""
    folder = Path(__file__).parents[2] / "lowrank_tune" / "algorithms"
    found = []
    for file in folder.glob("*.py"):
        # it reads and writes a cache, which the proof does not need
        if file.name == "reference_logps.py":
            continue
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                ("lowrank_tune.config", "lowrank_tune.data")
            ):
                found.append(f"{file.name}: {node.module}")
    assert found == []


@slow
def test_algorithms_need_no_more_than_the_machine_has(gpu: ModuleType, tmp_path: Path) -> None:
    """Without pydantic, datasets, TRL and re2: nothing but torch, transformers, peft, accelerate and bitsandbytes."""
    path = tmp_path / "records.jsonl"
    hidden = ("pydantic", "pydantic-core")  # the newest typer requires it, which is not imported here
    environment = filtered_environment(tmp_path, [*machine_packages(), "bitsandbytes"], hidden)
    blocked = subprocess.run([sys.executable, "-c", "import pydantic"], capture_output=True, text=True, env=environment)
    assert "ModuleNotFoundError" in blocked.stderr
    words = [sys.executable, str(SCRIPT), "worker", "--tiny", "--parts", "facts,grpo,ppo", "--json", str(path)]
    words += ["--limit-factor", "8"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    records = module("records").read(path)
    assert {record["algorithm"] for record in records if record["kind"] == "checks"} == {"grpo", "ppo"}
    assert [record["part"] for record in records if record.get("status") == "done"] == ["facts", "grpo", "ppo"]


@slow
def test_the_whole_proof_with_what_is_carried(gpu: ModuleType, tmp_path: Path) -> None:
    """All parts, the product and TRL too, behind an import filter that hides every package that is not there."""
    path = tmp_path / "records.jsonl"
    environment = filtered_environment(tmp_path, [*machine_packages(), *CARRIED.split()])
    hidden = subprocess.run([sys.executable, "-c", "import pytest"], capture_output=True, text=True, env=environment)
    assert "ModuleNotFoundError" in hidden.stderr
    words = proof("--json", str(path), "--seconds", "3600", "--limit-factor", "8")
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path)
    records = module("records").read(path)
    bad = [record for record in records if not module("parts").passed(record)]
    assert done.returncode == 0 and "every check passed" in done.stdout and not bad, done.stdout + done.stderr
    names = [part.name for part in module("parts").PARTS]
    assert [record["part"] for record in records if record.get("status") == "done"] == names
    cells = [record for record in records if record["kind"] == "cell"]
    kit = {record["algorithm"] for record in cells if record["side"] == "lowrank_tune"}
    assert kit == set(ALGORITHMS) and all(math.isfinite(record["seconds_per_step"]) for record in cells)
    trl = [record["algorithm"] for record in cells if record["side"] == "TRL"]
    installed = not module("trl_baseline").missing_packages()
    assert trl == (["sft", "grpo", "dpo"] if installed else [])
    steps = {record["step"]: record for record in records if record["kind"] == "product"}
    assert list(steps) == ["resume", "train", "chat", "merge"]
    assert steps["train"]["accuracy_after"] > steps["train"]["accuracy_before"] + 0.1
