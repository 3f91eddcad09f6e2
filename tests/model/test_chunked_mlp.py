"""Laws of `train.mlp_chunks`: chunks of the sequence change no result and no gradient, and only one of them has its
intermediate activations at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, llama_roles, perturb, ragged_batch, relative_error, roles_over, unquantized_base
from test_memory import all_gradients, gradient_of
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lowrank_tune.config import load_any
from lowrank_tune.errors import ConfigError, UserError
from lowrank_tune.model import chunked_mlp
from lowrank_tune.model.chunked_forward import Recomputation, chunk_sizes, chunked_forward
from lowrank_tune.model.roles import Roles

TOKENS = 9


def no_contexts() -> Any:
    return nullcontext(), nullcontext()


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of tests are shorter than the shortest chunk."""
    monkeypatch.setattr(chunked_mlp, "MIN_CHUNK_TOKENS", 1)


@pytest.mark.parametrize("length", [1, 2, 7, 96, 97])
@pytest.mark.parametrize("chunks", [0, 1, 2, 5, 96, 200])
def test_chunks_are_the_whole_sequence_and_differ_by_one_token(length: int, chunks: int) -> None:
    sizes = chunk_sizes(length, chunks)
    assert sum(sizes) == length and len(sizes) == max(1, min(chunks, length))
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


def gradients(run: Callable[[Tensor], Tensor], module: nn.Module) -> list[Tensor]:
    """The output, the gradient of the input, and those of the weights."""
    hidden = torch.randn(2, TOKENS, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hidden.requires_grad_()
    module.zero_grad()
    output = run(hidden)
    (output * torch.arange(output.numel()).view_as(output).cos()).sum().backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    return [output.detach(), hidden.grad, *(p.grad.clone() for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("chunks", [1, 2, 4, TOKENS, 2 * TOKENS])
def test_a_chunked_module_is_the_plain_one(chunks: int) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 40), nn.GELU(), nn.Linear(40, 16)).double()
    plain = gradients(module, module)
    chunked = gradients(lambda hidden: chunked_forward(module, hidden, chunks, Recomputation(no_contexts)), module)
    assert len(plain) == len(chunked) == 8
    for one, other in zip(chunked, plain, strict=True):
        assert relative_error(one, other) <= 1e-14


def test_a_norm_in_chunks_is_bit_equal() -> None:
    """No sum of a norm without weights goes over tokens."""
    norm = nn.RMSNorm(16, elementwise_affine=False)
    plain = gradients(norm, norm)
    chunked = gradients(lambda hidden: chunked_forward(norm, hidden, 4, Recomputation(no_contexts)), norm)
    assert all(torch.equal(one, other) for one, other in zip(chunked, plain, strict=True))


def hidden_and_gradient(kind: str, chunks: int) -> list[Tensor]:
    roles = roles_over(unquantized_base(kind), checkpointing=True, mlp_chunks=chunks)
    perturb(roles, "policy", size=0.05)
    roles.base.model.double()
    hidden = roles.hidden("policy", ragged_batch())
    hidden.square().mean().backward()  # type: ignore[no-untyped-call]
    assert hidden.dtype == torch.float64
    return [hidden.detach(), all_gradients(roles)]


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("kind", ["llama", *(pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES[1:])])
def test_chunks_change_no_model(kind: str) -> None:
    plain = hidden_and_gradient(kind, 1)
    assert float(plain[1].abs().max()) > 0
    for one, other in zip(hidden_and_gradient(kind, 3), plain, strict=True):
        # The norms of transformers compute in fp32 whatever the weights are.
        assert relative_error(one, other) <= 1e-6


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("name", ["sft", "ppo", pytest.param("dpo", marks=pytest.mark.slow)])
def test_chunks_change_no_gradient_whatever_is_recomputed(name: str) -> None:
    """PPO and DPO activate other roles before the backward pass."""
    plain = gradient_of(name, checkpointing=False)
    assert float(plain.abs().max()) > 0
    for choice in ({"checkpointing": False}, {"checkpointing": 1}, {"checkpointing": True, "offload": True}):
        assert relative_error(gradient_of(name, mlp_chunks=3, **choice), plain) <= 1e-5, choice


@pytest.mark.usefixtures("short_chunks")
def test_4_bit_layers_run_in_chunks() -> None:
    found = []
    for chunks in (1, 3):
        roles = llama_roles(4, checkpointing=True, mlp_chunks=chunks)
        perturb(roles, "policy", size=0.05)
        roles.logps("policy", ragged_batch()).logps.sum().backward()  # type: ignore[no-untyped-call]
        found.append(all_gradients(roles))
    assert relative_error(*found) <= 1e-6 and not torch.equal(*found)


@pytest.mark.usefixtures("short_chunks")
def test_intermediate_activations_are_not_stored() -> None:
    """Without recomputed layers: of the MLP (128 wide) nothing is left for the backward pass."""

    def widest(chunks: int) -> int:
        roles = llama_roles(16, checkpointing=False, mlp_chunks=chunks)
        widths = [0]

        def pack(tensor: Tensor) -> Tensor:
            if tensor.ndim == 3:
                widths.append(tensor.shape[-1])
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            roles.hidden("policy", ragged_batch())
        return max(widths)

    assert widest(1) == 128 and widest(2) == 64


def mlp_lengths(roles: Roles) -> list[int]:
    """The sequence lengths that the first linear layer of the first MLP gets in a forward pass."""
    lengths = []
    gate = roles.base.model.get_decoder().layers[0].mlp.gate_proj
    handle = gate.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    with roles.inference_mode():
        roles.hidden("policy", ragged_batch((60, 60)))
    handle.remove()
    return lengths


def test_short_rows_have_fewer_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    roles = llama_roles(16, mlp_chunks=4)
    assert mlp_lengths(roles) == [60]
    monkeypatch.setattr(chunked_mlp, "MIN_CHUNK_TOKENS", 40)
    assert mlp_lengths(roles) == [20, 20, 20]
    monkeypatch.setattr(chunked_mlp, "MIN_CHUNK_TOKENS", 1)
    assert mlp_lengths(roles) == [15, 15, 15, 15]


@pytest.mark.usefixtures("short_chunks")
def test_the_base_is_as_before_when_adapters_are_unloaded() -> None:
    base = unquantized_base("llama")
    before = {name: vars(module).get("forward") for name, module in base.model.named_modules()}
    roles = roles_over(base, mlp_chunks=3)
    assert "forward" in vars(base.model.get_decoder().layers[0].mlp)
    roles.unload_adapters()
    assert {name: vars(module).get("forward") for name, module in base.model.named_modules()} == before


def test_a_model_without_known_mlps_is_refused() -> None:
    base = unquantized_base("llama")
    del base.model.get_decoder().layers[1].mlp
    with pytest.raises(UserError, match="^train.mlp_chunks: the MLPs of llama models cannot be computed in chunks"):
        chunked_mlp.chunk_mlps(base.model, 2, no_contexts)
    chunked_mlp.chunk_mlps(base.model, 1, no_contexts)


class Experts(nn.Module):
    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return hidden, hidden


def test_an_mlp_with_another_output_is_refused() -> None:
    base = unquantized_base("llama")
    base.model.get_decoder().layers[1].mlp = Experts()
    chunked_mlp.chunk_mlps(base.model, 2, no_contexts)
    with pytest.raises(UserError, match="^train.mlp_chunks: "):
        base.model(input_ids=torch.tensor([[3, 4]]))


def test_unsloth_computes_mlps_by_itself() -> None:
    with pytest.raises(ConfigError, match="train.mlp_chunks: does nothing with `base.backend: unsloth`"):
        load_any("qwen3-8b-sft", "base.backend=unsloth", "train.mlp_chunks=2")


@pytest.mark.parametrize("with_dropout", [True, False])
def test_dropout_draws_the_same_numbers_again(with_dropout: bool) -> None:
    """Each element of the gradient is nonzero where the output is, if and only if the random numbers are kept."""
    hidden = torch.ones(1, 400, 8, requires_grad=True)
    torch.manual_seed(0)
    dropout = nn.Sequential(nn.Dropout(0.5), Square())
    output = chunked_forward(dropout, hidden, 4, Recomputation(no_contexts, with_dropout))
    output.sum().backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert torch.equal(hidden.grad != 0, output != 0) == with_dropout


class Square(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * hidden


def test_random_numbers_are_kept_where_an_adapter_has_dropout() -> None:
    for dropout in (0.0, 0.1):
        roles = llama_roles(16, dropout=dropout, mlp_chunks=2)
        layer = roles.base.model.get_decoder().layers[0]
        assert layer.mlp.forward.recomputation.with_dropout == (dropout > 0)
        assert not layer.input_layernorm.forward.recomputation.with_dropout
