"""Before the first step a fresh policy equals its reference: bit for bit on the plain paths, and within rounding as it
is trained."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from models import llama_roles, make_batch, ragged_batch, sft_over
from torch import Tensor

from lowrank_tune.algorithms.base import AlgorithmContext
from lowrank_tune.algorithms.dpo import DPO
from lowrank_tune.algorithms.kto import KTO
from lowrank_tune.batch import Batch, LabeledBatch, PairBatch
from lowrank_tune.config import DPOConfig, KTOConfig
from lowrank_tune.events import Event, LogMessage, is_warning
from lowrank_tune.model.decoder import Decoder
from lowrank_tune.model.roles import Roles

ROWS = [[5, 9, 12, 7, 8, 3], [5, 9, 6], [11, 13, 17], [11, 13, 4, 8, 20, 21, 22]]


@dataclass
class PlantedPath:
    """Adds `error` times a wave to all hidden states of a policy while it is enabled."""

    error: float
    name: str = "a planted path"
    enabled: bool = True


@pytest.fixture
def planted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Roles]:
    """Yields roles with a planted path, which their start-up comparison did not see."""
    roles = llama_roles(16)
    path = PlantedPath(request.param)
    roles.fast_paths.append(path)
    plain = Decoder.hidden

    def hidden(self: Decoder, batch: Batch) -> Tensor:
        states = plain(self, batch)
        return states + path.error * states.cos() if path.enabled and roles.active_stack else states

    monkeypatch.setattr(Decoder, "hidden", hidden)
    yield roles


def check(roles: Roles) -> None:
    sft_over(roles).check(ragged_batch(), 0)


@pytest.mark.parametrize("planted", [0.0, 3e-7], indirect=True)
def test_rounding_of_a_fast_path_passes(planted: Roles) -> None:
    check(planted)
    assert all(path.enabled for path in planted.fast_paths), "the check restores what was enabled"


@pytest.mark.parametrize("planted", [1e-3, math.nan], indirect=True)
def test_a_fast_path_that_computes_something_else_is_disabled(planted: Roles) -> None:
    events: list[Event] = []
    planted.limits.emit = events.append
    check(planted)
    assert not any(path.enabled for path in planted.fast_paths)
    (event,) = events
    assert is_warning(event) and isinstance(event, LogMessage)
    assert re.match(r"packed rows.*a planted path: before the first step the policy differs from its", event.message)
    assert event.message.endswith("; the plain paths are used")


@pytest.mark.parametrize("planted", [1e-3], indirect=True)
def test_a_policy_that_is_not_fresh_is_not_compared(planted: Roles) -> None:
    sft_over(planted).check(ragged_batch(), 1)


def dpo_and_pairs(beta: float) -> tuple[DPO, PairBatch]:
    roles = llama_roles(16)
    rows = make_batch(ROWS)
    pairs = PairBatch(rows.input_ids, rows.attention_mask, rows.completion_mask)
    with roles.inference_mode():
        pairs.reference_sequence_logps = roles.logps("reference", pairs).logps.sum(dim=1)
    return DPO(AlgorithmContext(roles), DPOConfig(beta=beta)), pairs


def test_dpo_begins_at_ln_2_and_its_check_sees_the_log_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm, pairs = dpo_and_pairs(0.1)
    seen: list[Tensor] = []
    monkeypatch.setattr(algorithm, "_check_first_loss", lambda logratios, micro: seen.append(logratios))
    algorithm.check(pairs, 0)
    assert seen[0].shape == (4,) and float(seen[0].abs().max()) < 1e-4
    pairs.token_weights = algorithm.token_weights(pairs)
    (term,) = algorithm.compute_losses(pairs)
    assert float(term.loss.detach()) == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize(("shift", "is_wrong"), [(0.001, False), (0.03, True), (-0.03, True), (math.nan, True)])
def test_a_first_loss_that_is_not_ln_2_disables_the_fast_paths(shift: float, is_wrong: bool) -> None:
    """With a beta of 0.1 a shift of the chosen rows by 0.03 nats changes the loss by 0.0015."""
    algorithm, pairs = dpo_and_pairs(0.1)
    logratios = torch.tensor([shift, 0.0, shift, 0.0])
    algorithm._check_first_loss(logratios, pairs)
    assert all(path.enabled is not is_wrong for path in algorithm.context.roles.fast_paths)


def kto_and_answers(beta: float) -> tuple[KTO, LabeledBatch]:
    roles = llama_roles(16)
    rows = make_batch(ROWS)
    answers = LabeledBatch(rows.input_ids, rows.attention_mask, rows.completion_mask)
    answers.labels = torch.tensor([True, False, False, False])
    with roles.inference_mode():
        answers.reference_sequence_logps = roles.logps("reference", answers).logps.sum(dim=1)
    context = AlgorithmContext(roles, lambda step: answers)
    algorithm = KTO(context, KTOConfig(beta=beta), max_length=16, micro_tokens=64)
    return algorithm, algorithm.collect(0).batch


def test_kto_begins_at_one_half_and_its_check_sees_the_log_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm, answers = kto_and_answers(0.1)
    seen: list[Tensor] = []
    monkeypatch.setattr(algorithm, "_check_first_loss", lambda logratios, micro: seen.append(logratios))
    algorithm.check(answers, 0)
    assert seen[0].shape == (4,) and float(seen[0].abs().max()) < 1e-4
    answers.token_weights = algorithm.token_weights(answers)
    (term,) = algorithm.compute_losses(answers)
    assert float(term.loss.detach()) == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize(
    ("shift", "kl", "is_wrong"),
    [(0.001, 0.0, False), (0.3, 0.0, True), (-0.3, 0.0, True), (0.0, 0.3, True), (math.nan, 0.0, True)],
)
def test_a_first_loss_of_kto_that_is_not_one_half_disables_the_fast_paths(
    shift: float, kl: float, is_wrong: bool
) -> None:
    """One of four answers is desirable: a shift of all log-ratios by 0.3 changes the mean loss by 0.004."""
    algorithm, answers = kto_and_answers(0.1)
    answers.kl_estimate = torch.full((4,), kl)
    algorithm._check_first_loss(torch.full((4,), shift), answers)
    assert all(path.enabled is not is_wrong for path in algorithm.context.roles.fast_paths)
