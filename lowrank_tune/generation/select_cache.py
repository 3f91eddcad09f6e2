"""Selects the cache of a model: the fastest kind that computes what plain forward passes compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lowrank_tune.events import Emit, warning
from lowrank_tune.generation.fallback_caches import DynamicCacheStore, NoCacheStore
from lowrank_tune.generation.kv_cache import KVStore
from lowrank_tune.generation.paged_cache import PagedCache, pages_fault
from lowrank_tune.generation.static_slot_cache import StaticSlotCache
from lowrank_tune.model.oom import is_out_of_memory
from lowrank_tune.model.rounding import allowed_difference, relative_difference

StoreFactory = Callable[[Any], KVStore]
STORES: tuple[tuple[StoreFactory, str], ...] = (
    (StaticSlotCache, "one key-value cache for all sequences"),
    (DynamicCacheStore, "the model's own cache for each prompt"),
)
PAGED_STORE: StoreFactory = PagedCache
LAST_RESORT = "no cache: each step computes whole sequences again"
HALF_TOLERANCE = 5e-2
FP32_TOLERANCE = 1e-3
"""Relative differences of a hidden state that are always allowed."""
PROBE_ROWS = 3
"""Rows of the batch that measures the rounding of another batch shape: as many as a probe decodes at most."""
_cache_by_model: WeakKeyDictionary[Any, StoreFactory] = WeakKeyDictionary()
_pages_by_model: WeakKeyDictionary[Any, StoreFactory | None] = WeakKeyDictionary()
"""The kind of pages of models that wanted them, None for models that cannot have any."""


def select_cache(
    model: Any,
    emit: Emit | None = None,
    wants_pages: bool = False,
) -> KVStore:
    """Returns an empty store, with `wants_pages` one of `PAGED_STORE` if it can serve the model. The first call for a
    model tries the kinds in a few tiny passes, with the adapters and the mode that are active.

    If the kind of pages, or the fastest other kind, cannot serve the model, one warning with the reason is emitted.
    """
    if wants_pages:
        if model not in _pages_by_model:
            _pages_by_model[model] = _select_pages(model, emit)
        kind = _pages_by_model[model]
        if kind is not None:
            return kind(model)
    if model not in _cache_by_model:
        _cache_by_model[model] = _select_kv_cache(model, emit)
    return _cache_by_model[model](model)


def select_cache_without_values(model: Any) -> KVStore:
    """Returns an empty store of the fastest kind of `STORES` whose passes the model accepts. Compares nothing: for the
    planner, whose meta tensors have no values."""
    if model not in _cache_by_model:
        _cache_by_model[model] = NoCacheStore
        for kind, _ in STORES:
            if not isinstance(_decode_probes_or_fault(kind, model), str):
                _cache_by_model[model] = kind
                break
    return _cache_by_model[model](model)


def _select_pages(model: Any, emit: Emit | None) -> StoreFactory | None:
    fault = pages_fault(model) or cache_fault(PAGED_STORE, model)
    if fault is None:
        return PAGED_STORE
    if emit is not None:
        emit(warning(f"`rollout.prefix_caching: true` has no effect: {fault}"))
    return None


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
        emit(warning(f"completions are decoded with {used}, which is slower; not usable: {'; '.join(faults)}"))
    return chosen


def cache_fault(kind: StoreFactory, model: Any) -> str | None:
    """Returns why a kind of store cannot serve a model, or None.

    Two prompts of different lengths, one of them in two slots, must continue as they do alone and without a cache.
    """
    probes = _decode_probes_or_fault(kind, model)
    if isinstance(probes, str):
        return probes
    plain = [_uncached_state(model, probe.token_ids) for probe in probes]
    if plain[0].dtype != torch.float32 or torch.is_autocast_enabled(model.device.type):
        batched = [_uncached_state(model, probe.token_ids, PROBE_ROWS) for probe in probes]
        rounding = max(map(relative_difference, batched, plain))
        allowed = allowed_difference(HALF_TOLERANCE, rounding)
    else:
        allowed = FP32_TOLERANCE
    differences = [
        relative_difference(probe.hidden_state, expected) for probe, expected in zip(probes, plain, strict=True)
    ]
    # The comparison is false for NaN.
    if all(difference <= allowed for difference in differences):
        return None
    return f"hidden states differ by {max(differences):.1%} from plain passes, and {allowed:.1%} is allowed"


class _Probe(NamedTuple):
    """A sequence, and the last hidden state (d,) that a store computes for it."""

    token_ids: list[int]
    hidden_state: Tensor


def _decode_probes_or_fault(kind: StoreFactory, model: Any) -> list[_Probe] | str:
    """Returns the probes, or what the model raises when it is used with this kind of store."""
    try:
        return decode_probes(kind(model), model.get_input_embeddings().weight.shape[0])
    # The errors that models raise for a kind of cache that they do not support.
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        if is_out_of_memory(error):
            raise
        return str(error) or type(error).__name__


def decode_probes(store: KVStore, vocabulary: int) -> list[_Probe]:
    """Decodes three sequences for three steps. The second one ends early, and another one moves into its slot."""
    token_ids = [token_id % vocabulary for token_id in range(2, 20)]
    first = token_ids[:3]
    if isinstance(store, PagedCache):
        # Both samples of this prompt share its first page.
        first = (token_ids * store.page_size)[: store.page_size + 3]
    sequences = [first[:], token_ids[3:9], first[:]]
    store.allocate(3, len(first) + 13, 1 << 40)
    prompts, hidden = store.prefill(sequences[:2])
    probes = [_Probe(sequences[row][:], hidden[row]) for row in (0, 1)]
    store.insert(prompts, [0, 1, 0], [0, 1, 2])
    for step in range(3):
        if step == 1:
            store.move(2, 1, len(sequences[2]))
            del sequences[1]
        tokens = token_ids[9 + 3 * step :][: len(sequences)]
        positions = [len(sequence) for sequence in sequences]
        states = store.step(tokens, positions)
        for sequence, token, state in zip(sequences, tokens, states, strict=True):
            sequence.append(token)
            probes.append(_Probe(sequence[:], state))
    return probes


def _uncached_state(
    model: Any,
    sequence: Sequence[int],
    rows: int = 1,
) -> Tensor:
    """Returns the last hidden state (d,) of a sequence in a batch of `rows` equal rows."""
    ids = torch.tensor([list(sequence)] * rows, device=model.device)
    output = model.get_decoder()(input_ids=ids, use_cache=False)
    return output.last_hidden_state[0, -1]  # type: ignore[no-any-return]
