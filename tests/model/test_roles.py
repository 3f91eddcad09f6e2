"""Properties of roles: without adapters the base is unchanged, training changes only the trained adapter, and
recomputation uses the adapters of the forward pass."""

from __future__ import annotations

import gc
import inspect
import json
import textwrap
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
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
    """A few optimizer steps of SFT, as the loop does them."""
    optimizer = torch.optim.AdamW(roles.parameters(role), lr=rate)
    algorithm = sft_over(roles)
    for step in range(steps):
        for micro in with_token_weights(algorithm, algorithm.collect(step).batch).split(3):
            for term in algorithm.compute_losses(micro):
                term.loss.backward()
        optimizer.step()
        zero_grad(roles)


# --- 1: adapters off equals the bare model ----------------------------------------------------------------------------


def off_equals_bare(bits: int, train_mode: bool, then: str, dropout: float = 0.1) -> bool:
    """Whether `base` gives the logits of the model that never had an adapter, bit for bit, and a fresh policy those of
    the stack below."""
    bare, batch = load_base_of(bits), ragged_batch()
    expected = logits(bare.model, batch, train_mode)
    roles = llama_roles(bits, lower=["sft"], dropout=dropout)
    perturb(roles, "sft")
    if then == "fresh":
        with roles.activate("policy"), torch.no_grad():  # with dropout: a fresh adapter's zero B hides it
            mine = logits(roles.base.model, batch, train_mode)
        with roles.activate("reference"):
            below = logits(roles.base.model, batch, train_mode)
        if not torch.equal(mine, below) or torch.equal(mine, expected):
            return False
    elif then == "trained":
        train(roles)
    else:
        roles.load_adapter_tensors(
            "policy", {key: torch.randn_like(t) for key, t in roles.adapter_tensors("policy").items()}, "here"
        )
    with roles.activate("base"):
        return torch.equal(logits(roles.base.model, batch, train_mode), expected)


@pytest.mark.parametrize("then", ["fresh", "trained", "loaded"])
@pytest.mark.parametrize("train_mode", [False, True])
@pytest.mark.parametrize("bits", [4, 16])
def test_adapters_off_equal_the_bare_model(bits: int, train_mode: bool, then: str) -> None:
    assert off_equals_bare(bits, train_mode, then)


def _use_leaves_the_lower(self: Roles, role: str) -> Any:
    return roles_module._ActiveAdapters(self._active, self.stacks["reference"] if role == "base" else self.stacks[role])


def _frozen_dropout_fires(self: Roles) -> None:
    real_freeze(self)
    for layer in self.lora_layers:
        for name in layer.lora_dropout:
            layer.lora_dropout[name].p = 0.5


def _pin_forgotten(self: Roles) -> None:
    pinned = any(layer._active_adapter is self._active for layer in self.lora_layers)
    if not pinned:
        real_pin(self)


def _load_without_pin(self: Roles, name: str, tensors: Any, where: str) -> None:
    self._peft.base_model.set_adapter([roles_module.ADAPTER_PREFIX + name])
    real_load(self, name, tensors, where)


real_freeze, real_pin, real_load = Roles._freeze_all_but_trainable, Roles._share_active_list, Roles.load_adapter_tensors


@pytest.mark.parametrize(
    ("name", "bug", "then"),
    [
        ("activate", _use_leaves_the_lower, "trained"),
        ("_freeze_all_but_trainable", _frozen_dropout_fires, "fresh"),
        ("_share_active_list", lambda self: None, "loaded"),
    ],
)
def test_a_role_that_leaks_into_the_base_is_seen(
    monkeypatch: pytest.MonkeyPatch, name: str, bug: Any, then: str
) -> None:
    monkeypatch.setattr(Roles, name, bug)
    with pytest.MonkeyPatch.context() as inner:
        inner.setattr(roles_module, "check_head", lambda model, head: None)
        assert not off_equals_bare(4, True, then)


def test_a_switch_that_peft_undoes_is_pinned_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """`load_adapter_tensors` may call structural PEFT code; it must pin after that."""
    monkeypatch.setattr(Roles, "load_adapter_tensors", _load_without_pin)
    assert off_equals_bare(4, True, "loaded")
    roles = llama_roles()
    assert all(layer._active_adapter is roles._active for layer in roles.lora_layers)
    pins = 0

    def only_at_birth(self: Roles) -> None:
        nonlocal pins
        pins += 1
        if pins == 1:
            real_pin(self)

    monkeypatch.setattr(Roles, "_share_active_list", only_at_birth)
    assert not off_equals_bare(4, True, "loaded")


def test_dropout_of_the_base_never_fires() -> None:
    """Granite 3.0 comes with attention dropout 0.1, which is a number on the module, not an nn.Dropout."""
    for kind, dropouts in (
        ("granite", {"attention_dropout": 0.5}),
        ("gpt2", {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}),
        ("gpt_neox", {"attention_dropout": 0.5, "hidden_dropout": 0.5}),
    ):
        model = unquantized_base(kind, **dropouts).model
        assert torch.equal(logits(model, ragged_batch(), True), logits(model, ragged_batch(), True)), kind


def test_the_hash_does_not_see_the_adapters() -> None:
    base = load_base_of()
    before = base_hashes(base.model)
    roles = roles_over(base, lower=["sft"])
    assert base_hashes(roles.base.model) == before and len(before) > 15


# --- 2: training moves the policy and nothing else --------------------------------------------------------------------


def moved_elsewhere(roles: Roles) -> list[str]:
    """All that training the policy touched and should not have: bytes, hashes, gradients, `requires_grad`. Empty is
    right."""
    before, hashes = all_tensors(roles.base.model), base_hashes(roles.base.model)
    wants = {name: p.requires_grad for name, p in roles.base.model.named_parameters()}
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
        wrong += [
            f"gradient of {n}"
            for n, p in roles.base.model.named_parameters()
            if p.grad is not None and ".lt_policy." not in n
        ]
        wrong += [
            f"no gradient of {n}"
            for n, p in roles.base.model.named_parameters()
            if p.grad is None and ".lt_policy." in n
        ]
        optimizer.step()
        zero_grad(roles)
    moved = changed_tensors(before, all_tensors(roles.base.model))
    wrong += [f"bytes of {n}" for n in moved if ".lt_policy." not in n]
    wrong += [f"still {n}" for n in before if ".lt_policy." in n and n not in moved]
    wrong += [f"hash of {n}" for n in changed_hashes(hashes, base_hashes(roles.base.model))]
    wrong += [f"requires_grad of {n}" for n, p in roles.base.model.named_parameters() if p.requires_grad != wants[n]]
    return wrong


def changed_hashes(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


@pytest.mark.parametrize("bits", [4, 16])
def test_training_a_role_leaves_every_other_byte_alone(bits: int) -> None:
    roles = llama_roles(bits, lower=["sft"], extra=["value"], checkpointing=True, dropout=0.1)
    perturb(roles, "sft", "value")
    assert moved_elsewhere(roles) == []


def _use_by_peft(self: Roles, role: str) -> Any:
    """What PEFT's own switch does: it also makes the active adapters trainable, and the others not."""
    stack = [] if role == "base" else self.stacks[role]
    for key, parameter in self._peft.named_parameters():
        if "lora_" in key:
            parameter.requires_grad_(any(f".{name}." in key for name in stack))
    return roles_module._ActiveAdapters(self._active, stack)


def _trainable_by_stack(self: Roles) -> None:
    """Trainability taken from the stacks: everything in the policy's stack trains."""
    for key, parameter in self._peft.named_parameters():
        parameter.requires_grad_(any(f".{name}." in key for name in self.stacks["policy"]))


@pytest.mark.parametrize(
    ("name", "bug"), [("activate", _use_by_peft), ("_freeze_all_but_trainable", _trainable_by_stack)]
)
def test_a_switch_that_touches_requires_grad_is_seen(monkeypatch: pytest.MonkeyPatch, name: str, bug: Any) -> None:
    monkeypatch.setattr(Roles, name, bug)
    roles = llama_roles(lower=["sft"])
    perturb(roles, "sft")
    assert moved_elsewhere(roles) != []


def test_a_base_that_is_written_is_seen() -> None:
    roles = llama_roles()
    layer = roles.base.model.get_decoder().layers[1]

    def write_a_little(*_: Any) -> None:
        layer.input_layernorm.weight.data.add_(1e-6)

    handle = layer.register_forward_hook(write_a_little)
    try:
        assert {wrong.split()[0] for wrong in moved_elsewhere(roles)} == {"bytes", "hash"}
    finally:
        handle.remove()


# --- exceptions restore everything ------------------------------------------------------------------------------------


class Fault(Exception):
    pass


def left_behind(roles: Roles) -> list[str]:
    """What an exception inside nested roles leaves changed. Empty is right."""
    wants = {name: p.requires_grad for name, p in roles.base.model.named_parameters()}
    wrong: list[str] = []

    def look(what: str, stack: Sequence[str], training: bool) -> None:
        if roles._active != stack:
            wrong.append(f"{what}: {roles._active} is active")
        if {module.training for module in roles.base.model.modules()} != {training}:
            wrong.append(f"{what}: train mode")
        if torch.is_grad_enabled() != training:
            wrong.append(f"{what}: grad mode")

    with suppress(Fault), roles.activate("policy"):
        with suppress(Fault), roles.activate("reference"), roles.inference_mode():
            with suppress(Fault), roles.inference_mode(), roles.activate("base"):
                look("innermost", [], False)
                raise Fault
            look("inside", roles.stacks["reference"], False)
            raise Fault
        look("outer", roles.stacks["policy"], True)
        raise Fault
    look("after", [], True)
    # A role that is entered again while it is active, as by a second backward pass within the first.
    again = roles.activate("policy")
    with again, roles.activate("reference"):
        with again:
            look("again", roles.stacks["policy"], True)
        look("after again", roles.stacks["reference"], True)
    look("after all", [], True)

    def broken(*_: Any) -> None:
        raise Fault

    handle = roles.base.model.get_decoder().layers[1].register_forward_pre_hook(broken)
    for call in (
        lambda: roles.logps("policy", ragged_batch()),
        lambda: roles.full_vocab_kl("policy", "reference", ragged_batch()),
    ):
        with suppress(Fault):
            call()
        look("forward", [], True)
    handle.remove()
    wrong += [f"requires_grad of {n}" for n, p in roles.base.model.named_parameters() if p.requires_grad != wants[n]]
    roles.base.model.train()
    roles._active.clear()
    return wrong


def test_exceptions_inside_a_role_restore_everything() -> None:
    assert left_behind(llama_roles(lower=["sft"])) == []


def _exit_to_the_base(self: Any, *_: object) -> None:
    self.before.pop()
    self.active.clear()


def _exit_only_when_well(self: Any, kind: Any, *_: object) -> None:
    before = self.before.pop()
    if kind is None:
        self.active[:] = before


@contextmanager
def _quiet_without_finally(self: Roles) -> Iterator[None]:
    self.base.model.eval()
    with torch.no_grad():
        yield
    self.base.model.train()


@contextmanager
def _quiet_always_to_train(self: Roles) -> Iterator[None]:
    self.base.model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        self.base.model.train()


@pytest.mark.parametrize(
    ("place", "name", "bug"),
    [
        (roles_module._ActiveAdapters, "__exit__", _exit_to_the_base),
        (roles_module._ActiveAdapters, "__exit__", _exit_only_when_well),
        (Roles, "inference_mode", _quiet_without_finally),
        (Roles, "inference_mode", _quiet_always_to_train),
    ],
)
def test_a_role_that_stays_after_an_exception_is_seen(
    monkeypatch: pytest.MonkeyPatch, place: Any, name: str, bug: Any
) -> None:
    roles = llama_roles(lower=["sft"])
    monkeypatch.setattr(place, name, bug)
    assert left_behind(roles) != []


# --- 3: gradient checkpointing ----------------------------------------------------------------------------------------

STACKS = {"policy": ["policy"], "value": ["value"], "reference": []}
DEEP = {"policy": ["sft", "policy"], "value": ["sft", "value"], "reference": ["sft"]}


def some_gradients(
    bits: int, stacks: dict[str, list[str]], roles_used: Sequence[str], checkpointing: bool
) -> tuple[Tensor, int, int]:
    """Gradients of policy and value, joint backward of the used roles' terms *while another role of the same depth is
    active*, and how often a layer ran until then and in all."""
    lower = sorted({name for stack in stacks.values() for name in stack} - {"policy", "value"})
    roles = roles_over(
        load_base_of(bits),
        lower=lower,
        extra=["value"],
        trainable=["policy", "value"],
        stacks=stacks,
        checkpointing=checkpointing,
    )
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
    assert roles._active == []
    return torch.cat(found), forward, count[0]


def error_of_checkpointing(bits: int, stacks: dict[str, list[str]], roles_used: Sequence[str]) -> float:
    """Relative difference of the gradients with and without; infinite where a layer was not run exactly as often as it
    should."""
    plain, forward, all_in_all = some_gradients(bits, stacks, roles_used, False)
    if (forward, all_in_all) != (len(roles_used), len(roles_used)):
        return float("inf")
    recomputed, forward, all_in_all = some_gradients(bits, stacks, roles_used, True)
    if (forward, all_in_all) != (len(roles_used), 2 * len(roles_used)):
        return float("inf")
    return relative_error(recomputed, plain)


ROLES_USED = (("policy",), ("policy", "value"), ("value", "policy"))


@pytest.mark.parametrize("used", ROLES_USED)
@pytest.mark.parametrize("stacks", [STACKS, DEEP], ids=["one", "two"])
@pytest.mark.parametrize("bits", [4, 16])
def test_checkpointing_changes_no_gradient(bits: int, stacks: dict[str, list[str]], used: Sequence[str]) -> None:
    assert error_of_checkpointing(bits, stacks, used) <= 1e-6


def _checkpoint_without_adapters(self: Roles, *_: Any) -> None:
    model = self.base.model
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.disable_input_require_grads()


@pytest.mark.parametrize("stacks", [STACKS, DEEP], ids=["one", "two"])
@pytest.mark.parametrize(
    "bug",
    [_checkpoint_without_adapters, lambda self, *_: None],
    ids=["recomputation without adapters", "no recomputation"],
)
def test_recomputation_under_another_role_is_seen(
    monkeypatch: pytest.MonkeyPatch, bug: Any, stacks: dict[str, list[str]]
) -> None:
    monkeypatch.setattr(Roles, "_checkpoint", bug)
    for used in ROLES_USED:
        assert error_of_checkpointing(4, stacks, used) > 1e-2


def test_checkpointing_sleeps_in_quiet_and_wakes_after() -> None:
    roles = llama_roles(checkpointing=True)
    with count_forwards(roles) as count:
        with roles.inference_mode():
            assert not roles.logps("policy", ragged_batch()).logps.requires_grad
        assert count[0] == 1
        roles.logps("policy", ragged_batch()).logps.sum().backward()
        assert count[0] == 3


def test_a_graph_can_be_walked_twice() -> None:
    roles = llama_roles(checkpointing=True)
    perturb(roles, "policy")
    loss = roles.logps("policy", ragged_batch()).logps.sum()
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    once = gradients(roles)
    loss.backward()  # type: ignore[no-untyped-call]
    assert relative_error(gradients(roles), 2 * once) <= 1e-6 and roles._active == []


# --- 6: padding -------------------------------------------------------------------------------------------------------

ROWS = [[5, 9, 13, 2, 40, 41, 7], [8, 3, 96], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20]]


def error_of_padding(roles: Roles, **how: Any) -> float:
    """Largest difference that padding `how` makes to the log-probs of the real tokens, and the relative one of the
    gradient, against each row alone."""

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
def test_padding_side_and_width_change_nothing(kind: str, how: dict[str, Any]) -> None:
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
def test_padding_that_is_looked_at_is_seen(monkeypatch: pytest.MonkeyPatch, kind: str, dropped: list[str]) -> None:
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


def test_right_padding_is_bit_identical_in_value() -> None:
    """Whatever ids stand in the padding of the same width."""
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
    """Whether plain PEFT, given the saved policy and a fresh base, computes the same logits bit for bit."""
    base = load_base_of(bits)
    plain = PeftModel.from_pretrained(base.model, str(save(roles, "policy", folder)))
    with roles.activate("policy"):
        return torch.equal(
            logits(plain, ragged_batch(), train_mode), logits(roles.base.model, ragged_batch(), train_mode)
        )


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"target_modules": ("q_proj", "down_proj")}], ids=str)
@pytest.mark.parametrize("bits", [4, 16])
def test_a_saved_adapter_loads_with_plain_peft(tmp_path: Path, bits: int, more: dict[str, Any]) -> None:
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


def test_a_wrong_scaling_or_a_lost_tensor_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roles = llama_roles()
    perturb(roles, "policy")
    real_config, real_tensors = roles.adapter_config, roles.adapter_tensors
    monkeypatch.setattr(roles, "adapter_config", lambda name: {**real_config(name), "use_rslora": True})
    assert not plain_peft_equals(roles, 4, tmp_path / "scaling")
    monkeypatch.undo()
    monkeypatch.setattr(roles, "adapter_tensors", lambda name: dict(list(real_tensors(name).items())[2:]))
    assert not plain_peft_equals(roles, 4, tmp_path / "lost")


def test_an_adapter_goes_on_where_it_was(tmp_path: Path) -> None:
    """read_adapter and load_adapter_tensors: as the policy it is trainable and the same; below another it is frozen,
    without dropout."""
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
    with roles.inference_mode(), again.inference_mode(), below.inference_mode():
        expected = roles.logps("policy", ragged_batch()).logps
        assert torch.equal(again.logps("policy", ragged_batch()).logps, expected)
        assert torch.equal(below.logps("reference", ragged_batch()).logps, expected)
        assert torch.equal(below.logps("policy", ragged_batch()).logps, expected)
    assert [p.requires_grad for p in again.parameters("policy")] and len(below.parameters("policy")) == len(
        again.parameters("policy")
    )
    assert not any(p.requires_grad for n, p in below.base.model.named_parameters() if ".lt_sft." in n)
    with pytest.MonkeyPatch.context() as patch:  # the check can fail
        patch.setattr(AdapterConfig, "lora_dropout", 0.0, raising=False)
        other = {key: tensor + 1e-3 for key, tensor in saved.tensors.items()}
        again.load_adapter_tensors("policy", other, "here")
        with again.inference_mode():
            assert not torch.equal(again.logps("policy", ragged_batch()).logps, expected)


def frozen_dropout_sleeps() -> bool:
    roles = llama_roles(lower=["sft"], dropout=0.5)
    perturb(roles, "sft", "policy")
    first, second = (roles.logps("reference", ragged_batch()).logps.detach() for _ in range(2))
    trained = [roles.logps("policy", ragged_batch()).logps.detach() for _ in range(2)]
    assert not torch.equal(*trained), "dropout of the trained adapter must fire, or this test is blind"
    return torch.equal(first, second)


def test_dropout_of_a_frozen_adapter_never_fires(monkeypatch: pytest.MonkeyPatch) -> None:
    assert frozen_dropout_sleeps()
    monkeypatch.setattr(Roles, "_freeze_all_but_trainable", _only_requires_grad)
    assert not frozen_dropout_sleeps()


def _only_requires_grad(self: Roles) -> None:
    for key, parameter in self._peft.named_parameters():
        parameter.requires_grad_(".lt_policy." in key)


NAMES = ("value", "q_proj", "lora_a", "lora_A", "weight", "mlp", "model", "layers", "base_layer", "policy_2", "default")


def lost_tensors(folder: Path) -> list[str]:
    """Adapters of which a saved file does not hold every tensor, or whose loading changes another one. Empty is
    right."""
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


def test_names_of_modules_lose_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lost_tensors(tmp_path) == []
    monkeypatch.setattr(roles_module, "ADAPTER_PREFIX", "")
    lost: list[str] | None = None
    # the kit's own count, or PEFT, may raise first
    with suppress(AssertionError, ValueError, KeyError, RuntimeError):
        lost = lost_tensors(tmp_path)
    assert lost != []


def test_masters_are_fp32_whatever_the_base_is() -> None:
    base = load_base_of(16)
    base.model.to(torch.bfloat16)
    roles = roles_over(base, lower=["sft"])
    assert {p.dtype for n, p in roles.base.model.named_parameters() if "lora_" in n} == {torch.float32}
    assert {p.dtype for n, p in roles.base.model.named_parameters() if "lora_" not in n} == {torch.bfloat16}


def test_a_seed_gives_the_same_adapters() -> None:
    first, second, other = (llama_roles(seed=seed).adapter_tensors("policy") for seed in (3, 3, 4))
    assert all(same_bytes(first[key], second[key]) for key in first)
    assert not all(same_bytes(first[key], other[key]) for key in first)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 4.0), (True, 8.0)])
def test_adapter_output_is_scaled_by_alpha_over_rank(rslora: bool, scale: float) -> None:
    """alpha 16, r 4: 16 / 4, and 16 / sqrt(4) with rslora; and the layer really adds that."""
    roles = roles_over(load_base_of(16), use_rslora=rslora)
    perturb(roles, "policy")
    layer = next(module for module in roles.base.model.modules() if isinstance(module, LoraLayer))
    x = torch.randn(3, 64)
    with roles.activate("policy"):
        delta = layer(x) - layer.base_layer(x)
    by_hand = scale * (x @ layer.lora_A["lt_policy"].weight.T @ layer.lora_B["lt_policy"].weight.T)
    assert relative_error(delta.detach(), by_hand.detach()) < 1e-5


# --- faults of an adapter's folder ------------------------------------------------------------------------------------

GOOD = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


def sentence(call: Callable[[], Any]) -> str:
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
def test_broken_adapter_folder_raises_one_sentence(
    tmp_path: Path, files: dict[str, str], weights: bytes | str | None, message: str
) -> None:
    folder = write_files(tmp_path / "adapter", files)
    if weights == "good":
        save_file({"a": torch.zeros(1)}, folder / WEIGHTS)
    elif isinstance(weights, bytes):
        (folder / WEIGHTS).write_bytes(weights)
    assert message in sentence(lambda: read_adapter(str(folder), "adapters.sft.path"))


def test_a_missing_folder_and_an_adapter_of_another_base(tmp_path: Path) -> None:
    assert "there is no folder" in sentence(lambda: read_adapter(str(tmp_path / "none"), "adapters.sft.path"))
    narrow = roles_over(unquantized_base("llama", hidden_size=32))
    saved = read_adapter(str(save(narrow, "policy", tmp_path / "narrow")), "adapters.sft.path")
    roles = llama_roles(lower=["sft"])
    before = all_tensors(roles.base.model)
    assert "another base" in sentence(
        lambda: roles.load_adapter_tensors("sft", saved.tensors, "adapters.sft.path: narrow")
    )
    assert changed_tensors(before, all_tensors(roles.base.model)) == set()


def test_adapter_for_other_modules_is_refused(tmp_path: Path) -> None:
    good = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    for config in (
        LoraConfig(r=2, target_modules=["no_such_module"]),
        LoraConfig(r=2, target_modules=["q_proj"], exclude_modules=["q_proj"]),
    ):
        for configs in ({"sft": config, "policy": good}, {"policy": good, "sft": config}):
            with pytest.raises(UserError, match="^adapters.sft: this adapter does not fit "):
                Roles(load_base_of(), configs, ["policy"], {"policy": ["sft", "policy"], "reference": ["sft"]})


def test_init_method_of_a_saved_adapter_is_ignored(tmp_path: Path) -> None:
    """A saved adapter brings its weights; a start from an orthogonal or EVA initialization is neither repeated nor
    refused."""
    for born in ("gaussian", "orthogonal", "eva"):
        folder = write_files(tmp_path / born, {CONFIG: json.dumps(GOOD | {"init_lora_weights": born})})
        save_file({"a": torch.zeros(1)}, folder / WEIGHTS)
        assert read_adapter(str(folder), "adapters.sft.path").config.init_lora_weights is True


def test_unknown_target_modules_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="no linear module no_such; it has down_proj, gate_proj"):
        lora_config(AdapterConfig(target_modules=("q_proj", "no_such")), load_base_of().model)
    with pytest.raises(UserError, match="gpt2 models have no linear modules"):
        lora_config(AdapterConfig(), unquantized_base("gpt2").model)


def test_all_linear_takes_every_linear_but_the_head() -> None:
    roles = llama_roles()
    names = [n for n, m in roles.base.model.named_modules() if isinstance(m, LoraLayer)]
    assert len(names) == 14 and not any("lm_head" in n for n in names)
    assert isinstance(roles.base.model.get_output_embeddings(), nn.Linear) and roles.base.device == CPU


# --- release: one base for stage after stage --------------------------------------------------------------------------


def trained_bytes(roles: Roles) -> dict[str, Tensor]:
    """What two optimizer steps make of a policy, and its log-probs."""
    perturb(roles, "policy")
    train(roles)
    with roles.inference_mode():
        return roles.adapter_tensors("policy") | {"logps": roles.logps("policy", ragged_batch()).logps}


def of_kind(kind: str) -> Base:
    if kind == "tiny-tutor":
        return load_base(BaseConfig(), TOKENIZER, CPU)  # type: ignore[arg-type]
    return load_base_of(int(kind))


def released_wrong(kind: str, first: bool, then: bool) -> set[str]:
    """What differs between Roles over a base that carried others before (checkpointed if `first`) and over a fresh one.
    Empty is right."""
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
    watched = [
        weakref.ref(thing) for thing in (*roles.parameters("policy"), *roles.parameters("reward"), *roles.lora_layers)
    ]
    base.model.eval()
    roles.unload_adapters()
    gc.collect()
    wrong = {"alive" for thing in watched if thing() is not None}
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
    """Names of what stands on the modules, but for the places where transformers keeps what checkpointing needs."""
    return {f"{name}.{key}" for name, module in model.named_modules() for key in vars(module) if "grad" not in key}


@pytest.mark.parametrize(("first", "then"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(
    "kind", ["4", pytest.param("16", marks=pytest.mark.slow), pytest.param("tiny-tutor", marks=pytest.mark.slow)]
)
def test_a_released_base_is_as_it_was_loaded(kind: str, first: bool, then: bool) -> None:
    assert released_wrong(kind, first, then) == set()


def release_without(line: str) -> Callable[[Roles], None]:
    """`unload_adapters` without one of its lines."""
    source, names = textwrap.dedent(inspect.getsource(Roles.unload_adapters)), dict(vars(roles_module))
    assert source.count(line) == 1
    exec(source.replace(line, "pass"), names)
    return names["unload_adapters"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("line", "sign"),
    [
        ("setattr(model.get_submodule(parent), child, module.base_layer)", "modules"),
        ("del model.peft_config", "attribute .peft_config"),
        ("disable_checkpointing(model)", "mode"),
        ("self.heads.clear()", "alive"),
        ("model.train()", "mode"),
    ],
)
def test_a_release_that_forgets_something_is_seen(monkeypatch: pytest.MonkeyPatch, line: str, sign: str) -> None:
    monkeypatch.setattr(Roles, "unload_adapters", release_without(line))
    assert any(wrong.startswith(sign) for wrong in released_wrong("16", True, False))
