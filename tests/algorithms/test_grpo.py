"""Laws of GRPO: advantages by hand, every loss and its gradient in float64 and through a plain model, one gradient
whatever the split, groups without signal, the sampler's own log-probs, and whole runs."""

from __future__ import annotations

import gzip
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import CPU, VOCAB, changed_tensors, gradients, llama_roles, make_batch, perturb, relative_error, zero_grad
from safetensors.torch import load_file
from test_dpo import Plain, by_key, error_against
from torch import Tensor

from lowrank_tune import Recipe, run
from lowrank_tune import runner as runner_module
from lowrank_tune.algorithms import grpo as grpo_module
from lowrank_tune.algorithms.base import AlgorithmContext
from lowrank_tune.algorithms.grpo import GRPO, MAX_RESAMPLES, group_advantages, kl_penalty, policy_loss, zero_std_groups
from lowrank_tune.algorithms.rollouts import RolloutBatch, RolloutCollector
from lowrank_tune.batch import Batch
from lowrank_tune.data import PromptExample
from lowrank_tune.errors import TrainingError
from lowrank_tune.events import GroupLogged, LogMessage, StepEnd
from lowrank_tune.generation.outputs import Completion
from lowrank_tune.model import roles as roles_module
from lowrank_tune.model.adapters import WEIGHTS
from lowrank_tune.model.roles import Roles
from lowrank_tune.stats import add_stats, to_floats

KINDS = ("grpo", "dapo", "dr_grpo", "gspo", "cispo")
ESTIMATORS = ("k3_ratio", "k3", "k2", "exact")
HIGH = {"dapo": 0.28, "cispo": 1.1}  # low enough to be met here
LONGEST = 12

# --- advantages -------------------------------------------------------------------------------------------------------


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    s = 0.5 + 1e-4  # 1/n: each is half away from a half
    t = math.sqrt((1.5**2 + 3 * 0.5**2) / 4) + 1e-4
    expected = [[0.5 / s, -0.5 / s, -0.5 / s, 0.5 / s], [1.5 / t, -0.5 / t, -0.5 / t, -0.5 / t], [0.0] * 4]
    assert torch.allclose(group_advantages(rewards), torch.tensor(expected), rtol=1e-6, atol=0)
    assert group_advantages(rewards, scale_by_std=False).tolist() == [
        [0.5, -0.5, -0.5, 0.5],
        [1.5, -0.5, -0.5, -0.5],
        [0.0] * 4,
    ]
    assert zero_std_groups(rewards).tolist() == [False, False, True]


def test_seven_equal_rewards_are_exactly_nothing() -> None:
    rewards = torch.full((1, 7), 0.7)
    assert group_advantages(rewards).tolist() == [[0.0] * 7] and group_advantages(
        rewards, scale_by_std=False
    ).tolist() == [[0.0] * 7]
    naive = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-4)
    assert naive.any(), "the plain formula in fp32 is no longer a trap"
    assert zero_std_groups(torch.tensor([[0.1 + 0.2, 0.3], [0.3, 0.3 + 1e-5]], dtype=torch.float64)).tolist() == [
        True,
        False,
    ]


REWARD = st.floats(-100, 100, width=32)


@given(
    st.integers(1, 5).flatmap(
        lambda n: st.lists(st.lists(REWARD, min_size=n + 1, max_size=n + 1), min_size=1, max_size=4)
    )
)
def test_advantages_equal_numpy(rewards: list[list[float]]) -> None:
    for divide in (True, False):
        found = group_advantages(torch.tensor(rewards, dtype=torch.float64), divide).double().numpy()
        for got, group in zip(found, np.array(rewards), strict=True):
            wanted = (group - group.mean()) / (group.std() + 1e-4 if divide else 1.0)
            if np.ptp(group) <= 1e-6:
                assert (got == 0).all()
            else:
                assert np.allclose(got, wanted, rtol=1e-6, atol=1e-6 * abs(wanted).max())


# --- the oracle: per token, in float64, derivatives worked by hand ----------------------------------------------------


def oracle(
    kind: str,
    rows: Sequence[tuple[Any, Any, Any]],
    advantages: Sequence[float],
    low: float,
    high: float,
    kl: float,
    estimator: str,
) -> tuple[float, list[list[float]], list[float]]:
    """(log-probs, old, reference) of each row's own tokens -> loss, its derivatives by the log-probs, and each row's
    weight of a token.

    The KL over the whole vocabulary is not a function of these; its weight is."""
    total = sum(len(logps) for logps, _, _ in rows)
    loss, slopes, weights = 0.0, [], []
    for (logps, old, reference), a in zip(rows, advantages, strict=True):
        n = len(logps)
        w = {"dapo": 1 / max(1, total), "cispo": 1 / max(1, total), "dr_grpo": 1 / (len(rows) * LONGEST)}.get(
            kind, 1 / (len(rows) * max(1, n))
        )
        mean = sum(p - o for p, o in zip(logps, old, strict=True)) / max(1, n)
        row = []
        for p, o, q in zip(logps, old, reference, strict=True):
            ratio, r = math.exp(p - o), math.exp(mean if kind == "gspo" else p - o)
            if kind == "cispo":
                value, slope = -min(r, high) * a * p, -min(r, high) * a
            elif a > 0 and r > 1 + high:
                value, slope = -(1 + high) * a, 0.0
            elif a < 0 and r < 1 - low:
                value, slope = -(1 - low) * a, 0.0
            else:  # every token of a sequence moves its ratio by 1/n, and stands in n equal terms: one again
                value, slope = -r * a, -r * a
            d = q - p
            k3 = math.exp(d) - d - 1
            if estimator == "k3":
                value, slope = value + kl * k3, slope + kl * (1 - math.exp(d))
            elif estimator == "k3_ratio":
                value, slope = value + kl * k3 * ratio, slope + kl * ratio * (k3 + 1 - math.exp(d))
            elif estimator == "k2":
                value, slope = value + kl * d * d / 2, slope - kl * d
            loss += w * value
            row.append(w * slope)
        slopes.append(row)
        weights.append(w)
    return loss, slopes, weights


def tokens_of(seed: int, lengths: Sequence[int] = (5, 2, 9, 1, 4, 0)) -> tuple[list[tuple[Any, Any, Any]], list[float]]:
    """Rows of log-probs, old ones and reference ones, with ratios on both sides of the clip; and advantages of both
    signs."""
    stream = np.random.default_rng(seed)
    rows = []
    for n in lengths:
        logps = -stream.exponential(2.0, n)
        rows.append((logps, logps + stream.normal(0, 0.3, n), logps + stream.normal(0, 0.8, n)))
    return rows, [float(a) for a in np.where(np.arange(len(lengths)) % 2, -1, 1) * stream.uniform(0.2, 2, len(lengths))]


def padded_tensors(
    rows: Sequence[tuple[Any, Any, Any]], dtype: torch.dtype, filler: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same as (B, T) tensors with gaps before, inside and after; what stands in the gaps is `filler`."""
    width = 2 * max(len(row[0]) for row in rows) + 3
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    three = [torch.full((len(rows), width), filler, dtype=dtype) for _ in range(3)]
    for i, row in enumerate(rows):
        places = [2 + 2 * t + i % 2 for t in range(len(row[0]))]
        mask[i, places] = True
        for into, values in zip(three, row, strict=True):
            into[i, places] = torch.tensor(values, dtype=dtype)
    return *three, mask  # type: ignore[return-value]


def weights_of(kind: str, mask: Tensor) -> Tensor:
    """What `weigh` gives, for a mask alone."""
    algorithm = GRPO(None, FakeCollector(None, []), kind)  # type: ignore[arg-type]
    return algorithm.token_weights(Batch(torch.zeros(mask.shape, dtype=torch.long), torch.ones_like(mask), mask))


def pure_error(kind: str, estimator: str, dtype: torch.dtype, filler: float = 0.0, seed: int = 0) -> float:
    """Largest distance from the oracle, of the loss and of every slope, against the largest of them."""
    rows, advantages = tokens_of(seed)
    low, high = 0.2, HIGH.get(kind, 0.2)
    logps, old, reference, mask = padded_tensors(rows, dtype, filler)
    logps.requires_grad_()
    found, _ = grpo_module.policy_loss(kind, logps, old, torch.tensor(advantages, dtype=dtype), mask, low, high)
    found = found + 0.3 * grpo_module.kl_penalty(estimator, logps, old, reference, mask)
    loss = (found * weights_of(kind, mask)).sum()
    (slope,) = torch.autograd.grad(loss, logps)
    expected, slopes, _ = oracle(kind, rows, advantages, low, high, 0.3, estimator)
    flat = torch.tensor([s for row in slopes for s in row], dtype=torch.float64)
    wrong = max(
        abs(float(loss.detach()) - expected) / abs(expected),
        float((slope[mask].double() - flat).abs().max() / flat.abs().max()),
    )
    outside = float(slope[~mask].abs().max())
    return wrong if wrong == wrong and outside == 0 else math.inf


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("estimator", ESTIMATORS[:3])
def test_loss_and_gradient_equal_the_formulas(kind: str, estimator: str) -> None:
    for seed in range(8):
        assert pure_error(kind, estimator, torch.float64, seed=seed) < 3e-7, "weights alone are fp32"
        assert pure_error(kind, estimator, torch.float32, seed=seed) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("filler", [math.nan, math.inf, -math.inf, 1e38])
def test_what_stands_in_masked_slots_does_nothing(kind: str, filler: float) -> None:
    for estimator in ESTIMATORS[:3]:
        assert pure_error(kind, estimator, torch.float32, filler) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_oracle_knows_its_own_slope(kind: str) -> None:
    """Central differences; cispo's weight is held still, as its formula says."""
    rows, advantages = tokens_of(3)
    for estimator in ("k3", "k3_ratio", "k2"):
        _, slopes, _ = oracle(kind, rows, advantages, 0.2, 0.2, 0.3, estimator)
        for i, t in ((0, 1), (2, 4), (4, 0)):

            def at(h: float, i: int = i, t: int = t, estimator: str = estimator) -> float:
                moved = [tuple(part.copy() for part in row) for row in rows]
                moved[i][0][t] += h
                if kind != "cispo":
                    return oracle(kind, moved, advantages, 0.2, 0.2, 0.3, estimator)[0]
                held = [(row[0], row[1], row[2]) for row in rows]
                weight = min(math.exp(held[i][0][t] - held[i][1][t]), 0.2)
                kl = oracle("cispo", moved, [0.0] * 6, 0.2, 0.2, 0.3, estimator)[0]
                return kl - weight * advantages[i] * moved[i][0][t] / sum(len(row[0]) for row in rows)

            assert (at(1e-6) - at(-1e-6)) / 2e-6 == pytest.approx(slopes[i][t], abs=1e-8)


def _no_clip(
    kind: str, logps: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    return policy_loss(kind, logps, old, advantage, mask, 1.0, 1e9)


def _sides_swapped(
    kind: str, logps: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    return policy_loss(kind, logps, old, advantage, mask, high / 2, low / 2)


def _masked_by_zero(
    kind: str, logps: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    value, stopped = policy_loss(kind, logps, old, advantage, torch.ones_like(mask), low, high)
    return value * mask, stopped


@pytest.mark.parametrize("bug", [_no_clip, _sides_swapped])
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_clip_is_seen(monkeypatch: pytest.MonkeyPatch, kind: str, bug: Any) -> None:
    monkeypatch.setattr(grpo_module, "policy_loss", bug)
    assert max(pure_error(kind, "k3", torch.float64, seed=seed) for seed in range(3)) > 1e-3


def test_masking_by_zero_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo_module, "policy_loss", _masked_by_zero)
    assert pure_error("grpo", "k3", torch.float32) < 1e-6 < pure_error("grpo", "k3", torch.float32, math.nan)


def test_a_wrong_kl_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        grpo_module, "kl_penalty", lambda name, *rest: kl_penalty("k3" if name == "k3_ratio" else "k3_ratio", *rest)
    )
    assert min(pure_error("grpo", estimator, torch.float64) for estimator in ("k3", "k3_ratio")) > 1e-3


def test_tokens_that_the_clip_stops_are_counted() -> None:
    ratios, advantages = torch.tensor([[0.5, 0.9, 1.1, 1.5, 9.0]] * 2), torch.tensor([1.0, -1.0])
    mask = torch.tensor([[True, True, True, True, False]] * 2)
    stopped = policy_loss("grpo", ratios.log(), torch.zeros(2, 5), advantages, mask, 0.2, 0.3)[1]
    assert stopped.tolist() == [[False, False, False, True, False], [True, False, False, False, False]]
    assert (
        policy_loss("cispo", ratios.log(), torch.zeros(2, 5), advantages, mask, 0.2, 1.2)[1].tolist()
        == [[False] * 3 + [True, False]] * 2
    )
    assert not policy_loss("grpo", ratios.log(), ratios.log(), advantages, mask, 0.2, 0.3)[1].any()


# --- whose gradient is it? Enumeration of a vocabulary of five --------------------------------------------------------


def expected_slope(estimator: str, z: Tensor, q: Tensor) -> tuple[float, Tensor]:
    """E_p of the estimator and of its gradient by the logits, where old is the policy itself: every token once, by its
    odds."""
    logps = torch.log_softmax(z, 0)
    old, mask = logps.detach(), torch.ones(1, len(z), dtype=torch.bool)
    each = grpo_module.kl_penalty(estimator, logps[None], old[None], q[None], mask)
    mean = (old.exp() * each[0]).sum()
    return float(mean.detach()), torch.autograd.grad(mean, z, retain_graph=True)[0]


def kl_and_slope(z: Tensor, q: Tensor, forward: bool) -> tuple[float, Tensor]:
    p = torch.log_softmax(z, 0)
    kl = (q.exp() * (q - p)).sum() if forward else (p.exp() * (p - q)).sum()
    return float(kl.detach()), torch.autograd.grad(kl, z, retain_graph=True)[0]


def test_the_gradient_of_each_estimator_is_that_of_its_kl() -> None:
    for seed in range(10):
        stream = torch.Generator().manual_seed(seed)
        z, q = (
            torch.randn(5, generator=stream, dtype=torch.float64),
            torch.log_softmax(torch.randn(5, generator=stream).double(), 0),
        )
        z.requires_grad_()
        reverse, forward = kl_and_slope(z, q, False), kl_and_slope(z, q, True)
        for estimator, (value, slope), honest in (
            ("k3_ratio", reverse, True),
            ("k3", forward, False),
            ("k2", reverse, False),
        ):
            mean, found = expected_slope(estimator, z, q)
            assert relative_error(found, slope) < 1e-10, estimator
            assert not honest or mean == pytest.approx(value, abs=1e-12)
        # its value is honest, its gradient is another's
        assert expected_slope("k3", z, q)[0] == pytest.approx(reverse[0], abs=1e-12)
        assert relative_error(expected_slope("k3", z, q)[1], reverse[1]) > 1e-2


# --- through a model --------------------------------------------------------------------------------------------------


class FakeCollector(RolloutCollector):
    """Draws completions that a test made: random ids, with rewards by the draw; the log-probs are the roles' own."""

    def __init__(
        self,
        roles: Any,
        rewards: Sequence[Sequence[Sequence[float]]],
        temperature: float = 1.0,
        cut: Sequence[int] = (),
        drift: float = 0.0,
        **how: Any,
    ) -> None:
        super().__init__(
            roles,
            None,
            None,
            ("answer",),
            (1.0,),
            str,
            frozenset({1}),
            0,
            0,
            LONGEST,
            temperature,
            8,
            40,
            int,  # type: ignore[arg-type]
            lambda *args: self.shown.append(args),
        )
        self.rewards, self.cut, self.drift, self.how = rewards, cut, drift, how
        self.shown: list[tuple[Any, ...]] = []
        self.requested_counts: list[int | None] = []

    def collect(self, step: int, draw: int, count: int | None = None) -> RolloutBatch:
        self.requested_counts.append(count)
        rewards = torch.tensor(self.rewards[draw][:count], dtype=torch.float64)
        groups, n = rewards.shape
        rows, masks = written(groups, n, seed=100 * step + draw)
        batch = make_batch(rows, masks, **self.how)
        noise = torch.randn(batch.input_ids.shape, generator=torch.Generator().manual_seed(step))
        batch.extra["sampler"] = (
            self.logps("policy", batch) + self.drift * noise
            if self.roles is not None
            else torch.zeros(batch.input_ids.shape)
        )
        truncated = torch.tensor([i in self.cut for i in range(groups * n)])
        prompts = [PromptExample([2], f"prompt {draw}.{group}", None, {}) for group in range(groups)]
        texts = [f"prompt {draw}.{group} answer {i}" for group in range(groups) for i in range(n)]
        return RolloutBatch(
            batch, rewards, rewards.view(-1, 1), truncated, self.reward_names, texts, prompts, {"rollout_seconds": 2.0}
        )


def written(groups: int, n: int, seed: int = 0) -> tuple[list[list[int]], list[list[bool]]]:
    """Completions of 1 to 11 tokens, groups with one prompt; pad and end ids stand inside."""
    stream, rows, masks = np.random.default_rng(seed), [], []
    for _ in range(groups):
        prompt = stream.integers(0, VOCAB, stream.integers(1, 6)).tolist()
        for _ in range(n):
            length = int(stream.integers(1, LONGEST))
            rows.append([*prompt, *stream.integers(0, VOCAB, length).tolist()])
            masks.append([False] * len(prompt) + [True] * length)
    return rows, masks


INFORMATIVE_REWARDS = [[[1.0, 0.0, 0.0], [0.2, 0.9, 0.4]]]


@pytest.fixture(scope="module")
def roles() -> Roles:
    """fp32, a frozen SFT adapter below the policy, both with weights that matter."""
    found = llama_roles(16, lower=["sft"])
    perturb(found, "sft", size=0.05)
    perturb(found, "policy", size=0.05, seed=2)
    return found


def over(
    roles: Roles, kind: str = "grpo", rewards: Any = INFORMATIVE_REWARDS, fake: Mapping[str, Any] = {}, **how: Any
) -> GRPO:
    context = AlgorithmContext(roles, None, fresh=False)  # type: ignore[arg-type]
    return GRPO(context, FakeCollector(roles, rewards, **fake), kind, epsilon_high=HIGH.get(kind), **how)


def one_pass(algorithm: GRPO, part: Batch, **split: int | None) -> tuple[float, Tensor, dict[str, float]]:
    zero_grad(algorithm.context.roles)
    part.token_weights = algorithm.token_weights(part)
    loss, stats = 0.0, {}
    for micro in part.split(**split or {"rows": 4}):
        for term in algorithm.compute_losses(micro):
            term.loss.backward()
            loss += float(term.loss.detach().double())
            add_stats(stats, term.stats)
    return loss, gradients(algorithm.context.roles), to_floats(stats)


def model_error(roles: Roles, kind: str, estimator: str, temperature: float = 0.7) -> tuple[float, float]:
    """Distance of loss and gradient of a whole step from transformers' logits in float64; old log-probs that are not
    the policy's."""
    algorithm = over(roles, kind, fake={"temperature": temperature}, beta=0.3, kl_estimator=estimator)
    part = algorithm.collect(0).batch
    part.extra["old"] = part.extra["sampler"] + 0.3 * torch.randn(
        part.input_ids.shape, generator=torch.Generator().manual_seed(0)
    )
    loss, _, _ = one_pass(algorithm, part)
    mine = by_key(roles, "policy")
    plain = Plain([roles.adapter_tensors("sft")], roles.adapter_tensors("policy"))
    kept, rows = [], []
    for i in range(len(part)):
        ids = part.input_ids[i][part.attention_mask[i]].tolist()
        places = part.completion_mask[i].nonzero().squeeze(1)
        p = torch.log_softmax(plain.run(ids).logits[0] / temperature, dim=1)[places - 1]
        with torch.no_grad():
            q = torch.log_softmax(plain.run(ids, policy=False).logits[0] / temperature, dim=1)[places - 1]
        token = part.input_ids[i][places][:, None]
        logps = p.gather(1, token).squeeze(1)
        kept.append((logps, (p.exp() * (p - q)).sum()))
        rows.append((logps.tolist(), part.extra["old"][i][places].tolist(), q.gather(1, token).squeeze(1).tolist()))
    advantages = part.extra["advantage"].tolist()
    expected, slopes, weights = oracle(kind, rows, advantages, 0.2, HIGH.get(kind, 0.2), 0.3, estimator)
    total = torch.zeros((), dtype=torch.float64)
    for (logps, exact), slope, weight in zip(kept, slopes, weights, strict=True):
        total = total + (logps * torch.tensor(slope, dtype=torch.float64)).sum()
        if estimator == "exact":
            total = total + 0.3 * weight * exact
            expected += 0.3 * weight * float(exact.detach())
    total.backward()
    return abs(loss - expected) / abs(expected), error_against(mine, plain.gradient())


@pytest.mark.parametrize(
    ("kind", "estimator"),
    [("grpo", "k3_ratio"), ("dapo", "k3"), ("dr_grpo", "k2"), ("gspo", "exact"), ("cispo", "exact")],
)
def test_through_a_model(roles: Roles, kind: str, estimator: str) -> None:
    loss, gradient = model_error(roles, kind, estimator)
    assert loss < 1e-5 and gradient < 1e-5


def test_bugs_of_a_whole_step_are_seen(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = Roles.full_vocab_kl
    monkeypatch.setattr(
        Roles, "full_vocab_kl", lambda self, p, q, *rest, gradient: exact(self, p, q, *rest, gradient=gradient).detach()
    )
    assert model_error(roles, "grpo", "exact")[1] > 1e-3
    monkeypatch.undo()
    logps = Roles.logps
    monkeypatch.setattr(Roles, "logps", lambda self, role, batch, temperature=1.0: logps(self, role, batch))
    assert model_error(roles, "grpo", "k3")[1] > 1e-3


# --- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_any_micro_batch_size_gives_one_gradient(roles: Roles, kind: str) -> None:
    found = []
    for split in ({"rows": 1}, {"rows": 4}, {"tokens": 30}, {"rows": 99}):
        algorithm = over(
            roles,
            kind,
            fake={"drift": 0.2},
            old_logps_source="sampler",
            kl_estimator="exact" if kind == "dapo" else "k3_ratio",
        )
        found.append(one_pass(algorithm, algorithm.collect(0).batch, **split))
    for loss, gradient, stats in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5, abs=1e-7) and relative_error(gradient, found[0][1]) < 1e-5
        assert stats == pytest.approx(found[0][2], rel=1e-5, abs=1e-6)
    assert found[0][2]["loss"] == pytest.approx(found[0][0], rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(roles: Roles, kind: str) -> None:
    found = []
    for how in ({}, {"more": 5}, {"filler": 31}, {"more": 3, "filler": 1}):
        algorithm = over(roles, kind, fake=how, num_iterations=2)
        found.append(one_pass(algorithm, algorithm.collect(0).batch))
    for loss, gradient, stats in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5, abs=1e-7) and relative_error(gradient, found[0][1]) < 1e-5
        assert stats == pytest.approx(found[0][2], rel=1e-4, abs=1e-6)


def test_weights_add_up() -> None:
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[0, 1:3], mask[1, 2:9] = True, True
    assert weights_of("grpo", mask).sum(dim=1).tolist() == pytest.approx([1 / 3, 1 / 3, 0.0])
    assert weights_of("dapo", mask)[mask].tolist() == pytest.approx([1 / 9] * 9)
    assert weights_of("dr_grpo", mask)[mask].tolist() == pytest.approx([1 / (3 * LONGEST)] * 9)
    assert torch.equal(weights_of("gspo", mask), weights_of("grpo", mask)) and torch.equal(
        weights_of("cispo", mask), weights_of("dapo", mask)
    )


def test_the_first_of_several_passes_has_ratio_one(roles: Roles) -> None:
    algorithm = over(roles, "grpo", num_iterations=3, beta=0.0)
    experience = algorithm.collect(0)
    parts = list(experience.minibatches())
    assert len(parts) == 3 and all(part is experience.batch for part in parts)
    part = parts[0]
    policy = roles.logps("policy", part).logps.detach()
    assert float((policy - part.extra["old"])[part.loss_mask].abs().max()) < 1e-5
    several, _, stats = one_pass(algorithm, part)
    assert stats["clip_ratio"] == 0.0 and "sampling/sampling_logp_difference/mean" in stats
    single = over(roles, "grpo", beta=0.0)
    alone = one_pass(single, single.collect(0).batch)
    assert "old" not in single.collect(0).batch.extra and several == pytest.approx(alone[0], abs=1e-6)
    kept = roles.adapter_tensors("policy")
    try:
        perturb(roles, "policy", size=0.3, seed=9)
        assert algorithm.should_continue({}) is True
        _, _, later = one_pass(algorithm, part)
        assert later["clip_ratio"] > 0.1 and "sampling/sampling_logp_difference/mean" not in later, (
            "old is of the policy that wrote, whatever came since"
        )
    finally:
        roles.load_adapter_tensors("policy", kept, "here")


@pytest.mark.parametrize(("truncated", "rows"), [("keep", 6), ("mask", 4)])
def test_completions_that_were_cut(roles: Roles, truncated: str, rows: int) -> None:
    algorithm = over(roles, fake={"cut": (0, 4)}, truncated_completions=truncated)
    part = algorithm.collect(0).batch
    assert int(part.loss_mask.any(dim=1).sum()) == rows and len(part) == 6
    assert torch.equal(part.extra["advantage"].view(2, 3), group_advantages(torch.tensor(INFORMATIVE_REWARDS[0])))
    weight = algorithm.token_weights(part)
    assert weight.sum() == pytest.approx(rows / 6), "a masked completion still counts among N"
    assert (weight[[0, 4]].sum() == 0) == (truncated == "mask")


def test_a_truncated_completion_is_penalized(roles: Roles) -> None:
    algorithm = over(
        roles,
        rewards=[[[0.5] * 3, [0.0, 1.0, 1.0]]],
        fake={"cut": (1, 5)},
        truncated_completions="penalize",
        missing_eos_penalty=0.5,
    )
    experience = algorithm.collect(0)
    expected = group_advantages(torch.tensor([[0.5, 0.0, 0.5], [0.0, 1.0, 0.5]]))
    assert torch.allclose(experience.batch.extra["advantage"].view(2, 3), expected)
    assert (
        to_floats(experience.stats)["reward"] == pytest.approx(3.5 / 6)
        and to_floats(experience.stats)["frac_reward_zero_std"] == 0.5
    )


def test_all_cut_and_masked_is_a_step_of_nothing(roles: Roles) -> None:
    for kind in KINDS:
        algorithm = over(roles, kind, fake={"cut": range(6)}, truncated_completions="mask")
        loss, gradient, _ = one_pass(algorithm, algorithm.collect(0).batch)
        assert loss == 0.0 and not gradient.any()


MIXED = [
    [[0.7] * 3, [0.0, 1.0, 0.0], [0.1] * 3, [1.0] * 3],
    [[0.3] * 3, [1.0, 0.0, 0.0], [0.0] * 3],
    [[0.0, 0.0, 1.0], [0.5] * 3],
    [[0.2] * 3],
    [[1.0, 0.0, 0.0]],
]


@pytest.mark.parametrize(
    ("how", "groups", "draws"),
    [("keep", [0, 1, 2, 3], [None]), ("drop", [1], [None]), ("resample", None, [None, 3, 2, 1])],
)
def test_zero_std_groups(roles: Roles, how: str, groups: Any, draws: Any) -> None:
    assert MAX_RESAMPLES == 4, "the last of these draws is never made"
    algorithm = over(roles, rewards=MIXED, zero_std_groups=how)
    experience = algorithm.collect(0)
    rollouts, advantages = algorithm.collector.shown[0][1:]
    assert algorithm.collector.requested_counts == draws
    prompts = [one.text for one in rollouts.prompts]
    assert prompts == (
        ["prompt 0.1", "prompt 1.1", "prompt 2.0"] if how == "resample" else [f"prompt 0.{i}" for i in groups]
    )
    assert rollouts.texts == [f"{prompt} answer {i}" for prompt in prompts for i in range(3)]
    assert torch.equal(rollouts.reward_components.view_as(rollouts.rewards), rollouts.rewards) and len(
        rollouts.truncated
    ) == 3 * len(prompts)
    assert len(experience.batch) == 3 * len(prompts) == advantages.numel()
    assert torch.equal(advantages.flatten(), experience.batch.extra["advantage"])
    where = zero_std_groups(rollouts.shaped_rewards)
    assert not advantages[where].any() and advantages[~where].all() and int(where.sum()) == (3 if how == "keep" else 0)
    stats = to_floats(experience.stats)
    assert stats["frac_reward_zero_std"] == pytest.approx(7 / 10 if how == "resample" else 3 / 4)
    assert stats["rollout_seconds"] == 2.0 * len(draws), "the time of every draw"
    loss, gradient, _ = one_pass(algorithm, experience.batch)
    assert math.isfinite(loss) and gradient.any()


def test_resampled_rows_are_the_rows_that_were_drawn(roles: Roles) -> None:
    """Joined to one width: ids, masks and log-probs of each row are what its own draw had."""
    algorithm = over(roles, rewards=MIXED, zero_std_groups="resample")
    part = algorithm.collect(0).batch
    rows = [
        row
        for draw, group, n in ((0, 1, 4), (1, 1, 3), (2, 0, 2))
        for row in written(n, 3, seed=draw)[0][3 * group : 3 * group + 3]
    ]
    assert [part.input_ids[i][part.attention_mask[i]].tolist() for i in range(9)] == rows
    alone = algorithm.collector.logps("policy", part)
    assert (
        float((part.extra["sampler"] - alone)[part.loss_mask].abs().max()) < 1e-5
        and not part.extra["sampler"][~part.loss_mask].any()
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("how", "kl"), [("keep", 0.0), ("drop", 0.0), ("drop", 0.5), ("resample", 0.5)])
def test_a_step_of_zero_std_groups_changes_nothing(roles: Roles, kind: str, how: str, kl: float) -> None:
    """With `drop` KL neither: what is left of it near the reference is rounding noise, which Adam would blow up to a
    whole step."""
    algorithm = over(roles, kind, rewards=[[[0.7] * 7, [0.1] * 7]] * 4, beta=kl, zero_std_groups=how)
    loss, gradient, stats = one_pass(algorithm, algorithm.collect(0).batch)
    assert loss == 0.0 and not gradient.any() and not gradient.isnan().any() and all(map(math.isfinite, stats.values()))
    algorithm.collector.rewards = INFORMATIVE_REWARDS * 4
    assert one_pass(algorithm, algorithm.collect(1).batch)[1].any(), "the next step is one again"


def test_zero_std_groups_that_are_kept_have_their_kl(roles: Roles) -> None:
    algorithm = over(roles, rewards=[[[0.7] * 7]], beta=0.5, zero_std_groups="keep")
    loss, gradient, stats = one_pass(algorithm, algorithm.collect(0).batch)
    assert loss > 0 and gradient.any() and stats["kl"] > 0
    assert list(algorithm.iter_warnings({"frac_reward_zero_std": 0.79, "reward": 0.1})) == []
    assert "90%" in next(algorithm.iter_warnings({"frac_reward_zero_std": 0.9, "reward": 0.1}))
    assert list(algorithm.iter_warnings({"frac_reward_zero_std": 0.9, "reward": 0.9})) == [], (
        "groups that all became right are no trouble"
    )


def test_kl_in_the_reward(roles: Roles) -> None:
    algorithm = over(
        roles, rewards=[[[0.5, 0.5, 0.5], [1.0, 0.0, 0.0]]], fake={"drift": 0.1}, beta=0.4, kl_in_reward=True
    )
    experience = algorithm.collect(0)
    part = experience.batch
    rewards = []
    for i, reward in enumerate([0.5, 0.5, 0.5, 1.0, 0.0, 0.0]):
        places = part.completion_mask[i].nonzero().squeeze(1).tolist()
        rewards.append(
            reward
            - 0.4 * sum(float(part.extra["sampler"][i, t]) - float(part.extra["reference_logps"][i, t]) for t in places)
        )
    expected = group_advantages(torch.tensor(rewards).view(2, 3))
    assert torch.allclose(part.extra["advantage"].view(2, 3), expected, atol=1e-4) and expected.all()
    assert (
        to_floats(experience.stats)["reward"] == pytest.approx(2.5 / 6)
        and to_floats(experience.stats)["frac_reward_zero_std"] == 0.5
    )
    loss, gradient, stats = one_pass(algorithm, part)
    alone = over(roles, beta=0.0)
    again = one_pass(alone, part)
    assert loss == again[0] and torch.equal(gradient, again[1]) and stats["kl"] > 0, "the loss has no second KL"


# --- the sampler's own log-probs --------------------------------------------------------------------------------------


class Lengths:
    """A reward that differs: the number of tokens."""

    def __init__(self) -> None:
        self.kept: dict[int, list[float]] = {}

    def submit(self, key: int, prompt: PromptExample, text: str, completion: Completion) -> None:
        self.kept[key] = [float(len(completion.token_ids))]

    def collect(self) -> Mapping[int, Sequence[float]]:
        kept, self.kept = self.kept, {}
        return kept


def real_collector(roles: Roles, long: bool = False) -> RolloutCollector:
    times = 6 if long else 1
    prompts = [
        PromptExample([2, 5, 9, 40] * times, "a", None, {}),
        PromptExample([2, 7] * times, "b", None, {}),
        PromptExample([3] * 9 * times, "c", None, {}),
    ]
    return RolloutCollector(
        roles,
        lambda step, draw, count: prompts,
        Lengths(),
        ("length",),
        (1.0,),
        str,
        frozenset({1}),
        0,
        4,
        LONGEST,
        0.8,
        5,
        64,
        lambda number: number,
    )


def test_a_group_reads_its_prompt_once_and_nothing_changes(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference, old log-probs and gradient with shared prompts are those of rows apart; groups stay next to each other
    in any split."""
    planted = list[int]()
    real = roles_module.pack_shared_prefixes
    monkeypatch.setattr(
        roles_module, "pack_shared_prefixes", lambda *given: (tree := real(*given), planted.append(tree is not None))[0]
    )
    found = []
    for share, split in (
        (False, {"rows": 4}),
        (True, {"rows": 4}),
        (True, {"rows": 3}),
        (True, {"tokens": 90}),
        (True, {"rows": 99}),
    ):
        monkeypatch.setattr(roles, "share_prefixes", share)
        algorithm = GRPO(
            AlgorithmContext(roles, None, fresh=False), real_collector(roles, long=True), beta=0.3, num_iterations=2
        )  # type: ignore[arg-type]
        part = algorithm.collect(0).batch
        planted.clear()
        found.append((one_pass(algorithm, part, **split), part.extra["reference_logps"], part.extra["old"]))
        assert any(planted) == share
        micros = [micro.extra["shared"] for micro in part.split(**split)]
        assert sum(int((shared[1:] == 0).sum()) for shared in micros) == 3 - sum(
            int(shared[0] == 0) for shared in micros
        )
    for (loss, gradient, stats), reference, old in found[1:]:
        assert (
            loss == pytest.approx(found[0][0][0], rel=1e-4, abs=1e-6)
            and relative_error(gradient, found[0][0][1]) < 1e-5
        )
        assert stats == pytest.approx(found[0][0][2], rel=1e-4, abs=1e-6)
        assert torch.allclose(reference, found[0][1], atol=1e-5) and torch.allclose(old, found[0][2], atol=1e-5)


def first_pass(roles: Roles, temperature: float = 0.8, old: str = "sampler") -> tuple[GRPO, dict[str, float]]:
    """A step on the real engine, at 0.8; the update at `temperature`."""
    algorithm = GRPO(AlgorithmContext(roles, None, fresh=False), real_collector(roles), old_logps_source=old, beta=0.0)  # type: ignore[arg-type]
    part = algorithm.collect(0).batch
    algorithm.collector.temperature = temperature
    return algorithm, one_pass(algorithm, part)[2] | {"frac_reward_zero_std": 0.0, "reward": 0.5}


def test_the_sampler_and_the_policy_agree(roles: Roles) -> None:
    algorithm, stats = first_pass(roles)
    assert (
        stats["sampling/sampling_logp_difference/mean"] < 1e-5
        and stats["clip_ratio"] == 0.0
        and list(algorithm.iter_warnings(stats)) == []
    )


@pytest.mark.parametrize("old", ["sampler", "recomputed"])
def test_another_temperature_stops_the_run(roles: Roles, old: str) -> None:
    algorithm, stats = first_pass(roles, 0.4, old)
    assert stats["sampling/sampling_logp_difference/mean"] > 0.1
    with pytest.raises(TrainingError, match="grpo.max_logprob_mismatch"):
        list(algorithm.iter_warnings(stats))
    algorithm.max_logprob_mismatch = 50.0
    assert list(algorithm.iter_warnings(stats)) == []


def test_the_sampler_is_the_plain_model(roles: Roles) -> None:
    part = real_collector(roles).collect(0, 0).batch
    plain = Plain([roles.adapter_tensors("sft"), roles.adapter_tensors("policy")])
    for i in range(len(part)):
        ids, places = part.input_ids[i][part.attention_mask[i]], part.completion_mask[i].nonzero().squeeze(1)
        with torch.no_grad():
            p = torch.log_softmax(plain.run(ids.tolist(), policy=False).logits[0] / 0.8, dim=1)
        assert torch.allclose(p[places - 1, ids[places]].float(), part.extra["sampler"][i][places], atol=1e-4)


# --- whole runs -------------------------------------------------------------------------------------------------------


def small(sft: Path, **more: Any) -> dict[str, Any]:
    return {
        "name": "grpo",
        "algorithm": "grpo",
        "base": {"model": "tiny-tutor", "bits": 4},
        "adapters": {"sft": {"path": str(sft)}, "policy": {"r": 4}},
        "data": {"train": [{"dataset": "builtin:arithmetic", "max_samples": 20}]},
        "rewards": [{"name": "answer"}, {"name": "length", "target_tokens": 5, "weight": 0.5}],
        "rollout": {"num_generations": 4, "max_new_tokens": 10},
        "train": {
            "max_steps": 2,
            "prompts_per_step": 3,
            "micro_batch_size": 5,
            "learning_rate": 5e-3,
            "gradient_checkpointing": False,
        },
        **more,
    }


@pytest.fixture(scope="module")
def sft_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short SFT run, whose adapter stays frozen below."""
    recipe = {
        "name": "sft",
        "algorithm": "sft",
        "base": {"model": "tiny-tutor", "bits": 4},
        "adapters": {"policy": {"r": 4}},
        "data": {"train": [{"dataset": "builtin:arithmetic", "max_samples": 40}]},
        "train": {"max_steps": 3, "global_batch_size": 8, "learning_rate": 5e-3, "gradient_checkpointing": False},
    }
    out = tmp_path_factory.mktemp("below") / "sft"
    run(Recipe.from_dict(recipe), out=out, ui="none", device=CPU)
    return out


def run_with_events(recipe: dict[str, Any], out: Path) -> tuple[Any, list[Any]]:
    events: list[Any] = []
    return run(Recipe.from_dict(recipe), out=out, ui="none", device=CPU, on_event=events.append), events


def figures(events: Sequence[Any]) -> list[dict[str, float]]:
    unsteady = {"tokens_per_second", "memory_gib", "rollout_seconds", "reward_seconds"}
    return [
        {k: v for k, v in event.stats.items() if k not in unsteady} for event in events if isinstance(event, StepEnd)
    ]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOWRANK_TUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_frozen_adapter_and_the_base_stay_and_two_runs_are_equal(cache: Path, tmp_path: Path, sft_run: Path) -> None:
    files = {path: path.read_bytes() for path in sft_run.rglob("*") if path.is_file()}
    outcome, events = run_with_events(small(sft_run), tmp_path / "one")
    ended = load_file(tmp_path / "one" / "final" / WEIGHTS)
    assert {path: path.read_bytes() for path in sft_run.rglob("*") if path.is_file()} == files
    below = json.loads((sft_run / "summary.json").read_text())
    assert outcome.summary["base_hash"]["end"] == outcome.summary["base_hash"]["start"] == below["base_hash"]["end"]
    assert set(outcome.summary["adapter_hashes"]) == {"sft"}
    steps = figures(events)
    assert 0 <= steps[0]["kl"] < 1e-9 < steps[1]["kl"] and steps[0]["sampling/sampling_logp_difference/mean"] < 1e-5
    assert all(tensor.any() for key, tensor in ended.items() if "lora_B" in key), (
        "nothing was trained: the test saw nothing"
    )
    _, again = run_with_events(small(sft_run), tmp_path / "two")
    assert figures(again) == steps and changed_tensors(ended, load_file(tmp_path / "two" / "final" / WEIGHTS)) == set()
    groups = [
        [(event.step, event.prompt, event.completions) for event in which if isinstance(event, GroupLogged)]
        for which in (events, again)
    ]
    assert groups[0] == groups[1] and len(groups[0]) == 2
    _, other = run_with_events(
        small(sft_run, seed=1, train={**small(sft_run)["train"], "max_steps": 1}), tmp_path / "three"
    )
    assert (
        figures(other)[0]["reward"] != steps[0]["reward"]
        or figures(other)[0]["completions/mean_length"] != steps[0]["completions/mean_length"]
    )


def test_a_policy_that_is_not_its_reference_is_refused(
    cache: Path, tmp_path: Path, sft_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = runner_module.build

    def perturbed(*given: Any, **more: Any) -> Any:
        built = real(*given, **more)
        perturb(built.roles, "policy", size=0.05)
        return built

    monkeypatch.setattr(runner_module, "build", perturbed)
    with pytest.raises(TrainingError, match="the reference is not what it must be"):
        run_with_events(small(sft_run), tmp_path / "run")


GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl.gz"


@pytest.mark.slow
@pytest.mark.skipif(not GSM8K.exists(), reason="needs the real data")
def test_real_questions_that_are_too_hard(cache: Path, tmp_path: Path) -> None:
    """200 of GSM8K, which the tiny base cannot answer: rewards are counted honestly, a person is told, and nothing
    moves on noise."""
    with gzip.open(GSM8K, "rt", encoding="utf-8") as lines:
        (tmp_path / "gsm8k.jsonl").write_text("".join(itertools.islice(lines, 200)), encoding="utf-8")
    recipe = {
        "name": "gsm8k",
        "algorithm": "grpo",
        "base": {"model": "tiny-tutor"},
        "adapters": {"policy": {"r": 4}},
        "data": {"train": [{"dataset": str(tmp_path / "gsm8k.jsonl")}], "max_prompt_length": 512},
        "rewards": [{"name": "answer"}],
        "rollout": {"num_generations": 4, "max_new_tokens": 48},
        "train": {"max_steps": 2, "prompts_per_step": 4, "micro_batch_size": 8, "gradient_checkpointing": False},
    }
    outcome, events = run_with_events(recipe, tmp_path / "run")
    notes = [(event.level, event.message) for event in events if isinstance(event, LogMessage)]
    steps = figures(events)
    assert outcome.summary["status"] == "done" and len(steps) == 2
    assert any("prompts of 200 of 200 rows" in text and "200 with a gold answer" in text for _, text in notes)
    assert all(step["reward"] <= 0.2 and step["frac_reward_zero_std"] >= 0.5 for step in steps)
    assert any(level == "warning" and ("signal" in text or "zero reward std" in text) for level, text in notes)
    if all(step["frac_reward_zero_std"] == 1.0 for step in steps):
        assert any(
            level == "warning" and "most groups have equal rewards and give no gradient, 100%" in text
            for level, text in notes
        )
        assert not any(t.any() for key, t in load_file(tmp_path / "run" / "final" / WEIGHTS).items() if "lora_B" in key)
