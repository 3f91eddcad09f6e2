"""Adapters are cast once for a rollout, compute the same bits as autocast's own copies, and are given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import perturb, roles_over, unquantized_base
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_tune.generation import Engine
from lowrank_tune.generation.cast_adapters import CastAdapters, cast_adapters
from lowrank_tune.generation.gpu_linears import GpuLinears
from lowrank_tune.generation.outputs import Completion, Token
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.model.decoding_options import DecodingOptions
from lowrank_tune.model.roles import Roles

SAMPLING = SamplingParams(6, frozenset(), temperature=1.0, seed=3)


def bf16_roles() -> Roles:
    """Returns roles over a base on the CPU that computes under bf16 autocast, as on a GPU."""
    base = unquantized_base("llama")
    base.model.bfloat16()
    roles = roles_over(replace(base, dtype=torch.bfloat16), lower=["sft"])
    perturb(roles, "sft", "policy")
    return roles


class AdapterCasts(TorchDispatchMode):
    """Counts the casts of adapters from fp32 to bf16."""

    def __init__(self, roles: Roles) -> None:
        super().__init__()
        self.shapes = {parameter.shape for parameter in adapters_of(roles).values()}
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        # In inference mode `to` is not decomposed.
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.to):
            is_cast = args[0].dtype == torch.float32 and output.dtype == torch.bfloat16
            self.count += is_cast and args[0].shape in self.shapes
        return output


def adapters_of(roles: Roles) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in roles.base.model.named_parameters() if "lora_" in name}


def stream(roles: Roles) -> Iterator[Token | Completion]:
    return Engine(roles, "policy").stream([[5, 9, 12]], 1, SAMPLING)


def use_cast_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes engines on the CPU prepare adapters as on a GPU."""

    def prepared(self: Engine, *_: int) -> Any:
        return cast_adapters(self.roles.base.model, self.roles.stacks[self.role], torch.bfloat16)

    monkeypatch.setattr(Engine, "prepared_weights", prepared)


def test_a_gpu_casts_the_stack_of_its_role_for_plain_modules() -> None:
    roles = bf16_roles()
    base = SimpleNamespace(device=torch.device("cuda"), model=roles.base.model, dtype=torch.bfloat16)
    stub: Any = SimpleNamespace(base=base, stacks=roles.stacks, decoding=DecodingOptions(few_launches=False))
    for role, count in (("policy", 28), ("reference", 0), ("base", 0)):
        with Engine(stub, role, cache_bytes=1, scratch_bytes=1).prepared_weights() as weights:
            assert isinstance(weights, CastAdapters)
            assert len(weights.copies) == count
            assert all(copy.dtype == torch.bfloat16 and not copy.requires_grad for copy in weights.copies)
        assert not weights.copies


def test_a_gpu_joins_the_linears_of_its_role() -> None:
    roles = bf16_roles()
    base = SimpleNamespace(device=torch.device("cuda"), model=roles.base.model, dtype=torch.bfloat16)
    stub: Any = SimpleNamespace(base=base, stacks=roles.stacks, decoding=DecodingOptions())
    # Query, key and value; output; gate and up; down, in two layers, with rank 4 of each adapter.
    for role, rank, count in (("policy", 8, 8), ("reference", 4, 8), ("base", 0, 8)):
        with Engine(stub, role, cache_bytes=1, scratch_bytes=1).prepared_weights() as weights:
            assert isinstance(weights, GpuLinears)
            downs = [group.down for group in weights.groups]
            assert len(downs) == count and not weights.other_adapters.copies
            joined = [len(group.modules) * rank for group in weights.groups]
            assert [0 if down is None else down.shape[1] for down in downs] == joined
            assert all(down is None or down.dtype == torch.bfloat16 for down in downs)


def test_cast_adapters_compute_the_bits_of_autocast() -> None:
    roles = bf16_roles()
    ids = torch.tensor([[5, 9, 12, 7], [3, 4, 8, 6]])

    def hidden() -> Tensor:
        with torch.no_grad(), roles.base.autocast(), roles.activate("policy"):
            return roles.base.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state  # type: ignore[no-any-return]

    expected = hidden()
    with cast_adapters(roles.base.model, roles.stacks["policy"], torch.bfloat16) as weights, weights:
        assert torch.equal(hidden(), expected)
    roles.stacks["policy"] = []
    assert not torch.equal(hidden(), expected)


def test_a_token_of_a_stream_casts_no_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    roles = bf16_roles()
    monkeypatch.setattr(Engine, "prepared_weights", lambda self, *_: nullcontext(nullcontext()))
    tokens = stream(roles)
    next(tokens)
    with AdapterCasts(roles) as casts:
        expected = next(tokens)
    assert casts.count >= 28, "autocast casts the trained and the frozen adapters again"
    use_cast_adapters(monkeypatch)
    tokens = stream(roles)
    next(tokens)
    with AdapterCasts(roles) as casts:
        found = next(tokens)
    assert casts.count == 0 and found == expected


def test_trained_parameters_are_back_at_every_yield(monkeypatch: pytest.MonkeyPatch) -> None:
    use_cast_adapters(monkeypatch)
    roles = bf16_roles()
    before = adapters_of(roles)
    states = {name: (parameter.dtype, parameter.requires_grad) for name, parameter in before.items()}
    for _ in stream(roles):
        assert all(parameter is before[name] for name, parameter in adapters_of(roles).items())
    dropped = stream(roles)
    next(dropped)
    del dropped
    assert all(parameter is before[name] for name, parameter in adapters_of(roles).items())
    assert states == {name: (parameter.dtype, parameter.requires_grad) for name, parameter in before.items()}


@pytest.mark.parametrize("error", [RuntimeError("a fault"), torch.OutOfMemoryError("out of memory")])
def test_trained_parameters_are_back_after_an_exception(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """After an out-of-memory error the sequences are drawn again, with adapters that are cast again."""
    use_cast_adapters(monkeypatch)
    roles = bf16_roles()
    before = adapters_of(roles)
    sample = Engine.sample
    calls: list[int] = []

    def failing(self: Engine, *arguments: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == 3:
            raise error
        return sample(self, *arguments)

    monkeypatch.setattr(Engine, "sample", failing)
    prompts = [[5, 9, 12], [4, 6]]
    completions = Engine(roles, "policy").generate(prompts, 1, SAMPLING)
    if isinstance(error, torch.OutOfMemoryError):
        assert len(list(completions)) == 2
    else:
        with pytest.raises(RuntimeError, match="a fault"):
            list(completions)
    assert all(parameter is before[name] for name, parameter in adapters_of(roles).items())
