"""Kernels of a simulated program: their number, bytes and FLOPs are those counted by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from lowrank_tune.config import load_any
from lowrank_tune.memory_planner.allocation_tracker import AllocationTracker
from lowrank_tune.memory_planner.extrapolation import extrapolate_counts
from lowrank_tune.memory_planner.kernel_costs import Kernel, KernelKind
from lowrank_tune.memory_planner.kernel_counter import KernelCounter, KernelCounts
from lowrank_tune.memory_planner.meta_model import Layer, layers_of
from lowrank_tune.memory_planner.rollouts import DecodingSpec
from lowrank_tune.memory_planner.simulation import SimulationSpec, count_kernels, simulate
from lowrank_tune.memory_planner.specs import simulation_specs
from lowrank_tune.model import logprobs

WIDTH, INNER, HEADS, KV_WIDTH, VOCABULARY, RANK = 256, 512, 8, 128, 1000, 16
ROWS, LENGTH = 2, 96


def counter_of(device: str = "cuda") -> KernelCounter:
    return KernelCounter(AllocationTracker(device, VOCABULARY))


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def kernels(counts: KernelCounts) -> dict[Kernel, float]:
    (found,) = counts.values()
    return dict(found)


def spec_of(folder: Path, layers: int = 2, algorithm: str = "sft", *overrides: str) -> SimulationSpec:
    """A recipe over a Llama that has a configuration and no weights."""
    LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        num_hidden_layers=layers,
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    file = folder / "recipe.yaml"
    file.write_text(
        f"""
algorithm: {algorithm}
base: {{model: {folder}, bits: 4}}
data: {{train: [{{dataset: builtin:arithmetic}}], max_length: {LENGTH}}}
train: {{max_steps: 2, micro_batch_size: {ROWS}}}
""",
        encoding="utf-8",
    )
    (spec,) = simulation_specs(load_any(str(file), *overrides), "cuda")
    return spec


def flops_of(found: Mapping[Kernel, float], *kinds: KernelKind) -> float:
    return sum(kernel.flops * count for kernel, count in found.items() if not kinds or kernel.kind in kinds)


def test_a_matrix_product_is_2mnk_and_its_operands() -> None:
    with counter_of() as counter:
        meta(3, 5) @ meta(5, 7)
    (kernel,) = kernels(counter.counts)
    assert kernel == Kernel(KernelKind.GEMM, 2 * (15 + 35 + 21), 2 * 3 * 5 * 7)


@pytest.mark.parametrize(
    ("batched", "flops"), [("bmm", 4 * 2 * 3 * 5 * 7), ("addmm", 2 * 3 * 5 * 7), ("addmm_", 2 * 3 * 5 * 7)]
)
def test_other_matrix_products(batched: str, flops: int) -> None:
    with counter_of() as counter:
        if batched == "bmm":
            torch.bmm(meta(4, 3, 5), meta(4, 5, 7))
        elif batched == "addmm_":
            meta(3, 7).addmm_(meta(3, 5), meta(5, 7))
        else:
            torch.addmm(meta(7), meta(3, 5), meta(5, 7))
    assert flops_of(kernels(counter.counts)) == flops


def test_views_and_allocations_are_no_kernels() -> None:
    with counter_of() as counter:
        x = meta(4, 6)
        x.view(24).view(6, 4).t()[1:3].unsqueeze(0).expand(5, 2, 6).detach()
        torch.empty_like(x)
        torch.ops.aten._unsafe_view(x, [24])
    assert counter.counts == {}


def test_an_expanded_operand_is_read_once() -> None:
    with counter_of() as counter:
        meta(1, 8).expand(100, 8) + meta(100, 8)
    (kernel,) = kernels(counter.counts)
    assert kernel == Kernel(KernelKind.ELEMENTWISE, 2 * (8 + 800 + 800))


def test_a_row_of_an_embedding_is_read_and_not_the_whole_table() -> None:
    with counter_of() as counter:
        torch.embedding(meta(1000, 8), torch.tensor([1, 2, 3]))
    (kernel,) = kernels(counter.counts)
    assert kernel.num_bytes == 2 * (3 * 8 * 2)


def test_an_update_of_many_tensors_reads_and_writes_them_in_one_kernel() -> None:
    with counter_of() as counter:
        torch._foreach_add_([meta(8), meta(4)], [meta(8), meta(4)])
    assert kernels(counter.counts) == {Kernel(KernelKind.ELEMENTWISE, 2 * (12 + 12 + 12)): 1}


def test_an_optimizer_step_reads_weights_gradients_and_moments(tmp_path: Path) -> None:
    """Fused AdamW in fp32: weight, gradient and two moments are read and, by its schema, written. A plain step measures
    nothing."""
    spec = spec_of(tmp_path)
    found = count_kernels(spec, layers_of(spec.config, 0))["optimizer"]
    parameters = 2 * sum(RANK * (inputs + outputs) for inputs, outputs in linear_weights().values())
    largest = max(kernel.num_bytes for kernel in found)
    assert 0 <= largest - 4 * 8 * parameters < 4 * 200
    assert sum(found.values()) < 20


def test_causal_flash_attention_is_half_of_all_pairs() -> None:
    query = meta(2, 4, 96, 64)
    for is_causal, share in ((True, 0.5), (False, 1.0)):
        with counter_of() as counter:
            torch.ops.aten._scaled_dot_product_flash_attention(query, query, query, 0.0, is_causal)
        (kernel,) = kernels(counter.counts)
        assert kernel.kind == KernelKind.FLASH and kernel.flops == 4 * 2 * 4 * 96 * 96 * 64 * share


def test_a_repeated_part_counts_as_often_as_it_is_repeated() -> None:
    with counter_of() as counter:
        with counter.repeated(3), counter.repeated(2):
            meta(3) + 1
        meta(5) + 1
    assert sorted(kernels(counter.counts).values()) == [1, 6]


def linear_weights() -> dict[str, tuple[int, int]]:
    """Inputs and outputs of a layer's linears."""
    return {
        "q": (WIDTH, WIDTH),
        "k": (WIDTH, KV_WIDTH),
        "v": (WIDTH, KV_WIDTH),
        "o": (WIDTH, WIDTH),
        "gate": (WIDTH, INNER),
        "up": (WIDTH, INNER),
        "down": (INNER, WIDTH),
    }


@pytest.mark.parametrize("compiled", [False, True])
def test_flops_of_an_update_are_those_of_the_formula(tmp_path: Path, compiled: bool) -> None:
    """Forward and input gradients of all weights, LoRA with its own gradients, the head twice: log-probs and their
    slope. Nothing before the first layer is trained, so its q, k and v pass no gradient on, unless they are compiled
    together with those of the other layers."""
    layers = 2
    spec = spec_of(
        tmp_path, layers, "sft", "train.gradient_checkpointing=none", f"train.torch_compile={str(compiled).lower()}"
    )
    found = count_kernels(spec, layers_of(spec.config, 0))["update"]
    tokens = ROWS * LENGTH
    weights = sum(inputs * outputs for inputs, outputs in linear_weights().values())
    lora = sum(RANK * (inputs + outputs) for inputs, outputs in linear_weights().values())
    first = 0 if compiled else WIDTH * (WIDTH + 2 * KV_WIDTH)
    scored = ROWS * (LENGTH - 1)
    expected = 2 * 2 * tokens * (layers * weights) - 2 * tokens * first
    expected += 3 * 2 * tokens * layers * lora - (0 if compiled else 2 * tokens * 3 * RANK * WIDTH)
    expected += 2 * 2 * scored * VOCABULARY * WIDTH
    # Some versions of transformers compute rotary angles, positions times half a head's frequencies, as a product.
    angles = 2 * LENGTH * (WIDTH // HEADS // 2)
    assert flops_of(found, KernelKind.GEMM, KernelKind.NF4) in (expected, expected + angles)
    pairs = 4 * ROWS * HEADS * LENGTH * LENGTH * (WIDTH // HEADS) // 2
    assert flops_of(found, KernelKind.FLASH) == layers * pairs
    assert flops_of(found, KernelKind.FLASH_BACKWARD) == 2.5 * layers * pairs


@pytest.mark.slow
def test_recomputed_layers_run_twice(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    none = count_kernels(spec, layers_of(spec.config, 0))["update"]
    both = count_kernels(spec, layers_of(spec.config, 2))["update"]
    assert flops_of(both, KernelKind.NF4) == 2 * flops_of(none, KernelKind.NF4)
    assert flops_of(both, KernelKind.FLASH) == 2 * flops_of(none, KernelKind.FLASH)
    assert flops_of(both, KernelKind.FLASH_BACKWARD) == flops_of(none, KernelKind.FLASH_BACKWARD)


@pytest.mark.slow
def test_skipped_chunks_of_the_head_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The products of the head do not depend on the size of a chunk."""
    spec = spec_of(tmp_path)

    def head_flops() -> float:
        found = count_kernels(spec, layers_of(spec.config, 0))["update"]
        return sum(
            kernel.flops * count
            for kernel, count in found.items()
            if kernel.kind == KernelKind.GEMM and kernel.flops % VOCABULARY == 0
        )

    whole = head_flops()
    assert whole == 2 * 2 * ROWS * (LENGTH - 1) * VOCABULARY * WIDTH
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 16 * VOCABULARY)
    assert head_flops() == whole


def totals(counts: KernelCounts) -> dict[str, list[float]]:
    found = {}
    for phase, each in counts.items():
        launches = sum(each.values())
        num_bytes = sum(kernel.num_bytes * count for kernel, count in each.items())
        found[phase] = [launches, num_bytes, flops_of(each)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("decodes", [False, True])
def test_counts_from_few_layers_are_those_of_all(tmp_path: Path, decodes: bool) -> None:
    spec = spec_of(tmp_path, layers=7)
    if decodes:
        rollouts = {"rollout": DecodingSpec("policy", 8, 32, 64, 2, 4, 1 << 40)}
        spec = SimulationSpec(spec.recipe, spec.config, spec.device, spec.sizes, rollouts=rollouts)

    def count(layers: Sequence[Layer]) -> KernelCounts:
        return count_kernels(spec, layers)

    layers = layers_of(spec.config, 3)
    whole = totals(count(layers))
    extrapolated = totals(extrapolate_counts(count, layers))
    assert extrapolated.keys() == whole.keys()
    for phase, values in whole.items():
        assert extrapolated[phase] == pytest.approx(values), phase


@pytest.mark.slow
def test_bytes_of_the_plan_do_not_depend_on_the_counter(tmp_path: Path) -> None:
    """The counter keeps no tensor: a second simulation, after one that counts, has the same peaks."""
    spec = spec_of(tmp_path)
    layers = layers_of(spec.config, 1)
    before = simulate(spec, layers)
    count_kernels(spec, layers)
    assert simulate(spec, layers) == before


def test_a_step_of_sequences_of_different_length_has_a_mask(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    rollouts = {"rollout": DecodingSpec("policy", 8, 32, 64, 2, 4, 1 << 40)}
    spec = SimulationSpec(spec.recipe, spec.config, spec.device, spec.sizes, rollouts=rollouts)
    counts = count_kernels(spec, layers_of(spec.config, 0))
    for name, width in (("average step", 32 + 32 + 1), ("longest step", 32 + 64)):
        found = counts[f"rollout: {name}"]
        masked = [kernel for kernel in found if kernel.kind == KernelKind.MASKED]
        assert [kernel.flops for kernel in masked] == [4 * 8 * HEADS * width * (WIDTH // HEADS)]
        packed = [kernel for kernel in found if kernel.kind == KernelKind.NF4]
        assert {kernel.mnk[0] for kernel in packed} == {8}
        assert sum(found[kernel] for kernel in packed) == 2 * len(linear_weights())
