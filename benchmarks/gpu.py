"""The kit on a real card: an NF4 model of a 7-8B shape with random weights, two timed steps of each algorithm, and what must hold.

    PYTHONPATH=. python benchmarks/gpu.py smoke                  # under 3 minutes on a card; memory capped to 24 GB where it has more
    PYTHONPATH=. python benchmarks/gpu.py smoke --tiny           # the same code on the CPU, in seconds

It needs torch, transformers, peft, accelerate and bitsandbytes, and nothing else: no network, no `datasets`, no pydantic. So it brings
stand-ins for the settings that it needs, and makes up its rows. Exit code 0 where every check held, else 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lowrank_tune.algorithms.kit import Kit
from lowrank_tune.algorithms.sft import SFT
from lowrank_tune.events import Event, StepDone
from lowrank_tune.model.adapters import lora_config
from lowrank_tune.model.base import Base, base_hashes, freeze, nf4, pick_device
from lowrank_tune.model.logps import Head
from lowrank_tune.model.roles import Roles
from lowrank_tune.train import Loop, Progress, make_optimizer
from lowrank_tune.types import Algorithm, Batch

WARM_UP, TIMED = 1, 2
STEPS = WARM_UP + TIMED + 1
"""The first and the last step are logging steps (KL to the base, movement); the two between them are timed."""
FP32_LOGITS = 2e-4
"""Most relative error of logits that left the matrix product in fp32. Rounded to bf16 they would be about 2e-3 off."""

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": dict(model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                         num_key_value_heads=8, head_dim=128, vocab_size=128256, rms_norm_eps=1e-5, max_position_embeddings=131072,
                         rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
    "qwen2.5-7b": dict(model_type="qwen2", hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                       num_key_value_heads=4, vocab_size=152064, rms_norm_eps=1e-6, max_position_embeddings=32768,
                       rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}),
    "tiny": dict(model_type="qwen2", hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=512, rms_norm_eps=1e-6, max_position_embeddings=1024,
                 rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
}  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """Stands for `settings.Adapter`, which needs pydantic."""

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str = "all-linear"
    rslora: bool = False


@dataclass(frozen=True)
class Train:
    """Stands for `settings.Train`: what the loop and the optimizer read."""

    micro_batch_size: int
    micro_batch_tokens: int | None = None
    learning_rate: float = 2e-4
    schedule: str = "constant"
    warmup_steps: int = 0
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    max_bad_steps: int = 1
    log_every: int = 1_000_000


@dataclass(frozen=True)
class Size:
    """Rows of a step, rows that go through the model at once, tokens of a row."""

    rows: int
    micro: int
    length: int


@dataclass
class Result:
    """What one algorithm did. `checks` are all true where the kit does what it promises."""

    algorithm: str
    checks: dict[str, bool] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)


def build_model(config: Any, device: torch.device) -> Any:
    """A quantised model made of random numbers, one linear at a time on the device: the 16-bit whole never exists."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, quantised_linear(module, dtype, device, generator))
        elif any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            # Rotary frequencies: they are computed, not loaded, so the module is made anew on the device.
            parent, _, last = name.rpartition(".")
            with device:
                setattr(model.get_submodule(parent), last, type(module)(config=config))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                fresh = torch.empty(parameter.shape, dtype=dtype, device=device)
                # Norm weights are the only vectors left here; the matrices are the embedding and the head.
                fresh.fill_(1.0) if fresh.ndim == 1 else fresh.normal_(0.0, 0.02, generator=generator)
                setattr(module, name, nn.Parameter(fresh, requires_grad=False))
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())), "something stayed without values"
    model.is_loaded_in_4bit = model.is_quantized = True  # what PEFT looks at to choose its 4-bit LoRA layer
    model.config.quantization_config = nf4(device)
    return model


def quantised_linear(linear: nn.Linear, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> nn.Module:
    """A `Linear4bit` (NF4, double quantisation) of this one's shape, with random weights."""
    made = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=dtype,
                                      compress_statistics=True, quant_type="nf4", device=torch.device("meta"))  # fmt: skip
    weight = torch.empty(linear.weight.shape, dtype=dtype, device=device).normal_(0.0, 0.02, generator=generator)
    made.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=made).to(device)
    if linear.bias is not None:
        made.bias = nn.Parameter(torch.zeros(linear.out_features, dtype=dtype, device=device), requires_grad=False)
    return made


def random_rows(size: Size, vocabulary: int, step: int) -> Batch:
    """Rows of random tokens; the second half of each is the assistant's. Every fourth row is a quarter shorter, so there is padding."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(3, vocabulary, (size.rows, size.length), generator=generator)
    lengths = torch.tensor([size.length - size.length // 4 * (row % 4 == 3) for row in range(size.rows)])
    positions = torch.arange(size.length)
    attended = positions < lengths[:, None]
    return Batch(ids, attended, attended & (positions >= size.length // 2))


def sft(roles: Roles, rows: Callable[[int], Batch]) -> Algorithm:
    return SFT(Kit(roles, rows))


ALGORITHMS: dict[str, Callable[[Roles, Callable[[int], Batch]], Algorithm]] = {"sft": sft}
"""Name -> maker. An algorithm that lands adds its line here; what it needs beside rows it makes up in its maker."""


@contextmanager
def counted_forwards(model: Any) -> Iterator[list[int]]:
    """Counts the forwards of decoder layers, so that recomputation is known to have happened. The hooks stand on a module *inside* each
    layer: transformers 5.23 recomputes a layer without calling the layer's own hooks."""
    count = [0]

    def add(*_: Any) -> None:
        count[0] += 1

    handles = [next(layer.children()).register_forward_pre_hook(add) for layer in model.get_decoder().layers]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


def smoke(name: str, base: Base, size: Size) -> Result:
    """Four steps of one algorithm with the kit's own loop and roles, and everything that must hold of them."""
    result, device, model = Result(name), base.device, base.model
    layers = list(model.get_decoder().layers)
    before = [base_hashes(layer) for layer in (layers[0], layers[-1])]
    vocabulary = model.config.vocab_size
    roles = Roles(base, {"policy": lora_config(Adapter(), model)}, ["policy"],  # type: ignore[arg-type]
                  {"policy": ["policy"], "reference": []}, checkpointing=True)  # fmt: skip
    parameters = roles.parameters("policy")
    start = [parameter.detach().clone() for parameter in parameters]
    train = Train(micro_batch_size=size.micro)
    events: list[StepDone] = []
    borders: list[tuple[float, int]] = []

    def emit(event: Event) -> None:
        if isinstance(event, StepDone):
            events.append(event)

    reset_peak(device)
    with counted_forwards(model) as count:

        def at_border(progress: Progress, last: bool) -> None:
            synchronise(device)
            borders.append((time.perf_counter(), count[0]))

        algorithm = ALGORITHMS[name](roles, lambda step: random_rows(size, vocabulary, step))
        loop = Loop(algorithm, parameters, make_optimizer(parameters, train, device),  # type: ignore[arg-type]
                    train, STEPS, 0, device, emit, at_border)  # type: ignore[arg-type]  # fmt: skip
        loop.run()
    seconds, forwards = (borders[-2][i] - borders[WARM_UP - 1][i] for i in (0, 1))
    batches = [random_rows(size, vocabulary, step) for step in range(WARM_UP, WARM_UP + TIMED)]
    passes = sum(len(list(batch.split(train.micro_batch_size))) for batch in batches) * len(layers)
    result.checks["loss is finite"] = all(math.isfinite(event.stats["loss"]) for event in events)
    result.checks["policy starts at the base (KL 0)"] = abs(events[0].stats["kl"]) <= 1e-6
    result.checks["adapters are fp32"] = all(parameter.dtype == torch.float32 for parameter in parameters)
    result.checks["adapters moved"] = all(bool((now != then).any()) for now, then in zip(parameters, start, strict=True))
    result.checks["base is unchanged"] = before == [base_hashes(layer) for layer in (layers[0], layers[-1])]
    result.checks["layers were recomputed"] = forwards == 2 * passes
    result.checks["linears are 4-bit"] = four_bit(layers[0])
    result.checks.update(logits_check(roles, batches[0], result.figures))
    tokens = sum(int(batch.attended.sum()) for batch in batches)
    result.figures |= {"loss at first step": events[0].stats["loss"], "loss at last step": events[-1].stats["loss"],
                       "seconds a step": seconds / TIMED, "tokens a second": tokens / seconds,
                       "teraflop/s, recomputation counted": work(base, roles, batches, size.micro) / seconds / 1e12,
                       "layer forwards a pass": forwards / passes, "peak GiB": peak_gib(device)}  # fmt: skip
    return result


def four_bit(layer: nn.Module) -> bool:
    """Whether every linear below a LoRA layer is `Linear4bit` in NF4, double-quantised."""
    linears = [module.base_layer for module in layer.modules() if hasattr(module, "base_layer")]
    states = [getattr(linear.weight, "quant_state", None) for linear in linears]
    return bool(states) and all(state is not None and state.quant_type == "nf4" and state.nested for state in states)


@torch.no_grad()
def logits_check(roles: Roles, batch: Batch, figures: dict[str, float]) -> dict[str, bool]:
    """The head's logits against an fp32 product of the same numbers, on 8 positions and the first 4,096 words."""
    one = batch.take(torch.tensor([0])).to(roles.base.device)
    with roles.quiet():
        hidden = roles.hidden("policy", one)[0, :8]
    weight = roles.head.weight[:4096]
    ours = Head(weight).logits(hidden)
    truth = hidden.float() @ weight.float().T
    if hidden.is_cuda:
        truth = hidden.double() @ weight.double().T  # the fp32 product could be cut to TF32 by a setting of the process
    norm = torch.linalg.vector_norm
    figures["relative error of logits"] = float(norm(ours.double() - truth.double()) / norm(truth.double()))
    figures["the same, had they been bf16"] = float(norm(truth.bfloat16().double() - truth.double()) / norm(truth.double()))
    exact = figures["relative error of logits"] < FP32_LOGITS
    return {"logits are fp32": ours.dtype == torch.float32, "logits left the product in fp32": exact}


def work(base: Base, roles: Roles, batches: list[Batch], micro: int) -> float:
    """Floating-point operations that the model's matrix products took in these steps, padding and recomputation counted.

    A frozen linear is run forward, recomputed, and run backward for its input only: 3 products; an adapter has one more, for its own
    gradient. Attention is counted as causal, its backward twice its forward. The head sees scored positions only, twice.
    """
    config = base.model.config
    linears = [module for module in base.model.get_decoder().modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    linear = sum(module.in_features * module.out_features for module in linears)
    adapter = sum(parameter.numel() for parameter in roles.parameters("policy"))
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    total = 0.0
    for batch in batches:
        for part in batch.split(micro):
            rows, length = part.ids.shape
            total += rows * length * (6.0 * linear + 8.0 * adapter + 4 * 2.0 * length * width * config.num_hidden_layers)
            total += int(part.scored.sum()) * 4.0 * config.vocab_size * config.hidden_size
    return total


def roof(device: torch.device) -> float:
    """Best of a few large square matrix products, in TFLOP/s: bf16 on a card, fp32 on a CPU."""
    size, dtype, repeats = (8192, torch.bfloat16, 20) if device.type == "cuda" else (512, torch.float32, 5)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(4):  # the first round warms up
        synchronise(device)
        begun = time.perf_counter()
        for _ in range(repeats):
            left @ right
        synchronise(device)
        best = min(best, (time.perf_counter() - begun) / repeats)
    return 2.0 * size**3 / best / 1e12


def cap_memory(device: torch.device, gigabytes: float) -> float | None:
    """Caps what torch may take on a card that has more. Returns the cap in GiB, or None."""
    if device.type != "cuda":
        return None
    total = torch.cuda.get_device_properties(device).total_memory
    if total <= gigabytes * 1e9:
        return None
    torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / total, device)
    return gigabytes * 1e9 / 2**30


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    gc.collect()  # modules and hooks refer to each other in circles
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float:
    """Peak since the last reset on a card; of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def run_smoke(options: argparse.Namespace) -> int:
    device = torch.device("cpu") if options.tiny else pick_device()
    if device.type == "cpu" and not options.tiny:
        print("There is no CUDA card here. `--tiny` runs the same code on the CPU.", file=sys.stderr)
        return 2
    if options.tiny:
        torch.set_num_threads(1)  # two threads over such small matrices mostly wait for each other
    size = Size(4, 2, 48) if options.tiny else Size(options.rows, options.micro_batch, options.length)
    # PEFT asks transformers by a name that is deprecated there.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
    begun, cap = time.perf_counter(), cap_memory(device, options.cap_gb)
    machine = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU", "torch": torch.__version__,
               "bitsandbytes": bitsandbytes.__version__, "memory cap GiB": cap, "roof TFLOP/s": roof(device)}  # fmt: skip
    shape = dict(SHAPES["tiny" if options.tiny else options.shape])
    results = []
    for name in options.algorithms or ALGORITHMS:
        # A fresh base for each: roles wrap the base's modules for good.
        reset_peak(device)
        building = time.perf_counter()
        config = AutoConfig.for_model(**shape, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0)
        base = freeze(build_model(config, device), tokenizer=None, name="random", bits=4)
        synchronise(device)
        building, built_gib = time.perf_counter() - building, peak_gib(device)
        result = smoke(name, base, size)
        result.figures |= {"seconds to build": building, "peak GiB while building": built_gib}
        result.figures["share of the roof"] = result.figures["teraflop/s, recomputation counted"] / float(machine["roof TFLOP/s"])
        if cap is not None:
            result.checks["peak is under the cap"] = result.figures["peak GiB"] <= cap
        results.append(result)
        del base
    machine["seconds in all"] = time.perf_counter() - begun
    print_results(machine, results, "tiny" if options.tiny else options.shape, size)
    if options.json:
        document = {"machine": machine, "size": asdict(size), "results": [asdict(result) for result in results]}
        Path(options.json).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0 if all(all(result.checks.values()) for result in results) else 1


def print_results(machine: dict[str, Any], results: list[Result], shape: str, size: Size) -> None:
    print(f"{shape}, NF4, random weights; {size.rows} rows of at most {size.length} tokens a step, {size.micro} at once, checkpointing on")
    print("; ".join(f"{name} {show(value)}" for name, value in machine.items() if value is not None))
    for result in results:
        print(f"\n{result.algorithm}")
        for name, value in result.figures.items():
            print(f"  {name:<34} {show(value):>14}")
        for name, held in result.checks.items():
            print(f"  {name:<34} {'yes' if held else 'NO':>14}")


def show(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2e}" if value and abs(value) < 1e-3 else f"{value:,.3f}" if abs(value) < 100 else f"{value:,.0f}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("smoke", help="two timed steps of each algorithm on a 7-8B shape")
    command.add_argument("algorithms", nargs="*", help=f"which ones; all where none is named: {', '.join(ALGORITHMS)}")
    command.add_argument("--tiny", action="store_true", help="a tiny shape on the CPU, in fp32")
    command.add_argument("--shape", choices=[name for name in SHAPES if name != "tiny"], default="llama-3.1-8b")
    command.add_argument("--rows", type=int, default=8, help="rows of an optimizer step")
    command.add_argument("--micro-batch", type=int, default=4, help="rows at once")
    command.add_argument("--length", type=int, default=1024, help="tokens of a row")
    command.add_argument("--cap-gb", type=float, default=24.0, help="memory that may be used, in gigabytes of 1e9 bytes")
    command.add_argument("--json", metavar="FILE", help="write all figures there too")
    command.set_defaults(run=run_smoke)
    options = parser.parse_args(arguments)
    unknown = set(options.algorithms) - set(ALGORITHMS)
    if unknown:
        parser.error(f"no algorithm {', '.join(sorted(unknown))}; there are {', '.join(ALGORITHMS)}")
    return int(options.run(options))


if __name__ == "__main__":
    sys.exit(main())
