"""Laws of the reward model: the loss by hand, in float64 and through a plain model; the score stands at the last token,
whatever it is."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from algorithm_helpers import MARGINS, accumulated, by_key, error_against, pair_batch, pair_rows
from hypothesis import given
from hypothesis import strategies as st
from models import CPU, VOCAB, changed_tensors, load_base_of, perturb, relative_error, reward_roles, same_bytes
from oracles import PlainModel, reward_pair
from torch import Tensor, nn

from lowrank_tune import Recipe, run
from lowrank_tune import runner as runner_module
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
    """What the kit makes of pairs of scores and a margin: losses, and their derivatives."""
    chosen, rejected, margin = (
        torch.tensor(values, dtype=dtype, requires_grad=True) for values in zip(*pairs, strict=True)
    )
    losses = reward_module.reward_loss(chosen, rejected, margin.detach(), centering)
    by = torch.autograd.grad(losses.sum(), [chosen, rejected])
    return list(zip(losses.tolist(), *(each.tolist() for each in by), strict=True))


def error(pairs: Sequence[tuple[float, float, float]], centering: float, dtype: torch.dtype) -> float:
    """The largest distance from the oracle, against the size of what is added up on the way."""
    worst = 0.0
    for found, (chosen, rejected, margin) in zip(torch_loss(pairs, centering, dtype), pairs, strict=True):
        size = abs(chosen) + abs(rejected) + abs(margin)
        scales = (1 + size + centering * size**2, *[1 + size + 2 * centering * size] * 2)
        for got, wanted, scale in zip(found, reward_pair(chosen, rejected, margin, centering), scales, strict=True):
            distance = abs(got - wanted) / scale
            worst = max(worst, distance if distance == distance else math.inf)
    return worst


SCORE = st.one_of(st.floats(-1000, 1000, width=32), st.floats(-3, 3, width=32), st.sampled_from([0.0, 1e3, -1e3]))
MARGIN = st.one_of(st.just(0.0), st.floats(0, 100, width=32))


@given(
    pairs=st.lists(st.tuples(SCORE, SCORE, MARGIN), min_size=1, max_size=5),
    centering=st.sampled_from([0.0, 2.0**-7, 1.0]),
)
def test_loss_and_gradient_equal_the_formula(pairs: list[tuple[float, float, float]], centering: float) -> None:
    assert error(pairs, centering, torch.float64) < 1e-12
    assert error(pairs, centering, torch.float32) < 1e-6


LN3 = math.log(3)  # sigma(ln 3) = 3/4
BY_HAND: list[tuple[tuple[float, float, float], float, tuple[float, float, float]]] = [
    # scores and margin, centering; loss, and the derivatives by both scores
    ((0.0, 0.0, 0.0), 0.0, (math.log(2), -0.5, 0.5)),  # a fresh head: ln 2
    ((LN3, 0.0, 0.0), 0.0, (math.log(4 / 3), -0.25, 0.25)),  # sigma(ln 3) = 3/4
    ((0.0, LN3, 0.0), 0.0, (math.log(4), -0.75, 0.75)),  # sigma(-ln 3) = 1/4
    ((2 * LN3, 0.0, LN3), 0.0, (math.log(4 / 3), -0.25, 0.25)),  # the margin takes one ln 3 away
    ((2.0, 2.0, LN3), 0.0, (math.log(4), -0.75, 0.75)),  # level scores with a margin are behind by it
    ((1.0, 1.0, 0.0), 0.5, (math.log(2) + 2.0, 1.5, 2.5)),  # 0.5 (1 + 1)^2 = 2, its slope 0.5 * 2 * 2 = 2 on both
    ((LN3, -LN3 + LN3, 0.0), 0.25, (math.log(4 / 3) + 0.25 * LN3**2, -0.25 + 0.5 * LN3, 0.25 + 0.5 * LN3)),
]


def wrong_by_hand() -> int:
    """How many of the numbers are not those worked by hand."""
    return sum(
        torch_loss([pair], c, torch.float64)[0] != pytest.approx(expected, abs=1e-12) for pair, c, expected in BY_HAND
    )


def test_by_hand() -> None:
    assert wrong_by_hand() == 0
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
def test_wrong_losses_are_seen(monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    monkeypatch.setattr(reward_module, "reward_loss", BUGS[bug])
    assert wrong_by_hand() > 0


def far_out_is_finite() -> bool:
    values = (0.0, 1e3, -1e3, 1e4, -1e4)
    pairs = [(p, q, m) for p in values for q in values for m in (0.0, 1e3)]
    return all(math.isfinite(number) for found in torch_loss(pairs, 0.01, torch.float32) for number in found)


def test_extremes_stay_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    assert far_out_is_finite()
    # badly wrong pulls with all its weight
    assert torch_loss([(-1e3, 1e3, 0.0)], 0.0, torch.float32)[0][1:] == (-1.0, 1.0)
    monkeypatch.setattr(
        reward_module,
        "reward_loss",
        lambda chosen, rejected, margin, c: -torch.log(torch.sigmoid(chosen - rejected - margin)),
    )
    assert not far_out_is_finite()


# --- through a model --------------------------------------------------------------------------------------------------


def perturbed_roles(dropout: float = 0.0, **more: Any) -> Roles:
    """fp32, a frozen SFT adapter below the reward adapter, all with weights that matter."""
    roles = reward_roles(load_base_of(16), lower=["sft"], dropout=dropout, **more)
    perturb(roles, "sft", size=0.05)
    perturb(roles, "reward", size=0.05, seed=2)
    roles.heads["reward"].weight.data.mul_(0.2)  # scores of a few units: neither flat nor saturated
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
    """Distance of loss and gradient, adapter and head, from transformers' hidden states in float64, each row alone and
    unpadded."""
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
def test_through_a_model(roles: Roles, centering: float, margins: tuple[float, ...]) -> None:
    loss, gradient = model_error(roles, centering, margins)
    assert loss < 1e-5 and gradient < 1e-4


def _before_the_first_pad(self: Roles, role: str, batch: Batch) -> Tensor:
    """The field's fault: the last token is looked for by its id, so the pad id inside a row ends it."""
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
def test_another_token_stack_or_graph_is_seen(monkeypatch: pytest.MonkeyPatch, roles: Roles, bug: Any) -> None:
    rows, _ = pair_rows()
    assert any(0 in row for row in rows), (
        "the pad id stands inside no row: the test could not see what it is there to see"
    )
    monkeypatch.setattr(Roles, "sequence_scores", bug)
    assert max(model_error(roles, 0.0)) > 1e-2


def test_margins_and_pairs_are_read_where_they_belong(monkeypatch: pytest.MonkeyPatch, roles: Roles) -> None:
    with monkeypatch.context() as planted:
        planted.setattr(reward_module, "reward_loss", BUGS["margin lost"])
        assert max(model_error(roles, 0.0)) > 1e-2
    with monkeypatch.context() as planted:
        planted.setattr(reward_module, "pair_mean_weights", lambda rows: torch.full((len(rows),), 1 / len(rows)))
        assert max(model_error(roles, 0.0)) > 1e-2
    with monkeypatch.context() as planted:
        planted.setattr(RewardModeling, "rows_per_unit", 1)
        assert max(model_error(roles, 0.0)) > 1e-2


SPLITS: list[dict[str, int | None]] = [
    {"rows": 2},
    {"rows": 4},
    {"rows": 6},
    {"tokens": 1},
    {"tokens": 40},
    {"tokens": 10_000},
]


def split_error(roles: Roles) -> float:
    rows, masks = pair_rows()
    batch = pair_batch(rows, masks)
    loss, gradient, stats = stepped(roles, batch, 0.1)
    errors = []
    for split in SPLITS:
        other, others, figures = stepped(roles, batch, 0.1, **split)
        errors += [abs(other - loss) / abs(loss), relative_error(others, gradient)]
        errors += [abs(figures[name] - stats[name]) / (abs(stats[name]) + 1e-1) for name in stats]
    return max(errors)


def _mean_of_means(self: RewardModeling, batch: Batch) -> Iterator[Any]:
    batch.token_weights = torch.full((len(batch),), 2 / len(batch))
    yield from real_terms(self, batch)


real_terms = RewardModeling.compute_losses


def test_any_split_gives_one_gradient(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    assert split_error(roles) < 5e-6
    monkeypatch.setattr(RewardModeling, "compute_losses", _mean_of_means)
    assert split_error(roles) > 1e-2


PADDINGS: list[dict[str, Any]] = [
    {"more": 7},
    {"filler": 1},
    {"more": 3, "filler": VOCAB - 1},
    {"left": True},
    {"left": True, "more": 2, "filler": 9},
]


@pytest.mark.parametrize("how", PADDINGS, ids=str)
def test_padding_and_order_change_nothing(roles: Roles, how: dict[str, Any]) -> None:
    rows, masks = pair_rows()
    loss, gradient, _ = stepped(roles, pair_batch(rows, masks), 0.1)
    padded, same, _ = stepped(roles, pair_batch(rows, masks, **how), 0.1)
    assert padded == pytest.approx(loss, rel=1e-5) and relative_error(same, gradient) < 1e-5
    order = (3, 0, 4, 2, 1)
    picked = [j for i in order for j in (2 * i, 2 * i + 1)]
    batch = pair_batch(
        [rows[j] for j in picked], [masks[j] for j in picked], margins=[MARGINS[i] for i in order], **how
    )
    other, same, _ = stepped(roles, batch, 0.1, rows=4)
    assert other == pytest.approx(loss, rel=1e-5) and relative_error(same, gradient) < 1e-5


def test_ids_in_padding_are_not_read_at_all(roles: Roles) -> None:
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
def test_the_score_is_the_last_tokens_whatever_it_is(ends: list[int], inside: int, seed: int) -> None:
    """Rows that end in pad, end-of-text or any other id, with pads and ends inside, score as the plain model's last
    hidden state."""
    rows, masks = pair_rows([(3, 4, 6)], seed)
    for row, end in zip(rows, ends, strict=True):
        row[1], row[-2], row[-1] = inside, inside, end
    roles, plain = kept()
    with roles.inference_mode():
        found = reward_over(roles).scores(pair_batch(rows, masks, margins=[0.0], more=3)).tolist()
    with torch.no_grad():
        assert found == pytest.approx([float(plain.score(row)) for row in rows], abs=2e-5)


KEPT: list[tuple[Roles, PlainModel]] = []


def kept() -> tuple[Roles, PlainModel]:
    if not KEPT:
        roles = perturbed_roles()
        KEPT.append((roles, PlainModel([roles.adapter_tensors("sft")], roles.adapter_tensors("reward"))))
    return KEPT[0]


def test_shared_prompts_change_nothing(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    planted: list[bool] = []
    real = Roles.pack

    def watched(self: Roles, batch: Batch) -> Any:
        planted.append((tree := real(self, batch)) is not None)
        return tree

    monkeypatch.setattr(Roles, "pack", watched)
    rows, masks = pair_rows([(40, 6, 9), (33, 2, 12), (50, 1, 1)])
    loss, gradient, _ = stepped(roles, pair_batch(rows, masks), 0.1)
    assert not any(planted)
    shared, same, _ = stepped(roles, pair_batch(rows, masks, share=True), 0.1, rows=2)
    assert any(planted), "nothing was shared: this test saw nothing"
    assert shared == pytest.approx(loss, rel=1e-5) and relative_error(same, gradient) < 1e-5


def test_dropout_trains_and_does_not_measure(roles: Roles) -> None:
    """With dropout two training passes differ; scores and measurements do not, and equal those of a model without
    it."""
    noisy = perturbed_roles(dropout=0.5)
    rows, masks = pair_rows()
    batch = pair_batch(rows, masks)
    assert not same_bytes(stepped(noisy, batch)[1], stepped(noisy, batch)[1])
    for one in (noisy, roles):
        assert one.base.model.training, "dropout would not fire at all"
    with noisy.inference_mode(), roles.inference_mode():
        assert same_bytes(reward_over(noisy).scores(batch), reward_over(roles).scores(batch))
        assert to_floats(reward_over(noisy).eval_metrics(batch)) == to_floats(reward_over(roles).eval_metrics(batch))
    assert noisy.base.model.training


def test_a_fresh_head_is_undecided(roles: Roles) -> None:
    """It starts at zero: loss ln 2, every pair a tie, and the head moves first."""
    fresh = reward_roles(load_base_of(16))
    rows, masks = pair_rows()
    loss, gradient, stats = stepped(fresh, pair_batch(rows, masks, margins=[0.0] * 5))
    assert loss == pytest.approx(math.log(2), abs=1e-7) and stats["accuracy"] == 0.5
    assert stats["margin"] == stats["score_chosen"] == stats["score_rejected"] == 0.0
    assert float(fresh.heads["reward"].weight.grad.norm()) > 1e-3  # type: ignore[union-attr]


def test_figures_by_the_plain_model(roles: Roles) -> None:
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


def falls(roles: Roles) -> bool:
    """Whether thirty steps on one batch bring the loss down by half and every pair the right way round."""
    rows, masks = pair_rows()
    batch = pair_batch(rows, masks, margins=[0.0] * 5)
    optimizer = torch.optim.AdamW(roles.parameters("reward"), lr=1e-2)
    losses: list[float] = []
    for _ in range(30):
        loss, _, stats = stepped(roles, batch)
        losses.append(loss)
        optimizer.step()
    return losses[-1] < 0.5 * losses[0] and stats["accuracy"] == 1.0


def test_it_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    assert falls(reward_roles(load_base_of(16), checkpointing=True))
    monkeypatch.setattr(reward_module, "reward_loss", lambda *given: reward_loss(*given).detach().requires_grad_())
    with pytest.raises(AssertionError):
        assert falls(reward_roles(load_base_of(16)))


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
import json, sys, torch
from lowrank_tune import Recipe
from lowrank_tune.assembly import build
recipe, out = json.loads(sys.argv[1]), sys.argv[2]
recipe["adapters"] = {"reward": {"path": out}}
built = build(Recipe.from_dict(recipe), lambda event: None, torch.device("cpu"))
with built.roles.inference_mode():
    scores = built.algorithm.scores(built.validation_batch(list(range(built.data.validation.units))))
head = built.roles.adapter_tensors("reward")["base_model.model.score.weight"]
print(json.dumps({"head": head.flatten().tolist(), "scores": scores.tolist(), "fresh": built.algorithm.context.fresh}))
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[Any]]:
    """A run, and what its head and its scores of the held-out pairs were in memory at its end."""
    out, kept, events, ended = tmp_path_factory.mktemp("runs") / "reward", list[Any](), list[Any](), dict[str, Any]()
    real = runner_module.build

    def listen(event: Any) -> None:
        events.append(event)
        if isinstance(event, RunEnded):
            built = kept[0]
            with built.roles.inference_mode():
                batch = built.validation_batch(list(range(built.data.validation.units)))
                ended.update(
                    scores=built.algorithm.scores(batch), head=built.roles.heads["reward"].weight.detach().clone()
                )

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runner_module, "build", lambda *given, **more: kept.append(real(*given, **more)) or kept[-1])
        run(Recipe.from_dict(small_reward()), out=out, ui="none", device=CPU, on_event=listen)
    return out, ended, events


@pytest.mark.slow
def test_the_head_comes_back_bit_equal_in_a_new_process(finished: tuple[Path, dict[str, Any], list[Any]]) -> None:
    out, ended, _ = finished
    completed = subprocess.run(
        [sys.executable, "-c", AGAIN, json.dumps(small_reward()), str(out)], capture_output=True, text=True, timeout=300
    )
    assert completed.returncode == 0, completed.stderr
    found = json.loads(completed.stdout.splitlines()[-1])
    assert ended["head"].abs().max() > 1e-3 and len(set(found["scores"])) > 4, (
        "an untrained head would come back equal too"
    )
    assert same_bytes(torch.tensor([found["head"]]), ended["head"])
    assert same_bytes(torch.tensor(found["scores"]), ended["scores"]) and found["fresh"] is False
    saved = read_adapter(str(out), "adapters.reward.path", head=True)
    assert saved.head is not None and saved.head.dtype == torch.float32 and same_bytes(saved.head, ended["head"])
    with pytest.raises(UserError, match="is a reward adapter"):
        read_adapter(str(out), "adapters.policy.path")


def test_a_run_reports_and_saves_its_scores(finished: tuple[Path, dict[str, Any], list[Any]]) -> None:
    """From ln 2 and all ties; at the end scores.json is what the model in memory thinks, figures worked from it by
    hand."""
    out, ended, events = finished
    first = next(event for event in events if isinstance(event, StepEnd)).stats
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["accuracy"] == 0.5 and "kl" not in first
    scores = json.loads((out / "scores.json").read_text())
    chosen, rejected = ended["scores"][::2], ended["scores"][1::2]
    assert scores["chosen"] == pytest.approx(chosen.tolist(), abs=1e-4) and scores["rejected"] == pytest.approx(
        rejected.tolist(), abs=1e-4
    )
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
    one, two, other = (build(Recipe.from_dict(small_reward(seed=seed)), lambda event: None, CPU) for seed in (5, 5, 6))
    assert changed_tensors(one.roles.adapter_tensors("reward"), two.roles.adapter_tensors("reward")) == set()
    assert changed_tensors(one.roles.adapter_tensors("reward"), other.roles.adapter_tensors("reward")) != set()
    a, b, c = (built.algorithm.collect(0).batch for built in (one, two, other))
    assert (
        same_bytes(a.input_ids, b.input_ids)
        and not same_bytes(a.row_indices, c.row_indices)
        and a.reference_sequence_logps is None
    )
