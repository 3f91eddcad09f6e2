"""DPO: the loss of one pair and its derivatives by both log-ratios, for every `dpo.loss_type`.

Oracles: numbers worked out by hand, and `oracles.dpo` (float64, derivatives by hand).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import oracles
import pytest
import torch
from algorithm_helpers import DPO_LOSSES, largest
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from lowrank_tune.algorithms import dpo as dpo_module
from lowrank_tune.algorithms.dpo import dpo_loss

LENGTH_NORMALIZED = ("ipo", "sigmoid_norm")
"""Losses of log-ratios per token."""
Loss = Callable[[str, Tensor, Tensor, float, float, Tensor, Tensor], Tensor]
"""`dpo_loss(loss_type, chosen_logratio, rejected_logratio, beta, label_smoothing, chosen_tokens, rejected_tokens)`."""

# --- against the oracle -----------------------------------------------------------------------------------------------


def losses_and_slopes(
    loss_type: str,
    chosen_logratio: Sequence[float],
    rejected_logratio: Sequence[float],
    beta: float,
    label_smoothing: float,
    num_tokens: Sequence[tuple[int, int]],
    dtype: torch.dtype,
) -> tuple[list[float], list[float], list[float]]:
    """Returns the losses of the package, and their derivatives by both log-ratios."""
    chosen = torch.tensor(chosen_logratio, dtype=dtype, requires_grad=True)
    rejected = torch.tensor(rejected_logratio, dtype=dtype, requires_grad=True)
    chosen_tokens, rejected_tokens = (torch.tensor(counts) for counts in zip(*num_tokens, strict=True))
    losses = dpo_module.dpo_loss(loss_type, chosen, rejected, beta, label_smoothing, chosen_tokens, rejected_tokens)
    chosen_slopes, rejected_slopes = torch.autograd.grad(losses.sum(), [chosen, rejected])
    return losses.tolist(), chosen_slopes.tolist(), rejected_slopes.tolist()


def formula_error(
    loss_type: str,
    chosen_logratio: Sequence[float],
    rejected_logratio: Sequence[float],
    beta: float,
    label_smoothing: float,
    num_tokens: Sequence[tuple[int, int]],
    dtype: torch.dtype,
) -> float:
    """Returns the largest distance from the oracle, relative to the numbers that are added on the way."""
    found = losses_and_slopes(loss_type, chosen_logratio, rejected_logratio, beta, label_smoothing, num_tokens, dtype)
    errors = []
    for *values, chosen, rejected, tokens in zip(*found, chosen_logratio, rejected_logratio, num_tokens, strict=True):
        expected = oracles.dpo(loss_type, chosen, rejected, beta, label_smoothing, tokens)
        m, n = tokens if loss_type in LENGTH_NORMALIZED else (1, 1)
        size = abs(chosen / m) + abs(rejected / n)
        if loss_type == "ipo":
            scale = size + 1 / (2 * beta)
            scales = (scale**2, 2 * scale / m, 2 * scale / n)
        else:
            scale = (1 + beta * size) / (1 - 2 * label_smoothing)
            scales = (scale, beta * scale / m, beta * scale / n)
        errors += [abs(a - b) / scale for a, b, scale in zip(values, expected, scales, strict=True)]
    return largest(errors)


LOGRATIO = st.one_of(
    st.floats(-1000, 1000, width=32), st.floats(-3, 3, width=32), st.sampled_from([0.0, 1e3, -1e3, 1e-30])
)
TOKENS = st.tuples(st.integers(1, 300), st.integers(1, 300))
PAIRS = st.lists(st.tuples(LOGRATIO, LOGRATIO, TOKENS), min_size=1, max_size=5)
BETA = st.one_of(st.floats(2**-10, 10, width=32), st.sampled_from([2.0**-10, 0.125, 10.0]))


@pytest.mark.parametrize("loss_type", DPO_LOSSES)
@given(pairs=PAIRS, beta=BETA, label_smoothing=st.sampled_from([0.0, 0.0625, 0.25, 0.4375]))
def test_loss_and_gradient_equal_oracle(
    loss_type: str, pairs: list[tuple[float, float, tuple[int, int]]], beta: float, label_smoothing: float
) -> None:
    """Each loss and its two derivatives are those of `oracles.dpo`: 1e-12 in fp64, 1e-6 in fp32."""
    chosen, rejected, num_tokens = zip(*pairs, strict=True)
    # hinge has no derivative at beta (a+ - a-) = 1
    assume(loss_type != "hinge" or all(abs(beta * (a - b) - 1) > 1e-5 for a, b in zip(chosen, rejected, strict=True)))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        assert formula_error(loss_type, chosen, rejected, beta, label_smoothing, num_tokens, dtype) < tolerance


@pytest.mark.parametrize("loss_type", DPO_LOSSES)
@pytest.mark.parametrize(("chosen", "rejected", "beta"), [(0.3, -0.7, 0.5), (-2.0, 1.5, 0.9), (3.0, 2.9, 2.0)])
@pytest.mark.parametrize(("label_smoothing", "num_tokens"), [(0.0, (1, 1)), (0.2, (3, 7))])
def test_oracle_slopes_equal_central_differences(
    loss_type: str,
    chosen: float,
    rejected: float,
    beta: float,
    label_smoothing: float,
    num_tokens: tuple[int, int],
) -> None:
    """The derivatives of `oracles.dpo` are the central differences of its loss."""

    def oracle(chosen: float, rejected: float) -> tuple[float, float, float]:
        return oracles.dpo(loss_type, chosen, rejected, beta, label_smoothing, num_tokens)

    h = 1e-6
    _, chosen_slope, rejected_slope = oracle(chosen, rejected)
    by_chosen = (oracle(chosen + h, rejected)[0] - oracle(chosen - h, rejected)[0]) / (2 * h)
    by_rejected = (oracle(chosen, rejected + h)[0] - oracle(chosen, rejected - h)[0]) / (2 * h)
    assert chosen_slope == pytest.approx(by_chosen, abs=1e-7)
    assert rejected_slope == pytest.approx(by_rejected, abs=1e-7)


# --- by hand ----------------------------------------------------------------------------------------------------------

# sigma(ln 3) = 3/4, sigma(-ln 3) = 1/4
LN3 = math.log(3)
BY_HAND: list[tuple[str, float, float, float, tuple[int, int], float, float, float]] = [
    # loss_type, a+, a-, beta, tokens, loss, and the derivatives by a+ and a-
    ("sigmoid", 0.0, 0.0, 0.1, (1, 1), math.log(2), -0.05, 0.05),  # beta sigma(0)
    ("sigmoid", 2 * LN3, 0.0, 0.5, (9, 2), math.log(4 / 3), -0.125, 0.125),  # x = ln 3: 0.5 * 1/4
    ("sigmoid", -LN3, LN3, 0.5, (9, 2), math.log(4), -0.375, 0.375),  # x = -ln 3: 0.5 * 3/4
    ("ipo", 0.0, 0.0, 0.5, (2, 3), 1.0, -1.0, 2 / 3),  # (0 - 1)^2; 2 * -1 / 2, and / -3
    ("ipo", 6.0, -2.0, 0.5, (3, 4), 2.25, 1.0, -0.75),  # d' = 2 + 1/2; (3/2)^2; 3 / 3, and 3 / -4
    ("ipo", 4.0, 0.0, 0.5, (4, 1), 0.0, 0.0, 0.0),  # d' = 1 = 1 / (2 beta): the minimum
    ("hinge", 1.0, -0.5, 0.5, (7, 1), 0.25, -0.5, 0.5),  # 1 - 0.75
    ("hinge", 4.0, 0.0, 0.5, (7, 1), 0.0, 0.0, 0.0),  # 1 - 2 is below zero
    ("hinge", 0.0, 2.0, 0.5, (7, 1), 2.0, -0.5, 0.5),  # 1 + 1
    # e = 1/4: ln 2 (3/4 - 1/4) / (1/2); 0.5 (3/8 + 1/8) / (1/2)
    ("robust", 0.0, 0.0, 0.5, (7, 1), math.log(2), -0.5, 0.5),
    # 0.5 (3/4 1/4 + 1/4 3/4) / (1/2)
    ("robust", 2 * LN3, 0.0, 0.5, (7, 1), 1.5 * math.log(4 / 3) - 0.5 * math.log(4), -0.375, 0.375),
    # 0.5 (9/16 + 1/16) / (1/2)
    ("robust", 0.0, 2 * LN3, 0.5, (7, 1), 1.5 * math.log(4) - 0.5 * math.log(4 / 3), -0.625, 0.625),
    ("apo_zero", 0.0, 0.0, 1.0, (7, 1), 1.0, -0.25, 0.25),  # 1 - 1/2 + 1/2
    ("apo_zero", LN3, -LN3, 1.0, (7, 1), 0.5, -0.1875, 0.1875),  # 1 - 3/4 + 1/4; sigma sigma' = 3/16
    ("apo_zero", -LN3, 0.0, 1.0, (7, 1), 1.25, -0.1875, 0.25),  # 1 - 1/4 + 1/2
    ("sigmoid_norm", 2 * LN3, 0.0, 1.0, (2, 5), math.log(4 / 3), -0.125, 0.05),  # x = ln 3: 1/4 over 2 and 5 tokens
    ("sigmoid_norm", 0.0, 3 * LN3, 1.0, (4, 3), math.log(4), -0.1875, 0.25),  # x = -ln 3: 3/4 over 4 and 3
    ("sigmoid_norm", 4 * LN3, LN3, 1.0, (2, 1), math.log(4 / 3), -0.125, 0.25),  # x = 2 ln 3 - ln 3
]


def losses_unlike_hand() -> set[str]:
    """Returns the losses whose numbers differ from those by hand."""
    wrong = set()
    for loss_type, chosen, rejected, beta, tokens, *expected in BY_HAND:
        found = losses_and_slopes(loss_type, [chosen], [rejected], beta, 0.25, [tokens], torch.float64)
        if [values[0] for values in found] != pytest.approx(expected, abs=1e-12):
            wrong.add(loss_type)
    return wrong


def test_losses_equal_numbers_by_hand() -> None:
    """Each loss and its two derivatives are the numbers of `BY_HAND`."""
    assert losses_unlike_hand() == set()


def test_oracle_equals_numbers_by_hand() -> None:
    """`oracles.dpo` gives the numbers of `BY_HAND` too."""
    for loss_type, chosen, rejected, beta, tokens, *expected in BY_HAND:
        assert oracles.dpo(loss_type, chosen, rejected, beta, 0.25, tokens) == pytest.approx(expected, abs=1e-12)


def _sums_for_means(
    loss_type: str, chosen: Tensor, rejected: Tensor, beta: float, e: float, m: Tensor, n: Tensor
) -> Tensor:
    return dpo_loss(loss_type, chosen, rejected, beta, e, torch.ones_like(m), torch.ones_like(n))


def _swapped(loss_type: str, chosen: Tensor, rejected: Tensor, beta: float, e: float, m: Tensor, n: Tensor) -> Tensor:
    return dpo_loss(loss_type, rejected, chosen, beta, e, n, m)


def _rounded(loss_type: str, chosen: Tensor, rejected: Tensor, beta: float, e: float, m: Tensor, n: Tensor) -> Tensor:
    return dpo_loss(loss_type, chosen.bfloat16().to(chosen.dtype), rejected, beta, e, m, n)


def _smoothed_sigmoid(
    loss_type: str, chosen: Tensor, rejected: Tensor, beta: float, e: float, m: Tensor, n: Tensor
) -> Tensor:
    if loss_type != "sigmoid":
        return dpo_loss(loss_type, chosen, rejected, beta, e, m, n)
    return (1 - 2 * e) * dpo_loss("robust", chosen, rejected, beta, e, m, n)


def _beta_twice(
    loss_type: str, chosen: Tensor, rejected: Tensor, beta: float, e: float, m: Tensor, n: Tensor
) -> Tensor:
    return dpo_loss(loss_type, chosen, rejected, beta * beta, e, m, n)


def _log_of_sigmoid(
    loss_type: str, chosen: Tensor, rejected: Tensor, beta: float, e: float, m: Tensor, n: Tensor
) -> Tensor:
    return -torch.log(torch.sigmoid(beta * (chosen - rejected)))


@pytest.mark.parametrize(
    ("bug", "found_in"),
    [
        (_sums_for_means, {"ipo", "sigmoid_norm"}),
        (_swapped, set(DPO_LOSSES)),
        (_rounded, {"sigmoid", "robust", "apo_zero", "sigmoid_norm"}),
        (_smoothed_sigmoid, {"sigmoid"}),
        (_beta_twice, {"sigmoid", "ipo", "hinge", "robust"}),
    ],
)
def test_loss_bugs_differ_from_numbers_by_hand(monkeypatch: pytest.MonkeyPatch, bug: Loss, found_in: set[str]) -> None:
    """The numbers of `BY_HAND` find bugs of other implementations: sums for means, swapped sides, bf16, and others."""
    monkeypatch.setattr(dpo_module, "dpo_loss", bug)
    assert losses_unlike_hand() >= found_in


# --- extremes ---------------------------------------------------------------------------------------------------------


def is_finite_for_extremes(loss_type: str) -> bool:
    """Returns whether the loss and its gradient are finite for log-ratios of a diverged run."""
    extremes = [0.0, 1e3, -1e3, 1e4, -1e4]
    chosen, rejected = zip(*itertools.product(extremes, extremes), strict=True)
    num_tokens = [(1, 3)] * len(chosen)
    for beta in (1e-3, 0.1, 10.0):
        found = losses_and_slopes(loss_type, chosen, rejected, beta, 0.25, num_tokens, torch.float32)
        if not all(map(math.isfinite, itertools.chain(*found))):
            return False
    return True


@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_extreme_logratios_give_finite_losses(loss_type: str) -> None:
    """Log-ratios of up to 1e4 nats give a finite loss and a finite gradient in fp32."""
    assert is_finite_for_extremes(loss_type)


def test_log_of_sigmoid_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the extremes finds log(sigmoid(x)), which is -inf for a large negative x."""
    monkeypatch.setattr(dpo_module, "dpo_loss", _log_of_sigmoid)
    assert not is_finite_for_extremes("sigmoid")


def test_sigmoid_slope_of_wrong_pair_is_minus_beta() -> None:
    """The derivative of sigmoid at x = -1e4 is -beta, not 0."""
    _, chosen_slopes, _ = losses_and_slopes("sigmoid", [-1e3], [0.0], 10.0, 0.0, [(1, 1)], torch.float32)
    assert chosen_slopes == [-10.0]


@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_answer_without_tokens_gives_finite_loss(loss_type: str) -> None:
    """An answer without tokens has a log-ratio of 0 and gives a finite loss. The data has none, but one must not break
    the step."""
    found = losses_and_slopes(loss_type, [0.0, 2.0], [2.0, 0.0], 0.5, 0.25, [(0, 3), (3, 0)], torch.float32)
    assert all(math.isfinite(value) for values in found for value in values)
