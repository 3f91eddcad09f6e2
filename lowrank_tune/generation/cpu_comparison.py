"""Compares the faster forwards of a rollout on the CPU with those of the model, once for each model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lowrank_tune.events import Emit, warning
from lowrank_tune.generation.select_cache import decode_probes, select_cache
from lowrank_tune.model.logprobs import Head
from lowrank_tune.model.oom import is_out_of_memory
from lowrank_tune.model.rounding import relative_difference

Forwards = Sequence[tuple[nn.Module, Callable[..., Any]]]
TOLERANCE = 1e-3
"""Relative difference of hidden states: rounding of a deep model in fp32 explains less."""
_is_equal: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


@contextmanager
def replaced_forwards(forwards: Forwards) -> Iterator[None]:
    """Replaces the forward methods of modules."""
    for module, forward in forwards:
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, _forward in forwards:
            del module.__dict__["forward"]


def passes_comparison(
    model: Any,
    forwards: Forwards,
    heads: tuple[Head, Head],
    emit: Emit,
) -> bool:
    """Returns whether a few decoded tokens have the same hidden states with the replaced forwards, and the same logits
    by both heads, with the adapters and the mode that are active. If not, the first call for a model emits a
    warning."""
    if model not in _is_equal:
        fault = _fault(model, forwards, heads)
        _is_equal[model] = fault is None
        if fault is not None:
            emit(warning(f"completions are decoded with transformers' own modules, which is slower: {fault}"))
    return _is_equal[model]


def _fault(
    model: Any,
    forwards: Forwards,
    heads: tuple[Head, Head],
) -> str | None:
    expected = _hidden_states(model)
    try:
        with replaced_forwards(forwards):
            computed = _hidden_states(model)
        difference = relative_difference(computed, expected)
        logits = [head.logits(expected) for head in heads]
    # The errors that PyTorch and transformers raise for shapes and layouts that they do not support.
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        if is_out_of_memory(error):
            raise
        return f"the faster ones raise {type(error).__name__}: {error}"
    differences = difference, relative_difference(*logits)
    # The comparison is false for NaN.
    if all(difference <= TOLERANCE for difference in differences):
        return None
    return (
        f"hidden states or logits of the faster ones differ by {max(differences):.1%}, and {TOLERANCE:.1%} is allowed"
    )


def _hidden_states(model: Any) -> Tensor:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    probes = decode_probes(select_cache(model), vocabulary)
    return torch.stack([probe.hidden_state for probe in probes])
