"""Rows that are padded on the right run without a mask, and nothing is read back from the device for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import make_batch, perturb, roles_over, unquantized_base
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lowrank_tune.batch import Batch
from lowrank_tune.events import Event, LogMessage
from lowrank_tune.model import roles as roles_module
from lowrank_tune.model.causal_attention import CAUSAL_MODEL_TYPES, CAUSAL_NAME, causal_attention, needs_no_mask
from lowrank_tune.model.roles import Roles

ROWS = [[5, 9, 12, 7, 8, 3], [4, 6], [11, 13, 17]]


class HostReads(TorchFunctionMode):
    """Records the functions that read a value of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero", "equal"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def logps_and_gradient(roles: Roles, batch: Batch) -> tuple[Tensor, Tensor]:
    logps = roles.logps("policy", batch).logps
    parameters = roles.parameters("policy")
    gradients = torch.autograd.grad(logps.sum(), parameters)
    return logps.detach(), torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("kind", sorted(CAUSAL_MODEL_TYPES))
def test_rows_without_a_mask_compute_the_same_bits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = unquantized_base(kind)
    roles = roles_over(base, checkpointing=kind == "llama")
    roles.decoder.packed_rows.enabled = False
    perturb(roles, "policy")
    batch = make_batch(ROWS)
    with causal_attention(base.model, 6):
        assert base.model.config._attn_implementation == "lowrank_tune_causal"
    assert base.model.config._attn_implementation == "sdpa"
    logps, gradient = logps_and_gradient(roles, batch)
    monkeypatch.setattr("lowrank_tune.model.causal_attention.CAUSAL_MODEL_TYPES", frozenset())
    expected, expected_gradient = logps_and_gradient(roles, batch)
    assert torch.equal(logps, expected) and torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("kind", sorted(CAUSAL_MODEL_TYPES))
def test_no_mask_is_created_and_no_value_is_read(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = unquantized_base(kind)
    created: list[str] = []
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda ids: created.append("packed"))
    ids = torch.tensor([[5, 9, 12, 7, 8, 3]])
    with HostReads() as reads, causal_attention(base.model, 6), torch.no_grad():
        base.model.get_decoder()(input_ids=ids, use_cache=False)
    assert reads.names == [] and created == []
    with torch.no_grad():
        base.model.get_decoder()(input_ids=ids, use_cache=False)
    assert "packed" in created, "the plain path reads the positions"


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("mistral", {"sliding_window": 6}, False),
        ("mistral", {"sliding_window": 7}, True),
        ("gemma3_text", {"sliding_window": 4}, False),
        ("gemma3_text", {"use_bidirectional_attention": True}, False),
        ("gpt_neox", {}, False),
        ("llama", {"is_causal": False}, False),
    ],
)
def test_other_models_and_longer_rows_keep_their_masks(kind: str, changes: dict[str, Any], expected: bool) -> None:
    config = unquantized_base(kind, **{k: v for k, v in changes.items() if k == "sliding_window"}).model.config
    for name, value in changes.items():
        setattr(config, name, value)
    assert needs_no_mask(config, 6) == expected


def test_decisions_are_made_from_the_rows_on_the_cpu() -> None:
    batch = make_batch(ROWS)
    moved = batch.to("meta")
    assert moved.on_cpu is batch and batch.on_cpu is batch
    assert moved.is_right_padded and not make_batch(ROWS, left=True).to("meta").is_right_padded
    rows, columns = moved.indices_of(roles_module._loss_mask)
    assert rows.device.type == columns.device.type == "meta"
    assert rows.shape == columns.shape == (int(batch.loss_mask.sum()),)
    chosen = batch.select_rows(torch.tensor([1]))
    assert chosen.on_cpu is chosen and "_cpu_rows" not in moved.tensors()


def test_the_way_without_masks_is_compared_once_on_the_base() -> None:
    roles = roles_over(unquantized_base("llama"))
    del roles.decoder.runs_without_masks
    rng = torch.get_rng_state()
    assert roles.decoder.runs_without_masks
    assert torch.equal(torch.get_rng_state(), rng) and roles.base.model.training


def test_a_way_that_computes_something_else_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under this name every token sees all others."""
    batch = make_batch(ROWS)
    expected = roles_over(unquantized_base("llama")).logps("policy", batch).logps

    def without_causality(*arguments: Any, **settings: Any) -> Any:
        return sdpa_attention_forward(*arguments, **{**settings, "is_causal": False})

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, CAUSAL_NAME, without_causality)
    roles = roles_over(unquantized_base("llama"))
    del roles.decoder.runs_without_masks
    events: list[Event] = []
    roles.limits.emit = events.append
    assert torch.equal(roles.logps("policy", batch).logps, expected)
    assert not roles.decoder.runs_without_masks
    assert [event.message for event in events if isinstance(event, LogMessage)] == [
        f"{roles.base.name}: attention without masks computes something else; masks are used"
    ]
