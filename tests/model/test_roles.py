"""Properties of roles: without adapters the base is unchanged, training changes only the trained adapter, and
recomputation uses the adapters of the forward pass.

A test named `..._is_found` plants a bug, and shows that the check of the test before it fails.
"""

from __future__ import annotations

import gc
import inspect
import json
import textwrap
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    CPU,
    TOKENIZER,
    LoraConfig,
    all_tensors,
    changed_tensors,
    count_forwards,
    gradients,
    llama_roles,
    load_base_of,
    make_batch,
    perturb,
    ragged_batch,
    relative_error,
    roles_over,
    same_bytes,
    sft_over,
    unquantized_base,
    use_plain_paths,
    with_token_weights,
    write_files,
    zero_grad,
)
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from lowrank_tune.batch import Batch
from lowrank_tune.config import AdapterConfig, BaseConfig
from lowrank_tune.errors import UserError
from lowrank_tune.model import roles as roles_module
from lowrank_tune.model.adapters import CONFIG, WEIGHTS, lora_config, read_adapter
from lowrank_tune.model.base import Base, base_hashes, load_base
from lowrank_tune.model.roles import Roles


def logits(model: Any, batch: Batch, train: bool) -> Tensor:
    model.train(train)
    try:
        with torch.no_grad():
            return model(input_ids=batch.input_ids, use_cache=False).logits  # type: ignore[no-any-return]
    finally:
        model.train()


def train(roles: Roles, steps: int = 2, rate: float = 1e-2, role: str = "policy") -> None:
    """Runs a few optimizer steps of SFT, as the trainer does."""
    optimizer = torch.optim.AdamW(roles.parameters(role), lr=rate)
    algorithm = sft_over(roles)
    for step in range(steps):
        for micro in with_token_weights(algorithm, algorithm.collect(step).batch).split(3):
            for term in algorithm.compute_losses(micro):
                term.loss.backward()
        optimizer.step()
        zero_grad(roles)


# --- 1: adapters off equals the bare model ----------------------------------------------------------------------------


Fault = Callable[[Roles], None]
"""Changes roles as a bug would."""


def off_equals_bare(bits: int, train_mode: bool, then: str, fault: Fault | None = None, dropout: float = 0.1) -> bool:
    """Returns whether `base` has the logits of a model that never had an adapter, bit for bit, and a fresh policy those
    of the stack below it. `then` is what happened to the policy before: fresh, trained or loaded."""
    bare, batch = load_base_of(bits), ragged_batch()
    expected = logits(bare.model, batch, train_mode)
    roles = llama_roles(bits, lower=["sft"], dropout=dropout)
    perturb(roles, "sft")
    if fault is not None:
        fault(roles)
    if then == "fresh":
        # With dropout: the B of a fresh adapter is zero and hides its own dropout.
        with roles.activate("policy"), torch.no_grad():
            mine = logits(roles.base.model, batch, train_mode)
        with roles.activate("reference"):
            below = logits(roles.base.model, batch, train_mode)
        if not torch.equal(mine, below) or torch.equal(mine, expected):
            return False
    elif then == "trained":
        train(roles)
    else:
        load_random_policy(roles)
    with roles.activate("base"):
        return torch.equal(logits(roles.base.model, batch, train_mode), expected)


def load_random_policy(roles: Roles) -> None:
    tensors = {key: torch.randn_like(tensor) for key, tensor in roles.adapter_tensors("policy").items()}
    roles.load_adapter_tensors("policy", tensors, "here")


@pytest.mark.parametrize("then", ["fresh", "trained", "loaded"])
@pytest.mark.parametrize("train_mode", [False, True])
@pytest.mark.parametrize("bits", [4, 16])
def test_base_role_equals_bare_model(bits: int, train_mode: bool, then: str) -> None:
    """With no adapter active the logits are those of a model without adapters, bit for bit, also in train mode with
    dropout."""
    assert off_equals_bare(bits, train_mode, then)


def _base_keeps_the_lower_adapter(roles: Roles) -> None:
    activate = roles.activate
    roles.activate = lambda role: activate("reference" if role == "base" else role)  # type: ignore[method-assign]


def _dropout_of_frozen_adapters(roles: Roles) -> None:
    for layer in roles.lora_layers:
        for dropout in layer.lora_dropout.values():
            dropout.p = 0.5


def _switched_by_peft(roles: Roles) -> None:
    """PEFT's own switch gives each layer a list of its own, so that `activate` does not reach it. Only PEFT's forward
    reads it."""
    use_plain_paths(roles)
    for layer in roles.lora_layers:
        layer.set_adapter(["lt_sft", "lt_policy"])


def _switched_by_peft_after_each_load(roles: Roles) -> None:
    load = roles.load_adapter_tensors

    def load_and_switch(name: str, tensors: Any, where: str) -> None:
        load(name, tensors, where)
        _switched_by_peft(roles)

    roles.load_adapter_tensors = load_and_switch  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("fault", "then"),
    [
        (_base_keeps_the_lower_adapter, "trained"),
        (_dropout_of_frozen_adapters, "fresh"),
        (_switched_by_peft, "trained"),
        (_switched_by_peft_after_each_load, "loaded"),
    ],
)
def test_adapter_that_stays_active_in_the_base_is_found(fault: Fault, then: str) -> None:
    """`off_equals_bare` finds an adapter or a dropout that is still applied."""
    assert not off_equals_bare(4, True, then, fault)


def test_load_restores_the_switch_that_peft_replaced() -> None:
    """`load_adapter_tensors` may call code of PEFT that gives layers lists of their own. It restores the shared one."""
    assert off_equals_bare(4, True, "loaded", _switched_by_peft)


def test_all_layers_have_the_active_stack_after_a_load() -> None:
    """After a load every layer follows `activate`."""
    roles = llama_roles(lower=["sft"])
    _switched_by_peft(roles)
    load_random_policy(roles)
    for role, stack in {"policy": ["lt_sft", "lt_policy"], "reference": ["lt_sft"], "base": []}.items():
        with roles.activate(role):
            assert all(layer.active_adapters == stack for layer in roles.lora_layers)


@pytest.mark.parametrize(
    ("kind", "dropouts"),
    [
        ("granite", {"attention_dropout": 0.5}),
        ("gpt2", {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}),
        ("gpt_neox", {"attention_dropout": 0.5, "hidden_dropout": 0.5}),
    ],
)
def test_dropout_of_the_base_is_off(kind: str, dropouts: dict[str, float]) -> None:
    """Dropout of a base is off in train mode, also where it is a number of the module and not an nn.Dropout (Granite
    3.0)."""
    model = unquantized_base(kind, **dropouts).model
    assert torch.equal(logits(model, ragged_batch(), True), logits(model, ragged_batch(), True))


def test_base_hash_does_not_depend_on_adapters() -> None:
    """The hashes of the base are the same before and after adapters are added."""
    base = load_base_of()
    before = base_hashes(base.model)
    roles = roles_over(base, lower=["sft"])
    assert base_hashes(roles.base.model) == before and len(before) > 15


# --- 2: training moves the policy and nothing else --------------------------------------------------------------------


def wrong_after_training(roles: Roles) -> list[str]:
    """Returns what training the policy changed and should not have: bytes, hashes, gradients, `requires_grad`. Empty is
    right."""
    before, hashes = all_tensors(roles.base.model), base_hashes(roles.base.model)
    is_trainable = {name: p.requires_grad for name, p in roles.base.model.named_parameters()}
    algorithm = sft_over(roles)
    optimizer = torch.optim.AdamW(
        [p for p in roles.base.model.parameters() if p.is_floating_point()], lr=1e-2, weight_decay=0.1
    )
    wrong: list[str] = []
    for step in range(2):
        batch = with_token_weights(algorithm, algorithm.collect(step).batch)
        roles.logps("reference", batch)
        roles.full_vocab_kl("policy", "reference", batch)
        with roles.activate("base"), roles.activate("policy"):
            pass
        for term in algorithm.compute_losses(batch):
            term.loss.backward()
        for name, parameter in roles.base.model.named_parameters():
            if parameter.grad is not None and ".lt_policy." not in name:
                wrong.append(f"gradient of {name}")
            if parameter.grad is None and ".lt_policy." in name:
                wrong.append(f"no gradient of {name}")
        optimizer.step()
        zero_grad(roles)
    moved = changed_tensors(before, all_tensors(roles.base.model))
    wrong += [f"bytes of {n}" for n in moved if ".lt_policy." not in n]
    wrong += [f"still {n}" for n in before if ".lt_policy." in n and n not in moved]
    wrong += [f"hash of {n}" for n in changed_hashes(hashes, base_hashes(roles.base.model))]
    for name, parameter in roles.base.model.named_parameters():
        if parameter.requires_grad != is_trainable[name]:
            wrong.append(f"requires_grad of {name}")
    return wrong


def changed_hashes(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


@pytest.mark.parametrize("bits", [4, 16])
def test_training_changes_only_the_policy(bits: int) -> None:
    """Training changes the bytes of the policy, and no byte, hash, gradient or `requires_grad` of anything else."""
    roles = llama_roles(bits, lower=["sft"], extra=["value"], checkpointing=True, dropout=0.1)
    perturb(roles, "sft", "value")
    assert wrong_after_training(roles) == []


def _switch_changes_requires_grad(roles: Roles) -> None:
    """As PEFT's own switch: the active adapters become trainable, and the others frozen."""
    activate = roles.activate

    def activate_and_train(role: str) -> Any:
        stack = [] if role == "base" else roles.stacks[role]
        for key, parameter in roles.base.model.named_parameters():
            if "lora_" in key:
                parameter.requires_grad_(any(f".{name}." in key for name in stack))
        return activate(role)

    roles.activate = activate_and_train  # type: ignore[method-assign]


def _whole_stack_is_trainable(roles: Roles) -> None:
    for key, parameter in roles.base.model.named_parameters():
        parameter.requires_grad_(any(f".{name}." in key for name in roles.stacks["policy"]))


@pytest.mark.parametrize("fault", [_switch_changes_requires_grad, _whole_stack_is_trainable])
def test_wrong_requires_grad_is_found(fault: Fault) -> None:
    """`wrong_after_training` finds a switch that changes `requires_grad`, and a trainable lower adapter."""
    roles = llama_roles(lower=["sft"])
    perturb(roles, "sft")
    fault(roles)
    assert wrong_after_training(roles) != []


def test_changed_base_is_found() -> None:
    """`wrong_after_training` finds a base that changes by 1e-6, by its bytes and by its hash."""
    roles = llama_roles()
    layer = roles.base.model.get_decoder().layers[1]

    def write_a_little(*_: Any) -> None:
        layer.input_layernorm.weight.data.add_(1e-6)

    handle = layer.register_forward_hook(write_a_little)
    try:
        assert {wrong.split()[0] for wrong in wrong_after_training(roles)} == {"bytes", "hash"}
    finally:
        handle.remove()


# --- exceptions restore everything ------------------------------------------------------------------------------------


class Interruption(Exception):
    pass


def wrong_after_exceptions(roles: Roles) -> list[str]:
    """Returns what exceptions inside nested roles leave changed. Empty is right."""
    before = {name: p.requires_grad for name, p in roles.base.model.named_parameters()}
    wrong: list[str] = []

    def check(what: str, stack: Sequence[str], training: bool) -> None:
        if roles.active_stack != stack:
            wrong.append(f"{what}: {roles.active_stack} is active")
        if {module.training for module in roles.base.model.modules()} != {training}:
            wrong.append(f"{what}: train mode")
        if torch.is_grad_enabled() != training:
            wrong.append(f"{what}: grad mode")

    with suppress(Interruption), roles.activate("policy"):
        with suppress(Interruption), roles.activate("reference"), roles.inference_mode():
            with suppress(Interruption), roles.inference_mode(), roles.activate("base"):
                check("innermost", [], False)
                raise Interruption
            check("inside", roles.stacks["reference"], False)
            raise Interruption
        check("outer", roles.stacks["policy"], True)
        raise Interruption
    check("after", [], True)
    # A role that is entered again while it is active, as by a second backward pass within the first.
    again = roles.activate("policy")
    with again, roles.activate("reference"):
        with again:
            check("again", roles.stacks["policy"], True)
        check("after again", roles.stacks["reference"], True)
    check("after all", [], True)

    def broken(*_: Any) -> None:
        raise Interruption

    handle = roles.base.model.get_decoder().layers[1].register_forward_pre_hook(broken)
    for call in (
        lambda: roles.logps("policy", ragged_batch()),
        lambda: roles.full_vocab_kl("policy", "reference", ragged_batch()),
    ):
        with suppress(Interruption):
            call()
        check("forward", [], True)
    handle.remove()
    wrong += [f"requires_grad of {n}" for n, p in roles.base.model.named_parameters() if p.requires_grad != before[n]]
    return wrong


def test_exceptions_restore_roles_and_modes() -> None:
    """After an exception the active stack, the train mode, grad mode and `requires_grad` are those of before."""
    assert wrong_after_exceptions(llama_roles(lower=["sft"])) == []


class _ActiveUntil(AbstractContextManager[None]):
    """Activates a role. Wrong on exit: if `base_is_left`, no adapter is active afterwards; else the role stays active
    after an exception."""

    def __init__(self, activate: Any, role: str, base_is_left: bool) -> None:
        self.activate, self.active, self.base_is_left = activate, activate(role), base_is_left

    def __enter__(self) -> None:
        self.active.__enter__()

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if self.base_is_left:
            self.active.__exit__(kind, *rest)
            self.activate("base").__enter__()
        elif kind is None:
            self.active.__exit__(kind, *rest)


def _exit_to_the_base(roles: Roles) -> None:
    activate = roles.activate
    roles.activate = lambda role: _ActiveUntil(activate, role, base_is_left=True)  # type: ignore[method-assign]


def _no_exit_after_an_exception(roles: Roles) -> None:
    activate = roles.activate
    roles.activate = lambda role: _ActiveUntil(activate, role, base_is_left=False)  # type: ignore[method-assign]


def _no_train_mode_after_an_exception(roles: Roles) -> None:
    @contextmanager
    def inference_mode() -> Iterator[None]:
        roles.base.model.eval()
        with torch.no_grad():
            yield
        roles.base.model.train()

    roles.inference_mode = inference_mode  # type: ignore[method-assign]


def _train_mode_after_inner_inference_mode(roles: Roles) -> None:
    @contextmanager
    def inference_mode() -> Iterator[None]:
        roles.base.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            roles.base.model.train()

    roles.inference_mode = inference_mode  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "fault",
    [
        _exit_to_the_base,
        _no_exit_after_an_exception,
        _no_train_mode_after_an_exception,
        _train_mode_after_inner_inference_mode,
    ],
)
def test_state_that_is_not_restored_is_found(fault: Fault) -> None:
    """`wrong_after_exceptions` finds contexts that restore too little, or to a fixed state."""
    roles = llama_roles(lower=["sft"])
    fault(roles)
    assert wrong_after_exceptions(roles) != []


# --- 3: gradient checkpointing ----------------------------------------------------------------------------------------

STACKS = {"policy": ["policy"], "value": ["value"], "reference": []}
DEEP = {"policy": ["sft", "policy"], "value": ["sft", "value"], "reference": ["sft"]}


def some_gradients(
    bits: int,
    stacks: dict[str, list[str]],
    roles_used: Sequence[str],
    checkpointing: bool,
    enable: Fault | None = None,
) -> tuple[Tensor, int, int]:
    """Returns the gradients of one joint backward pass of the used roles *while another role of the same depth is
    active*, and how often a layer ran before that pass and in all. `enable` turns checkpointing on instead of `Roles`.
    """
    lower = sorted({name for stack in stacks.values() for name in stack} - {"policy", "value"})
    roles = roles_over(
        load_base_of(bits),
        lower=lower,
        extra=["value"],
        trainable=["policy", "value"],
        stacks=stacks,
        checkpointing=checkpointing and enable is None,
    )
    if checkpointing and enable is not None:
        enable(roles)
    perturb(roles, "policy", seed=1)
    perturb(roles, "value", seed=2)
    perturb(roles, *lower, seed=3)
    batch = ragged_batch()
    with count_forwards(roles) as count:
        loss = sum((index + 1) * roles.logps(role, batch).logps.sum() for index, role in enumerate(roles_used))
        forward = count[0]
        with roles.activate("value" if roles_used[-1] == "policy" else "policy"):
            loss.backward()  # type: ignore[union-attr]
    found = [gradients(roles, role) for role in roles_used]
    assert roles.active_stack == []
    return torch.cat(found), forward, count[0]


def error_of_checkpointing(
    bits: int, stacks: dict[str, list[str]], roles_used: Sequence[str], enable: Fault | None = None
) -> float:
    """Returns the relative difference of the gradients with and without checkpointing; infinite if a layer ran another
    number of times than once, or twice with checkpointing."""
    plain, forward, all_in_all = some_gradients(bits, stacks, roles_used, False)
    if (forward, all_in_all) != (len(roles_used), len(roles_used)):
        return float("inf")
    recomputed, forward, all_in_all = some_gradients(bits, stacks, roles_used, True, enable)
    if (forward, all_in_all) != (len(roles_used), 2 * len(roles_used)):
        return float("inf")
    return relative_error(recomputed, plain)


ROLES_USED = (("policy",), ("policy", "value"), ("value", "policy"))


@pytest.mark.parametrize("used", ROLES_USED)
@pytest.mark.parametrize("stacks", [STACKS, DEEP], ids=["one", "two"])
@pytest.mark.parametrize("bits", [4, 16])
def test_checkpointing_changes_no_gradient(bits: int, stacks: dict[str, list[str]], used: Sequence[str]) -> None:
    """Gradients with checkpointing are those without, and each layer is recomputed once, whatever role is active by
    then."""
    assert error_of_checkpointing(bits, stacks, used) <= 1e-6


def _checkpoint_without_adapters(roles: Roles) -> None:
    """As transformers does it: the recomputation uses whatever adapters are active by then."""
    # Which would not run at all without its attention function.
    roles.decoder.packed_rows.enabled = False
    model = roles.base.model
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.disable_input_require_grads()


@pytest.mark.parametrize("stacks", [STACKS, DEEP], ids=["one", "two"])
@pytest.mark.parametrize(
    "enable",
    [_checkpoint_without_adapters, lambda roles: None],
    ids=["recomputation without adapters", "no recomputation"],
)
def test_recomputation_under_another_role_is_found(enable: Fault, stacks: dict[str, list[str]]) -> None:
    """`error_of_checkpointing` finds recomputation with the adapters that are active by then, and none at all."""
    for used in ROLES_USED:
        assert error_of_checkpointing(4, stacks, used, enable) > 1e-2


def test_inference_mode_turns_checkpointing_off() -> None:
    """In `inference_mode` nothing is recomputed and nothing has a graph; afterwards a training pass recomputes
    again."""
    roles = llama_roles(checkpointing=True)
    with count_forwards(roles) as count:
        with roles.inference_mode():
            assert not roles.logps("policy", ragged_batch()).logps.requires_grad
        assert count[0] == 1
        roles.logps("policy", ragged_batch()).logps.sum().backward()
        assert count[0] == 3


def test_second_backward_pass_recomputes_again() -> None:
    """Two backward passes through one checkpointed graph give twice the gradient."""
    roles = llama_roles(checkpointing=True)
    perturb(roles, "policy")
    loss = roles.logps("policy", ragged_batch()).logps.sum()
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    once = gradients(roles)
    loss.backward()  # type: ignore[no-untyped-call]
    assert relative_error(gradients(roles), 2 * once) <= 1e-6 and roles.active_stack == []


# --- 6: padding -------------------------------------------------------------------------------------------------------

ROWS = [[5, 9, 13, 2, 40, 41, 7], [8, 3, 96], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20]]


def error_of_padding(roles: Roles, **how: Any) -> float:
    """Returns the largest difference that padding `how` makes to the log-probs of the real tokens, and to the gradient
    (relative), against each row alone."""

    def logps_of(batch: Batch) -> tuple[Tensor, Tensor]:
        zero_grad(roles)
        found = roles.logps("policy", batch)
        found.logps.sum().backward()
        return torch.cat([found.logps[batch.attention_mask], found.entropy[batch.attention_mask]]).detach(), gradients(
            roles
        )

    alone = [logps_of(make_batch([row])) for row in ROWS]
    values = torch.cat(
        [
            torch.cat([value[: len(row)] for (value, _), row in zip(alone, ROWS, strict=True)]),
            torch.cat([value[len(row) :] for (value, _), row in zip(alone, ROWS, strict=True)]),
        ]
    )
    padded, gradient = logps_of(make_batch(ROWS, **how))
    return max(float((padded - values).abs().max()), relative_error(gradient, sum(g for _, g in alone)))  # type: ignore[arg-type]


PADDINGS: list[dict[str, Any]] = [
    {},
    {"more": 9},
    {"more": 9, "filler": 77},
    {"left": True},
    {"left": True, "more": 5, "filler": 77},
]


@pytest.mark.parametrize("how", PADDINGS, ids=str)
@pytest.mark.parametrize("kind", ["nf4", "llama", "gpt2", "gpt_neo", "mistral"])
def test_padding_side_and_width_change_no_logp(kind: str, how: dict[str, Any]) -> None:
    """Log-probs, entropies and gradients of padded rows are those of each row alone."""
    roles = (
        llama_roles()
        if kind == "nf4"
        else roles_over(unquantized_base(kind, **({"sliding_window": 4} if kind == "mistral" else {})))
    )
    perturb(roles, "policy")
    assert error_of_padding(roles, **how) <= 2e-5


@pytest.mark.parametrize(
    ("kind", "dropped"),
    [
        ("gpt2", ["position_ids"]),
        ("gpt_neo", ["position_ids"]),
        ("llama", ["attention_mask", "position_ids"]),
    ],
)
def test_forward_pass_without_mask_or_positions_is_found(
    monkeypatch: pytest.MonkeyPatch, kind: str, dropped: list[str]
) -> None:
    """`error_of_padding` finds a decoder that gets no mask or no positions."""
    roles = roles_over(unquantized_base(kind))
    perturb(roles, "policy")
    decoder = roles.base.model.get_decoder()
    monkeypatch.setattr(
        roles.base.model,
        "get_decoder",
        lambda: lambda **given: decoder(**{**given, **dict.fromkeys(dropped)}),
        raising=False,
    )
    assert error_of_padding(roles, left=True) > 1e-3


def test_ids_in_right_padding_change_no_bit() -> None:
    """Log-probs and entropies are bit-identical for any ids in padding of the same width."""
    roles = llama_roles()
    perturb(roles, "policy")
    few, many = (roles.logps("policy", make_batch(ROWS, more=4, filler=filler)) for filler in (0, 55))
    assert torch.equal(few.logps, many.logps) and torch.equal(few.entropy, many.entropy)


# --- 10: adapters -----------------------------------------------------------------------------------------------------


def save(roles: Roles, name: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(roles.adapter_tensors(name), folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(roles.adapter_config(name)), encoding="utf-8")
    return folder


def plain_peft_equals(roles: Roles, bits: int, folder: Path, train_mode: bool = False) -> bool:
    """Returns whether plain PEFT, given the saved policy and a fresh base, computes the same logits bit for bit."""
    base = load_base_of(bits)
    use_plain_paths(roles)
    plain = PeftModel.from_pretrained(base.model, str(save(roles, "policy", folder)))
    with roles.activate("policy"):
        return torch.equal(
            logits(plain, ragged_batch(), train_mode), logits(roles.base.model, ragged_batch(), train_mode)
        )


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"target_modules": ("q_proj", "down_proj")}], ids=str)
@pytest.mark.parametrize("bits", [4, 16])
def test_saved_adapter_loads_with_plain_peft(tmp_path: Path, bits: int, more: dict[str, Any]) -> None:
    """Plain PEFT with the saved policy computes the same logits, bit for bit."""
    roles = llama_roles(bits, lower=["other"], **more)
    perturb(roles, "policy", "other")
    roles.stacks["policy"] = ["lt_policy"]
    assert plain_peft_equals(roles, bits, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (
        config["base_model_name_or_path"] == roles.base.name
        and config["inference_mode"] is True
        and config["peft_type"] == "LORA"
    )


def test_wrong_scaling_or_lost_tensor_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`plain_peft_equals` finds a saved configuration with another scale, and a file without one layer."""
    roles = llama_roles()
    perturb(roles, "policy")
    real_config, real_tensors = roles.adapter_config, roles.adapter_tensors
    monkeypatch.setattr(roles, "adapter_config", lambda name: {**real_config(name), "use_rslora": True})
    assert not plain_peft_equals(roles, 4, tmp_path / "scaling")
    monkeypatch.undo()
    monkeypatch.setattr(roles, "adapter_tensors", lambda name: dict(list(real_tensors(name).items())[2:]))
    assert not plain_peft_equals(roles, 4, tmp_path / "lost")


def test_loaded_adapter_equals_saved_adapter(tmp_path: Path) -> None:
    """A saved adapter has the same log-probs as a trainable policy, and frozen and without dropout below another
    one."""
    roles = llama_roles(dropout=0.25, use_rslora=True)
    perturb(roles, "policy")
    saved = read_adapter(str(save(roles, "policy", tmp_path / "run" / "final").parent), "adapters.policy.path")
    assert saved.base_name == roles.base.name and saved.config.use_rslora and saved.config.lora_dropout == 0.25
    again = Roles(load_base_of(), {"policy": saved.config}, ["policy"], {"policy": ["policy"], "reference": []})
    again.load_adapter_tensors("policy", saved.tensors, "here")
    below = Roles(
        load_base_of(),
        {"sft": saved.config, "policy": saved.config},
        ["policy"],
        {"policy": ["sft", "policy"], "reference": ["sft"]},
    )
    below.load_adapter_tensors("sft", saved.tensors, "here")
    # The products of fast paths have other shapes where an adapter is below another one.
    with (
        roles.inference_mode(),
        again.inference_mode(),
        below.inference_mode(),
        roles.plain_paths(),
        again.plain_paths(),
        below.plain_paths(),
    ):
        expected = roles.logps("policy", ragged_batch()).logps
        assert torch.equal(again.logps("policy", ragged_batch()).logps, expected)
        assert torch.equal(below.logps("reference", ragged_batch()).logps, expected)
        assert torch.equal(below.logps("policy", ragged_batch()).logps, expected)
    assert again.parameters("policy") and all(p.requires_grad for p in again.parameters("policy"))
    assert len(below.parameters("policy")) == len(again.parameters("policy"))
    assert not any(p.requires_grad for n, p in below.base.model.named_parameters() if ".lt_sft." in n)
    # The comparison finds weights that differ by 1e-3.
    other = {key: tensor + 1e-3 for key, tensor in saved.tensors.items()}
    again.load_adapter_tensors("policy", other, "here")
    with again.inference_mode():
        assert not torch.equal(again.logps("policy", ragged_batch()).logps, expected)


def is_repeatable(roles: Roles, role: str) -> bool:
    """Returns whether two forward passes in train mode give the same log-probs."""
    first, second = (roles.logps(role, ragged_batch()).logps.detach() for _ in range(2))
    return torch.equal(first, second)


def test_dropout_of_a_frozen_adapter_is_off() -> None:
    """In train mode the dropout of a frozen adapter is off, that of the trained adapter is on."""
    roles = llama_roles(lower=["sft"], dropout=0.5)
    perturb(roles, "sft", "policy")
    assert is_repeatable(roles, "reference")
    assert not is_repeatable(roles, "policy"), "dropout of the trained adapter is off too"


def test_dropout_of_a_frozen_adapter_is_found() -> None:
    """`is_repeatable` finds dropout of a frozen adapter."""
    roles = llama_roles(lower=["sft"], dropout=0.5)
    perturb(roles, "sft", "policy")
    _dropout_of_frozen_adapters(roles)
    assert not is_repeatable(roles, "reference")


NAMES = ("value", "q_proj", "lora_a", "lora_A", "weight", "mlp", "model", "layers", "base_layer", "policy_2", "default")


def lost_tensors(folder: Path) -> list[str]:
    """Returns the adapters of which a saved file does not contain every tensor, or whose loading changes another one.
    Empty is right."""
    roles = roles_over(load_base_of(), lower=NAMES)
    perturb(roles, "policy", *NAMES)
    wrong = []
    for name in ("policy", *NAMES):
        tensors = roles.adapter_tensors(name)
        if len(tensors) != 28:
            wrong.append(name)
        before = all_tensors(roles.base.model)
        roles.load_adapter_tensors(name, {key: tensor + 1 for key, tensor in tensors.items()}, "here")
        moved = changed_tensors(before, all_tensors(roles.base.model))
        if len(moved) != 28 or any(f".{roles_module.ADAPTER_PREFIX}{name}." not in key for key in moved):
            wrong.append(name)
        after = roles.adapter_tensors(name)
        if any(not torch.equal(after[key], tensor + 1) for key, tensor in tensors.items()):
            wrong.append(name)
    if len(roles.parameters("policy")) != 28:
        wrong.append("parameters")
    return wrong


def test_adapters_named_like_modules_lose_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters with names of modules are saved and loaded whole, because of `ADAPTER_PREFIX`: without it some are
    not."""
    assert lost_tensors(tmp_path) == []
    monkeypatch.setattr(roles_module, "ADAPTER_PREFIX", "")
    lost: list[str] | None = None
    # The count of `adapter_tensors`, or PEFT, may raise first.
    with suppress(AssertionError, ValueError, KeyError, RuntimeError):
        lost = lost_tensors(tmp_path)
    assert lost != []


def test_adapters_are_fp32_over_a_bf16_base() -> None:
    """Adapters have fp32 weights over a base of another dtype."""
    base = load_base_of(16)
    base.model.to(torch.bfloat16)
    roles = roles_over(base, lower=["sft"])
    assert {p.dtype for n, p in roles.base.model.named_parameters() if "lora_" in n} == {torch.float32}
    assert {p.dtype for n, p in roles.base.model.named_parameters() if "lora_" not in n} == {torch.bfloat16}


def test_equal_seeds_give_equal_adapters() -> None:
    """One seed gives the same bits, another seed gives others."""
    first, second, other = (llama_roles(seed=seed).adapter_tensors("policy") for seed in (3, 3, 4))
    assert all(same_bytes(first[key], second[key]) for key in first)
    assert not all(same_bytes(first[key], other[key]) for key in first)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 4.0), (True, 8.0)])
def test_adapter_output_is_scaled_by_alpha_over_rank(rslora: bool, scale: float) -> None:
    """A layer adds (alpha / r) B A x, with rslora (alpha / sqrt(r)) B A x: here alpha is 16 and r is 4."""
    roles = roles_over(load_base_of(16), use_rslora=rslora)
    perturb(roles, "policy")
    layer = next(module for module in roles.base.model.modules() if isinstance(module, LoraLayer))
    x = torch.randn(3, 64)
    with roles.activate("policy"):
        delta = layer(x) - layer.base_layer(x)
    by_hand = scale * (x @ layer.lora_A["lt_policy"].weight.T @ layer.lora_B["lt_policy"].weight.T)
    assert relative_error(delta.detach(), by_hand.detach()) < 1e-5


# --- wrong folders of adapters ---------------------------------------------------------------------------------------

GOOD = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


def one_line_error(call: Callable[[], Any]) -> str:
    """Returns the message of the UserError that the call raises: one line with the key."""
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert text.startswith("adapters.sft.path") and "\n" not in text.strip() and len(text) < 400, text
    return text


@pytest.mark.parametrize(
    ("files", "weights", "message"),
    [
        ({}, None, "contains no adapter_config.json"),
        ({"run.json": "{}"}, None, "a run that has not ended"),
        ({CONFIG: json.dumps(GOOD), "adapter_model.bin": "x"}, None, "can run code when they are read"),
        ({CONFIG: json.dumps(GOOD)}, None, "contains no adapter_model.safetensors"),
        ({CONFIG: json.dumps(GOOD)}, b"not a safetensors file", "is broken"),
        ({CONFIG: json.dumps(GOOD)}, b"", "is broken"),
        ({CONFIG: "{"}, "good", "is broken"),
        ({CONFIG: "\x00\x01"}, "good", "is broken"),
        ({CONFIG: "[]"}, "good", "is not a LoRA adapter but list"),
        ({CONFIG: json.dumps({"peft_type": "IA3"})}, "good", "is not a LoRA adapter but IA3"),
        ({CONFIG: json.dumps(GOOD | {"use_dora": True})}, "good", "uses use_dora"),
        ({CONFIG: json.dumps(GOOD | {"modules_to_save": ["lm_head"]})}, "good", "uses modules_to_save"),
        ({CONFIG: json.dumps(GOOD | {"init_lora_weights": "pissa"})}, "good", "uses init_lora_weights pissa"),
        ({CONFIG: json.dumps(GOOD | {"init_lora_weights": "olora"})}, "good", "uses init_lora_weights olora"),
        ({CONFIG: json.dumps(GOOD | {"bias": "all"})}, "good", "uses bias all"),
        ({CONFIG: json.dumps(GOOD | {"use_qalora": True})}, "good", "uses use_qalora"),
        ({CONFIG: json.dumps(GOOD | {"target_parameters": ["x"]})}, "good", "uses target_parameters"),
        ({CONFIG: json.dumps(GOOD | {"r": "four"})}, "good", "is broken: r is 'four'"),
        ({CONFIG: json.dumps(GOOD | {"r": True})}, "good", "is broken: r is True"),
        ({CONFIG: json.dumps(GOOD | {"r": 0})}, "good", "is broken: r is 0"),
        ({CONFIG: json.dumps(GOOD | {"lora_alpha": float("nan")})}, "good", "is broken: lora_alpha is nan"),
        ({CONFIG: json.dumps(GOOD | {"lora_alpha": None})}, "good", "is broken: lora_alpha is None"),
        ({CONFIG: json.dumps(GOOD | {"lora_dropout": "much"})}, "good", "is broken: lora_dropout is 'much'"),
        ({CONFIG: json.dumps(GOOD | {"lora_dropout": 1.5})}, "good", "is broken: lora_dropout is 1.5"),
        ({CONFIG: json.dumps(GOOD | {"target_modules": 7})}, "good", "is broken: target_modules is 7"),
        ({CONFIG: json.dumps(GOOD | {"rank_pattern": {"q_proj": "x"}})}, "good", "is broken: rank_pattern is"),
        ({CONFIG: json.dumps(GOOD | {"alpha_pattern": 7})}, "good", "is broken: alpha_pattern is 7"),
    ],
)
def test_broken_adapter_folder_raises_one_line_error(
    tmp_path: Path, files: dict[str, str], weights: bytes | str | None, message: str
) -> None:
    """A folder without a LoRA adapter that can be trained raises UserError: one line with the key and the reason."""
    folder = write_files(tmp_path / "adapter", files)
    if weights == "good":
        save_file({"a": torch.zeros(1)}, folder / WEIGHTS)
    elif isinstance(weights, bytes):
        (folder / WEIGHTS).write_bytes(weights)
    assert message in one_line_error(lambda: read_adapter(str(folder), "adapters.sft.path"))


def test_missing_folder_and_adapter_of_another_base_are_refused(tmp_path: Path) -> None:
    """A folder that is missing, or weights of other shapes, raise UserError, and no tensor changes."""
    assert "there is no folder" in one_line_error(lambda: read_adapter(str(tmp_path / "none"), "adapters.sft.path"))
    narrow = roles_over(unquantized_base("llama", hidden_size=32))
    saved = read_adapter(str(save(narrow, "policy", tmp_path / "narrow")), "adapters.sft.path")
    roles = llama_roles(lower=["sft"])
    before = all_tensors(roles.base.model)
    assert "another base" in one_line_error(
        lambda: roles.load_adapter_tensors("sft", saved.tensors, "adapters.sft.path: narrow")
    )
    assert changed_tensors(before, all_tensors(roles.base.model)) == set()


def test_adapter_for_other_modules_is_refused(tmp_path: Path) -> None:
    """A configuration that matches no module raises UserError with the key, as the first adapter or as a later one."""
    good = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    for config in (
        LoraConfig(r=2, target_modules=["no_such_module"]),
        LoraConfig(r=2, target_modules=["q_proj"], exclude_modules=["q_proj"]),
    ):
        for configs in ({"sft": config, "policy": good}, {"policy": good, "sft": config}):
            with pytest.raises(UserError, match="^adapters.sft: this adapter does not fit "):
                Roles(load_base_of(), configs, ["policy"], {"policy": ["sft", "policy"], "reference": ["sft"]})


def test_init_method_of_a_saved_adapter_is_ignored(tmp_path: Path) -> None:
    """A saved adapter contains its weights, so an orthogonal or EVA initialization is neither repeated nor refused."""
    for method in ("gaussian", "orthogonal", "eva"):
        folder = write_files(tmp_path / method, {CONFIG: json.dumps(GOOD | {"init_lora_weights": method})})
        save_file({"a": torch.zeros(1)}, folder / WEIGHTS)
        assert read_adapter(str(folder), "adapters.sft.path").config.init_lora_weights is True


def test_unknown_target_modules_are_refused_with_the_known_ones() -> None:
    """An unknown name in `target_modules` raises UserError with the names that exist."""
    with pytest.raises(UserError, match="no linear module no_such; it has down_proj, gate_proj"):
        lora_config(AdapterConfig(target_modules=("q_proj", "no_such")), load_base_of().model)
    with pytest.raises(UserError, match="gpt2 models have no linear modules"):
        lora_config(AdapterConfig(), unquantized_base("gpt2").model)


def test_all_linear_adapts_every_linear_but_the_head() -> None:
    """`target_modules: all-linear` adapts all 14 linear modules of two layers, and not the output head."""
    roles = llama_roles()
    names = [n for n, m in roles.base.model.named_modules() if isinstance(m, LoraLayer)]
    assert len(names) == 14 and not any("lm_head" in n for n in names)
    assert isinstance(roles.base.model.get_output_embeddings(), nn.Linear) and roles.base.device == CPU


# --- release: one base for stage after stage --------------------------------------------------------------------------


def trained_bytes(roles: Roles) -> dict[str, Tensor]:
    """Returns the weights of a policy after two optimizer steps, and its log-probs."""
    perturb(roles, "policy")
    train(roles)
    with roles.inference_mode():
        return roles.adapter_tensors("policy") | {"logps": roles.logps("policy", ragged_batch()).logps}


def of_kind(kind: str) -> Base:
    if kind == "tiny-tutor":
        return load_base(BaseConfig(), TOKENIZER, CPU)  # type: ignore[arg-type]
    return load_base_of(int(kind))


def wrong_after_unload(kind: str, first: bool, then: bool) -> set[str]:
    """Returns what differs between roles over a base that had others before (checkpointed if `first`) and over a fresh
    one. Empty is right."""
    base, batch = of_kind(kind), ragged_batch(vocab=60)
    before, hashes = all_tensors(base.model), base_hashes(base.model)
    outputs = [logits(base.model, batch, mode) for mode in (True, False)]
    modules, names = [(name, type(module)) for name, module in base.model.named_modules()], attributes(base.model)
    stacks = {"policy": ["sft", "policy"], "reward": ["reward"], "reference": ["sft"]}
    roles = roles_over(
        base,
        lower=["sft"],
        dropout=0.1,
        checkpointing=first,
        extra=["reward"],
        heads=["reward"],
        trainable=["policy", "reward"],
        stacks=stacks,
    )
    perturb(roles, "sft", "reward")
    trained_bytes(roles)
    roles.sequence_scores("reward", batch).sum().backward()  # type: ignore[no-untyped-call]
    objects = (*roles.parameters("policy"), *roles.parameters("reward"), *roles.lora_layers)
    references = [weakref.ref(item) for item in objects]
    del objects
    base.model.eval()
    roles.unload_adapters()
    gc.collect()
    wrong = {"not freed" for reference in references if reference() is not None}
    wrong |= {f"bytes of {name}" for name in changed_tensors(before, all_tensors(base.model))}
    wrong |= {"hashes"} if base_hashes(base.model) != hashes else set()
    wrong |= {"modules"} if [(name, type(module)) for name, module in base.model.named_modules()] != modules else set()
    wrong |= {f"attribute {name}" for name in attributes(base.model) ^ names}
    wrong |= {
        f"requires_grad of {name}" for name, p in base.model.named_parameters() if p.requires_grad or p.grad is not None
    }
    wrong |= {
        "mode"
        for module in base.model.modules()
        if not module.training or getattr(module, "gradient_checkpointing", False)
    }
    wrong |= {
        "logits"
        for mode, out in zip((True, False), outputs, strict=True)
        if not torch.equal(logits(base.model, batch, mode), out)
    }
    if wrong:
        return wrong
    again, fresh = (
        trained_bytes(roles_over(one, dropout=0.1, checkpointing=then, seed=5)) for one in (base, of_kind(kind))
    )
    return {f"next {name}" for name in changed_tensors(again, fresh)}


def attributes(model: nn.Module) -> set[str]:
    """Returns the names of the attributes of all modules, without those that checkpointing sets."""
    return {f"{name}.{key}" for name, module in model.named_modules() for key in vars(module) if "grad" not in key}


@pytest.mark.parametrize(("first", "then"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(
    "kind", ["4", pytest.param("16", marks=pytest.mark.slow), pytest.param("tiny-tutor", marks=pytest.mark.slow)]
)
def test_unloaded_base_is_as_it_was_loaded(kind: str, first: bool, then: bool) -> None:
    """After `unload_adapters` the base, its outputs, and the training of the next roles are those of a fresh base."""
    assert wrong_after_unload(kind, first, then) == set()


def release_without(line: str) -> Callable[[Roles], None]:
    """Returns `unload_adapters` without one of its lines."""
    source, names = textwrap.dedent(inspect.getsource(Roles.unload_adapters)), dict(vars(roles_module))
    assert source.count(line) == 1
    exec(source.replace(line, "pass"), names)
    return names["unload_adapters"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("line", "sign"),
    [
        ("setattr(model.get_submodule(parent), child, module.base_layer)", "modules"),
        ("del model.peft_config", "attribute .peft_config"),
        ("self._undo.close()", "attribute"),
        ("self.heads.clear()", "not freed"),
        ("model.train()", "mode"),
    ],
)
def test_unload_without_one_line_is_found(monkeypatch: pytest.MonkeyPatch, line: str, sign: str) -> None:
    """`wrong_after_unload` finds `unload_adapters` without any one of its lines."""
    monkeypatch.setattr(Roles, "unload_adapters", release_without(line))
    assert any(wrong.startswith(sign) for wrong in wrong_after_unload("16", True, False))
