"""Laws of `model/activation_checkpointing.py`: which layers are recomputed, and where what they keep waits, changes no
gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models import CPU, llama_roles, perturb, ragged_batch, relative_error, unquantized_base
from test_loop import algorithm_over
from test_recovery import fast
from torch import Tensor

from lowrank_tune.config import TrainingConfig, from_dict
from lowrank_tune.errors import ConfigError, UserError
from lowrank_tune.model import activation_checkpointing
from lowrank_tune.model.activation_checkpointing import Checkpointing, checkpoint_layers, num_checkpointed_layers
from lowrank_tune.model.roles import Roles

CHOICES: list[dict[str, Any]] = [
    {"checkpointing": "all"},
    {"checkpointing": True},
    {"checkpointing": "auto"},
    {"checkpointing": 1},
    {"checkpointing": 2},
    {"checkpointing": 0},
    {"checkpointing": "none"},
    {"checkpointing": True, "offload": True},
    {"checkpointing": 1, "offload": True},
]


def all_gradients(roles: Roles) -> Tensor:
    """Of every trainable parameter, in one vector; a missing one is zero."""
    found = [
        p for p in (*roles.base.model.parameters(), *(head.weight for head in roles.heads.values())) if p.requires_grad
    ]
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in found])


def gradient_of(name: str, **choice: Any) -> Tensor:
    """The gradient of one step of an algorithm over shaken adapters."""
    algorithm, roles, _ = algorithm_over(name, 0.0, **choice)
    perturb(roles, *roles.trainable, size=0.05)
    part = next(iter(algorithm.collect(0).minibatches()))
    part.token_weights = algorithm.token_weights(part)
    for micro in part.split(4, None, algorithm.rows_per_unit):
        for term in algorithm.compute_losses(micro.to(CPU)):
            term.loss.backward()
    return all_gradients(roles)


@pytest.mark.parametrize("name", fast("sft", "ppo"))
def test_no_choice_of_layers_changes_a_gradient(name: str) -> None:
    kept = gradient_of(name, checkpointing=False)
    assert float(kept.abs().max()) > 0
    for choice in CHOICES:
        assert relative_error(gradient_of(name, **choice), kept) <= 1e-6, choice


@contextmanager
def forwards(roles: Roles) -> Iterator[list[int]]:
    """How often each layer's attention runs, recomputations too."""
    layers = [module for name, module in roles.base.model.named_modules() if name.endswith("self_attn")]
    counts = [0] * len(layers)

    def counter(index: int) -> Any:
        def one_more(*_: Any) -> None:
            counts[index] += 1

        return one_more

    handles = [layer.register_forward_hook(counter(index)) for index, layer in enumerate(layers)]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (False, [1, 1]),
        ("none", [1, 1]),
        (0, [1, 1]),
        (1, [2, 1]),
        (2, [2, 2]),
        (9, [2, 2]),
        (True, [2, 2]),
        ("all", [2, 2]),
        ("auto", [2, 2]),
    ],
)
def test_the_first_layers_are_recomputed_and_no_others(wanted: Checkpointing, expected: list[int]) -> None:
    roles = llama_roles(16, checkpointing=wanted)
    with forwards(roles) as counts:
        roles.logps("policy", ragged_batch()).logps.sum().backward()
    assert counts == expected and sum(1 for count in expected if count == 2) == num_checkpointed_layers(wanted, 2)


def kept_bytes(**choice: Any) -> int:
    """Bytes that a forward pass leaves for its backward pass: what autograd packs, each storage once, where it is not a
    weight."""
    roles = llama_roles(16, **choice)
    weights = {p.untyped_storage().data_ptr() for p in (*roles.base.model.parameters(), *roles.base.model.buffers())}
    # The tensors and not their sizes: the address of one that is freed would be used again.
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in weights:
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        roles.logps("policy", ragged_batch((60, 60, 60)))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_the_more_layers_are_recomputed_the_less_is_kept() -> None:
    none, first, every = (kept_bytes(checkpointing=wanted) for wanted in (0, 1, 2))
    assert every < 0.2 * none and every < first < none and abs((none - first) - (first - every)) < 0.05 * none


def test_offloaded_inputs_are_copies_and_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs of recomputed layers are offloaded as copies, so that later in-place changes of them have no
    effect."""
    packed: list[tuple[Tensor, Tensor]] = []
    real = activation_checkpointing.save_on_cpu

    class Watched(real):  # type: ignore[valid-type,misc]
        def __init__(self, pin_memory: bool) -> None:
            super().__init__(pin_memory)
            inner = self.pack_hook

            def pack(tensor: Tensor) -> Any:
                device, copy = inner(tensor)
                packed.append((tensor, copy))
                return device, copy

            self.pack_hook = pack

    monkeypatch.setattr(activation_checkpointing, "save_on_cpu", Watched)
    roles = llama_roles(16, checkpointing=True, offload=True)
    batch = ragged_batch()
    roles.logps("policy", batch).logps.sum().backward()  # type: ignore[no-untyped-call]
    hidden = [pair for pair in packed if pair[0].shape == (1, int(batch.attention_mask.sum()), 64)]
    assert len(hidden) == 2, "one hidden state a layer"
    assert all(one.data_ptr() != copy.data_ptr() and torch.equal(one, copy) for one, copy in hidden)


def test_lossy_offload_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lossy(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory: bool) -> None:
            super().__init__(
                lambda tensor: tensor, lambda tensor: tensor * 1.001 if tensor.is_floating_point() else tensor
            )

    kept = gradient_of("sft", checkpointing=False)
    monkeypatch.setattr(activation_checkpointing, "save_on_cpu", Lossy)
    assert relative_error(gradient_of("sft", checkpointing=True, offload=True), kept) > 1e-6


def test_models_whose_layers_cannot_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base = unquantized_base("llama")
    monkeypatch.setattr(activation_checkpointing, "GradientCheckpointingLayer", torch.nn.Conv3d)
    with pytest.raises(
        UserError, match="^train.gradient_checkpointing: llama models recompute all layers or none; use `all`"
    ):
        checkpoint_layers(base.model, 1, False, lambda: (None, None))  # type: ignore[arg-type,return-value]


def recipe(**train: Any) -> dict[str, Any]:
    return {
        "algorithm": "sft",
        "data": {"train": [{"dataset": "builtin:arithmetic"}]},
        "train": {"max_steps": 1, **train},
    }


@pytest.mark.parametrize("wanted", [True, False, "none", "all", "auto", 0, 7])
def test_settings_keep_every_choice(wanted: Any) -> None:
    found = from_dict(recipe(gradient_checkpointing=wanted))
    assert found.train.gradient_checkpointing == wanted and type(found.train.gradient_checkpointing) is type(wanted)
    assert from_dict(found.to_dict()) == found


@pytest.mark.parametrize(
    ("train", "fault"),
    [
        *(
            (
                {"gradient_checkpointing": wrong},
                f"train.gradient_checkpointing: expected true or false or one of none, all, auto or a whole number, "
                f"found {wrong!r}",
            )
            for wrong in ("some", -1, 0.5)
        ),
        ({"logits_chunk": 1000}, "train.logits_chunk: must be a power of two, such as 16777216, found 1000"),
        ({"memory_budget_gib": 0.0}, "train.memory_budget_gib: must be greater than 0.0, found 0.0"),
        *(
            (
                {"gradient_checkpointing": none, "activation_offloading": True},
                "train.activation_offloading: does nothing without `train.gradient_checkpointing`: it moves what "
                "recomputed layers keep",
            )
            for none in (False, "none", 0)
        ),
    ],
)
def test_wrong_memory_setting_is_refused_by_key(train: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(recipe(**train))
    assert fault in str(caught.value).splitlines()


def test_offloading_without_recomputation_is_refused() -> None:
    assert TrainingConfig(activation_offloading=True).activation_offloading
    for wanted in (True, "all", "auto", 3):
        from_dict(recipe(gradient_checkpointing=wanted, activation_offloading=True))
