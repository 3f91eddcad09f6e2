"""The small tensor functions, against plain Python and numbers worked by hand."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from lowrank_tune import functional
from lowrank_tune.functional import (
    apply_mask,
    calibration_error,
    correlation,
    masked_mean,
    mean,
    pair_accuracy,
    pair_mean_weights,
    reliability_bins,
    token_mean_weights,
)
from lowrank_tune.memory_planner.fake_device import fake_device_mode
from lowrank_tune.stats import WeightedMean, to_floats


def test_token_weights_by_hand() -> None:
    mask = torch.tensor([[True, False, True], [False, False, True]])
    assert torch.equal(token_mean_weights(mask), torch.tensor([[1 / 3, 0, 1 / 3], [0, 0, 1 / 3]]))
    assert not token_mean_weights(torch.zeros(2, 3, dtype=torch.bool)).any()


@pytest.mark.parametrize("pairs", [1, 2, 3, 7, 500])
def test_pair_weights_sum_to_one_over_pairs(pairs: int) -> None:
    weights = pair_mean_weights(torch.zeros(2 * pairs, 5, dtype=torch.long))
    assert weights.shape == (2 * pairs,) and weights.dtype == torch.float32
    assert float(weights[::2].double().sum()) == pytest.approx(1, abs=1e-6) and len(weights.unique()) == 1
    assert pair_mean_weights(torch.zeros(0, 5)).shape == (0,)


def test_a_tie_is_right_by_half() -> None:
    """Ahead, tied, behind, ahead: 1 + 1/2 + 0 + 1 of 4."""
    assert pair_accuracy(torch.tensor([2.0, 0.0, -1e-9, 1e-30])).value == 2.5 / 4
    assert pair_accuracy(torch.zeros(3)).value == 0.5 and math.isnan(pair_accuracy(torch.zeros(0)).value)
    assert math.isclose(pair_accuracy(torch.tensor([-0.0])).value, 0.5)


def test_what_is_no_number_is_not_right() -> None:
    assert pair_accuracy(torch.tensor([math.nan, 1.0])).value == 0.5


def test_means_are_detached_and_see_the_mask_alone() -> None:
    values = torch.tensor([[1.0, math.nan], [5.0, 3.0]], requires_grad=True)
    masked = masked_mean(values, torch.tensor([[True, False], [False, True]]))
    assert masked.value == 2.0 and isinstance(masked.total, torch.Tensor) and not masked.total.requires_grad
    kept = apply_mask(values, torch.tensor([[True, False], [False, True]]))
    kept.sum().backward()
    assert values.grad is not None and torch.equal(values.grad, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert mean(torch.tensor([1.0, 4.0], requires_grad=True)).value == 2.5


# --- calibration ------------------------------------------------------------------------------------------------------

LN3 = math.log(3)  # confidence 3/4
DIFFERENCES = st.lists(st.one_of(st.floats(-8, 8), st.sampled_from([0.0, 1e3, -1e3, 5e-324])), min_size=1, max_size=40)


def plain_reliability(differences: Sequence[float], bins: int) -> list[tuple[float, float, int]]:
    """Every difference into the bin of its confidence; bins of equal width over [1/2, 1], the last one closed."""
    inside: dict[int, list[tuple[float, float]]] = {}
    for difference in differences:
        confidence = 1 / (1 + math.exp(-abs(difference)))
        right = 1.0 if difference > 0 else 0.5 if difference == 0 else 0.0
        inside.setdefault(min(bins - 1, int((confidence - 0.5) * 2 * bins)), []).append((confidence, right))
    return [
        (*(statistics.fmean(column) for column in zip(*inside[number], strict=True)), len(inside[number]))  # type: ignore[misc]
        for number in sorted(inside)
    ]


def test_reliability_by_hand() -> None:
    """Two pairs at confidence 3/4, one right; one sure and right; one tie at confidence 1/2."""
    found = functional.reliability_bins(torch.tensor([LN3, -LN3, 1e3, 0.0]), num_bins=10)
    assert found == [(0.5, 0.5, 1), (pytest.approx(0.75), 0.5, 2), (1.0, 1.0, 1)]
    assert calibration_error(found) == pytest.approx((0 + 2 * 0.25 + 0) / 4)
    assert reliability_bins(torch.zeros(0)) == [] and math.isnan(calibration_error([]))


@given(DIFFERENCES, st.integers(1, 20))
def test_reliability_equals_plain_python(differences: list[float], bins: int) -> None:
    confidences = [(1 / (1 + math.exp(-abs(d))) - 0.5) * 2 * bins for d in differences]
    assume(all(abs(c - round(c)) > 1e-9 or c in (0.0, bins) for c in confidences))  # on an edge, rounding decides
    found = reliability_bins(torch.tensor(differences, dtype=torch.float64), bins)
    expected = plain_reliability(differences, bins)
    assert [count for *_, count in found] == [count for *_, count in expected]
    for got, wanted in zip(found, expected, strict=True):
        assert got == pytest.approx(wanted, abs=1e-9)
    assert sum(count for *_, count in found) == len(differences)
    assert 0 <= calibration_error(found) <= 1


def test_a_calibrated_model_has_no_error() -> None:
    """Of a thousand pairs at confidence 3/4, three in four are right."""
    differences = torch.tensor([LN3] * 750 + [-LN3] * 250)
    assert calibration_error(reliability_bins(differences)) == pytest.approx(0, abs=1e-6)
    # twice as sure: sigma(2 ln 3) = 9/10
    assert calibration_error(reliability_bins(2 * differences)) == pytest.approx(0.9 - 0.75, abs=1e-6)


BUGS: dict[str, Any] = {
    "confidence of the chosen": lambda difference, num_bins=10: [
        (float(torch.sigmoid(difference).mean()), 0.0, len(difference))
    ],
    "a tie is wrong": lambda difference, num_bins=10: reliability_bins(difference - 1e-12, num_bins),
    "other bins": lambda difference, num_bins=10: reliability_bins(difference, 2),
}


@pytest.mark.parametrize("bug", BUGS)
def test_changed_diagram_is_found(monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    monkeypatch.setattr(functional, "reliability_bins", BUGS[bug])
    with pytest.raises(AssertionError):
        test_reliability_by_hand()


# --- correlation ------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(-100, 100), st.floats(-100, 100)), min_size=2, max_size=30))
def test_correlation_equals_the_standard_library(points: list[tuple[float, float]]) -> None:
    x, y = ([*each] for each in zip(*points, strict=True))
    assume(statistics.pstdev(x) > 1e-3 and statistics.pstdev(y) > 1e-3)
    found = correlation(torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64))
    assert found == pytest.approx(statistics.correlation(x, y), abs=1e-9)


def test_correlation_by_hand() -> None:
    assert correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10, 20, 30])) == pytest.approx(1)
    assert correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3, 2, 1])) == pytest.approx(-1)
    assert correlation(torch.tensor([1.0, 0.0, -1.0, 0.0]), torch.tensor([0, 1, 0, -1])) == pytest.approx(0)
    assert math.isnan(correlation(torch.tensor([1.0, 1.0]), torch.tensor([1, 2])))


class Transfers(TorchFunctionMode):
    """Records the device of every tensor whose values are read."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__float__):
            self.devices.append(args[0].device.type)
        elif func is torch.as_tensor:
            assert "device" not in kwargs, "a statistic is copied to another device"
        return func(*args, **(kwargs or {}))


def test_statistics_are_read_with_one_transfer_from_each_device() -> None:
    one = torch.ones((), device="meta")
    stats = {
        "rollouts": WeightedMean(torch.tensor(6.0), torch.tensor(3)),
        "update": WeightedMean(one, one),
        "reward": WeightedMean(torch.tensor(5.0, dtype=torch.float64), 2),
        "loss": WeightedMean(one, 4),
        "seconds": WeightedMean(1.5, 1),
    }
    with fake_device_mode(torch.device("cuda")), Transfers() as transfers:
        found = to_floats(stats)
    assert sorted(transfers.devices) == ["cpu", "cuda"]
    assert [found[name] for name in ("rollouts", "reward", "seconds")] == [2.0, 2.5, 1.5]
    # A fake GPU's values are read as 0.
    assert found["loss"] == 0.0 and math.isnan(found["update"])
