"""The model's decoder as training runs it: a batch of rows in, the last hidden states out, by the fastest path that
computes the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

from torch import Tensor

from lowrank_tune.batch import Batch
from lowrank_tune.events import Emit, warning
from lowrank_tune.model.base import Base
from lowrank_tune.model.causal_attention import (
    ATTENTION_KEY,
    VERIFIED_COLUMNS,
    AttentionName,
    causal_attention,
    needs_no_mask,
    verify_causal_attention,
)
from lowrank_tune.model.packed_rows import PackedRows
from lowrank_tune.model.prefix_sharing import (
    PackedBatch,
    longest_shareable,
    mask_for,
    pack_shared_prefixes,
    verify_packing,
)
from lowrank_tune.model.sequence_packing import Segments


class Decoder:
    """Runs the decoder of a base with the adapters that are active.

    `without_adapters` returns the context in which no adapter is active: fast paths are compared with the plain one
    there. `emit` receives a warning for each path that computes something else. While the attribute `share_prefixes` is
    False every row is computed whole, which is necessary if a backend ignores masks. Each pass enters `layers_context`.
    """

    def __init__(
        self,
        base: Base,
        without_adapters: Callable[[], AbstractContextManager[None]],
        emit: Emit,
    ) -> None:
        self.base = base
        self.share_prefixes = base.backend == "transformers"
        self._without_adapters = without_adapters
        self.layers_context: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._emit = emit
        self.packed_rows = PackedRows(base, self.run, self._shares_exactly, emit)
        self._vocab_size, self._hidden_size = base.model.get_output_embeddings().weight.shape

    def hidden(self, batch: Batch) -> Tensor:
        """Returns the last hidden states (B, T, d). If it is faster, rows are packed into one without padding, and a
        beginning that rows share is computed once (`model/sequence_packing.py`, and with masks
        `model/prefix_sharing.py`)."""
        if self.packed_rows.enabled:
            hidden = self.packed_rows.hidden(batch, self.share_prefixes)
            if hidden is not None:
                return hidden
        packed = self.pack(batch)
        if packed is not None:
            hidden = self.run(packed.input_ids, packed.attention_mask, packed.position_ids)
            return packed.unpack(hidden)
        ids = batch.input_ids.masked_fill(~batch.attention_mask, 0)
        # Right-padded rows need no mask, because a token never sees the tokens after it.
        if batch.is_right_padded:
            return self._run_causal(ids)
        mask = batch.attention_mask.long()
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        return self.run(ids, mask, positions)

    def _run_causal(self, ids: Tensor) -> Tensor:
        """Returns the hidden states of rows that are padded on the right."""
        if not self.runs_without_masks:
            return self._run_without_mask(ids)
        with causal_attention(self.base.model, ids.shape[1]):
            return self._run_without_mask(ids)

    def _run_without_mask(self, ids: Tensor) -> Tensor:
        return self.run(ids, None, None)

    def run(
        self,
        ids: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        segments: Segments | None = None,
    ) -> Tensor:
        """Returns the last hidden states (B, T, d) of ids (B, T), with a mask (B, T) or (B, 1, T, T), or with the
        segments of a packed row."""
        arguments = {} if segments is None else segments.as_arguments()
        if mask is not None and mask.ndim == 4:
            mask = mask_for(mask, self.base.model)
        with self.base.autocast(), self.layers_context():
            decoder = self.base.model.get_decoder()
            return decoder(  # type: ignore[no-any-return]
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=False,
                **arguments,
            ).last_hidden_state

    def current_attention(self) -> AttentionName:
        """Returns a context with the attention function that the model has now, for layers that are recomputed."""
        config = self.base.model.config.get_text_config()
        return AttentionName(config, vars(config)[ATTENTION_KEY])

    def pack(self, batch: Batch) -> PackedBatch | None:
        """Returns the layout in which shared beginnings of the batch are computed once, or None if they are not."""
        if not self.share_prefixes or batch.shared_prefix is None:
            return None
        packed = pack_shared_prefixes(batch, self._hidden_size, self.base.device)
        if packed is not None and batch.input_ids.shape[1] <= self.max_shareable_length:
            return packed
        return None

    @cached_property
    def runs_without_masks(self) -> bool:
        """Whether rows that are padded on the right run without transformers' masks: compared once, on the base."""
        model = self.base.model
        is_known = needs_no_mask(model.config.get_text_config(), VERIFIED_COLUMNS)
        if self.base.backend != "transformers" or not is_known:
            return False
        with self._plain_base():
            is_equal = verify_causal_attention(
                self._run_without_mask,
                model,
                self._vocab_size,
            )
        if not is_equal:
            self._emit(warning(f"{self.base.name}: attention without masks computes something else; masks are used"))
        return is_equal

    @cached_property
    def max_shareable_length(self) -> int:
        """Tokens of the longest row whose beginning may be shared, 0 if packed rows compute something else."""
        model = self.base.model
        longest = longest_shareable(model.config)
        if not longest:
            return 0
        if self._shares_exactly(self._run_with_mask):
            return longest
        return 0

    def _run_with_mask(self, pair: Batch) -> Tensor:
        """Returns the hidden states of a made-up pair, whose beginning is computed once."""
        layout = pack_shared_prefixes(pair, 1 << 20)
        assert layout is not None, "the pair saves a third"
        return layout.unpack(self.run(layout.input_ids, layout.attention_mask, layout.position_ids))

    def _shares_exactly(self, packed_decoder: Callable[[Batch], Tensor]) -> bool:
        """Returns whether the base computes the same with a beginning that is computed once."""
        with self._plain_base():
            return verify_packing(
                self.run,
                packed_decoder,
                self._vocab_size,
                self.base.model.dtype,
                self.base.device,
            )

    @contextmanager
    def _plain_base(self) -> Iterator[None]:
        with self.base.inference_mode(), self._without_adapters():
            yield
