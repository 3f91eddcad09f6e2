"""Rows run through the decoder as one row of real tokens, where every layer computes each of them alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from lowrank_tune.batch import Batch
from lowrank_tune.events import Emit, LogMessage
from lowrank_tune.model.base import Base
from lowrank_tune.model.causal_attention import AttentionName, needs_no_mask
from lowrank_tune.model.fast_paths import FastPath
from lowrank_tune.model.segment_attention import SEGMENTS_NAME, has_segment_attention
from lowrank_tune.model.segment_check import find_segment_fault
from lowrank_tune.model.sequence_packing import PackedRow, Segments, pack_rows


class RunDecoder(Protocol):
    """The decoder of a base: input ids, mask, position ids and segments -> last hidden states."""

    def __call__(
        self,
        ids: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        segments: Segments | None = None,
    ) -> Tensor: ...


class PackedRows:
    """A fast path of `Decoder.hidden` (`model/fast_paths.py`) that computes no padding, and beginnings that rows share
    once.

    While `compiled` is enabled, all rows are packed that may be (`pack_rows`, `always`). Models that are not known to
    compute each segment of a packed row alone never take it. The first call reports this, with one message to `emit`.
    """

    name = "packed rows"

    def __init__(
        self,
        base: Base,
        run: RunDecoder,
        shares_exactly: Callable[[Callable[[Batch], Tensor]], bool],
        emit: Emit,
    ) -> None:
        self.enabled = True
        self.compiled: FastPath | None = None
        self._base = base
        self._run = run
        self._shares_exactly = shares_exactly
        self._emit = emit
        self._config = base.model.config.get_text_config()
        self._hidden_size: int = base.model.get_output_embeddings().weight.shape[1]
        self._has_reported_window = False

    def hidden(self, batch: Batch, share_prefixes: bool) -> Tensor | None:
        """Returns the last hidden states (B, T, d), or None if the rows must or may as well be padded."""
        packed = self.pack(batch, share_prefixes)
        if packed is None:
            return None
        return self._run_packed(packed)

    def pack(self, batch: Batch, share_prefixes: bool) -> PackedRow | None:
        """Returns the layout in which the rows run, None if they are padded."""
        if not batch.is_right_padded or not self._allows(batch.input_ids.shape[1]):
            return None
        share = share_prefixes and batch.shared_prefix is not None
        if share and not self._shares_prefixes:
            return None
        is_compiled = self.compiled is not None and self.compiled.enabled
        return pack_rows(batch, self._hidden_size, share, is_compiled)

    def _run_packed(self, packed: PackedRow) -> Tensor:
        with AttentionName(self._config, SEGMENTS_NAME):
            hidden = self._run(
                packed.input_ids,
                None,
                packed.position_ids,
                packed.segments,
            )
        return packed.unpack(hidden)

    def _allows(self, columns: int) -> bool:
        """Returns whether rows of up to `columns` tokens may be packed."""
        if self._unsupported_reason is not None:
            return False
        is_allowed = needs_no_mask(self._config, columns)
        if not is_allowed and not self._has_reported_window:
            self._has_reported_window = True
            self._report(f"the sliding window of its layers is shorter than a row of {columns:,} tokens")
        return is_allowed

    @cached_property
    def _shares_prefixes(self) -> bool:
        """Whether the base computes the same with a beginning that is stored once: compared once."""
        is_exact = self._shares_exactly(self._run_pair)
        if not is_exact:
            self._report("with a beginning that rows share they compute something else")
        return is_exact

    def _run_pair(self, pair: Batch) -> Tensor:
        packed = pack_rows(pair, self._hidden_size, True)
        assert packed is not None, "the pair saves a third"
        return self._run_packed(packed)

    @cached_property
    def _unsupported_reason(self) -> str | None:
        """Why no row is ever packed, None if rows are."""
        reason = self._find_unsupported_reason()
        if reason is not None:
            self._report(reason)
        return reason

    def _find_unsupported_reason(self) -> str | None:
        device = self._base.device
        dtype = self._base.model.dtype
        if self._base.backend != "transformers":
            return f"the backend {self._base.backend} computes attention itself"
        has_dropout = bool(getattr(self._config, "attention_dropout", None))
        if has_dropout or not needs_no_mask(self._config, 1):
            return f"{self._config.model_type} layers may not compute each row of a packed row alone"
        if not has_segment_attention(device, self._base.dtype):
            name = str(self._base.dtype).removeprefix("torch.")
            return f"this version of PyTorch has no attention over segments of {name} on this device"
        reason = find_segment_fault(device, dtype, *_head_sizes(self._config))
        if reason is not None:
            return f"attention over segments {reason} on this device"
        return None

    def _report(self, reason: str) -> None:
        self._emit(LogMessage(message=f"{self._base.name}: rows are padded to one length: {reason}"))


def _head_sizes(config: Any) -> tuple[int, int]:
    """Returns the heads of queries for each head of keys, and the size of a head."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads // (getattr(config, "num_key_value_heads", None) or heads), head_dim
