"""Gathered rows, and the fixed order in which their gradient is summed."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_tune.model.gather_rows import _gather_rows, gather_rows

INDEX = torch.tensor([2, 0, 0, 5, 0, 2])


def rows() -> Tensor:
    return torch.randn(6, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_the_operator_is_an_index_with_its_gradient() -> None:
    tensor, other = rows(), rows()
    gathered = _gather_rows(tensor, INDEX)
    assert torch.equal(gathered, other[INDEX]) and torch.equal(gathered, gather_rows(tensor, INDEX))
    (gathered * gathered.detach().cos()).sum().backward()
    (other[INDEX] * other[INDEX].detach().cos()).sum().backward()
    assert tensor.grad is not None and other.grad is not None
    torch.testing.assert_close(tensor.grad, other.grad)
    assert float(tensor.grad[[1, 3, 4]].abs().max()) == 0.0


def test_the_operator_is_registered_as_torch_needs_it() -> None:
    torch.library.opcheck(_gather_rows, (rows(), INDEX))
