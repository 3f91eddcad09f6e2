"""Packed documents: the loss and the gradient of separate documents, for any split into micro-batches, as segments of
one row and as padded rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from models import gradients, load_base_of, perturb, relative_error, roles_over, sft_over, zero_grad
from test_multi_row_units import by_hand, step
from unit_stores import write_units

from lowrank_tune.assembly.model import packs_as_tokens
from lowrank_tune.batch import Row
from lowrank_tune.config import TrainingConfig
from lowrank_tune.data import TokenizedDataset, collate, collate_units
from lowrank_tune.data.packing import pack_documents
from lowrank_tune.data.text_rows import cut_document
from lowrank_tune.functional import perplexity
from lowrank_tune.model.roles import Roles

MAX_LENGTH = 24
LENGTHS = (5, 40, 3, 11, 24, 2, 9, 30, 7, 16, 1, 13)
SPLITS: list[dict[str, int | None]] = [
    {},
    *({"tokens": packs * MAX_LENGTH} for packs in (1, 2, 3)),
    {"rows": 1},
    {"rows": 5},
    {"tokens": 50, "rows": 4},
]


@pytest.fixture(scope="module")
def roles() -> Roles:
    made = roles_over(load_base_of(16), lower=["sft"], checkpointing=True)
    perturb(made, "sft", "policy")
    return made


@pytest.fixture(scope="module")
def pieces() -> list[list[Row]]:
    rng = np.random.default_rng(0)
    return [cut_document(rng.integers(2, 97, length).tolist(), MAX_LENGTH) for length in LENGTHS]


@pytest.fixture(scope="module")
def packed(pieces: list[list[Row]], tmp_path_factory: pytest.TempPathFactory) -> TokenizedDataset:
    store = write_units(tmp_path_factory.mktemp("packs") / "store", pieces, "text")
    return pack_documents(store, MAX_LENGTH, 0)[0]


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_packs_have_the_loss_and_gradient_of_separate_documents(
    roles: Roles, pieces: list[list[Row]], packed: TokenizedDataset, split: dict[str, int | None]
) -> None:
    expected, gradient = by_hand(roles, [row for document in pieces for row in document])
    for plain in (True, False):
        loss, found, _ = step(roles, collate_units(packed, range(packed.units), 0), split, plain)
        assert loss == pytest.approx(expected, rel=1e-5) and relative_error(found, gradient) < 1e-5


def test_the_law_in_float64(pieces: list[list[Row]], packed: TokenizedDataset) -> None:
    """One loss and one gradient up to the rounding of float64, whatever the documents are computed with."""
    made = roles_over(load_base_of(16))
    perturb(made, "policy")
    made.base.model.double()
    rows = [row for document in pieces for row in document]
    found = []
    for batch in (collate_units(packed, range(packed.units), 0), collate(rows, 0)):
        zero_grad(made)
        logps = made.logps("policy", batch).logps
        loss = -logps.double().sum() / batch.loss_mask.sum()
        loss.backward()
        found.append((float(loss.detach()), gradients(made).double()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6) and relative_error(found[0][1], found[1][1]) < 1e-6


def test_a_document_is_not_computed_in_the_context_of_another(roles: Roles, packed: TokenizedDataset) -> None:
    """Other tokens in one document of a pack change no log-prob of the others, with any path."""
    batch = collate_units(packed, range(packed.units), 0)
    changed = collate_units(packed, range(packed.units), 0)
    changed.input_ids[0] = (changed.input_ids[0] + 7) % 97
    for enabled in (True, False):
        with pytest.MonkeyPatch.context() as patch, roles.inference_mode():
            patch.setattr(roles.decoder.packed_rows, "enabled", enabled)
            before, after = (roles.logps("policy", each).logps for each in (batch, changed))
        assert relative_error(after[1:], before[1:]) < 1e-6 and relative_error(after[0], before[0]) > 1e-3


def test_packs_run_as_rows_of_real_tokens(roles: Roles, packed: TokenizedDataset) -> None:
    batch = collate_units(packed, range(packed.units), 0)
    tokens = step(roles, batch, {}, plain=False)[2]
    assert tokens == sum(LENGTHS) < batch.input_ids.numel()


def test_a_micro_batch_of_packs_is_limited_in_tokens(packed: TokenizedDataset) -> None:
    train = TrainingConfig(micro_batch_size=2, max_steps=1)
    by_tokens = packs_as_tokens(train, MAX_LENGTH)
    assert (by_tokens.micro_batch_rows, by_tokens.micro_batch_tokens) == (None, 2 * MAX_LENGTH)
    assert packs_as_tokens(TrainingConfig(max_steps=1), MAX_LENGTH).micro_batch_tokens == 4 * MAX_LENGTH
    given = TrainingConfig(micro_batch_tokens=100, max_steps=1)
    assert packs_as_tokens(given, MAX_LENGTH) is given
    batch = collate_units(packed, range(packed.units), 0)
    micros = list(batch.split(by_tokens.micro_batch_rows, by_tokens.micro_batch_tokens))
    assert max(micro.input_ids.numel() for micro in micros) <= 2 * MAX_LENGTH
    assert len(micros) <= packed.units / 2 + 2 < len(batch) / 2


def test_a_run_without_a_size_has_micro_batches_of_four_rows() -> None:
    assert TrainingConfig(max_steps=1).micro_batch_rows == 4
    assert TrainingConfig(max_steps=1, micro_batch_tokens=100).micro_batch_rows is None


def test_perplexity_is_exp_of_the_loss_and_finite(roles: Roles) -> None:
    algorithm = sft_over(roles)
    assert algorithm.validation_metrics({"loss": 2.0, "entropy": 1.0}) == {
        "loss": 2.0,
        "entropy": 1.0,
        "perplexity": pytest.approx(math.exp(2.0)),
    }
    assert perplexity(0.0) == 1.0 and math.isfinite(perplexity(1e6)) and math.isnan(perplexity(math.nan))
