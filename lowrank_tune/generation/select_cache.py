"""Which store serves a model: the fastest one that computes what plain forward passes compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lowrank_tune.events import Emit, LogMessage
from lowrank_tune.generation.kv_cache import DynamicCacheStore, KVStore, NoCacheStore, StaticSlotCache
from lowrank_tune.model.oom import is_out_of_memory
from lowrank_tune.model.rounding import allowed_difference, relative_difference

StoreFactory = Callable[[Any], KVStore]
STORES: tuple[tuple[StoreFactory, str], ...] = (
    (StaticSlotCache, "one key-value cache for all sequences"),
    (DynamicCacheStore, "the model's own cache for each prompt"),
)
LAST_RESORT = "no cache: each step computes whole sequences again"
HALF_TOLERANCE = 5e-2
FP32_TOLERANCE = 1e-3
"""Relative differences of a hidden state that are always allowed."""
PROBE_ROWS = 3
"""Rows of the batch that measures the rounding of another batch shape: as many as the trial decodes at most."""
_cache_by_model: WeakKeyDictionary[Any, StoreFactory] = WeakKeyDictionary()


def select_cache(model: Any, emit: Emit | None = None) -> KVStore:
    """Return an empty store. The first call for a model tries the kinds in a few tiny passes; adapters and modes are
    the caller's.

    Where the fastest kind cannot serve the model, `emit` is called with one note that contains the reason.
    """
    if model not in _cache_by_model:
        _cache_by_model[model] = _select_kv_cache(model, emit)
    return _cache_by_model[model](model)


def select_cache_without_values(model: Any) -> KVStore:
    """Return an empty store of the fastest kind whose passes the model accepts. Nothing is compared: for the planner,
    whose meta tensors have no values."""
    if model not in _cache_by_model:
        usable = (kind for kind, _ in STORES if not isinstance(_decode_probes_or_fault(kind, model), str))
        _cache_by_model[model] = next(usable, NoCacheStore)
    return _cache_by_model[model](model)


def _select_kv_cache(model: Any, emit: Emit | None) -> StoreFactory:
    faults: list[str] = []
    chosen: StoreFactory = NoCacheStore
    used = LAST_RESORT
    for kind, description in STORES:
        fault = cache_fault(kind, model)
        if fault is None:
            chosen = kind
            used = description
            break
        faults.append(f"{description}: {fault}")
    if faults and emit is not None:
        emit(
            LogMessage(
                level="warning",
                message=f"completions are decoded with {used}, which is slower; not usable: {'; '.join(faults)}",
            )
        )
    return chosen


def cache_fault(kind: StoreFactory, model: Any) -> str | None:
    """Return why a kind of store cannot serve a model, or None.

    Two prompts of different lengths, one of them in two slots, must continue as they do alone and without a cache.
    """
    probes = _decode_probes_or_fault(kind, model)
    if isinstance(probes, str):
        return probes
    plain = [_uncached_state(model, sequence) for sequence, _ in probes]
    half = plain[0].dtype != torch.float32 or torch.is_autocast_enabled(model.device.type)
    rounding = 0.0
    if half:
        batched = [_uncached_state(model, sequence, PROBE_ROWS) for sequence, _ in probes]
        rounding = max(map(relative_difference, batched, plain))
    allowed = allowed_difference(HALF_TOLERANCE if half else FP32_TOLERANCE, rounding)
    differences = [relative_difference(state, expected) for (_, state), expected in zip(probes, plain, strict=True)]
    if all(difference <= allowed for difference in differences):  # false for NaN, too
        return None
    return f"hidden states differ by {max(differences):.1%} from plain passes, and {allowed:.1%} is allowed"


def _decode_probes_or_fault(kind: StoreFactory, model: Any) -> list[tuple[list[int], Tensor]] | str:
    """The probes, or what the model raises when it is used with this kind of store."""
    try:
        return _decode_probes(kind(model), model.get_input_embeddings().weight.shape[0])
    # whatever another kind of cache runs into
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        if is_out_of_memory(error):
            raise
        return str(error) or type(error).__name__


def _decode_probes(store: KVStore, vocabulary: int) -> list[tuple[list[int], Tensor]]:
    """Sequences, each with the last hidden state that the store has for it. The second one ends early, and its slot is
    taken."""
    token_ids = [token_id % vocabulary for token_id in range(2, 20)]
    sequences = [token_ids[:3], token_ids[3:9], token_ids[:3]]
    store.allocate(3, 16, 1 << 40)
    prompts, hidden = store.prefill(sequences[:2])
    probes = [(sequences[row][:], hidden[row]) for row in (0, 1)]
    store.insert(prompts, [0, 1, 0], [0, 1, 2])
    for step in range(3):
        if step == 1:
            store.move(2, 1, len(sequences[2]))
            del sequences[1]
        tokens = token_ids[9 + 3 * step :][: len(sequences)]
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.append(token)
        states = store.step(tokens, [len(sequence) - 1 for sequence in sequences])
        probes += [(sequence[:], state) for sequence, state in zip(sequences, states, strict=True)]
    return probes


def _uncached_state(model: Any, sequence: Sequence[int], rows: int = 1) -> Tensor:
    """Return the last hidden state (d,) of a sequence, which stands in each of the rows of its batch."""
    ids = torch.tensor([list(sequence)] * rows, device=model.device)
    return model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, -1]  # type: ignore[no-any-return]
