"""A few steps of one algorithm, and everything that must hold of them."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gpu_proof import measured_run
from gpu_proof.factories import ALGORITHMS, GENERATIVE, HEADS, PAIRED, TRAINED_ROLES, make_roles, randomize_b
from gpu_proof.machine import best_seconds, release_unused
from gpu_proof.measured_run import MeasuredRun
from gpu_proof.records import Record
from gpu_proof.synthetic import STEPS, Size, TrainSettings, ragged_rows
from gpu_proof.workload import flops
from lowrank_tune.algorithms.base import Algorithm
from lowrank_tune.batch import Batch
from lowrank_tune.errors import TrainingError
from lowrank_tune.events import StepEnd
from lowrank_tune.model.base import Base, base_hashes
from lowrank_tune.model.heads import HEAD_WEIGHT_KEY as HEAD_KEY
from lowrank_tune.model.logprobs import Head
from lowrank_tune.model.roles import Roles

TIMED = STEPS - 2
"""Steps between the first and the last, which also measure KL and movement."""
FP32_LOGITS_ERROR = 2e-4
"""Largest relative error of logits that left the matrix product in fp32. Rounded to bf16 it would be about 2e-3."""
SHARED_LOGPS_ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Nats by which a shared prompt may move the log-prob of a token in the mean, or a score. Other kernels and batch
shapes alone move bf16: 0.04 to 0.05 on an H200, over 32 layers of random weights. A wrong mask moves it by more than
1."""
SHARED_GRADIENT_ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.15}
"""The same for the gradient, relative: 0.03 to 0.08 there."""
LN2_ERROR = {torch.float32: 1e-5, torch.bfloat16: 0.05}
"""Distance of the first loss of DPO and of a new reward model from ln 2."""
SAMPLING_ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Mean difference in nats between a token's log-prob in the sampler and in the policy: decoding has other batch shapes.
0.04 to 0.06 on an H200, over 32 layers of random weights."""
ZERO_KL = {torch.float32: 1e-6, torch.bfloat16: 1e-3}
"""KL of a policy that is its reference, where the two ran in other batch shapes: half the square of such a
difference."""


@dataclass
class CheckResult:
    """What one algorithm did. All `checks` are true where the kit works as documented."""

    algorithm: str
    checkpointing: bool = True
    checks: dict[str, bool] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    error: str | None = None

    @property
    def failed(self) -> list[str]:
        return [name for name, passed in self.checks.items() if not passed]

    def record(self) -> Record:
        return {"kind": "checks", **asdict(self)}


def check_algorithm(name: str, base: Base, size: Size, checkpointing: bool = True) -> CheckResult:
    """Run four steps of one algorithm with the kit's own loop and roles, on the same rows, and check what must hold."""
    result, device, model = CheckResult(name, checkpointing), base.device, base.model
    checks, figures, dtype = result.checks, result.figures, model.dtype
    layers = list(model.get_decoder().layers)
    hashes = [base_hashes(layer) for layer in (layers[0], layers[-1])]
    trained, together = TRAINED_ROLES.get(name, ("policy",)), 2 if name in PAIRED else 1
    role, roles = trained[0], make_roles(base, trained, checkpointing)
    parameters = [parameter for each in trained for parameter in roles.parameters(each)]
    start = [parameter.detach().clone() for parameter in parameters]
    algorithm = ALGORITHMS[name](roles, lambda step: ragged_rows(size, model.config.vocab_size, together), size)
    release_unused(device)
    try:
        run = measured_run.run(algorithm, roles, parameters, TrainSettings(size.micro // together), STEPS)
    except TrainingError as error:
        result.error = str(error)
        checks["runs, with the right reference"] = False
        roles.unload_adapters()
        return result
    batch, losses = run.batches[0], [event.stats["loss"] for event in run.events]
    micro_batches = list(batch.split(size.micro, rows_per_unit=together))
    figures["peak_gib"] = run.peak_gib
    checks["runs, with the right reference"] = True
    checks["fits into memory"] = run.out_of_memory == 0
    checks["loss is finite"] = all(math.isfinite(loss) for loss in losses)
    if name in GENERATIVE:
        check_rollouts(algorithm, run, dtype, result)
    else:
        checks["loss falls"] = losses[-1] < losses[0]
    checks["adapters are fp32"] = all(parameter.dtype == torch.float32 for parameter in parameters)
    changed = [bool((now != before).any()) for now, before in zip(parameters, start, strict=True)]
    checks["adapters changed"] = all(changed)
    checks["base is unchanged"] = hashes == [base_hashes(layer) for layer in (layers[0], layers[-1])]
    passes = TIMED * len(micro_batches) * len(layers) * len(trained)
    forwards = sum(run.layer_forwards[1:-1])
    checks["layers were recomputed" if checkpointing else "layers ran once"] = forwards == (1 + checkpointing) * passes
    checks["linears are 4-bit"] = is_four_bit(layers[0])
    check_kl(name, run.events, dtype, result)
    if name in PAIRED:
        checks["loss starts at ln 2"] = abs(losses[0] - math.log(2)) <= LN2_ERROR[dtype]
        check_prefix_sharing(roles, role, algorithm, micro_batches[0].to(device), dtype, result)
    check_logits(roles, role, batch, result)
    seconds = sum(run.update_seconds[1:-1])
    step_flops = sum(flops(base, roles, each, micro_batches, checkpointing) for each in trained)
    figures |= {
        "loss_first_step": losses[0],
        "loss_last_step": losses[-1],
        "seconds_per_step": (seconds + sum(run.collect_seconds[1:-1])) / TIMED,
        "update_tokens_per_second": TIMED * int(batch.attention_mask.sum()) / seconds,
        "update_tflops": TIMED * step_flops / seconds / 1e12,
        "layer_forwards_per_pass": forwards / passes,
    }
    checks["saved and reloaded, it computes the same"] = survives_saving(
        base, roles, trained, micro_batches[0].to(device)
    )
    return result


def check_kl(name: str, events: Sequence[StepEnd], dtype: torch.dtype, result: CheckResult) -> None:
    """The policy starts as its reference and then moves away from it."""
    if "kl" not in events[0].stats:
        return
    first, last = events[0].stats["kl"], events[-1].stats["kl"]
    result.figures["kl_last_step"] = last
    result.checks["policy starts at the base (KL 0)"] = abs(first) <= (ZERO_KL[dtype] if name in GENERATIVE else 1e-6)
    result.checks["KL is positive after training"] = last > 0


def check_rollouts(algorithm: Any, run: MeasuredRun, dtype: torch.dtype, result: CheckResult) -> None:
    """Completions have their full length, rewards differ, and the sampler's log-probs are the policy's."""
    batch, events = run.batches[0], run.events
    mismatch = max(event.stats["sampling/sampling_logp_difference/mean"] for event in events)
    seconds = min(event.stats["rollout_seconds"] for event in events)
    result.figures |= {
        "sampling_logp_difference": mismatch,
        "entropy": events[0].stats["entropy"],
        "rollout_tokens_per_second": float(batch.completion_mask.sum()) / seconds,
    }
    result.checks["sampler and policy agree"] = mismatch <= SAMPLING_ERROR[dtype]
    lengths = batch.completion_mask.sum(dim=1)
    result.checks["completions have full length"] = bool((lengths == algorithm.collector.max_new_tokens).all())
    if result.algorithm == "grpo":
        result.checks["no group has zero std"] = all(event.stats["frac_reward_zero_std"] == 0 for event in events)
        return
    result.figures |= {name: events[-1].stats[name] for name in ("value_loss", "explained_variance", "approx_kl")}
    first = events[0].stats
    result.checks["ratios start at 1"] = first["clip_ratio"] <= 0.01 and first["value_clip_ratio"] == 0


def outputs(roles: Roles, role: str, batch: Batch) -> Tensor:
    """Return what a role computes for rows, without a graph: scores (B,), or log-probs (B, T)."""
    with roles.inference_mode():
        return roles.sequence_scores(role, batch) if role in roles.heads else roles.logps(role, batch).logps


def check_prefix_sharing(
    roles: Roles, role: str, algorithm: Algorithm[Any], batch: Batch, dtype: torch.dtype, result: CheckResult
) -> None:
    """A pair's prompt runs through the model once, with a mask and as segments of one packed row, and outputs and
    gradient are those of whole rows. Times all three ways."""
    tree = roles.decoder.pack(batch)
    result.checks["prompts are shared"] = tree is not None
    if tree is None:
        return
    result.figures["shared_slots_share"] = tree.input_ids.numel() / batch.input_ids.numel()
    batch.token_weights = algorithm.token_weights(batch)
    # Training on random pairs drives the loss of DPO to 0, where no gradient is left to compare.
    randomize_b(roles, role)
    parameters = roles.parameters(role)

    def update() -> None:
        for parameter in parameters:
            parameter.grad = None
        for term in algorithm.compute_losses(batch):
            term.loss.backward()  # type: ignore[no-untyped-call]

    computed, gradients, seconds = [], [], []
    # False if the start-up comparison disabled it.
    packs_rows = roles.decoder.packed_rows.enabled
    for share, pack in ((False, False), (True, False), (True, packs_rows)):
        roles.decoder.share_prefixes, roles.decoder.packed_rows.enabled = share, pack
        computed.append(outputs(roles, role, batch))
        seconds.append(best_seconds(update, 1, roles.base.device, rounds=2))
        kept = [parameter.grad.flatten().float() for parameter in parameters if parameter.grad is not None]
        gradients.append(torch.cat(kept))
    for parameter in parameters:
        parameter.grad = None
    differences = [(computed[0] - other).abs() for other in computed[1:]]
    output_error = max(float(d.mean() if d.ndim == 1 else d[batch.loss_mask].mean()) for d in differences)
    norm = torch.linalg.vector_norm
    gradient_error = max(float(norm(gradients[0] - other) / norm(gradients[0])) for other in gradients[1:])
    result.figures |= {
        "sharing_output_difference": output_error,
        "sharing_gradient_difference": gradient_error,
        "update_seconds_whole_rows": seconds[0],
        "update_seconds_shared": seconds[1],
        "update_seconds_packed": seconds[2],
    }
    equal = output_error <= SHARED_LOGPS_ERROR[dtype] and gradient_error <= SHARED_GRADIENT_ERROR[dtype]
    result.checks["shared prompts change nothing"] = equal


def survives_saving(base: Base, roles: Roles, names: Sequence[str], batch: Batch) -> bool:
    """Return whether adapters and heads, saved and loaded into new roles, compute the same bit for bit. Releases the
    roles."""
    computed = [outputs(roles, name, batch) for name in names]
    tensors = [roles.adapter_tensors(name) for name in names]
    roles.unload_adapters()
    reloaded, equal = make_roles(base, names, checkpointing=False, seed=1), True
    for name, before, saved in zip(names, computed, tensors, strict=True):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "adapter_model.safetensors"
            save_file(saved, file)
            equal &= not torch.equal(outputs(reloaded, name, batch), before)
            reloaded.load_adapter_tensors(name, load_file(file), str(file))
        loaded = reloaded.adapter_tensors(name)
        equal &= all(torch.equal(loaded[key], tensor) for key, tensor in saved.items())
        equal &= torch.equal(outputs(reloaded, name, batch), before)
        equal &= name not in HEADS or saved[HEAD_KEY].dtype == torch.float32
    reloaded.unload_adapters()
    return equal


def is_four_bit(layer: nn.Module) -> bool:
    """Return whether every linear below a LoRA layer is `Linear4bit` in NF4, double-quantized."""
    linears = [module.base_layer for module in layer.modules() if hasattr(module, "base_layer")]
    states = [getattr(linear.weight, "quant_state", None) for linear in linears]
    return bool(states) and all(state is not None and state.quant_type == "nf4" and state.nested for state in states)


@torch.no_grad()
def check_logits(roles: Roles, role: str, batch: Batch, result: CheckResult) -> None:
    """Compare the head's logits with a product of higher precision, on 8 positions and the first 4,096 tokens of the
    vocabulary."""
    row = batch.select_rows(torch.tensor([0])).to(roles.base.device)
    with roles.inference_mode():
        hidden = roles.hidden(role, row)[0, :8]
    weight = roles.head.weight[:4096]
    logits = Head(weight).logits(hidden)
    exact = hidden.float() @ weight.float().T
    if hidden.is_cuda:
        exact = hidden.double() @ weight.double().T  # a setting of the process could reduce the fp32 product to TF32
    norm = torch.linalg.vector_norm
    error = float(norm(logits.double() - exact.double()) / norm(exact.double()))
    rounded = float(norm(exact.bfloat16().double() - exact.double()) / norm(exact.double()))
    result.figures |= {"logits_error": error, "logits_error_if_bf16": rounded}
    result.checks |= {
        "logits are fp32": logits.dtype == torch.float32,
        "logits left the product in fp32": error < FP32_LOGITS_ERROR,
    }
