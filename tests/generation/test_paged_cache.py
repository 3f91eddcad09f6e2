"""Pages of keys and values draw what one cache for all sequences draws: prompts longer and shorter than a page, groups,
admission at any time, memory that runs out; and no page is lost, or written by two sequences.

The kernel runs on GPUs only; `gathered_attention` computes what its documentation states.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import perturb, roles_over, unquantized_base
from rollout_helpers import Completions, assert_equal_completions, by_sample, ragged_prompts, stacked_llama_roles
from torch import Tensor

from lowrank_tune.generation import Engine, decode_steps, paged_attention, select_cache
from lowrank_tune.generation.decode_scheduler import DecodeScheduler
from lowrank_tune.generation.decode_steps import BufferedSteps, PlainSteps
from lowrank_tune.generation.kv_cache import slots_that_fit
from lowrank_tune.generation.page_pool import SCRATCH_PAGE, PagePool, pages_that_fit
from lowrank_tune.generation.paged_attention import PAGE_SIZE, PageTables, varlen_paged_attention
from lowrank_tune.generation.paged_cache import PagedCache, paged_columns, pages_fault
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.generation.static_slot_cache import StaticSlotCache
from lowrank_tune.generation.stopping import StoppingCriteria
from lowrank_tune.model.oom import MemoryLimits
from lowrank_tune.model.roles import Roles

PAGE = 4


def gathered_attention(query: Tensor, keys: Tensor, values: Tensor, tables: PageTables, scale: float | None) -> Tensor:
    """Attention of each query (H, D) over the first tokens of its pages, one sequence after the other in float64."""
    rows = []
    for row, pages, length in zip(query.double(), tables.pages.tolist(), tables.lengths.tolist(), strict=True):
        assert 0 < length <= tables.width
        seen_keys, seen_values = (pool[pages].flatten(0, 1)[:length].double() for pool in (keys, values))
        group = len(row) // seen_keys.shape[1]
        heads = []
        for head, one in enumerate(row):
            scores = seen_keys[:, head // group] @ one * (scale or len(one) ** -0.5)
            heads.append(scores.softmax(0) @ seen_values[:, head // group])
        rows.append(torch.stack(heads))
    return torch.stack(rows).to(query.dtype)


class CheckedCache(PagedCache):
    """Checks after each change that no two sequences have a page that one of them writes, and that no page is lost."""

    made: list[CheckedCache] = []

    def __init__(self, model: Any) -> None:
        super().__init__(model, gathered_attention, PAGE)
        CheckedCache.made.append(self)
        self.most_shared = 0

    def _upload_tables(self) -> None:
        super()._upload_tables()
        pool = self.pool
        own = [page for sequence in pool.slots.values() for page in sequence.own]
        shared_by_id = {id(sequence.shared): sequence.shared for sequence in pool.slots.values()}
        shared = [page for pages in shared_by_id.values() for page in pages.pages]
        assert sorted(own + shared + pool.free) == list(range(1, self.num_pages + 1))
        self.most_shared = max([self.most_shared, *(pages.users for pages in shared_by_id.values() if pages.pages)])

    def step_on_device(self, input_ids: Tensor, position_ids: Tensor, width: int, is_full: bool = False) -> Tensor:
        for slot, table in enumerate(self.block_table.tolist()):
            expected = self.pool.slots[slot].pages if slot in self.pool.slots else [SCRATCH_PAGE] * len(table)
            assert table == expected
        before = [layer.keys.clone() for layer in self.cache.layers]
        hidden = super().step_on_device(input_ids, position_ids, width, is_full)
        written = [
            (layer.keys != keys).flatten(1).any(1) for layer, keys in zip(self.cache.layers, before, strict=True)
        ]
        changed = set(torch.stack(written).any(0).nonzero().flatten().tolist())
        own = {page for sequence in self.pool.slots.values() for page in sequence.own}
        assert changed <= own | {SCRATCH_PAGE}
        return hidden


@pytest.fixture(scope="module")
def roles() -> Iterator[Roles]:
    yield from stacked_llama_roles()


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_steps, "COLUMNS_PER_BUCKET", 8)


def completions(
    roles: Roles,
    kind: type[StaticSlotCache],
    prompts: list[list[int]],
    n: int,
    sampling: SamplingParams,
    sync_every: int | None = None,
    **more: Any,
) -> Completions:
    """Completions with a kind of cache; with `sync_every` by steps over buffers."""
    CheckedCache.made.clear()
    model = roles.base.model
    before = select_cache._cache_by_model.get(model)
    select_cache._cache_by_model[model] = kind
    engine = Engine(roles, "policy", **more)
    engine.buffered = sync_every is not None
    roles.decoding.sync_every = sync_every or 1
    try:
        found = by_sample(engine.generate(prompts, n, sampling))
    finally:
        del select_cache._cache_by_model[model]
        if before is not None:
            select_cache._cache_by_model[model] = before
    return found


@pytest.fixture(scope="module")
def float64_roles() -> Iterator[Roles]:
    """Roles over a base in float64: in fp32 rounding alone is 1e-5."""
    made = roles_over(unquantized_base("llama"), lower=["sft"])
    perturb(made, "policy", "sft")
    made.base.model.double()
    yield made
    made.unload_adapters()


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=5),
    n=st.integers(1, 4),
    slots=st.integers(1, 9),
    max_new_tokens=st.integers(1, 11),
    num_stops=st.sampled_from([0, 12]),
    sync_every=st.sampled_from([None, 1, 3]),
)
def test_pages_draw_what_one_cache_draws(
    float64_roles: Roles,
    lengths: list[int],
    n: int,
    slots: int,
    max_new_tokens: int,
    num_stops: int,
    sync_every: int | None,
) -> None:
    """Sequences end at their stop ids or at the limit, others move into their slots, and waiting ones are admitted."""
    prompts = ragged_prompts(lengths)
    sampling = SamplingParams(max_new_tokens, frozenset(range(num_stops)), 1.0)
    arguments = (prompts, n, sampling, sync_every)
    expected = completions(float64_roles, StaticSlotCache, *arguments, slots=slots)
    found = completions(float64_roles, CheckedCache, *arguments, slots=slots)
    assert_equal_completions(found, expected, 1e-6)
    (store,) = CheckedCache.made
    assert sorted(store.pool.free) == list(range(1, store.num_pages + 1)), "pages are lost"


def test_samples_of_a_prompt_share_its_pages(roles: Roles) -> None:
    sampling = SamplingParams(6, frozenset(), 1.0)
    completions(roles, CheckedCache, ragged_prompts([9, 3, 12]), 4, sampling, slots=12)
    # The first call for a base also compares its modules, with stores of its own.
    store = CheckedCache.made[0]
    assert store.most_shared == 4


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "phi", "granite", "cohere", "gemma", "olmo2", "smollm3", "phi3"])
def test_pages_of_other_families(kind: str) -> None:
    """With grouped heads, biases, norms of queries and other scales."""
    model_roles = roles_over(unquantized_base(kind))
    perturb(model_roles, "policy")
    prompts = ragged_prompts([9, 3])
    sampling = SamplingParams(8, frozenset(range(3)), 1.0)
    assert paged_attention.attends_to_pages(model_roles.base.model.get_decoder().config)
    expected = completions(model_roles, StaticSlotCache, prompts, 2, sampling, slots=3)
    assert_equal_completions(completions(model_roles, CheckedCache, prompts, 2, sampling, slots=3), expected)


def test_few_pages_admit_fewer_sequences(roles: Roles) -> None:
    """Pages for two whole sequences and eight slots: the others wait, and share what is there."""
    prompts = ragged_prompts([9, 10, 11])
    sampling = SamplingParams(8, frozenset(range(8)), 1.0)
    expected = completions(roles, StaticSlotCache, prompts, 4, sampling)
    most = 0

    class FewPages(CheckedCache):
        def allocate(self, slots: int, columns: int, limit: int) -> int:
            super().allocate(slots, columns, limit)
            self.num_pages = 10
            self.pool = PagePool(self.num_pages, 5)
            return self.slots

        def step_on_device(self, *arguments: Any, **options: Any) -> Tensor:
            nonlocal most
            most = max(most, len(self.pool.slots))
            return super().step_on_device(*arguments, **options)

    assert_equal_completions(completions(roles, FewPages, prompts, 4, sampling, slots=8), expected)
    assert most == 2


@settings(max_examples=5, deadline=None)
@given(
    length=st.integers(24, 34),
    num_prompts=st.integers(1, 2),
    n=st.integers(6, 9),
    whole=st.integers(2, 4),
    max_new_tokens=st.integers(2, 5),
)
def test_more_samples_of_a_prompt_fit_the_same_bytes(
    roles: Roles, length: int, num_prompts: int, n: int, whole: int, max_new_tokens: int
) -> None:
    """A limit with room for `whole` sequences that share nothing."""
    prompts = ragged_prompts([length] * num_prompts)
    sampling = SamplingParams(max_new_tokens, frozenset(range(4)), 1.0)
    slot_bytes = StaticSlotCache(roles.base.model).bytes_per_slot(length + max_new_tokens)
    limit = -(-whole * slot_bytes * 5 // 4)
    most_rows = []
    found = []
    run = PlainSteps.run
    for kind in (StaticSlotCache, CheckedCache):
        rows = [0]

        def counted(steps: PlainSteps, sequences: Any, rows: list[int] = rows) -> Any:
            rows.append(len(sequences))
            return run(steps, sequences)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PlainSteps, "run", counted)
            found.append(completions(roles, kind, prompts, n, sampling, cache_bytes=limit))
        most_rows.append(max(rows))
    assert_equal_completions(found[1], found[0])
    assert most_rows[0] == whole < most_rows[1]
    (store,) = CheckedCache.made
    assert (store.num_pages + 1) * PAGE * store.bytes_per_slot(1) <= limit * 4 // 5


@pytest.mark.parametrize(("wants_pages", "n", "shares"), [(False, 4, False), (True, 1, False), (True, 2, True)])
def test_pages_are_an_option_for_several_samples(
    roles: Roles, monkeypatch: pytest.MonkeyPatch, wants_pages: bool, n: int, shares: bool
) -> None:
    CheckedCache.made.clear()
    monkeypatch.setattr(select_cache, "pages_fault", lambda model: None)
    monkeypatch.setattr(select_cache, "PAGED_STORE", CheckedCache)
    monkeypatch.setattr(select_cache, "_pages_by_model", {})
    monkeypatch.setattr(roles.decoding, "prefix_caching", wants_pages)
    engine = Engine(roles, "policy")
    list(engine.generate(ragged_prompts([5, 9]), n, SamplingParams(2, frozenset(), 1.0)))
    assert bool(CheckedCache.made) == shares


def test_what_pages_leave_of_the_bytes(roles: Roles) -> None:
    """Copies of weights take no byte of the pages, the scratch page among them."""
    store = CheckedCache(roles.base.model)
    page_bytes = store.bytes_per_slot(1) * PAGE
    for slots, pages in ((2, 6), (3, 9), (9, 10)):
        store.allocate(slots, 3 * PAGE, 11 * page_bytes * 5 // 4)
        assert store.num_pages == pages
        assert 0 <= store.unused_bytes(11 * page_bytes * 5 // 4) - (10 - pages) * page_bytes <= 1


def test_a_slot_without_a_sequence_has_the_scratch_page(roles: Roles) -> None:
    """Padded steps write there, and the pages of the sequence that has ended may belong to others."""
    store = CheckedCache(roles.base.model)
    store.allocate(2, 12, 1 << 30)
    with torch.no_grad():
        prompts, _ = store.prefill(ragged_prompts([5, 3]))
        store.insert(prompts, [0, 1], [0, 1])
        store.release([1])
        assert store.block_table[1].tolist() == [SCRATCH_PAGE] * 3
        store.step_on_device(torch.tensor([[4], [4]]), torch.tensor([[5], [1]]), 8)


def test_memory_that_runs_out_with_pages(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ragged_prompts([9, 3, 6])
    sampling = SamplingParams(12, frozenset(range(4)), 1.0)
    expected = completions(roles, StaticSlotCache, prompts, 2, sampling, 4)
    step, calls = BufferedSteps.step, 0

    def run_short(self: BufferedSteps, rows: int, width: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(self, rows, width)

    monkeypatch.setattr(BufferedSteps, "step", run_short)
    assert_equal_completions(completions(roles, CheckedCache, prompts, 2, sampling, 4), expected)
    assert len(CheckedCache.made) == 2
    roles.limits = MemoryLimits()


@pytest.mark.parametrize(("whole", "num_ooms"), [(4, 1), (4, 2), (1, 1)])
def test_each_retry_has_fewer_pages(roles: Roles, monkeypatch: pytest.MonkeyPatch, whole: int, num_ooms: int) -> None:
    """More sequences share the pages than would fit without a shared prompt, and halving their number frees nothing."""
    prompts = ragged_prompts([24, 24, 25])
    sampling = SamplingParams(4, frozenset(), 1.0)
    slot_bytes = StaticSlotCache(roles.base.model).bytes_per_slot(29)
    expected = completions(roles, StaticSlotCache, prompts, 6, sampling)
    num_pages = []

    class FailingCache(CheckedCache):
        def step_on_device(self, *arguments: Any, **options: Any) -> Tensor:
            if self.num_pages not in num_pages:
                num_pages.append(self.num_pages)
                if len(num_pages) <= num_ooms:
                    raise torch.OutOfMemoryError("CUDA out of memory")
            return super().step_on_device(*arguments, **options)

    monkeypatch.setattr(roles, "limits", MemoryLimits())
    # A page more than whole sequences have, and the scratch page.
    limit = -(-(whole * 8 * PAGE * slot_bytes // 29 + 2 * PAGE * slot_bytes // 29) * 5 // 4)
    found = completions(roles, FailingCache, prompts, 6, sampling, cache_bytes=limit)
    assert_equal_completions(found, expected)
    assert len(CheckedCache.made) == num_ooms + 1
    assert num_pages == sorted(num_pages, reverse=True)


def test_prompts_that_wait_take_no_more_bytes_than_without_pages() -> None:
    """Two prompts for four sequences that share nothing, however many slots there are."""
    sampling = SamplingParams(4, frozenset())
    scheduler = DecodeScheduler([[1] * 9] * 12, 2, sampling, StoppingCriteria(sampling, None), range(12))
    scheduler.start(20)
    assert len(scheduler.next_prompts()) == 10
    scheduler.start(20)
    scheduler.set_slots(20, 4)
    assert len(scheduler.next_prompts()) == 2


# --- selection --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [None, "one token less", "pages in order"])
def test_pages_are_selected_if_they_compute_what_plain_passes_compute(
    monkeypatch: pytest.MonkeyPatch, fault: str | None
) -> None:
    """The probes cross a page, two of them with a shared one."""

    def attention(query: Tensor, keys: Tensor, values: Tensor, tables: PageTables, scale: float | None) -> Tensor:
        if fault == "one token less":
            tables = PageTables(tables.pages, (tables.lengths - 1).clamp_min(1), tables.width)
        elif fault == "pages in order":
            tables = PageTables(tables.pages[:, :1] + torch.arange(tables.pages.shape[1]), tables.lengths, tables.width)
            tables = PageTables(tables.pages.clamp_max(len(keys) - 1), tables.lengths, tables.width)
        return gathered_attention(query, keys, values, tables, scale)

    model = unquantized_base("llama").model
    monkeypatch.setattr(select_cache, "pages_fault", lambda model: None)
    monkeypatch.setattr(select_cache, "PAGED_STORE", partial(PagedCache, attention=attention, page_size=PAGE))
    notes: list[Any] = []
    with torch.no_grad():
        assert type(select_cache.select_cache(model, notes.append)) is StaticSlotCache
        store = select_cache.select_cache(model, notes.append, wants_pages=True)
        assert type(select_cache.select_cache(model, notes.append)) is StaticSlotCache
        select_cache.select_cache(model, notes.append, wants_pages=True)
    if fault is None:
        assert type(store) is PagedCache and not notes
        return
    assert type(store) is StaticSlotCache
    (note,) = notes
    assert note.message.startswith("`rollout.prefix_caching: true` has no effect: hidden states differ")


def test_pages_need_a_gpu_and_layers_with_full_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "compute capability 8.0" in str(pages_fault(unquantized_base("llama").model))
    monkeypatch.setattr("lowrank_tune.generation.paged_cache.has_flash_attention", lambda model: True)
    assert pages_fault(unquantized_base("llama").model) is None
    for kind in ("mistral", "gemma2", "gemma3_text", "gpt_neo", "gpt2"):
        assert "cannot read pages" in str(pages_fault(unquantized_base(kind).model)), kind


def test_the_kernel_is_called_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own checks of shapes, on tensors without values; and without a split of the keys."""
    if not paged_attention.has_varlen_pages():
        pytest.skip("this PyTorch has no pages")
    calls: list[dict[str, Any]] = []
    varlen_attn = paged_attention.varlen_attn

    def recorded(*arguments: Any, **options: Any) -> Tensor:
        calls.append(options)
        return varlen_attn(*arguments, **options)  # type: ignore[no-any-return]

    monkeypatch.setattr(paged_attention, "varlen_attn", recorded)
    meta = partial(torch.empty, device="meta")
    tables = PageTables(meta(3, 2, dtype=torch.int32), meta(3, dtype=torch.int32), 300)
    keys = meta(9, 256, 2, 64, dtype=torch.bfloat16)
    output = varlen_paged_attention(meta(3, 8, 64), keys, keys, tables, None)
    assert output.shape == (3, 8, 64) and output.dtype == torch.float32
    assert calls[0]["num_splits"] == 1 and calls[0]["enable_gqa"]


# --- the pool ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 20), num_pages=st.integers(6, 30), per_sequence=st.integers(1, 6))
def test_the_pool_gives_no_page_twice(seed: int, num_pages: int, per_sequence: int) -> None:
    """Random admissions, moves and ends of groups; at the end all pages are free again."""
    stream = random.Random(seed)
    pool = PagePool(num_pages, per_sequence)
    groups = [(stream.randrange(per_sequence), None) for _ in range(4)]
    shared_of: list[Any] = [None] * 4
    for _ in range(60):
        slot = stream.randrange(9)
        if slot in pool.slots:
            if stream.random() < 0.5:
                pool.release(slot)
            else:
                pool.move(slot, stream.choice([other for other in range(9) if other != slot]))
        else:
            group = stream.randrange(4)
            full = groups[group][0]
            if pool.sequences_that_fit(full, shared_of[group]):
                shared_of[group], _ = pool.store_prompt(full, shared_of[group])
                pool.add(slot, shared_of[group])
        shared = {id(one.shared): one.shared for one in pool.slots.values()}
        pages = [page for one in pool.slots.values() for page in one.own]
        pages += [page for one in shared.values() for page in one.pages]
        assert sorted(pages + pool.free) == list(range(1, num_pages + 1))
    for slot in list(pool.slots):
        pool.release(slot)
    assert sorted(pool.free) == list(range(1, num_pages + 1))


def test_a_prompt_is_stored_again_only_if_its_sequences_have_ended() -> None:
    pool = PagePool(8, 3)
    shared, _ = pool.store_prompt(2, None)
    pool.add(0, shared)
    assert pool.sequences_that_fit(2, shared) == 5 and pool.sequences_that_fit(2, None) == 3
    assert pool.store_prompt(2, shared) == (shared, False)
    pool.add(1, shared)
    pool.release(0)
    assert pool.store_prompt(2, shared) == (shared, False)
    pool.release(1)
    assert pool.store_prompt(2, shared)[1]


@pytest.mark.parametrize(("slots", "limit", "expected"), [(4, 1 << 30, 12), (4, 100, 7), (4, 0, 3), (1, 1 << 30, 3)])
def test_pages_that_fit(slots: int, limit: int, expected: int) -> None:
    """Four fifths of the bytes, with the scratch page; at least one sequence."""
    assert pages_that_fit(slots, 3, 10, limit) == expected
    assert (expected + 1) * 10 <= max(limit * 4 // 5, 40)


@settings(max_examples=60, deadline=None)
@given(max_slots=st.integers(1, 70), columns=st.integers(1, 2000), limit=st.integers(0, 1 << 27))
def test_planned_columns_take_no_fewer_bytes_than_the_pages(
    roles: Roles, max_slots: int, columns: int, limit: int
) -> None:
    store = PagedCache(roles.base.model)
    store.allocate(max_slots, columns, limit)
    token_bytes = store.bytes_per_slot(1)
    slots = slots_that_fit(max_slots, columns * token_bytes, limit)
    planned = slots * paged_columns(slots, max_slots, columns, token_bytes, limit) * token_bytes
    allocated = (store.num_pages + 1) * PAGE_SIZE * token_bytes
    assert max(allocated, slots * columns * token_bytes) <= planned < allocated + slots * (columns + 1) * token_bytes


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "groups"), [(8, 2), (4, 4)])
def test_the_kernel_computes_what_is_documented(heads: int, groups: int) -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(2, 20, PAGE_SIZE, groups, 64, dtype=torch.bfloat16, device="cuda")
    pages = torch.randperm(20, dtype=torch.int32, device="cuda").view(5, 4)
    pages[1, 0] = pages[0, 0]
    lengths = torch.tensor([1024, 257, 256, 1, 700], dtype=torch.int32, device="cuda")
    tables = PageTables(pages, lengths, 1024)
    query = torch.randn(5, heads, 64, dtype=torch.bfloat16, device="cuda")
    computed = varlen_paged_attention(query, keys, values, tables, None).float()
    expected = gathered_attention(query.float(), keys, values, tables, None)
    assert (computed - expected).abs().max() < 2e-2
