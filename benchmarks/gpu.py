"""The kit on a real card: an NF4 model of a 7-8B shape with random weights, a few steps of each algorithm, and what must hold.

    PYTHONPATH=. python benchmarks/gpu.py smoke                  # some minutes on a card; memory capped to 24 GB where it has more
    PYTHONPATH=. python benchmarks/gpu.py smoke dpo --checkpointing off
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
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lowrank_tune.algorithms.dpo import DPO
from lowrank_tune.algorithms.grpo import GRPO
from lowrank_tune.algorithms.harvest import Harvester
from lowrank_tune.algorithms.kit import Kit
from lowrank_tune.algorithms.ppo import PPO
from lowrank_tune.algorithms.reward import Reward
from lowrank_tune.algorithms.sft import SFT
from lowrank_tune.errors import RunFailed
from lowrank_tune.events import Event, StepDone
from lowrank_tune.model.adapters import lora_config
from lowrank_tune.model.base import Base, base_hashes, freeze, nf4, pick_device
from lowrank_tune.model.heads import KEY as HEAD_KEY
from lowrank_tune.model.logps import Head
from lowrank_tune.model.roles import Roles
from lowrank_tune.train import Loop, Progress, make_optimizer
from lowrank_tune.types import Algorithm, Batch, Completion, Experience

WARM_UP, TIMED = 1, 2
STEPS = WARM_UP + TIMED + 1
"""The first and the last step are logging steps (KL to the base, movement); the two between them are timed."""
FP32_LOGITS = 2e-4
"""Most relative error of logits that left the matrix product in fp32. Rounded to bf16 they would be about 2e-3 off."""
SHARED_LOGPS = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Nats by which a shared prompt may move the log-prob of a token in the mean, or a score; another batch shape alone moves bf16 by 0.016."""
SHARED_GRADIENT = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""The same for the gradient, relative."""
LN2_OFF = {torch.float32: 1e-5, torch.bfloat16: 0.05}
"""How far the first loss of DPO and of a fresh reward model may be from ln 2."""
MISMATCH = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Nats a token, in the mean, between what the sampler said of a token and what the policy says of it: decoding has other batch shapes."""
NO_KL = {torch.float32: 1e-6, torch.bfloat16: 1e-3}
"""KL of a policy that is its reference, where the two went through in other batch shapes: half the square of such a difference."""
MOST_NEW = 128
"""Tokens of a completion."""

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
    checkpointing: bool = True
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


def random_rows(size: Size, vocabulary: int, together: int = 1) -> Batch:
    """Rows of random tokens; the second half of each is the assistant's. Every fourth row is a quarter shorter, so there is padding.

    Rows of a pair (`together` 2) have the first half in common.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (size.rows, size.length), generator=generator)
    prompt = size.length // 2
    first = torch.arange(size.rows) // together * together
    ids[:, :prompt] = ids[first, :prompt]
    ids[:, prompt] = 3 + torch.arange(size.rows) % (vocabulary - 3)  # so that what is in common ends here
    lengths = torch.tensor([size.length - size.length // 4 * (row % 4 == 3) for row in range(size.rows)])
    positions = torch.arange(size.length)
    attended = positions < lengths[:, None]
    batch = Batch(ids, attended, attended & (positions >= prompt))
    if together > 1:
        shared = torch.where(first == torch.arange(size.rows), 0, prompt)
        batch.extra = {"shared": shared, "margin": torch.zeros(size.rows), "row": torch.arange(size.rows)}
    return batch


Rows = Callable[[int], Batch]


def sft(roles: Roles, rows: Rows) -> Algorithm:
    return SFT(Kit(roles, rows))


def reward(roles: Roles, rows: Rows) -> Algorithm:
    return Reward(Kit(roles, rows), centering=0.01)


def dpo(roles: Roles, rows: Rows) -> Algorithm:
    """With the log-probs of the reference computed before, a pair at a time: as a cache has them, in other shapes than training runs."""
    known = {}
    for step in range(STEPS):
        batch = rows(step)
        with roles.quiet():
            parts = [roles.logps("reference", batch.take(torch.arange(at, at + 2)).to(roles.base.device)).logps.sum(dim=1).cpu()
                     for at in range(0, len(batch), 2)]  # fmt: skip
        batch.extra["reference"] = torch.cat(parts)
        known[step] = batch
    return DPO(Kit(roles, known.__getitem__))


@dataclass(frozen=True)
class Asked:
    """Stands for `data.Asked`, whose floor needs pydantic."""

    ids: list[int]
    text: str = ""
    gold: None = None


class MeanId:
    """A reward made of ids alone, which no two completions earn alike: the mean id."""

    def __init__(self) -> None:
        self.scores: dict[int, list[float]] = {}

    def submit(self, key: int, asked: Any, text: str, completion: Completion) -> None:
        self.scores[key] = [sum(completion.ids) / len(completion.ids)]

    def collect(self) -> Mapping[int, Sequence[float]]:
        scores, self.scores = self.scores, {}
        return scores


def grpo(roles: Roles, rows: Rows) -> Algorithm:
    """The prompts are the first halves of the rows, one for each group; nothing ends a completion but its length."""
    return GRPO(Kit(roles, rows), drawing(roles, rows), dead_groups="keep")


def ppo(roles: Roles, rows: Rows) -> Algorithm:
    """The same completions; a value of its own, and one pass over each harvest."""
    return PPO(Kit(roles, rows), drawing(roles, rows))


def drawing(roles: Roles, rows: Rows) -> Harvester:
    """Completions of the first halves of rows, two groups of them."""
    size, length = len(rows(0)), rows(0).ids.shape[1]
    group = max(2, size // 2)

    def prompts(step: int, draw: int, count: int | None) -> list[Asked]:
        ids = rows(step).ids.roll(step, dims=1).tolist()
        return [Asked(ids[row][: length // 2 - row]) for row in range(size // group)]

    new = min(length // 2, MOST_NEW)
    return Harvester(roles, prompts, MeanId(), ["mean id"], [1.0], lambda ids: "", frozenset(), 0, group, new,  # type: ignore[arg-type]
                     1.0, 64, size * length, lambda number: number)  # fmt: skip


ALGORITHMS: dict[str, Callable[[Roles, Rows], Algorithm]] = {"sft": sft, "reward": reward, "dpo": dpo, "ppo": ppo, "grpo": grpo}
"""Name -> maker. An algorithm that lands adds its line here; what it needs beside rows it makes up in its maker."""
TRAINED = {"reward": ("reward",), "ppo": ("policy", "value")}
"""The trained roles, where it is not the policy alone."""
HEADS, PAIRED, ONLINE = {"reward", "value"}, {"reward", "dpo"}, {"ppo", "grpo"}
"""Roles with a scalar head, algorithms that learn from pairs, and those that write their own rows."""


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


def make_roles(base: Base, names: Sequence[str], checkpointing: bool, seed: int = 0) -> Roles:
    adapters = {name: lora_config(Adapter(), base.model) for name in names}  # type: ignore[arg-type]
    return Roles(base, adapters, names, {**{name: [name] for name in names}, "reference": []}, checkpointing, seed, HEADS & set(names))


def smoke(name: str, base: Base, size: Size, checkpointing: bool = True) -> Result:
    """Four steps of one algorithm with the kit's own loop and roles, on the same rows, and everything that must hold of them."""
    result, device, model = Result(name, checkpointing), base.device, base.model
    checks, figures = result.checks, result.figures
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layers = list(model.get_decoder().layers)
    before = [base_hashes(layer) for layer in (layers[0], layers[-1])]
    trained, together = TRAINED.get(name, ("policy",)), 2 if name in PAIRED else 1
    role, roles = trained[0], make_roles(base, trained, checkpointing)
    parameters = [parameter for each in trained for parameter in roles.parameters(each)]
    start = [parameter.detach().clone() for parameter in parameters]
    train = Train(micro_batch_size=size.micro // together)
    events: list[StepDone] = []
    borders: list[tuple[float, int, float]] = []

    def emit(event: Event) -> None:
        if isinstance(event, StepDone):
            events.append(event)

    algorithm = ALGORITHMS[name](roles, lambda step: random_rows(size, model.config.vocab_size, together))
    batch = algorithm.collect(0).batch
    reset_peak(device)
    with counted_forwards(model) as count:
        collect, collecting = algorithm.collect, 0.0

        def apart(step: int) -> Experience:
            """A rollout's forwards are not the update's, nor is its time."""
            nonlocal collecting
            begun, known = time.perf_counter(), count[0]
            experience = collect(step)
            collecting, count[0] = collecting + time.perf_counter() - begun, known
            return experience

        algorithm.collect = apart  # type: ignore[method-assign]

        def at_border(progress: Progress, last: bool) -> None:
            synchronise(device)
            borders.append((time.perf_counter(), count[0], collecting))

        loop = Loop(algorithm, parameters, make_optimizer(parameters, train, device),  # type: ignore[arg-type]
                    train, STEPS, 0, device, emit, at_border)  # type: ignore[arg-type]  # fmt: skip
        try:
            loop.run()
        except RunFailed as fault:
            print(f"{name}: {fault}", file=sys.stderr)
            checks["ran, with the right reference"] = False
            return result
    figures["peak GiB"] = peak_gib(device)
    seconds, forwards, collected = (borders[-2][i] - borders[WARM_UP - 1][i] for i in range(3))
    micros = list(batch.split(size.micro, together=together))
    losses = [event.stats["loss"] for event in events]
    checks["ran, with the right reference"] = True
    checks["loss is finite"] = all(math.isfinite(loss) for loss in losses)
    if name in ONLINE:
        online_check(algorithm, batch, events, dtype, result)
        figures["seconds of collecting a step"] = collected / TIMED
    else:
        checks["loss falls"] = losses[-1] < losses[0]
    checks["adapters are fp32"] = all(parameter.dtype == torch.float32 for parameter in parameters)
    checks["adapters moved"] = all(bool((now != then).any()) for now, then in zip(parameters, start, strict=True))
    checks["base is unchanged"] = before == [base_hashes(layer) for layer in (layers[0], layers[-1])]
    passes = TIMED * len(micros) * len(layers) * len(trained)
    checks["layers were recomputed" if checkpointing else "layers ran once"] = forwards == (1 + checkpointing) * passes
    checks["linears are 4-bit"] = four_bit(layers[0])
    if "kl" in events[0].stats:
        figures["KL after the last step but one"] = events[-1].stats["kl"]
        checks["policy starts at the base (KL 0)"] = abs(events[0].stats["kl"]) <= (NO_KL[dtype] if name in ONLINE else 1e-6)
        checks["KL is not negative, and grows"] = events[-1].stats["kl"] > 0
    if name in PAIRED:
        checks["loss starts at ln 2"] = abs(losses[0] - math.log(2)) <= LN2_OFF[dtype]
        sharing_check(roles, role, algorithm, micros[0].to(device), dtype, result)
    checks.update(logits_check(roles, role, batch, figures))
    tokens = TIMED * int(batch.attended.sum())
    done = TIMED * sum(work(base, roles, each, micros, checkpointing) for each in trained)
    figures |= {"loss at first step": losses[0], "loss at last step": losses[-1], "seconds a step": seconds / TIMED,
                "tokens a second": tokens / (seconds - collected), "teraflop/s": done / (seconds - collected) / 1e12,
                "layer forwards a pass": forwards / passes}  # fmt: skip
    checks["saved and reloaded, it says the same"] = survives_saving(base, roles, trained, micros[0].to(device))
    return result


def online_check(algorithm: Any, batch: Batch, events: list[StepDone], dtype: torch.dtype, result: Result) -> None:
    """Completions are whole, groups can be told apart, and what the sampler said of its tokens is what the policy says of them."""
    mismatch = max(event.stats["mismatch"] for event in events)
    result.figures |= {"sampler against policy, mean": mismatch, "mean entropy": events[0].stats["entropy"]}
    result.figures["tokens decoded a second"] = float(batch.says.sum()) / min(event.stats["rollout_seconds"] for event in events)
    result.checks["sampler and policy agree"] = mismatch <= MISMATCH[dtype]
    result.checks["completions are whole"] = bool((batch.says.sum(dim=1) == algorithm.harvester.max_new_tokens).all())
    if result.algorithm == "grpo":
        result.checks["no group is dead"] = all(event.stats["dead_groups"] == 0 for event in events)
    else:
        result.figures |= {name: events[-1].stats[name] for name in ("value_loss", "explained_variance", "update_kl")}
        result.checks["ratios begin at 1"] = events[0].stats["clip_fraction"] <= 0.01 and events[0].stats["value_clip_fraction"] == 0


def voiced(roles: Roles, role: str, batch: Batch) -> Tensor:
    """What a role says of rows, without a graph: scores (B,), or log-probs (B, T)."""
    with roles.quiet():
        return roles.last_scores(role, batch) if role in roles.heads else roles.logps(role, batch).logps


def sharing_check(roles: Roles, role: str, algorithm: Algorithm, micro: Batch, dtype: torch.dtype, result: Result) -> None:
    """A pair's prompt goes through the model once, and what comes out is what comes out of whole rows."""
    tree = roles._tree(micro)
    result.checks["prompts are shared"] = tree is not None
    if tree is None:
        return
    result.figures["share of the rows' slots"] = tree.ids.numel() / micro.ids.numel()
    micro.weight = algorithm.weigh(micro)
    said, gradients = [], []
    for roles.share in (False, True):
        said.append(voiced(roles, role, micro))
        for term in algorithm.terms(micro):
            term.loss.backward()  # type: ignore[no-untyped-call]
        gradients.append(torch.cat([parameter.grad.flatten().float() for parameter in roles.parameters(role) if parameter.grad is not None]))
        for parameter in roles.parameters(role):
            parameter.grad = None
    difference = (said[0] - said[1]).abs()
    apart = float(difference.mean() if said[0].ndim == 1 else difference[micro.scored].mean())
    bent = float(torch.linalg.vector_norm(gradients[0] - gradients[1]) / torch.linalg.vector_norm(gradients[0]))
    result.figures |= {"shared against whole, mean": apart, "shared against whole, gradient": bent}
    result.checks["shared prompts change nothing"] = apart <= SHARED_LOGPS[dtype] and bent <= SHARED_GRADIENT[dtype]


def survives_saving(base: Base, roles: Roles, names: Sequence[str], batch: Batch) -> bool:
    """Adapters and heads through files into roles that were made anew: what they say is the same bit for bit. Releases the roles."""
    said, tensors = [voiced(roles, name, batch) for name in names], [roles.adapter_tensors(name) for name in names]
    roles.release()
    again, good = make_roles(base, names, checkpointing=False, seed=1), True
    for name, before, saved in zip(names, said, tensors, strict=True):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "adapter_model.safetensors"
            save_file(saved, file)
            good &= not torch.equal(voiced(again, name, batch), before)
            again.load_adapter_tensors(name, load_file(file), str(file))
        back = again.adapter_tensors(name)
        good &= all(torch.equal(back[key], tensor) for key, tensor in saved.items()) and torch.equal(voiced(again, name, batch), before)
        good &= name not in HEADS or saved[HEAD_KEY].dtype == torch.float32
    again.release()
    return good


def four_bit(layer: nn.Module) -> bool:
    """Whether every linear below a LoRA layer is `Linear4bit` in NF4, double-quantised."""
    linears = [module.base_layer for module in layer.modules() if hasattr(module, "base_layer")]
    states = [getattr(linear.weight, "quant_state", None) for linear in linears]
    return bool(states) and all(state is not None and state.quant_type == "nf4" and state.nested for state in states)


@torch.no_grad()
def logits_check(roles: Roles, role: str, batch: Batch, figures: dict[str, float]) -> dict[str, bool]:
    """The head's logits against an fp32 product of the same numbers, on 8 positions and the first 4,096 words."""
    one = batch.take(torch.tensor([0])).to(roles.base.device)
    with roles.quiet():
        hidden = roles.hidden(role, one)[0, :8]
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


def work(base: Base, roles: Roles, role: str, micros: list[Batch], checkpointing: bool) -> float:
    """Floating-point operations that the model's matrix products take for these micro-batches; padding and recomputation counted, a shared
    prompt once.

    A frozen linear is run forward, perhaps again, and backward for its input only: 2 or 3 products; an adapter has one more, for its own
    gradient. Attention is counted as causal, its backward twice its forward. The head sees scored positions only, twice.
    """
    config = base.model.config
    linears = [module for module in base.model.get_decoder().modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    linear = sum(module.in_features * module.out_features for module in linears)
    adapter = sum(parameter.numel() for name, parameter in roles.named_parameters(role).items() if "lora_" in name)
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    forwards, total = 1 + checkpointing, 0.0
    for part in micros:
        tree = roles._tree(part)
        rows, length = part.ids.shape if tree is None else tree.ids.shape
        attention = (forwards + 2) * 2.0 * length * width * config.num_hidden_layers
        total += rows * length * (2.0 * (forwards + 1) * linear + 2.0 * (forwards + 2) * adapter + attention)
        if role not in HEADS:
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
    reset_peak(device)
    building = time.perf_counter()
    config = AutoConfig.for_model(**shape, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    base = freeze(build_model(config, device), tokenizer=None, name="random", bits=4)
    synchronise(device)
    machine |= {"seconds to build": time.perf_counter() - building, "peak GiB while building": peak_gib(device)}
    results = []
    for name in options.algorithms or ALGORITHMS:
        for checkpointing in {"on": [True], "off": [False], "both": [True, False]}[options.checkpointing]:
            # All stand on one base, one after the other. Where activations are kept, a pair at most goes through at once.
            here = size if checkpointing else replace(size, micro=min(size.micro, 2))
            result = smoke(name, base, here, checkpointing)
            if "teraflop/s" in result.figures:
                result.figures["share of the roof"] = result.figures["teraflop/s"] / float(machine["roof TFLOP/s"])
            if cap is not None:
                result.checks["peak is under the cap"] = result.figures.get("peak GiB", math.inf) <= cap
            results.append(result)
    machine["seconds in all"] = time.perf_counter() - begun
    print_results(machine, results, "tiny" if options.tiny else options.shape, size)
    if options.json:
        document = {"machine": machine, "size": asdict(size), "results": [asdict(result) for result in results]}
        Path(options.json).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0 if all(all(result.checks.values()) for result in results) else 1


def print_results(machine: dict[str, Any], results: list[Result], shape: str, size: Size) -> None:
    print(f"{shape}, NF4, random weights; {size.rows} rows of at most {size.length} tokens a step, {size.micro} at once, 2 where activations "
          "are kept")  # fmt: skip
    print("; ".join(f"{name} {show(value)}" for name, value in machine.items() if value is not None))
    for result in results:
        print(f"\n{result.algorithm}, checkpointing {'on' if result.checkpointing else 'off'}")
        for name, value in result.figures.items():
            print(f"  {name:<38} {show(value):>14}")
        for name, held in result.checks.items():
            print(f"  {name:<38} {'yes' if held else 'NO':>14}")


def show(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2e}" if value and abs(value) < 1e-3 else f"{value:,.3f}" if abs(value) < 100 else f"{value:,.0f}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("smoke", help="a few steps of each algorithm on a 7-8B shape")
    command.add_argument("algorithms", nargs="*", help=f"which ones; all where none is named: {', '.join(ALGORITHMS)}")
    command.add_argument("--tiny", action="store_true", help="a tiny shape on the CPU, in fp32")
    command.add_argument("--shape", choices=[name for name in SHAPES if name != "tiny"], default="llama-3.1-8b")
    command.add_argument("--checkpointing", choices=("on", "off", "both"), default="both", help="recompute activations")
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
