"""Fast paths of training, each with a plain version that computes the same.

Before the first step a few made-up rows run on both, on the user's own base: the log-probs and the gradients of the
adapters must agree. A path that computes something else, or that fails, is disabled with one warning, and training
continues on the plain one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lowrank_tune.batch import Batch
from lowrank_tune.errors import first_line
from lowrank_tune.events import Emit, warning
from lowrank_tune.model.base import Base
from lowrank_tune.model.oom import is_out_of_memory
from lowrank_tune.model.rounding import allowed_difference, relative_difference

NUM_COLUMNS = 40
LENGTHS = (NUM_COLUMNS, NUM_COLUMNS // 2, NUM_COLUMNS - 4)
NUM_SHARED = NUM_COLUMNS // 4
"""Tokens of each made-up row, and of the beginning that they share."""
FILL_SIZE = 0.02
"""Size of the values that replace those of an adapter."""
TOLERANCE = {torch.float32: 1e-4}
HALF_PRECISION_TOLERANCE = 2e-2
"""Relative differences of log-probs and gradients that are always allowed, in fp32 and in half precision."""


class FastPath(Protocol):
    """A computation that can be enabled and disabled. `name` begins the sentence of the warning."""

    name: str
    enabled: bool


@contextmanager
def disabled(paths: Iterable[FastPath]) -> Iterator[None]:
    """Disables fast paths, and restores them on exit."""
    before = [(path, path.enabled) for path in paths]
    for path, _ in before:
        path.enabled = False
    try:
        yield
    finally:
        for path, was_enabled in before:
            path.enabled = was_enabled


Outputs = dict[str, Tensor]
"""Log-probs and gradients by name."""
Compute = Callable[[Batch], Outputs]


def verify_fast_paths(
    paths: Sequence[FastPath],
    compute: Compute,
    base: Base,
    emit: Emit,
) -> None:
    """Disables each enabled path whose outputs are not those of the plain paths, or that raises an exception.

    `compute` runs made-up rows, separate ones and such that share their beginning. Paths are enabled one after the
    other, so that each is also compared together with those before it. In half precision the allowed difference grows
    with what another batch shape alone changes.
    """
    candidates = [path for path in paths if path.enabled]
    if not candidates:
        return
    shared = made_up_rows(base.model.get_output_embeddings().weight.shape[0], base.device)
    separate = replace(shared, shared_prefix=None)
    outputs = partial(_outputs_of, compute, [separate, shared])
    with base.train_mode(), _without_dropout(base.model):
        with disabled(candidates):
            expected = outputs()
            tolerance = _tolerance(compute, separate, base.model.dtype)
        for number, path in enumerate(candidates):
            with disabled(candidates[number + 1 :]):
                _verify(
                    path,
                    outputs,
                    expected,
                    tolerance,
                    emit,
                )


def _outputs_of(compute: Compute, batches: Sequence[Batch]) -> Outputs:
    """Returns the outputs of all batches."""
    outputs: Outputs = {}
    for number, batch in enumerate(batches):
        for name, values in compute(batch).items():
            outputs[f"{name} of batch {number}"] = values
    return outputs


def _verify(
    path: FastPath,
    compute: Callable[[], Outputs],
    expected: Outputs,
    tolerance: float,
    emit: Emit,
) -> None:
    """Disables the path if its outputs are not the expected ones."""
    try:
        difference = largest_difference(compute(), expected)
    # Compilers raise errors of many classes. The warning contains the message.
    except Exception as error:
        if is_out_of_memory(error):
            raise
        path.enabled = False
        emit(warning(f"{path.name}: an error ({first_line(error)}); the plain path is used"))
        return
    # False for NaN.
    if not difference <= tolerance:
        path.enabled = False
        emit(
            warning(
                f"{path.name}: another result than on the plain path, by {difference:.1e} of its size ({tolerance:.0e} "
                "is allowed); the plain path is used"
            )
        )


def _tolerance(
    compute: Compute,
    rows: Batch,
    dtype: torch.dtype,
) -> float:
    """Returns the relative difference that is allowed. In half precision it depends on the rounding of the plain path,
    measured with the same rows in a wider batch."""
    if dtype in TOLERANCE:
        return TOLERANCE[dtype]
    wider = rows.pad_columns(rows.input_ids.shape[1] + 8, 0)
    rounding = largest_difference(compute(wider), compute(rows))
    return allowed_difference(HALF_PRECISION_TOLERANCE, rounding)


def largest_difference(computed: Outputs, expected: Outputs) -> float:
    """Returns the largest relative difference of an output. Outputs that are zero in both are equal, and NaN is a
    difference of infinity."""
    assert computed.keys() == expected.keys(), "both paths have the same outputs"
    largest = 0.0
    for name, values in expected.items():
        columns = min(values.shape[-1], computed[name].shape[-1])
        pair = computed[name][..., :columns], values[..., :columns]
        if torch.equal(*pair):
            continue
        difference = relative_difference(*pair)
        if difference != difference:
            return float("inf")
        largest = max(largest, difference)
    return largest


def made_up_rows(vocab_size: int, device: torch.device) -> Batch:
    """Returns rows of different lengths, padded on the right, which share their beginning. Every token is scored."""
    numbers = torch.arange(3, 3 + len(LENGTHS) * NUM_COLUMNS).view(-1, NUM_COLUMNS)
    ids = numbers * 7 % vocab_size
    ids[:, :NUM_SHARED] = ids[0, :NUM_SHARED]
    mask = torch.arange(NUM_COLUMNS) < torch.tensor(LENGTHS)[:, None]
    ids = ids.masked_fill(~mask, 0)
    shared_prefix = torch.tensor([0] + [NUM_SHARED] * (len(LENGTHS) - 1))
    return Batch(
        ids,
        mask,
        mask.clone(),
        shared_prefix=shared_prefix,
    ).to(device)


@contextmanager
def fixed_values(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gives parameters small values that are the same in each run, and restores theirs on exit. A fresh adapter has a B
    of zeros, with which no path could compute a wrong gradient of A; and a run that is continued must choose the same
    paths."""
    before = [(parameter, parameter.detach().clone()) for parameter in parameters]
    for parameter, _ in before:
        numbers = torch.arange(parameter.numel(), dtype=torch.float32, device=parameter.device)
        parameter.data.copy_(FILL_SIZE * numbers.cos().view_as(parameter))
    try:
        yield
    finally:
        for parameter, values in before:
            parameter.data.copy_(values)


def gradients_of(value: Tensor, parameters: Mapping[str, nn.Parameter]) -> Outputs:
    """Returns the gradients by name, 0 for a parameter that the value does not depend on. Leaves `grad` as it is."""
    if not parameters:
        return {}
    gradients = torch.autograd.grad(
        value,
        list(parameters.values()),
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(parameters, gradients, strict=True))


@contextmanager
def _without_dropout(model: Any) -> Iterator[None]:
    """Sets the probability of all dropout modules to 0, so that no pass draws random numbers."""
    dropouts: list[Any] = [module for module in model.modules() if isinstance(module, nn.Dropout) and module.p]
    before = [module.p for module in dropouts]
    for module in dropouts:
        module.p = 0.0
    try:
        yield
    finally:
        for module, probability in zip(dropouts, before, strict=True):
            module.p = probability
