"""What a micro-batch of SFT makes a GPU do before and after its layers are compiled: kernel launches, bytes of
element-wise kernels, bytes that are saved for the backward pass, and the time by the roofline of the planner. Counted
on tensors without data at the true shapes, not measured: no GPU, no weights, no compiler is used.

    PYTHONPATH=. python benchmarks/compiled_counts.py                     # Llama-3.1-8B, 4 x 2,048; two minutes
    PYTHONPATH=. python benchmarks/compiled_counts.py --preset tiny-sft --quick   # two rows, for the tests

A compiled layer is counted from the graphs of AOTAutograd's partitioner: matrix products, attention and bitsandbytes'
operators are one kernel each, and so is each connected group of pointwise operations and reductions between them
(`memory_planner/fused_groups.py`). A recomputed layer runs its forward graph once more. The head, the embedding and the
optimizer are counted as `plan` counts them. Rates are the constants of `memory_planner/gpu_specs.py`.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lowrank_tune.config import load_any
from lowrank_tune.memory_planner.auto_settings import choice_of
from lowrank_tune.memory_planner.extrapolation import extrapolate_counts
from lowrank_tune.memory_planner.fake_device import replaced
from lowrank_tune.memory_planner.gpu_specs import GpuSpec
from lowrank_tune.memory_planner.kernel_costs import KernelKind
from lowrank_tune.memory_planner.meta_model import Layer, layers_of
from lowrank_tune.memory_planner.planned_gpu import gpu_named
from lowrank_tune.memory_planner.planner import plan_of, vram_bytes
from lowrank_tune.memory_planner.roofline import kernel_seconds, parts_on, phase_time
from lowrank_tune.memory_planner.simulation import SimulationSpec, count_kernels, simulate
from lowrank_tune.memory_planner.specs import simulation_specs
from lowrank_tune.memory_planner.step_costs import OPTIMIZER, UPDATE
from lowrank_tune.model.lora_forward import LoraLinears

KINDS = {
    "matrix products": (KernelKind.GEMM, KernelKind.NF4),
    "attention": (KernelKind.FLASH, KernelKind.FLASH_BACKWARD, KernelKind.MASKED, KernelKind.MASKED_BACKWARD),
    "element-wise": (KernelKind.ELEMENTWISE,),
}
HEADER = (
    "| SFT, one micro-batch | launches | element-wise GB | saved KB a token and layer | saved GB | "
    + " | ".join(f"ms {kind}" for kind in KINDS)
    + " | tokens/s |"
)


GPU = "4090"


@dataclass(frozen=True)
class Case:
    """A micro-batch of `rows` rows. `one_function` is whether linears with adapters are one autograd function
    (`model/lora_linear.py`) in place of PEFT's. `recomputed` is the number of layers, None for what the planner
    chooses."""

    name: str
    one_function: bool
    compiled: bool
    rows: int
    recomputed: int | None


def cases(layers: int) -> Iterator[Case]:
    yield Case("PEFT's layers, all recomputed", False, False, 4, layers)
    yield Case("PEFT's layers, none recomputed", False, False, 4, 0)
    yield Case("LoRA linears as one function, all recomputed", True, False, 4, layers)
    yield Case("LoRA linears as one function, none recomputed", True, False, 4, 0)
    yield Case("PEFT's layers compiled, all recomputed", False, True, 4, layers)
    yield Case("both, all recomputed", True, True, 4, layers)
    yield Case("both, recomputed by plan", True, True, 4, None)
    yield Case("both, recomputed by plan", True, True, 2, None)
    yield Case("both, none recomputed", True, True, 4, 0)


def quick_cases(layers: int) -> Iterator[Case]:
    yield Case("PEFT's layers, all recomputed", False, False, 1, layers)
    yield Case("both, all recomputed", True, True, 1, layers)


def spec_of(preset: str, case: Case) -> SimulationSpec:
    """The preset with fixed micro-batches; its other settings stay."""
    layers = "auto" if case.recomputed is None else case.recomputed
    recipe = load_any(
        preset,
        "data.max_length=2048",
        "train.micro_batch_tokens=null",
        f"train.micro_batch_size={case.rows}",
        f"train.gradient_checkpointing={layers}",
        "train.logits_chunk=67108864",
    )
    (spec,) = simulation_specs(recipe, "cuda")
    return replace(spec, compiled=case.compiled)


def recomputed_layers(spec: SimulationSpec, gpu: GpuSpec) -> int | None:
    """The fewest layers that must be recomputed on this GPU, None if the micro-batch does not fit."""
    plan = plan_of(spec, vram_bytes(spec, gpu.memory_gib), spec.recipe.name)
    return choice_of(spec, plan).values.get("gradient_checkpointing")


def saved_bytes(spec: SimulationSpec, recomputed: bool) -> float:
    """Bytes that one more layer keeps until its backward pass, for each token."""
    kind = layers_of(spec.config, 0)[0].kind
    layer = Layer(kind, recomputed)
    stored = []
    for count in (2, 3):
        peaks = simulate(spec, [layer] * count, only_update=True)
        stored.append(peaks["update", "after"]["activations"])
    return (stored[1] - stored[0]) / spec.sizes.tokens


def row(spec: SimulationSpec, case: Case, gpu: GpuSpec) -> str:
    num_layers = spec.config.get_text_config().num_hidden_layers
    recomputed = recomputed_layers(spec, gpu) if case.recomputed is None else case.recomputed
    if recomputed is None:
        cells = [f"{case.name}: {case.rows} x {spec.sizes.length:,}", "does not fit"]
        return f"| {' | '.join(cells)} |" + " |" * (HEADER.count("|") - 1 - len(cells))
    # Not cached on the disk, where both kinds of linears would have the same key.
    count = partial(count_kernels, spec, only_update=True)
    counts = extrapolate_counts(count, layers_of(spec.config, recomputed))
    launches = 0.0
    element_bytes = 0.0
    seconds = Counter[KernelKind]()
    for kernel, count in counts[UPDATE].items():
        for part in parts_on(kernel, gpu):
            launches += count
            seconds[part.kind] += count * kernel_seconds(part, gpu)  # type: ignore[assignment]
            if part.kind is KernelKind.ELEMENTWISE:
                element_bytes += count * part.num_bytes
    tokens = spec.sizes.tokens
    share = tokens / (spec.recipe.train.global_batch_size or 16) / spec.sizes.length
    optimizer = share * phase_time(counts[OPTIMIZER], gpu).gpu_seconds
    per_layer = [saved_bytes(spec, is_recomputed) for is_recomputed in (False, True)]
    saved = tokens * (per_layer[0] * (num_layers - recomputed) + per_layer[1] * recomputed)
    times = [1000 * sum(seconds[kind] for kind in kinds) for kinds in KINDS.values()]
    cells = [
        f"{case.name}: {recomputed} of {num_layers}, {case.rows} x {spec.sizes.length:,}",
        f"{launches:,.0f}",
        f"{element_bytes / 1e9:,.0f}",
        f"{per_layer[0] / 1e3:.1f}",
        f"{saved / 1e9:.1f}",
        *(f"{time:,.0f}" for time in times),
        f"{tokens / (sum(seconds.values()) + optimizer):,.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama-3.1-8b-sft")
    parser.add_argument("--gpu", default=GPU)
    parser.add_argument("--quick", action="store_true", help="all layers recomputed, in micro-batches of one row")
    options = parser.parse_args()
    gpu = gpu_named(options.gpu)
    (spec,) = simulation_specs(load_any(options.preset), "cuda")
    print(f"Counted, not measured: {spec.recipe.base.model}, {gpu.device_name}.\n")
    print(HEADER)
    print("|---" * (HEADER.count("|") - 1) + "|")
    num_layers = spec.config.get_text_config().num_hidden_layers
    for case in quick_cases(num_layers) if options.quick else cases(num_layers):
        with nullcontext() if case.one_function else replaced(LoraLinears, "install", _keep_plain):
            print(row(spec_of(options.preset, case), case, gpu), flush=True)


def _keep_plain(linears: LoraLinears, model: Any) -> None:
    """Leaves PEFT's forward methods in place."""


if __name__ == "__main__":
    main()
