"""Reward model: the Bradley-Terry loss, the score at the last token, the gradient of a step, and short runs.

Oracles: numbers worked out by hand, `oracles.reward_pair` in float64, and the model of transformers in float64
(`oracles.PlainModel`). A test named `..._is_found` plants a bug, and shows that the check of the test before it fails.
"""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from algorithm_helpers import (
    LONG_PROMPTS,
    MARGINS,
    PAIR_ORDER,
    PAIR_PADDINGS,
    PAIR_SPLITS,
    accumulated,
    by_key,
    error_against,
    largest,
    loss_after_training,
    pair_batch,
    pair_rows,
    record_builds,
    record_packing,
)
from hypothesis import given
from hypothesis import strategies as st
from models import CPU, changed_tensors, load_base_of, perturb, relative_error, reward_roles, same_bytes
from oracles import PlainModel, reward_pair
from torch import Tensor, nn

from lowrank_tune import Recipe, run
from lowrank_tune.algorithms import reward_model as reward_module
from lowrank_tune.algorithms.base import AlgorithmContext
from lowrank_tune.algorithms.reward_model import RewardModeling, reward_loss
from lowrank_tune.assembly import build
from lowrank_tune.batch import Batch
from lowrank_tune.config import RewardModelConfig
from lowrank_tune.errors import UserError
from lowrank_tune.events import RunEnded, StepEnd
from lowrank_tune.model.adapters import read_adapter
from lowrank_tune.model.roles import Roles
from lowrank_tune.stats import to_floats

# --- the loss against the oracle --------------------------------------------------------------------------------------


def torch_loss(
    pairs: Sequence[tuple[float, float, float]], centering: float, dtype: torch.dtype
) -> list[tuple[float, ...]]:
    """Returns loss and derivatives by both scores of each (chosen, rejected, margin)."""
    chosen, rejected, margin = (
        torch.tensor(values, dtype=dtype, requires_grad=True) for values in zip(*pairs, strict=True)
    )
    losses = reward_module.reward_loss(chosen, rejected, margin.detach(), centering)
    chosen_slopes, rejected_slopes = torch.autograd.grad(losses.sum(), [chosen, rejected])
    return list(zip(losses.tolist(), chosen_slopes.tolist(), rejected_slopes.tolist(), strict=True))


def formula_error(pairs: Sequence[tuple[float, float, float]], centering: float, dtype: torch.dtype) -> float:
    """Returns the largest distance from `reward_pair`, relative to the numbers that are added on the way."""
    errors = []
    for found, (chosen, rejected, margin) in zip(torch_loss(pairs, centering, dtype), pairs, strict=True):
        size = abs(chosen) + abs(rejected) + abs(margin)
        scales = (1 + size + centering * size**2, *[1 + size + 2 * centering * size] * 2)
        expected = reward_pair(chosen, rejected, margin, centering)
        errors += [abs(a - b) / scale for a, b, scale in zip(found, expected, scales, strict=True)]
    return largest(errors)


SCORE = st.one_of(st.floats(-1000, 1000, width=32), st.floats(-3, 3, width=32), st.sampled_from([0.0, 1e3, -1e3]))
MARGIN = st.one_of(st.just(0.0), st.floats(0, 100, width=32))


@given(
    pairs=st.lists(st.tuples(SCORE, SCORE, MARGIN), min_size=1, max_size=5),
    centering=st.sampled_from([0.0, 2.0**-7, 1.0]),
)
def test_loss_and_gradient_equal_oracle(pairs: list[tuple[float, float, float]], centering: float) -> None:
    """-log sigmoid(R+ - R- - m) + c (R+ + R-)^2 (arXiv:2203.02155, equation 1; arXiv:2312.09244): 1e-12 in fp64, 1e-6
    in fp32."""
    assert formula_error(pairs, centering, torch.float64) < 1e-12
    assert formula_error(pairs, centering, torch.float32) < 1e-6


# sigma(ln 3) = 3/4
LN3 = math.log(3)
BY_HAND: list[tuple[tuple[float, float, float], float, tuple[float, float, float]]] = [
    # scores and margin, centering; loss, and the derivatives by both scores
    ((0.0, 0.0, 0.0), 0.0, (math.log(2), -0.5, 0.5)),  # a fresh head: ln 2
    ((LN3, 0.0, 0.0), 0.0, (math.log(4 / 3), -0.25, 0.25)),  # sigma(ln 3) = 3/4
    ((0.0, LN3, 0.0), 0.0, (math.log(4), -0.75, 0.75)),  # sigma(-ln 3) = 1/4
    ((2 * LN3, 0.0, LN3), 0.0, (math.log(4 / 3), -0.25, 0.25)),  # 2 ln 3 minus the margin
    ((2.0, 2.0, LN3), 0.0, (math.log(4), -0.75, 0.75)),  # equal scores: x is minus the margin
    ((1.0, 1.0, 0.0), 0.5, (math.log(2) + 2.0, 1.5, 2.5)),  # 0.5 (1 + 1)^2 = 2, its slope 0.5 * 2 * 2 = 2 on both
    ((LN3, -LN3 + LN3, 0.0), 0.25, (math.log(4 / 3) + 0.25 * LN3**2, -0.25 + 0.5 * LN3, 0.25 + 0.5 * LN3)),
]


def wrong_by_hand() -> int:
    """Returns how many entries of `BY_HAND` differ."""
    return sum(
        torch_loss([pair], c, torch.float64)[0] != pytest.approx(expected, abs=1e-12) for pair, c, expected in BY_HAND
    )


def test_loss_equals_numbers_by_hand() -> None:
    """The loss and its two derivatives are the numbers of `BY_HAND`."""
    assert wrong_by_hand() == 0


def test_oracle_equals_numbers_by_hand() -> None:
    """`reward_pair` gives the numbers of `BY_HAND` too."""
    for (chosen, rejected, margin), centering, expected in BY_HAND:
        assert reward_pair(chosen, rejected, margin, centering) == pytest.approx(expected, abs=1e-12)


BUGS: dict[str, Any] = {
    "margin added": lambda chosen, rejected, margin, c: reward_loss(chosen, rejected, -margin, c),
    "margin lost": lambda chosen, rejected, margin, c: reward_loss(chosen, rejected, 0 * margin, c),
    "margin outside": lambda chosen, rejected, margin, c: reward_loss(chosen, rejected, 0 * margin, c) + margin,
    "sides swapped": lambda chosen, rejected, margin, c: reward_loss(rejected, chosen, margin, c),
    "centers each side": lambda chosen, rejected, margin, c: (
        reward_loss(chosen, rejected, margin) + c * (chosen**2 + rejected**2)
    ),
    "centers the difference": lambda chosen, rejected, margin, c: (
        reward_loss(chosen, rejected, margin) + c * (chosen - rejected) ** 2
    ),
    "centring detached": lambda chosen, rejected, margin, c: (
        reward_loss(chosen, rejected, margin) + c * (chosen + rejected).detach() ** 2
    ),
    "bf16 scores": lambda chosen, rejected, margin, c: reward_loss(
        chosen.bfloat16().to(chosen.dtype), rejected, margin, c
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_loss_bugs_differ_from_numbers_by_hand(monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    """The numbers of `BY_HAND` find bugs of margin, sides, centering and precision."""
    monkeypatch.setattr(reward_module, "reward_loss", BUGS[bug])
    assert wrong_by_hand() > 0


def is_finite_for_extremes() -> bool:
    """Returns whether loss and gradient are finite for scores of up to 1e4 and margins of up to 1e3."""
    values = (0.0, 1e3, -1e3, 1e4, -1e4)
    pairs = [(p, q, m) for p in values for q in values for m in (0.0, 1e3)]
    return all(math.isfinite(number) for found in torch_loss(pairs, 0.01, torch.float32) for number in found)


def test_extreme_scores_give_finite_losses() -> None:
    """Scores of up to 1e4 give a finite loss and a finite gradient in fp32."""
    assert is_finite_for_extremes()


def test_slopes_of_wrong_pair_are_minus_1_and_1() -> None:
    """A pair that is wrong by 2000 has the full gradient, not 0."""
    assert torch_loss([(-1e3, 1e3, 0.0)], 0.0, torch.float32)[0][1:] == (-1.0, 1.0)


def test_log_of_sigmoid_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """`is_finite_for_extremes` finds log(sigmoid(x)), which is -inf for a large negative x."""
    monkeypatch.setattr(
        reward_module,
        "reward_loss",
        lambda chosen, rejected, margin, c: -torch.log(torch.sigmoid(chosen - rejected - margin)),
    )
    assert not is_finite_for_extremes()


# --- through a model --------------------------------------------------------------------------------------------------


def perturbed_roles(dropout: float = 0.0, **more: Any) -> Roles:
    """Returns fp32 roles: a frozen SFT adapter below the reward adapter, and its head, with random weights."""
    roles = reward_roles(load_base_of(16), lower=["sft"], dropout=dropout, **more)
    perturb(roles, "sft", size=0.05)
    perturb(roles, "reward", size=0.05, seed=2)
    # Scores of a few units.
    roles.heads["reward"].weight.data.mul_(0.2)
    return roles


@pytest.fixture(scope="module")
def roles() -> Roles:
    return perturbed_roles()


def reward_over(roles: Roles, centering: float = 0.0) -> RewardModeling:
    return RewardModeling(AlgorithmContext(roles), RewardModelConfig(center_rewards_coefficient=centering))


def stepped(
    roles: Roles, batch: Batch, centering: float = 0.0, **split: int | None
) -> tuple[float, Tensor, dict[str, float]]:
    return accumulated(reward_over(roles, centering), batch, "reward", **split)


def model_error(roles: Roles, centering: float, margins: Sequence[float] = MARGINS) -> tuple[float, float]:
    """Returns the distance of the loss, and of the gradients of adapter and head, from the model of transformers in
    float64, each row alone and without padding."""
    rows, masks = pair_rows()
    loss, _, stats = stepped(roles, pair_batch(rows, masks, margins=margins), centering, rows=4)
    plain = PlainModel([roles.adapter_tensors("sft")], roles.adapter_tensors("reward"))
    expected = 0.0
    for i in range(0, len(rows), 2):
        scores = [plain.score(rows[j]) for j in (i, i + 1)]
        value, by_chosen, by_rejected = reward_pair(
            *(float(score.detach()) for score in scores), margins[i // 2], centering
        )
        expected += 2 * value / len(rows)
        (2 / len(rows) * (by_chosen * scores[0] + by_rejected * scores[1])).backward()
    wrong = max(abs(loss - expected), abs(stats["loss"] - expected)) / (1 + abs(expected))
    return wrong, error_against(by_key(roles, "reward"), plain.gradient())


@pytest.mark.parametrize(("centering", "margins"), [(0.0, (0.0,) * 5), (0.0, MARGINS), (0.1, MARGINS)])
def test_step_equals_plain_model(roles: Roles, centering: float, margins: tuple[float, ...]) -> None:
    """Loss and gradients of adapter and head are those of the model of transformers in float64."""
    loss, gradient = model_error(roles, centering, margins)
    assert loss < 1e-5 and gradient < 1e-4


def _before_the_first_pad(self: Roles, role: str, batch: Batch) -> Tensor:
    """A common bug: the last token is searched by its id, so a pad id inside a row ends it."""
    is_pad = (batch.input_ids == 0) | ~batch.attention_mask
    place = torch.where(is_pad.any(dim=1), is_pad.int().argmax(dim=1) - 1, batch.input_ids.shape[1] - 1).clamp_min(0)
    return self.heads[role](self.hidden(role, batch)[torch.arange(len(batch)), place])


def _last_column(self: Roles, role: str, batch: Batch) -> Tensor:
    return self.heads[role](self.hidden(role, batch)[:, -1])


def _last_answer_mean(self: Roles, role: str, batch: Batch) -> Tensor:
    return (self.scores(role, batch) * batch.loss_mask).sum(dim=1) / batch.loss_mask.sum(dim=1)


def _head_detached(self: Roles, role: str, batch: Batch) -> Tensor:
    return nn.functional.linear(
        self.hidden(role, batch)[torch.arange(len(batch)), batch.lengths - 1], self.heads[role].weight.detach()
    )[:, 0]


def _hidden_detached(self: Roles, role: str, batch: Batch) -> Tensor:
    return self.heads[role](self.hidden(role, batch).detach()[torch.arange(len(batch)), batch.lengths - 1])


def _base_alone(self: Roles, role: str, batch: Batch) -> Tensor:
    whole = self.stacks[role]
    self.stacks[role] = whole[-1:]
    try:
        return real_last(self, role, batch)
    finally:
        self.stacks[role] = whole


real_last = Roles.sequence_scores
PLACES = [_before_the_first_pad, _last_column, _last_answer_mean, _base_alone]


@pytest.mark.parametrize("bug", [*PLACES, _head_detached, _hidden_detached])
def test_wrong_token_stack_or_graph_is_found(monkeypatch: pytest.MonkeyPatch, roles: Roles, bug: Any) -> None:
    """`model_error` finds a score at another token, a base without the SFT adapter, and detached heads or states."""
    rows, _ = pair_rows()
    assert any(0 in row for row in rows), "no row contains the pad id"
    monkeypatch.setattr(Roles, "sequence_scores", bug)
    # Whose padding has the state of the last token.
    monkeypatch.setattr(roles.decoder.packed_rows, "enabled", False)
    assert max(model_error(roles, 0.0)) > 1e-2


@pytest.mark.parametrize(
    ("place", "name", "bug"),
    [
        (reward_module, "reward_loss", BUGS["margin lost"]),
        (reward_module, "pair_mean_weights", lambda rows: torch.full((len(rows),), 1 / len(rows))),
        (RewardModeling, "rows_per_unit", 1),
    ],
    ids=["margin lost", "mean over rows", "pairs split"],
)
def test_wrong_margins_or_pairs_are_found(
    monkeypatch: pytest.MonkeyPatch, roles: Roles, place: Any, name: str, bug: Any
) -> None:
    """`model_error` finds a loss without margins, a mean over rows, and micro-batches that split pairs."""
    monkeypatch.setattr(place, name, bug)
    assert max(model_error(roles, 0.0)) > 1e-2


def split_error(roles: Roles) -> float:
    """Returns the largest distance of loss, gradient and metrics of a split step from those of a whole one."""
    rows, masks = pair_rows()
    batch = pair_batch(rows, masks)
    loss, gradient, stats = stepped(roles, batch, 0.1)
    errors = []
    for split in PAIR_SPLITS:
        other, others, figures = stepped(roles, batch, 0.1, **split)
        errors += [abs(other - loss) / abs(loss), relative_error(others, gradient)]
        errors += [abs(figures[name] - stats[name]) / (abs(stats[name]) + 1e-1) for name in stats]
    return max(errors)


def _mean_of_means(self: RewardModeling, batch: Batch) -> Iterator[Any]:
    batch.token_weights = torch.full((len(batch),), 2 / len(batch))
    yield from real_terms(self, batch)


real_terms = RewardModeling.compute_losses


def test_micro_batches_give_gradient_of_whole_step(roles: Roles) -> None:
    """Loss, gradient and metrics do not depend on the size of the micro-batches."""
    assert split_error(roles) < 5e-6


def test_mean_of_micro_batch_means_is_found(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    """`split_error` finds weights that count the pairs of the micro-batch."""
    monkeypatch.setattr(RewardModeling, "compute_losses", _mean_of_means)
    assert split_error(roles) > 1e-2


@pytest.mark.parametrize("how", PAIR_PADDINGS, ids=str)
def test_padding_and_order_change_no_gradient(roles: Roles, how: dict[str, Any]) -> None:
    """Loss and gradient do not depend on the width, side or ids of padding, nor on the order of the pairs."""
    rows, masks = pair_rows()
    loss, gradient, _ = stepped(roles, pair_batch(rows, masks), 0.1)
    in_order = pair_batch(rows, masks, **how)
    order = [row for pair in PAIR_ORDER for row in (2 * pair, 2 * pair + 1)]
    margins = [MARGINS[pair] for pair in PAIR_ORDER]
    shuffled = pair_batch([rows[i] for i in order], [masks[i] for i in order], margins=margins, **how)
    for batch, split in ((in_order, {}), (shuffled, {"rows": 4})):
        padded_loss, padded_gradient, _ = stepped(roles, batch, 0.1, **split)
        assert padded_loss == pytest.approx(loss, rel=1e-5)
        assert relative_error(padded_gradient, gradient) < 1e-5


def test_ids_in_padding_are_not_read(roles: Roles) -> None:
    """Loss and gradient are bit-identical for any ids in the padding, also ids outside the vocabulary."""
    rows, masks = pair_rows()
    found = []
    for garbage in (0, 1, 10**9, -7):
        batch = pair_batch(rows, masks, more=2)
        batch.input_ids = batch.input_ids.where(batch.attention_mask, garbage)
        found.append(stepped(roles, batch)[:2])
    assert all(loss == found[0][0] and same_bytes(gradient, found[0][1]) for loss, gradient in found[1:])


@given(
    ends=st.lists(st.sampled_from([0, 1, 2, 50]), min_size=2, max_size=2),
    inside=st.sampled_from([0, 1]),
    seed=st.integers(0, 9),
)
def test_score_is_that_of_the_last_token(ends: list[int], inside: int, seed: int) -> None:
    """Rows that end in pad, end-of-text or any other id, with pads and ends inside, have the score of the plain model's
    last hidden state."""
    rows, masks = pair_rows([(3, 4, 6)], seed)
    for row, end in zip(rows, ends, strict=True):
        row[1], row[-2], row[-1] = inside, inside, end
    roles, plain = roles_and_plain_model()
    with roles.inference_mode():
        found = reward_over(roles).scores(pair_batch(rows, masks, margins=[0.0], more=3)).tolist()
    with torch.no_grad():
        assert found == pytest.approx([float(plain.score(row)) for row in rows], abs=2e-5)


@functools.cache
def roles_and_plain_model() -> tuple[Roles, PlainModel]:
    """Hypothesis cannot reset a fixture between examples, so this is a function."""
    roles = perturbed_roles()
    return roles, PlainModel([roles.adapter_tensors("sft")], roles.adapter_tensors("reward"))


def test_shared_prompts_change_no_gradient(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradient are those of whole rows if the prompt of a pair is computed once."""
    packed = record_packing(monkeypatch)
    rows, masks = pair_rows(LONG_PROMPTS)
    loss, gradient, _ = stepped(roles, pair_batch(rows, masks), 0.1)
    assert not any(packed)
    shared_loss, shared_gradient, _ = stepped(roles, pair_batch(rows, masks, share=True), 0.1, rows=2)
    assert any(packed), "no prompt was shared"
    assert shared_loss == pytest.approx(loss, rel=1e-5)
    assert relative_error(shared_gradient, gradient) < 1e-5


def test_dropout_is_on_in_training_and_off_in_evaluation(roles: Roles) -> None:
    """With dropout two training passes differ; scores and evaluations do not, and equal those of a model without it."""
    noisy = perturbed_roles(dropout=0.5)
    rows, masks = pair_rows()
    batch = pair_batch(rows, masks)
    assert not same_bytes(stepped(noisy, batch)[1], stepped(noisy, batch)[1])
    for one in (noisy, roles):
        assert one.base.model.training, "dropout is off"
    with noisy.inference_mode(), roles.inference_mode():
        assert same_bytes(reward_over(noisy).scores(batch), reward_over(roles).scores(batch))
        assert to_floats(reward_over(noisy).eval_metrics(batch)) == to_floats(reward_over(roles).eval_metrics(batch))
    assert noisy.base.model.training


def test_fresh_head_has_loss_ln_2() -> None:
    """A fresh head is zero: loss ln 2, ties only, and the head itself has a gradient."""
    fresh = reward_roles(load_base_of(16))
    rows, masks = pair_rows()
    loss, gradient, stats = stepped(fresh, pair_batch(rows, masks, margins=[0.0] * 5))
    assert loss == pytest.approx(math.log(2), abs=1e-7)
    assert stats["accuracy"] == 0.5
    assert stats["margin"] == stats["score_chosen"] == stats["score_rejected"] == 0.0
    assert float(fresh.heads["reward"].weight.grad.norm()) > 1e-3  # type: ignore[union-attr]


def test_metrics_equal_plain_model(roles: Roles) -> None:
    """Accuracy, margin and mean scores are those of the plain model."""
    rows, masks = pair_rows()
    figures = stepped(roles, pair_batch(rows, masks), rows=4)[2]
    plain = PlainModel([roles.adapter_tensors("sft")], roles.adapter_tensors("reward"))
    with torch.no_grad():
        scores = torch.stack([plain.score(row) for row in rows])
    chosen, rejected = scores[::2], scores[1::2]
    expected = {
        "accuracy": (chosen > rejected).double().mean(),
        "margin": (chosen - rejected).mean(),
        "score_chosen": chosen.mean(),
        "score_rejected": rejected.mean(),
    }
    assert {name: figures[name] for name in expected} == pytest.approx(
        {name: float(v) for name, v in expected.items()}, abs=1e-5
    )


def can_learn(roles: Roles) -> bool:
    """Returns whether thirty steps on one batch halve the loss and order every pair."""
    rows, masks = pair_rows()
    batch = pair_batch(rows, masks, margins=[0.0] * 5)
    first, last, stats = loss_after_training(reward_over(roles), batch, "reward")
    return last < 0.5 * first and stats["accuracy"] == 1.0


def test_thirty_steps_order_every_pair() -> None:
    """Thirty steps on one batch halve the loss, and every chosen answer then has the larger score."""
    assert can_learn(reward_roles(load_base_of(16), checkpointing=True))


def test_detached_loss_does_not_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """`can_learn` finds a loss without a gradient."""
    monkeypatch.setattr(reward_module, "reward_loss", lambda *given: reward_loss(*given).detach().requires_grad_())
    assert not can_learn(reward_roles(load_base_of(16)))


# --- whole runs -------------------------------------------------------------------------------------------------------


def small_reward(**changes: Any) -> dict[str, Any]:
    return {
        "name": "reward",
        "algorithm": "reward",
        "base": {"model": "tiny-tutor", "bits": 4},
        "adapters": {"reward": {"r": 4, "lora_dropout": 0.1}},
        "data": {
            "train": [{"dataset": "builtin:arithmetic-preferences", "max_samples": 40}],
            "eval_fraction": 0.2,
            "max_length": 256,
        },
        "train": {
            "max_steps": 6,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "learning_rate": 2e-3,
            "logging_steps": 1,
            "gradient_checkpointing": False,
        },
        **changes,
    }


AGAIN = """
import json, sys, torch, numpy as np
from lowrank_tune import Recipe
from lowrank_tune.assembly import build
recipe, out = json.loads(sys.argv[1]), sys.argv[2]
recipe["adapters"] = {"reward": {"path": out}}
built = build(Recipe.from_dict(recipe), lambda event: None, torch.device("cpu"))
with built.roles.inference_mode():
    scores = built.algorithm.scores(built.validation_batch(np.arange(len(built.data.validation))))
head = built.roles.adapter_tensors("reward")["base_model.model.score.weight"]
print(json.dumps({"head": head.flatten().tolist(), "scores": scores.tolist(), "fresh": built.algorithm.context.fresh}))
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[Any]]:
    """A finished run: its folder, its head and its scores of the held-out pairs in memory, and its events."""
    out = tmp_path_factory.mktemp("runs") / "reward"
    events, ended = list[Any](), dict[str, Any]()

    def record(event: Any) -> None:
        events.append(event)
        if isinstance(event, RunEnded):
            built = builds[0]
            with built.roles.inference_mode():
                batch = built.validation_batch(np.arange(len(built.data.validation)))
                ended.update(
                    scores=built.algorithm.scores(batch), head=built.roles.heads["reward"].weight.detach().clone()
                )

    with pytest.MonkeyPatch.context() as patch:
        builds = record_builds(patch)
        run(Recipe.from_dict(small_reward()), out=out, ui="none", device=CPU, on_event=record)
    return out, ended, events


@pytest.mark.slow
def test_head_is_restored_bit_for_bit_in_new_process(finished: tuple[Path, dict[str, Any], list[Any]]) -> None:
    """A new process that loads the saved adapter has the same head and the same scores, bit for bit."""
    out, ended, _ = finished
    completed = subprocess.run(
        [sys.executable, "-c", AGAIN, json.dumps(small_reward()), str(out)], capture_output=True, text=True, timeout=300
    )
    assert completed.returncode == 0, completed.stderr
    found = json.loads(completed.stdout.splitlines()[-1])
    # An untrained head would be equal too.
    assert ended["head"].abs().max() > 1e-3 and len(set(found["scores"])) > 4
    assert same_bytes(torch.tensor([found["head"]]), ended["head"])
    assert same_bytes(torch.tensor(found["scores"]), ended["scores"]) and found["fresh"] is False
    saved = read_adapter(str(out), "adapters.reward.path", head=True)
    assert saved.head is not None and saved.head.dtype == torch.float32 and same_bytes(saved.head, ended["head"])
    with pytest.raises(UserError, match="is a reward adapter"):
        read_adapter(str(out), "adapters.policy.path")


def test_first_step_of_a_run_has_loss_ln_2(finished: tuple[Path, dict[str, Any], list[Any]]) -> None:
    """A fresh head scores 0: loss ln 2, ties only, and no KL."""
    _, _, events = finished
    first = next(event for event in events if isinstance(event, StepEnd)).stats
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["accuracy"] == 0.5
    assert "kl" not in first


def test_run_saves_scores_and_metrics_of_held_out_pairs(finished: tuple[Path, dict[str, Any], list[Any]]) -> None:
    """`scores.json` contains the scores of the model in memory, and metrics that are recomputed here."""
    out, ended, _ = finished
    scores = json.loads((out / "scores.json").read_text())
    chosen, rejected = ended["scores"][::2], ended["scores"][1::2]
    assert scores["chosen"] == pytest.approx(chosen.tolist(), abs=1e-4)
    assert scores["rejected"] == pytest.approx(rejected.tolist(), abs=1e-4)
    figures = scores["metrics"]
    assert figures["accuracy"] == pytest.approx(
        float((chosen > rejected).double().mean() + 0.5 * (chosen == rejected).double().mean())
    )
    assert figures["margin"] == pytest.approx(float((chosen - rejected).mean()), abs=1e-5)
    lengths = torch.tensor(scores["chosen_tokens"] + scores["rejected_tokens"]).double()
    both = torch.cat([chosen, rejected]).double()
    assert figures["length_correlation"] == pytest.approx(
        float(torch.corrcoef(torch.stack([both, lengths]))[0, 1]), abs=1e-6
    )
    longer = [
        (c > r) == (m > n)
        for c, r, m, n in zip(chosen, rejected, scores["chosen_tokens"], scores["rejected_tokens"], strict=True)
        if m != n
    ]
    assert figures["prefers_longer"] == pytest.approx(sum(map(float, longer)) / len(longer))
    assert sum(entry["pairs"] for entry in scores["reliability"]) == scores["pairs"] == len(chosen)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["heldout_pairs"] == figures and summary["base_hash"]["start"] == summary["base_hash"]["end"]


def test_two_builds_with_one_seed_are_equal() -> None:
    """One seed gives the same adapters and batches, another seed gives others."""
    one, two, other = (build(Recipe.from_dict(small_reward(seed=seed)), lambda event: None, CPU) for seed in (5, 5, 6))
    assert changed_tensors(one.roles.adapter_tensors("reward"), two.roles.adapter_tensors("reward")) == set()
    assert changed_tensors(one.roles.adapter_tensors("reward"), other.roles.adapter_tensors("reward")) != set()
    a, b, c = (built.algorithm.collect(0).batch for built in (one, two, other))
    assert same_bytes(a.input_ids, b.input_ids)
    assert not same_bytes(a.row_indices, c.row_indices)
    assert a.reference_sequence_logps is None
