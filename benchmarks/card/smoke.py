"""A few steps of one algorithm on the card, and everything that must hold of them."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from card import course
from card.machine import free
from card.made import STEPS, Size, Train, random_rows
from card.makers import ALGORITHMS, HEADS, ONLINE, PAIRED, TRAINED, make_roles
from card.work import work
from lowrank_tune.errors import RunFailed
from lowrank_tune.events import StepDone
from lowrank_tune.model.base import Base, base_hashes
from lowrank_tune.model.heads import KEY as HEAD_KEY
from lowrank_tune.model.logps import Head
from lowrank_tune.model.roles import Roles
from lowrank_tune.types import Algorithm, Batch

TIMED = STEPS - 2
"""Steps between the first and the last, which also measure KL and movement."""
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


@dataclass
class Result:
    """What one algorithm did. `checks` are all true where the kit does what it promises."""

    algorithm: str
    checkpointing: bool = True
    checks: dict[str, bool] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)


def smoke(name: str, base: Base, size: Size, checkpointing: bool = True) -> Result:
    """Four steps of one algorithm with the kit's own loop and roles, on the same rows, and everything that must hold of them."""
    result, device, model = Result(name, checkpointing), base.device, base.model
    checks, figures, dtype = result.checks, result.figures, model.dtype
    layers = list(model.get_decoder().layers)
    before = [base_hashes(layer) for layer in (layers[0], layers[-1])]
    trained, together = TRAINED.get(name, ("policy",)), 2 if name in PAIRED else 1
    role, roles = trained[0], make_roles(base, trained, checkpointing)
    parameters = [parameter for each in trained for parameter in roles.parameters(each)]
    start = [parameter.detach().clone() for parameter in parameters]
    algorithm = ALGORITHMS[name](roles, lambda step: random_rows(size, model.config.vocab_size, together), size)
    batch = algorithm.collect(0).batch
    free(device)
    try:
        ran = course.run(algorithm, roles, parameters, Train(micro_batch_size=size.micro // together), STEPS)
    except RunFailed as fault:
        print(f"{name}: {fault}", file=sys.stderr)
        checks["ran, with the right reference"] = False
        roles.release()
        return result
    events, timed = ran.events, slice(1, -1)
    figures["peak GiB"] = ran.peak
    seconds, collected, forwards = sum(ran.updating[timed]), sum(ran.collecting[timed]), sum(ran.forwards[timed])
    micros = list(batch.split(size.micro, together=together))
    losses = [event.stats["loss"] for event in events]
    checks["ran, with the right reference"] = True
    checks["memory sufficed"] = ran.short == 0
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
    figures |= {"loss at first step": losses[0], "loss at last step": losses[-1], "seconds a step": (seconds + collected) / TIMED,
                "tokens a second": tokens / seconds, "teraflop/s": done / seconds / 1e12,
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
