"""Frozen adapters in half precision: half of the memory, the same log-probs, and the saved values unchanged."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from models import (
    all_tensors,
    changed_tensors,
    make_batch,
    perturb,
    relative_error,
    reward_roles,
    roles_over,
    unquantized_base,
)
from torch import Tensor

from lowrank_tune.model import roles as roles_module
from lowrank_tune.model.base import Base
from lowrank_tune.model.frozen_adapters import FrozenAdapters
from lowrank_tune.model.roles import Roles

ROWS = [[5, 9, 12, 7, 8, 3], [4, 6, 9], [11, 13, 17, 2]]


def bf16_base() -> Base:
    """Returns a base on the CPU that computes under bf16 autocast, as on a GPU."""
    base = unquantized_base("llama")
    base.model.bfloat16()
    return replace(base, dtype=torch.bfloat16)


@functools.cache
def saved_values() -> dict[str, dict[str, Tensor]]:
    """Returns adapters with values that bf16 cannot represent."""
    roles = roles_over(unquantized_base("llama"), lower=["sft"])
    perturb(roles, "sft", "policy")
    return {name: roles.adapter_tensors(name) for name in ("sft", "policy")}


def fresh_roles(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> Roles:
    """Returns roles whose frozen adapters are stored in `dtype`."""
    with monkeypatch.context() as patched:
        patched.setattr(roles_module, "FrozenAdapters", lambda _: FrozenAdapters(dtype))
        return roles_over(bf16_base(), lower=["sft"])


def loaded_roles(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> Roles:
    saved = saved_values()
    roles = fresh_roles(monkeypatch, dtype)
    for name, tensors in saved.items():
        roles.load_adapter_tensors(name, tensors, "test")
    return roles


def test_frozen_adapters_are_cast_and_trained_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    roles = loaded_roles(monkeypatch, torch.bfloat16)
    dtypes: dict[str, set[torch.dtype]] = {"sft": set(), "policy": set()}
    for key, parameter in roles.base.model.named_parameters():
        for name, found in dtypes.items():
            if f".lt_{name}." in key:
                found.add(parameter.dtype)
                assert parameter.requires_grad == (name == "policy")
    assert dtypes == {"sft": {torch.bfloat16}, "policy": {torch.float32}}
    assert roles.resident_bytes() < loaded_roles(monkeypatch, torch.float32).resident_bytes()


def test_logps_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are the same up to the rounding of bf16: PEFT sums those of fp32 adapters in fp32."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        roles = loaded_roles(monkeypatch, dtype)
        logps = roles.logps("policy", make_batch(ROWS)).logps
        gradients = torch.autograd.grad(logps.sum(), roles.parameters("policy"))
        with torch.no_grad():
            reference = roles.logps("reference", make_batch(ROWS)).logps
        found.append((logps.detach(), reference, torch.cat([gradient.flatten() for gradient in gradients])))
    (logps, reference, gradient), (half_logps, half_reference, half_gradient) = found
    assert torch.equal(logps, half_logps) and torch.equal(reference, half_reference)
    assert not torch.equal(logps, reference)
    assert relative_error(half_gradient, gradient) < 2e-2


def test_saved_values_are_those_that_were_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading twice, too: a resumed run loads the adapters of its checkpoint."""
    roles = loaded_roles(monkeypatch, torch.bfloat16)
    expected = saved_values()
    for name in ("sft", "policy"):
        assert not changed_tensors(expected[name], roles.adapter_tensors(name))
    other = {key: value + 0.01 for key, value in expected["sft"].items()}
    roles.load_adapter_tensors("sft", other, "test")
    assert not changed_tensors(other, roles.adapter_tensors("sft"))
    assert not changed_tensors(expected["policy"], roles.adapter_tensors("policy"))


def test_a_frozen_adapter_that_was_not_loaded_keeps_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = fresh_roles(monkeypatch, torch.float32).adapter_tensors("sft")
    assert not changed_tensors(fresh, roles_over(bf16_base(), lower=["sft"]).adapter_tensors("sft"))


def test_a_scalar_head_stays_fp32() -> None:
    roles = reward_roles(bf16_base(), lower=["sft"])
    assert roles.heads["reward"].weight.dtype == torch.float32


def test_the_base_is_what_it_was_afterwards() -> None:
    base = bf16_base()
    before = all_tensors(base.model)
    roles_over(base, lower=["sft"]).unload_adapters()
    assert not changed_tensors(before, all_tensors(base.model))
