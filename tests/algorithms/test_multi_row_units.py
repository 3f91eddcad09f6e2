"""SFT of units of several rows: the loss and the gradient of separate rows, for any split into micro-batches, with a
shared beginning computed once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from models import gradients, load_base_of, perturb, relative_error, roles_over, sft_over, zero_grad
from torch import Tensor
from unit_stores import conversation_rows, write_units

from lowrank_tune.batch import Batch, Row
from lowrank_tune.data import TokenizedDataset, collate, collate_rows, collate_units
from lowrank_tune.evaluation.validation import validate
from lowrank_tune.events import ignore_event
from lowrank_tune.model.roles import Roles

SHAPES = ((12, [9, 4, 1]), (0, [5]), (20, [3, 3]), (7, [30, 2, 2, 2]), (3, [6]))
SPLITS: list[dict[str, int | None]] = [
    {},
    *({"rows": rows} for rows in (1, 2, 3, 5)),
    *({"tokens": tokens} for tokens in (1, 45, 80, 1000)),
    {"rows": 2, "tokens": 60},
]


@pytest.fixture(scope="module")
def roles() -> Roles:
    made = roles_over(load_base_of(16), lower=["sft"], checkpointing=True)
    perturb(made, "sft", "policy")
    return made


@pytest.fixture(scope="module")
def units() -> list[list[Row]]:
    rng = np.random.default_rng(0)
    return [conversation_rows(rng, prefix, tails) for prefix, tails in SHAPES]


@pytest.fixture(scope="module")
def store(units: list[list[Row]], tmp_path_factory: pytest.TempPathFactory) -> TokenizedDataset:
    return write_units(tmp_path_factory.mktemp("units") / "store", units)


def step(roles: Roles, batch: Batch, split: dict[str, int | None], plain: bool) -> tuple[float, Tensor, int]:
    """Loss and gradient of a step, and the tokens that the decoder computed."""
    zero_grad(roles)
    algorithm = sft_over(roles)
    batch.token_weights = algorithm.token_weights(batch)
    loss, tokens = 0.0, 0
    with pytest.MonkeyPatch.context() as patch:
        if plain:
            patch.setattr(roles.decoder.packed_rows, "enabled", False)
            patch.setattr(roles.decoder, "share_prefixes", False)
        for micro in batch.split(**split):
            packed = None if plain else roles.decoder.packed_rows.pack(micro, True)
            tokens += micro.input_ids.numel() if packed is None else packed.input_ids.numel()
            for term in algorithm.compute_losses(micro):
                term.loss.backward()
                loss += float(term.loss.detach().double())
    return loss, gradients(roles), tokens


def by_hand(roles: Roles, rows: Sequence[Row]) -> tuple[float, Tensor]:
    """The mean over all trained tokens of separate rows, each in a batch of its own."""
    zero_grad(roles)
    total = sum(sum(row.completion_mask[1:]) for row in rows)
    loss = 0.0
    for row in rows:
        batch = collate([row], 0)
        logps = roles.logps("policy", batch).logps
        term = -(logps * batch.loss_mask).sum() / total
        term.backward()
        loss += float(term.detach().double())
    return loss, gradients(roles)


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_a_step_equals_that_of_separate_rows(
    roles: Roles, units: list[list[Row]], store: TokenizedDataset, split: dict[str, int | None]
) -> None:
    expected, gradient = by_hand(roles, list(itertools.chain(*units)))
    for plain in (True, False):
        loss, found, _ = step(roles, collate_units(store, range(store.units), 0), split, plain)
        assert loss == pytest.approx(expected, rel=1e-5) and relative_error(found, gradient) < 1e-5


def test_a_shared_beginning_is_computed_once(roles: Roles, units: list[list[Row]], store: TokenizedDataset) -> None:
    batch = collate_units(store, range(store.units), 0)
    own = sum(prefix + sum(tails) for prefix, tails in SHAPES)
    all_tokens = sum(len(row.input_ids) for row in itertools.chain(*units))
    assert step(roles, batch, {}, plain=False)[2] == own < all_tokens
    # One unit in each micro-batch: the same tokens, because no family is cut.
    assert sum(step(roles, collate_units(store, [unit], 0), {}, False)[2] for unit in range(store.units)) == own
    # Two rows at once: a family of three is cut, and its beginning is computed twice.
    assert step(roles, collate_units(store, [0], 0), {"rows": 2}, False)[2] == 12 + 9 + 4 + 12 + 1


def test_validation_is_the_mean_of_all_rows_for_any_budget(
    roles: Roles, units: list[list[Row]], store: TokenizedDataset
) -> None:
    expected, _ = by_hand(roles, list(itertools.chain(*units)))
    seen: list[int] = []

    def collated(rows: np.ndarray) -> Batch:
        batch = collate_rows(store, rows, 0)
        seen.append(batch.input_ids.numel())
        return batch

    for micro_tokens in (1, 40, 90, 10_000):
        seen.clear()
        found = validate(sft_over(roles), roles, store, collated, micro_tokens, ignore_event)
        assert found.metrics["loss"] == pytest.approx(expected, rel=1e-5) and found.pair_losses == []
        assert max(seen) <= max(micro_tokens, 37), "a unit is no limit: its rows are computed alone"


def test_a_torn_family_is_right_in_any_order(roles: Roles, store: TokenizedDataset) -> None:
    batch = collate_units(store, range(store.units), 0)
    expected = step(roles, batch, {}, plain=True)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(0))
    found = step(roles, batch.select_rows(order), {"rows": 4}, plain=False)
    assert found[0] == pytest.approx(expected[0], rel=1e-5) and relative_error(found[1], expected[1]) < 1e-5
