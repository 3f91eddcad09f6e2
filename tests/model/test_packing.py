"""Packed rows: a micro-batch as one row of real tokens has the values and gradients of its rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from models import (
    gradients,
    load_base_of,
    make_batch,
    perturb,
    ragged_batch,
    relative_error,
    roles_over,
    unquantized_base,
    zero_grad,
)
from test_recovery import ALGORITHMS, steps_of, watched_loop
from test_tree import groups, some_groups
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lowrank_tune.batch import Batch
from lowrank_tune.events import Event
from lowrank_tune.model import cpu_segment_attention as cpu_module
from lowrank_tune.model import segment_attention as attention_module
from lowrank_tune.model import sequence_packing
from lowrank_tune.model.causal_attention import CAUSAL_MODEL_TYPES
from lowrank_tune.model.decoder import Decoder
from lowrank_tune.model.packed_rows import PackedRows
from lowrank_tune.model.roles import Roles
from lowrank_tune.model.segment_attention import SEGMENTS_NAME, attend_to_segments
from lowrank_tune.model.segment_check import find_segment_fault
from lowrank_tune.model.sequence_packing import Segments, pack_rows

CPU = torch.device("cpu")
RECOMPUTED = (False, 1, True)


@functools.cache
def roles_of(kind: str, checkpointing: bool | int = False) -> Roles:
    """Returns roles of a perturbed policy over a frozen adapter; `4` is a Llama in NF4."""
    base = load_base_of(4) if kind == "4" else unquantized_base(kind)
    roles = roles_over(base, lower=["sft"], checkpointing=checkpointing)
    perturb(roles, "sft", "policy")
    return roles


@pytest.fixture(autouse=True)
def _pack_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence_packing, "MAX_RELATIVE_FLOPS", 100.0)


def logps_and_gradients(roles: Roles, batch: Batch, packed: bool, share: bool = True) -> tuple[Tensor, Tensor]:
    """Log-probs, and gradients of a loss that weighs every token differently."""
    zero_grad(roles)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roles.decoder.packed_rows, "enabled", packed)
        patch.setattr(roles.decoder, "share_prefixes", share)
        logps = roles.logps("policy", batch).logps
        weights = torch.linspace(0.5, 1.5, logps.numel()).view(logps.shape)
        (logps * weights).sum().backward()  # type: ignore[no-untyped-call]
    return logps.detach(), gradients(roles)


def error_of_packing(roles: Roles, batch: Batch, share: bool = True) -> float:
    """Returns the largest relative difference of log-probs or gradients from those of padded, separate rows."""
    assert roles.decoder.packed_rows.hidden(batch, share) is not None, "the rows were not packed"
    logps, gradient = logps_and_gradients(roles, batch, True, share)
    expected, expected_gradient = logps_and_gradients(roles, batch, False, False)
    return max(relative_error(logps, expected), relative_error(gradient, expected_gradient))


# --- laws -------------------------------------------------------------------------------------------------------------


@st.composite
def some_rows(draw: st.DrawFn) -> Batch:
    """One to six rows of any length, empty ones too, with padding behind the longest."""
    lengths = draw(st.lists(st.integers(0, 24), min_size=1, max_size=6).filter(any))
    batch = ragged_batch(lengths, draw(st.integers(0, 99)), unscored=())
    batch.completion_mask[0, :] = True
    return batch.pad_columns(batch.input_ids.shape[1] + draw(st.sampled_from([0, 3])), 7)


@pytest.mark.parametrize("kind", ["4", "llama", "qwen3", "gemma3_text", "phi3"])
@given(batch=some_rows(), recomputed=st.sampled_from(RECOMPUTED))
@hypothesis_settings(max_examples=6)
def test_packed_rows_have_the_logps_and_gradients_of_padded_rows(kind: str, batch: Batch, recomputed: int) -> None:
    assert error_of_packing(roles_of(kind, recomputed), batch) < 1e-5


@pytest.mark.parametrize("kind", ["4", "mistral", "qwen2", "cohere", "olmo2"])
@given(batch=some_groups(), recomputed=st.sampled_from(RECOMPUTED))
@hypothesis_settings(max_examples=6)
def test_shared_prompts_have_the_logps_and_gradients_of_separate_rows(kind: str, batch: Batch, recomputed: int) -> None:
    roles = roles_of(kind, recomputed)
    assert error_of_packing(roles, batch) < 1e-5
    assert error_of_packing(roles, batch, share=False) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", RECOMPUTED)
@pytest.mark.parametrize("kind", sorted(CAUSAL_MODEL_TYPES))
def test_every_known_family_packs_rows(kind: str, recomputed: bool | int) -> None:
    roles = roles_of(kind, recomputed)
    for batch in (ragged_batch(), groups([12, 7], [[5, 9, 0, 4], [6, 3, 1, 1]])):
        assert error_of_packing(roles, batch) < 1e-5


def test_any_split_into_micro_batches_has_the_same_gradient() -> None:
    roles, batch = roles_of("llama"), groups([12, 7, 3], [[5, 9], [6, 3], [8, 2]])
    whole = logps_and_gradients(roles, batch, True)[1]
    for rows in (1, 2, 3, 5):
        zero_grad(roles)
        weights = torch.linspace(0.5, 1.5, batch.input_ids.numel()).view(batch.input_ids.shape)
        batch.token_weights = weights
        for micro in batch.split(rows):
            assert micro.token_weights is not None
            (roles.logps("policy", micro).logps * micro.token_weights).sum().backward()  # type: ignore[no-untyped-call]
        assert relative_error(gradients(roles), whole) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_has_the_losses_and_gradients_of_padded_rows(name: str) -> None:
    runs = []
    for is_packed in (True, False):
        loop, roles, optimizer, events = watched_loop(name)
        roles.decoder.packed_rows.enabled = roles.decoder.share_prefixes = is_packed
        assert loop.run()
        assert roles.decoder.packed_rows._unsupported_reason is None
        runs.append((optimizer.seen, [step.stats["loss"] for step in steps_of(events)]))
    (packed, losses), (padded, expected) = runs
    assert max(relative_error(one, other) for one, other in zip(packed, padded, strict=True)) < 1e-5
    assert losses == pytest.approx(expected, rel=1e-5, abs=1e-6)


def dense_attention(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Attention by hand: (W, H, D) from queries (W, H, D), keys and values (W, KV, D), and which keys are seen."""
    repeats = query.shape[1] // key.shape[1]
    keys, values = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, keys) * scale
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


def seen_keys(batch: Batch) -> Tensor:
    """Returns which stored token each stored token sees, (W, W), from the definition: two tokens of one row, or a token
    of a row and one of the beginning that it shares with the first row of its group."""
    stored: list[tuple[int, int]] = []
    first, shared = 0, 0
    owners: list[tuple[int, int]] = []
    for row, length in enumerate(batch.attention_mask.sum(dim=1).tolist()):
        shared = 0 if batch.shared_prefix is None else int(batch.shared_prefix[row])
        first = row if shared == 0 else first
        owners += [(first, shared)] * (length - shared)
        stored += [(row, column) for column in range(shared, length)]
    return torch.tensor(
        [
            [(other == row and place <= column) or (other == owner and place < begin) for other, place in stored]
            for (row, column), (owner, begin) in zip(stored, owners, strict=True)
        ]
    )


def values_and_gradients(attend: Callable[..., Tensor], num_tokens: int) -> list[Tensor]:
    """Returns the output of attention in fp64 for random queries, keys and values, and their gradients."""
    stream = torch.Generator().manual_seed(1)
    tensors = [
        torch.randn(num_tokens, heads, 8, generator=stream, dtype=torch.float64).requires_grad_() for heads in (4, 2, 2)
    ]
    output = attend(*tensors)
    weights = torch.randn(output.shape, generator=stream, dtype=torch.float64)
    return [output.detach(), *torch.autograd.grad(output, tensors, weights)]


@given(batch=st.one_of(some_rows(), some_groups()))
@hypothesis_settings(max_examples=40)
def test_attention_over_segments_is_attention_with_a_mask(batch: Batch) -> None:
    packed = pack_rows(batch, 64, True)
    assert packed is not None
    num_tokens = packed.input_ids.shape[1]
    computed = values_and_gradients(lambda *qkv: attend_to_segments(*qkv, packed.segments, 0.3), num_tokens)
    seen = seen_keys(batch)
    expected = values_and_gradients(lambda *qkv: dense_attention(*qkv, seen, 0.3), num_tokens)
    for one, other in zip(computed, expected, strict=True):
        assert relative_error(one, other) < 1e-12


def varlen_twin(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **options: Any
) -> Tensor:
    """What PyTorch's variable-length attention computes for causal windows, aligned at the last query and key."""
    assert options["window_size"] == (-1, 0) and cu_q.dtype == cu_k.dtype == torch.int32
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    parts = []
    for (a, b), (c, d) in zip(cu_q.unfold(0, 2, 1).tolist(), cu_k.unfold(0, 2, 1).tolist(), strict=True):
        seen = torch.arange(d - c) <= torch.arange(b - a)[:, None] + (d - c) - (b - a)
        parts.append(dense_attention(query[a:b], key[c:d], value[c:d], seen, options["scale"]))
    return torch.cat(parts)


@given(batch=st.one_of(some_rows(), some_groups()))
@hypothesis_settings(max_examples=20)
def test_variable_length_attention_of_a_gpu_gets_the_same_segments(batch: Batch) -> None:
    packed = pack_rows(batch, 64, True)
    assert packed is not None
    num_tokens = packed.input_ids.shape[1]
    seen = seen_keys(batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_module, "varlen_attn", varlen_twin)
        computed = values_and_gradients(
            lambda *qkv: attention_module._varlen_attention(*qkv, packed.segments, 0.3), num_tokens
        )
    expected = values_and_gradients(lambda *qkv: dense_attention(*qkv, seen, 0.3), num_tokens)
    for one, other in zip(computed, expected, strict=True):
        assert relative_error(one, other) < 1e-12


def test_a_compiled_function_calls_the_operator_in_one_graph() -> None:
    packed = pack_rows(groups([6], [[3, 4]]), 64, True)
    assert packed is not None
    compiled = torch.compile(attend_to_segments, backend="aot_eager", fullgraph=True)
    num_tokens = packed.input_ids.shape[1]
    computed = values_and_gradients(lambda *qkv: compiled(*qkv, packed.segments, 0.3), num_tokens)
    expected = values_and_gradients(lambda *qkv: attend_to_segments(*qkv, packed.segments, 0.3), num_tokens)
    assert all(torch.equal(one, other) for one, other in zip(computed, expected, strict=True))


# --- layout -----------------------------------------------------------------------------------------------------------


def test_layout_by_hand() -> None:
    """P P P a b | P P P c | an empty row | Q d | Q d, whose last row stores nothing."""
    batch = make_batch([[5, 6, 7, 8, 9], [5, 6, 7, 4], [], [3, 2], [3, 2]])
    batch.shared_prefix = torch.tensor([0, 3, 0, 0, 2])
    packed = pack_rows(batch.to("meta"), 64, True)
    assert packed is not None and packed.input_ids.device.type == "meta"
    packed = pack_rows(batch, 64, True)
    assert packed is not None
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9, 4, 3, 2]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1]]
    segments = packed.segments
    assert segments.cu_seq_lens_q.tolist() == [0, 5, 6, 8]
    assert segments.cu_seq_lens_k.tolist() == [0, 5, 9, 11]
    assert (segments.max_length_q, segments.max_length_k) == (5, 4 + 1)
    assert segments.key_index is not None
    assert segments.key_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7]
    assert packed.slot_index[[0, 1, 3, 4]].tolist() == [
        [0, 1, 2, 3, 4],
        [0, 1, 2, 5, 5],
        [6, 7, 7, 7, 7],
        [6, 7, 7, 7, 7],
    ]
    whole = pack_rows(batch, 64, False)
    assert whole is not None and whole.segments.key_index is None
    assert whole.segments.cu_seq_lens_k.tolist() == [0, 5, 9, 11, 13]


def decoder_sizes(roles: Roles, batch: Batch) -> list[int]:
    """Returns the sizes of the token ids that the decoder gets for a batch."""
    sizes: list[int] = []
    handle = roles.base.model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    with roles.inference_mode():
        roles.hidden("policy", batch)
    handle.remove()
    return sizes


def test_rows_are_packed_where_that_saves_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence_packing, "MAX_RELATIVE_FLOPS", 0.97)
    roles = roles_of("llama")
    ragged = ragged_batch()
    assert decoder_sizes(roles, ragged) == [int(ragged.attention_mask.sum())]
    even = ragged_batch([9, 9, 9, 9])
    assert decoder_sizes(roles, even) == [36]
    assert pack_rows(even, 64, True) is None
    pair = groups([20], [[5, 5]])
    assert decoder_sizes(roles, pair) == [30]
    monkeypatch.setattr(roles.decoder, "share_prefixes", False)
    assert decoder_sizes(roles, pair) == [50]
    left = make_batch([[5, 6, 7, 8, 9, 3, 4], [4]], left=True)
    assert decoder_sizes(roles, left) == [14]


# --- where rows are padded --------------------------------------------------------------------------------------------


def messages(events: list[Event]) -> list[str]:
    return [event.message for event in events]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("gemma2", {}, "gemma2 layers may not compute each row of a packed row alone"),
        ("gpt2", {}, "gpt2 layers may not"),
        ("mistral", {"sliding_window": 8}, "sliding window of its layers is shorter than a row of 12 tokens"),
        ("llama", {"attention_dropout": 0.1}, "llama layers may not"),
        ("llama", {"attn_implementation": "eager"}, "llama layers may not"),
    ],
)
def test_other_models_pad_rows_with_one_message(kind: str, changes: dict[str, Any], words: str) -> None:
    roles = roles_over(unquantized_base(kind, **changes))
    if "attn_implementation" in changes:
        roles.base.model.set_attn_implementation("eager")
    events: list[Event] = []
    roles.limits.emit = events.append
    batch = ragged_batch()
    for _ in range(2):
        assert decoder_sizes(roles, batch)[-1] == batch.input_ids.numel()
    found = [message for message in messages(events) if "rows are padded" in message]
    assert len(found) == 1 and words in found[0]


def test_a_window_that_is_longer_than_all_rows_is_no_obstacle() -> None:
    base = unquantized_base("mistral", sliding_window=13)
    assert error_of_packing(roles_over(base), ragged_batch()) < 1e-5


def fresh_roles() -> tuple[Roles, list[Event]]:
    """Returns roles whose fast paths are not compared yet, and their events."""
    roles = roles_over(unquantized_base("llama"))
    perturb(roles, "policy")
    events: list[Event] = []
    roles.limits.emit = events.append
    roles.verified = False
    return roles, events


def test_a_right_path_stays_enabled_without_a_message() -> None:
    roles, events = fresh_roles()
    roles.logps("policy", ragged_batch())
    assert roles.verified and roles.decoder.packed_rows.enabled and not events


def _neighbors_seen(*arguments: Any, **options: Any) -> Any:
    """Every token sees the whole packed row before it."""
    num_tokens = int(options["cu_seq_lens_q"][-1])
    whole = torch.tensor([0, num_tokens], dtype=torch.int32)
    changed = {"cu_seq_lens_q": whole, "cu_seq_lens_k": whole, "key_index": None}
    return attention_module.segment_attention_forward(*arguments, **{**options, **changed})


def test_rows_that_see_their_neighbors_are_found_at_start_up(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = ragged_batch()
    roles, events = fresh_roles()
    with roles.plain_paths():
        expected = roles.logps("policy", batch).logps
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, SEGMENTS_NAME, _neighbors_seen)
    for _ in range(2):
        torch.testing.assert_close(roles.logps("policy", batch).logps, expected, rtol=1e-5, atol=1e-5)
    assert not roles.decoder.packed_rows.enabled
    about_shared, about_all = messages(events)
    assert "with a beginning that rows share they compute something else" in about_shared
    assert about_all.startswith("packed rows: another result than on the plain path")


def test_positions_that_are_not_used_are_found_at_start_up(monkeypatch: pytest.MonkeyPatch) -> None:
    roles, events = fresh_roles()
    run = Decoder.run

    def without_positions(decoder: Decoder, ids: Tensor, mask: Any, positions: Any, segments: Any = None) -> Tensor:
        return run(decoder, ids, mask, None, segments)

    monkeypatch.setattr(roles.decoder.packed_rows, "_run", functools.partial(without_positions, roles.decoder))
    batch = groups([12], [[5, 9]])
    assert decoder_sizes(roles, batch)[-1] == 32, "the tree with a mask"
    assert len(events) == 1 and "with a beginning that rows share they compute something else" in messages(events)[0]


def _aligned_at_the_first_key(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> Tensor:
    """The causal mask of a kernel that aligns it at the first query and key."""
    parts = []
    cu_q, cu_k = segments.cu_seq_lens_q, segments.cu_seq_lens_k
    index = torch.arange(len(key)) if segments.key_index is None else segments.key_index
    for (a, b), (c, d) in zip(cu_q.unfold(0, 2, 1).tolist(), cu_k.unfold(0, 2, 1).tolist(), strict=True):
        seen = torch.arange(d - c) <= torch.arange(b - a)[:, None]
        parts.append(dense_attention(query[a:b], key[index[c:d]], value[index[c:d]], seen, scale))
    return torch.cat(parts)


def test_a_wrong_alignment_is_found_at_start_up(monkeypatch: pytest.MonkeyPatch) -> None:
    roles, events = fresh_roles()
    monkeypatch.setattr("lowrank_tune.model.segment_check.attend_to_segments", _aligned_at_the_first_key)
    monkeypatch.setattr(attention_module, "attend_to_segments", _aligned_at_the_first_key)
    batch = groups([12], [[5, 9]])
    assert decoder_sizes(roles, batch)[-1] == 32, "the tree with a mask"
    found = [message for message in messages(events) if "attention over segments computes something else" in message]
    assert len(found) == 1 == len(events)
    assert roles.decoder.packed_rows.hidden(batch, True) is None


@pytest.mark.parametrize("bug", ["no beginning", "gradient of the beginning lost"])
def test_a_wrong_kernel_fails_the_check(monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    assert find_segment_fault(CPU, torch.float32, 2, 16) is None
    assert find_segment_fault(CPU, torch.bfloat16, 2, 16) is None
    blocks = cpu_module._blocks
    calls: list[int] = []

    def changed(*arguments: Any) -> Any:
        calls.append(1)
        is_forward = len(calls) == 1
        for block in blocks(*arguments):
            if block.is_causal or (bug != "no beginning" and is_forward):
                yield block

    monkeypatch.setattr(cpu_module, "_blocks", changed)
    assert find_segment_fault(CPU, torch.float32, 2, 16) == "computes something else"


def test_a_version_of_pytorch_without_such_attention_pads_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    has = attention_module.has_segment_attention
    cuda, half, full = torch.device("cuda"), torch.bfloat16, torch.float32
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert has(cuda, half) == (attention_module.varlen_attn is not None) and not has(cuda, full)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not has(cuda, torch.float16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(attention_module, "VARLEN_OPTIONS", frozenset(["is_causal"]))
    assert not has(cuda, half) and has(CPU, full)
    assert not has(torch.device("mps"), half)


def test_plain_paths_restores_what_was_enabled() -> None:
    roles, _ = fresh_roles()
    packed_rows: PackedRows = roles.decoder.packed_rows
    with roles.plain_paths():
        assert not packed_rows.enabled
        roles.logps("policy", ragged_batch())
    assert packed_rows.enabled and not roles.verified, "paths that are disabled are not compared"
