"""A key-value cache in pages: a prompt is stored once for all its samples.

A layer has one pool of pages. Token p of a sequence is in page p // page size of its table. The tables are one buffer
on the device, which the host writes between two steps, so that a step reads no value and can be captured as a CUDA
graph. All pages that a sequence may need are its own from the start: a step never needs a new page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from lowrank_tune.batch import copy_to
from lowrank_tune.generation.kv_cache import PrefilledPrompts, unused_cache_bytes
from lowrank_tune.generation.page_pool import PagePool, SharedPages, pages_that_fit
from lowrank_tune.generation.paged_attention import (
    PAGE_SIZE,
    PAGED_NAME,
    PagedAttention,
    PageTables,
    attends_to_pages,
    has_flash_attention,
    varlen_paged_attention,
)
from lowrank_tune.generation.slot_cache import ForwardContext, SlotCache, SlotLayer, layer_windows, sliding_windows
from lowrank_tune.generation.static_slot_cache import StaticSlotCache
from lowrank_tune.model.causal_attention import AttentionName


@dataclass(frozen=True)
class _PagedPrompts(PrefilledPrompts):
    num_tokens: list[int]
    shared: dict[int, SharedPages] = field(default_factory=dict)
    """The pages of each row that was inserted, which may be free again."""


@dataclass
class PagedContext(ForwardContext):
    """The forward pass that all layers are in, with the places (B,) of its tokens among all tokens of a pool."""

    token_index: Tensor | None = None


class PagedLayer(SlotLayer):
    """Keys and values of one layer, (pages, page size, heads, width of a head)."""

    step: PagedContext

    def allocate_pages(
        self,
        like: tuple[Tensor, Tensor],
        num_pages: int,
        page_size: int,
    ) -> None:
        """Creates pages for keys and values that are shaped as `like`."""
        # The kernel needs keys and values in one dtype, and norms may change that of keys.
        dtype = like[1].dtype
        self.keys, self.values = (
            states.new_zeros((num_pages, page_size, states.shape[1], states.shape[3]), dtype=dtype) for states in like
        )
        self.is_initialized = True

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        if self.step.positions is None:
            return super().update(key_states, value_states)
        token_index = self.step.token_index
        assert token_index is not None
        for pool, states in ((self.keys, key_states), (self.values, value_states)):
            pool.flatten(0, 1).index_copy_(0, token_index, states[:, :, 0].to(pool.dtype))
        return self.keys, self.values

    def write(
        self,
        prompts: tuple[Tensor, Tensor],
        row: int,
        start: int,
        end: int,
        pages: Tensor,
    ) -> None:
        """Copies the tokens `start` to `end` of a prompt into pages (P,): in full pages one after the other, or, if
        they are fewer than a page, at the beginning of each page."""
        page_size = self.keys.shape[1]
        for pool, states in zip((self.keys, self.values), prompts, strict=True):
            tokens = states[row, :, start:end].transpose(0, 1).to(pool.dtype)
            if len(tokens) < page_size:
                pool[pages, : len(tokens)] = tokens
            else:
                pool[pages] = tokens.reshape(-1, *pool.shape[1:])


class PagedLayers(SlotCache):
    """All layers of a decoder."""

    step: PagedContext

    def __init__(self, num_layers: int) -> None:
        self.step = PagedContext()
        Cache.__init__(self, layers=[PagedLayer(self.step, None) for _ in range(num_layers)])


def pages_fault(model: Any) -> str | None:
    """Returns why a model cannot use `PagedCache` on its device, or None."""
    if not has_flash_attention(model):
        return "it needs a GPU from compute capability 8.0, half precision, and a PyTorch with paged attention"
    config = model.get_decoder().config
    if not attends_to_pages(config) or any(layer_windows(config)):
        return "the attention of this model cannot read pages"
    return None


def paged_columns(
    slots: int,
    max_slots: int,
    columns: int,
    token_bytes: int,
    limit: int,
) -> int:
    """Returns the columns of each of `slots` slots that take as many bytes as the pages for `max_slots`, or more."""
    pages_per_sequence = -(-columns // PAGE_SIZE)
    num_pages = pages_that_fit(max_slots, pages_per_sequence, token_bytes * PAGE_SIZE, limit) + 1
    return max(columns, -(-num_pages * PAGE_SIZE // slots))


class PagedCache(StaticSlotCache):
    """One pool of pages for all sequences: a step is one forward pass, and reads the tokens that a sequence has. For
    models without a `pages_fault`."""

    def __init__(
        self,
        model: Any,
        attention: PagedAttention = varlen_paged_attention,
        page_size: int = PAGE_SIZE,
    ) -> None:
        windows = sliding_windows(model)
        self.config = model.get_decoder().config
        self.model = model
        self.decoder = model.get_decoder()
        self.device = model.device
        self.cache = self.paged_layers = PagedLayers(len(windows))
        self.attention = attention
        self.page_size = page_size
        self.slots = self.columns = 0
        self.is_capturable = True

    def allocate(
        self,
        slots: int,
        columns: int,
        limit: int,
    ) -> int:
        self.columns = columns
        per_sequence = -(-columns // self.page_size)
        self.num_pages = pages_that_fit(slots, per_sequence, self._page_bytes, limit)
        # Each sequence has a page of its own; whether the others are shared is known when it is admitted (`room`).
        self.slots = min(slots, self.num_pages)
        self.pool = PagePool(self.num_pages, per_sequence)
        self.block_table = torch.zeros((self.slots, per_sequence), dtype=torch.int32, device=self.device)
        return self.slots

    @property
    def unshared_slots(self) -> int:
        """Sequences that fit if no two of them share pages, at least 1."""
        return min(self.slots, self.num_pages // self.pool.pages_per_sequence)

    @property
    def _page_bytes(self) -> int:
        return self.bytes_per_slot(1) * self.page_size

    def unused_bytes(self, limit: int) -> int:
        return unused_cache_bytes(self.num_pages + 1, self._page_bytes, limit)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[_PagedPrompts, Tensor]:
        prefilled, hidden = super().prefill(prompts)
        num_tokens = [len(prompt) for prompt in prompts]
        return _PagedPrompts(prefilled.layers, prefilled.lengths, num_tokens), hidden

    def room(
        self,
        prompts: Any,
        row: int,
    ) -> int:
        num_full_pages = prompts.num_tokens[row] // self.page_size
        return self.pool.sequences_that_fit(num_full_pages, prompts.shared.get(row))

    def insert(
        self,
        prompts: Any,
        rows: Sequence[int],
        slots: Sequence[int],
    ) -> None:
        slots_of_row = dict[int, list[int]]()
        for row, slot in zip(rows, slots, strict=True):
            slots_of_row.setdefault(row, []).append(slot)
        for row, row_slots in slots_of_row.items():
            self._insert_row(prompts, row, row_slots)
        self._upload_tables()

    def _insert_row(
        self,
        prompts: _PagedPrompts,
        row: int,
        slots: Sequence[int],
    ) -> None:
        end = prompts.num_tokens[row]
        num_full_pages = end // self.page_size
        shared, is_new = self.pool.store_prompt(num_full_pages, prompts.shared.get(row))
        prompts.shared[row] = shared
        first_pages = [self.pool.add(slot, shared).own[0] for slot in slots]
        start = num_full_pages * self.page_size
        if is_new and start:
            self._write(prompts, row, 0, start, shared.pages)
        if start < end:
            self._write(prompts, row, start, end, first_pages)

    def _write(
        self,
        prompts: _PagedPrompts,
        row: int,
        start: int,
        end: int,
        pages: Sequence[int],
    ) -> None:
        index = copy_to(torch.tensor(pages), self.device)
        for layer, prefill_states in zip(self.cache.layers, prompts.layers, strict=True):
            if not layer.is_initialized:
                layer.allocate_pages(prefill_states, self.num_pages + 1, self.page_size)
            layer.write(prefill_states, row, start, end, index)

    def move(
        self,
        source: int,
        target: int,
        length: int,
    ) -> None:
        self.pool.move(source, target)
        self._upload_tables()

    def release(self, slots: Sequence[int]) -> None:
        in_use = [slot for slot in slots if slot in self.pool.slots]
        for slot in in_use:
            self.pool.release(slot)
        if in_use:
            self._upload_tables()

    def _upload_tables(self) -> None:
        tables = [self.pool.table(slot) for slot in range(self.slots)]
        self.block_table.copy_(copy_to(torch.tensor(tables, dtype=torch.int32), self.device))

    def step_on_device(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        width: int,
        is_full: bool = False,
    ) -> Tensor:
        pages = self.block_table[: len(input_ids)]
        page = pages.gather(1, position_ids // self.page_size).long()
        token_index = (page * self.page_size + position_ids % self.page_size).flatten()
        self.cache.decode(position_ids[:, 0], width)
        self.paged_layers.step.token_index = token_index
        with AttentionName(self.config, PAGED_NAME):
            output = self.decoder(
                input_ids=input_ids,
                position_ids=position_ids,
                past_key_values=self.cache,
                use_cache=True,
                page_tables=PageTables(pages, position_ids[:, 0].int() + 1, width),
                paged_attention=self.attention,
            )
        return output.last_hidden_state[:, 0]  # type: ignore[no-any-return]
