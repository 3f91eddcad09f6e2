"""Which store serves a model: the fastest one that says what plain forward passes say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lowrank_tune.model.recovery import is_out_of_memory
from lowrank_tune.rollout.stores import CohortStore, RecomputeStore, SlotStore, Store

Kind = Callable[[Any], Store]
STORES: tuple[Kind, ...] = (SlotStore, CohortStore)
_CHOSEN: WeakKeyDictionary[Any, Kind] = WeakKeyDictionary()


def store_for(model: Any) -> Store:
    """An empty store. The first call for a model tries the kinds in a few tiny passes; adapters and modes are the caller's."""
    if model not in _CHOSEN:
        _CHOSEN[model] = next((kind for kind in STORES if agrees(kind, model)), RecomputeStore)
    return _CHOSEN[model](model)


def agrees(kind: Kind, model: Any) -> bool:
    """Whether two prompts of different lengths, one of them in two slots, read on as they do alone and without a cache."""
    try:
        found = _read_on(kind(model), model.get_input_embeddings().weight.shape[0])
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:  # whatever another kind of cache runs into
        if is_out_of_memory(error):
            raise
        return False
    expected = [_plain(model, sequence) for sequence, _ in found]
    tolerance = 1e-3 if expected[0].dtype == torch.float32 and not torch.is_autocast_enabled() else 5e-2
    return all(float((mine - plain).norm()) <= tolerance * float(plain.norm()) for (_, mine), plain in zip(found, expected, strict=True))


def _read_on(store: Store, vocabulary: int) -> list[tuple[list[int], Tensor]]:
    """Sequences, each with the last hidden state that the store has for it. The second one ends early, and its slot is taken."""
    words = [word % vocabulary for word in range(2, 20)]
    sequences = [words[:3], words[3:9], words[:3]]
    store.open(3, 16, 1 << 40)
    prompts, hidden = store.read(sequences[:2])
    found = [(sequences[row][:], hidden[row]) for row in (0, 1)]
    store.place(prompts, [0, 1, 0], [0, 1, 2])
    for turn in range(3):
        if turn == 1:
            store.move(2, 1, len(sequences[2]))
            del sequences[1]
        tokens = words[9 + 3 * turn :][: len(sequences)]
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.append(token)
        states = store.step(tokens, [len(sequence) - 1 for sequence in sequences])
        found += [(sequence[:], state) for sequence, state in zip(sequences, states, strict=True)]
    return found


def _plain(model: Any, sequence: Sequence[int]) -> Tensor:
    ids = torch.tensor([list(sequence)], device=model.device)
    return model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, -1]  # type: ignore[no-any-return]
