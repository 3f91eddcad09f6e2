"""The load-balancing loss of routers: transformers' function for each row, one gradient for any split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import (
    gradients,
    llama_roles,
    make_batch,
    perturb,
    relative_error,
    roles_over,
    sft_over,
    zero_grad,
)
from support_matrix import FAMILIES, VOCAB, Case
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from lowrank_tune.batch import Batch
from lowrank_tune.config import TrainingConfig
from lowrank_tune.errors import UserError
from lowrank_tune.events import ignore_event
from lowrank_tune.model.base import Base
from lowrank_tune.model.roles import Roles
from lowrank_tune.model.router_loss import RouterLoss, find_routers, routers_of, row_losses
from lowrank_tune.stats import Stats
from lowrank_tune.training.trainer import Trainer, TrainerState

WITH_ROUTERS = ("qwen3_moe", "mixtral", "gpt_oss")
TOP_2_OF_4 = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
LENGTHS = (12, 5, 24, 9)
COEFFICIENT = 2.0


@pytest.fixture(scope="module")
def cases() -> Iterator[dict[str, Case]]:
    yield {
        family.model_type: Case(replace(family, changes={**family.changes, **TOP_2_OF_4}))
        for family in FAMILIES
        if family.model_type in (*WITH_ROUTERS, "llama")
    }


def rows_of(lengths: tuple[int, ...] = LENGTHS) -> Batch:
    stream = torch.Generator().manual_seed(3)
    return make_batch([torch.randint(3, VOCAB, (length,), generator=stream).tolist() for length in lengths])


def trained_roles(base: Base, coefficient: float = COEFFICIENT, **more: Any) -> Roles:
    roles = roles_over(base, **more)
    perturb(roles, "policy", size=0.05)
    if coefficient:
        roles.add_router_loss(RouterLoss(routers_of(base.model), "policy", coefficient))
    return roles


def no_step_end(state: TrainerState, is_last: bool) -> None: ...


def accumulated(roles: Roles, batch: Batch, size: int = 4) -> tuple[Tensor, Stats]:
    """The gradient of a step in micro-batches of `size` rows, and its metrics."""
    zero_grad(roles)
    parameters = roles.parameters("policy")
    train = TrainingConfig(max_steps=1, micro_batch_size=size, max_grad_norm=1e9)
    trainer = Trainer(
        sft_over(roles, batch),
        parameters,
        torch.optim.SGD(parameters, lr=0.1),
        train,
        1,
        0,
        roles.base.device,
        ignore_event,
        no_step_end,
        router_loss=roles.router_loss,
    )
    roles.base.model.train()
    stats, _, _ = trainer._accumulate(batch)
    return gradients(roles).clone(), stats


def oracle(logits: list[Tensor], length: int, top_k: int) -> float:
    """The formula for one row, in plain Python."""
    num_experts = logits[0].shape[-1]
    times, sums = [0.0] * num_experts, [0.0] * num_experts
    for layer in logits:
        for token in layer[:length].softmax(dim=-1).tolist():
            for expert in sorted(range(num_experts), key=token.__getitem__)[-top_k:]:
                times[expert] += 1
            sums = [a + b for a, b in zip(sums, token, strict=True)]
    return num_experts * sum(a * b for a, b in zip(times, sums, strict=True)) / (length * len(logits)) ** 2


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_the_loss_of_a_row_is_that_of_transformers(top_k: int) -> None:
    stream = torch.Generator().manual_seed(0)
    layers, rows, columns, experts = 3, len(LENGTHS), max(LENGTHS), 8
    logits = torch.randn(layers, rows, columns, experts, generator=stream, dtype=torch.float64) * 2
    mask = torch.arange(columns) < torch.tensor(LENGTHS)[:, None]
    # Padding is replaced, and not only weighted with 0.
    logits = logits.masked_fill(~mask[None, :, :, None], torch.nan)
    found = row_losses(list(logits), mask, top_k)
    assert found.dtype == torch.float64
    for row, length in enumerate(LENGTHS):
        alone = [layer[row, :length] for layer in logits]
        assert float(found[row]) == pytest.approx(oracle(alone, length, top_k), rel=1e-12)
        # It adds in float32.
        expected = load_balancing_loss_func(tuple(alone), experts, top_k)
        assert float(found[row]) == pytest.approx(float(expected), rel=1e-6)


def test_rows_that_are_used_alike_have_the_number_of_choices() -> None:
    """Each of 4 tokens has another pair of likeliest experts of 4."""
    logits = torch.tensor([[1.0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1]])[None]
    assert row_losses([logits], torch.ones(1, 4, dtype=torch.bool), 2).tolist() == pytest.approx([2.0])


@pytest.mark.parametrize("model_type", WITH_ROUTERS)
def test_one_row_has_the_loss_of_the_whole_model(cases: dict[str, Case], model_type: str) -> None:
    roles = trained_roles(cases[model_type].base())
    assert roles.router_loss is not None
    batch = rows_of((24,))
    roles.router_loss.num_tokens = 24
    roles.logps("policy", batch)
    found = roles.router_loss.take()
    assert found is not None and roles.router_loss.take() is None
    with roles.inference_mode(), roles.activate("policy"):
        output = roles.base.model(input_ids=batch.input_ids, output_router_logits=True)
    assert float(found[0].detach()) == pytest.approx(COEFFICIENT * float(output.aux_loss), rel=1e-5)
    assert found[1]["router_aux_loss"].value == pytest.approx(float(output.aux_loss), rel=1e-5)


def test_a_pass_without_gradient_or_of_another_role_is_not_recorded(cases: dict[str, Case]) -> None:
    roles = trained_roles(cases["mixtral"].base())
    assert roles.router_loss is not None
    roles.logps("reference", rows_of())
    assert roles.router_loss.take() is None
    with roles.inference_mode():
        roles.logps("policy", rows_of())
    assert roles.router_loss.take() is None
    assert not any(module._forward_hooks for module in roles.router_loss.routers.modules)


@pytest.mark.parametrize("model_type", WITH_ROUTERS)
def test_any_split_has_one_gradient(cases: dict[str, Case], model_type: str) -> None:
    roles = trained_roles(cases[model_type].base())
    together, stats = accumulated(roles, rows_of(), 4)
    for size in (1, 3):
        apart, others = accumulated(roles, rows_of(), size)
        assert relative_error(apart, together) < 1e-4
        assert others["router_aux_loss"].value == pytest.approx(stats["router_aux_loss"].value, rel=1e-5)
    assert 1 < stats["router_aux_loss"].value < 4


def test_the_gradient_is_that_of_the_weighted_loss(cases: dict[str, Case]) -> None:
    """The difference to the gradient without the loss grows with its coefficient, and is that of transformers' loss of
    each row."""
    base = cases["mixtral"].base()
    roles = trained_roles(base)
    total, _ = accumulated(roles, rows_of())
    roles.router_loss = None
    plain, _ = accumulated(roles, rows_of())
    zero_grad(roles)
    for row, length in zip(rows_of().input_ids, LENGTHS, strict=True):
        with roles.activate("policy"):
            output = base.model(input_ids=row[None, :length], output_router_logits=True)
        (COEFFICIENT * output.aux_loss * length / sum(LENGTHS)).backward()
    assert relative_error(total - plain, gradients(roles)) < 1e-3
    assert float(gradients(roles).norm()) > 0.01 * float(plain.norm())


@pytest.mark.parametrize("model_type", WITH_ROUTERS)
@pytest.mark.parametrize(
    "more", [{"checkpointing": True}, {"checkpointing": 1}, {"checkpointing": True, "offload": True}]
)
def test_recomputed_layers_have_the_same_gradient(
    cases: dict[str, Case], model_type: str, more: dict[str, Any]
) -> None:
    expected, _ = accumulated(trained_roles(cases[model_type].base()), rows_of())
    found, stats = accumulated(trained_roles(cases[model_type].base(), **more), rows_of())
    assert relative_error(found, expected) < 1e-6 and "router_aux_loss" in stats


@pytest.mark.parametrize("coefficient", [0.0, COEFFICIENT])
def test_mlps_in_chunks_have_the_same_gradient(
    cases: dict[str, Case], coefficient: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowrank_tune.model.chunked_mlp.MIN_CHUNK_TOKENS", 8)
    expected, _ = accumulated(trained_roles(cases["qwen3_moe"].base(), coefficient), rows_of())
    for checkpointing in (False, True):
        roles = trained_roles(cases["qwen3_moe"].base(), coefficient, mlp_chunks=3, checkpointing=checkpointing)
        assert relative_error(accumulated(roles, rows_of())[0], expected) < 1e-5


def test_without_a_coefficient_nothing_changes(cases: dict[str, Case]) -> None:
    roles = trained_roles(cases["qwen3_moe"].base(), coefficient=0.0)
    found, stats = accumulated(roles, rows_of())
    algorithm = sft_over(roles, rows_of())
    zero_grad(roles)
    batch = rows_of()
    batch.token_weights = algorithm.token_weights(batch)
    for micro in batch.split(4):
        for term in algorithm.compute_losses(micro):
            term.loss.backward()
    assert torch.equal(found, gradients(roles)) and "router_aux_loss" not in stats
    assert roles.decoder.share_prefixes


def test_rows_are_padded(cases: dict[str, Case]) -> None:
    roles = trained_roles(cases["qwen3_moe"].base())
    assert not roles.decoder.packed_rows.enabled and not roles.decoder.share_prefixes


def test_a_base_without_routers_is_refused() -> None:
    model = llama_roles().base.model
    assert find_routers(model) is None
    with pytest.raises(UserError, match="^train.router_aux_loss_coef: llama models have no router .*; remove it$"):
        routers_of(model)
