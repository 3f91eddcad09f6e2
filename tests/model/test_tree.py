"""Shared prompts: a packed group has the values and gradients of its rows, and other rows stay apart."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import SimpleNamespace
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
    relative_error,
    reward_roles,
    roles_over,
    unquantized_base,
    zero_grad,
)
from torch import Tensor

from lowrank_tune.batch import Batch
from lowrank_tune.memory_planner.fake_device import fake_device_mode
from lowrank_tune.model import decoder as decoder_module
from lowrank_tune.model import prefix_sharing as tree_module
from lowrank_tune.model import rounding
from lowrank_tune.model.prefix_sharing import PackedBatch, longest_shareable, pack_shared_prefixes
from lowrank_tune.model.roles import Roles

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 44},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {},
    "gemma3_text": {},
    "gpt2": {},
}


@functools.cache
def roles_of(kind: str, checkpointing: bool = False) -> Roles:
    """Returns roles of a perturbed policy over a frozen adapter; `4` and `16` are Llamas, loaded as in a run."""
    base = load_base_of(int(kind)) if kind.isdigit() else unquantized_base(kind, **KINDS[kind])
    roles = roles_over(base, lower=["sft"], checkpointing=checkpointing)
    perturb(roles, "sft", "policy")
    # test_packing.py tests the way without masks.
    roles.decoder.packed_rows.enabled = False
    return roles


def groups(prompts: Sequence[int], tails: Sequence[Sequence[int]], seed: int = 0, **how: Any) -> Batch:
    """Groups of rows: a prompt and one row for each tail (0: the prompt alone), scored behind the prompt and here and
    there in it."""
    stream = torch.Generator().manual_seed(seed)
    rows, masks, shared = [], [], []
    for prompt, own in zip(prompts, tails, strict=True):
        begin = torch.randint(2, 60, (prompt,), generator=stream).tolist()
        for number, tail in enumerate(own):
            # The first token of a tail differs within a group, so that a group shares exactly its prompt.
            rows.append(
                begin
                + [60 + number] * (tail > 0)
                + torch.randint(2, 60, (max(0, tail - 1),), generator=stream).tolist()
            )
            masks.append([place % 3 == 0 for place in range(prompt)] + [True] * tail)
            shared.append(prompt if number else 0)
    batch = make_batch(rows, masks, **how)
    batch.shared_prefix = torch.tensor(shared)
    return batch


def run(roles: Roles, batch: Batch, share: bool) -> tuple[Tensor, Tensor]:
    """Log-probs, and gradients of a loss that weighs every token differently."""
    zero_grad(roles)
    roles.decoder.share_prefixes = share
    logps = roles.logps("policy", batch).logps
    (logps * torch.linspace(0.5, 1.5, logps.numel()).view(logps.shape)).sum().backward()  # type: ignore[no-untyped-call]
    roles.decoder.share_prefixes = True
    return logps.detach(), gradients(roles)


def error_of_sharing(roles: Roles, batch: Batch) -> float:
    """Largest difference of a log-prob, to the largest of them, and relative one of the gradients; infinite where
    nothing was shared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_module, "MAX_RELATIVE_FLOPS", 100.0)
        if roles.decoder.pack(batch) is None:
            return float("inf")
        packed, gradient = run(roles, batch, True)
        apart, expected = run(roles, batch, False)
    return max(
        float((packed - apart).abs().max() / apart.abs().max().clamp_min(1.0)), relative_error(gradient, expected)
    )


@st.composite
def some_groups(draw: st.DrawFn, most: int = 20) -> Batch:
    """One to three groups of 2 or 4 rows; prompts and tails of any length, empty ones too, but no empty row."""
    size = draw(st.sampled_from([2, 4]))
    count = draw(st.integers(1, 3))
    prompts = [draw(st.integers(0, most)) for _ in range(count)]
    tails = [[draw(st.integers(0 if prompt else 1, most)) for _ in range(size)] for prompt in prompts]
    return groups(prompts, tails, draw(st.integers(0, 99)), more=draw(st.sampled_from([0, 3])))


@pytest.mark.parametrize("kind", ["4", *KINDS])
@given(batch=some_groups())
@hypothesis_settings(max_examples=15)
def test_shared_prompt_changes_no_logp_or_gradient(kind: str, batch: Batch) -> None:
    assert error_of_sharing(roles_of(kind), batch) < 1e-5


@pytest.mark.parametrize(
    ("prompts", "tails"),
    [
        ([12], [[5, 9]]),
        ([0, 0], [[5, 9], [3, 1]]),
        ([8], [[1, 1]]),
        ([8], [[9, 1]]),
        ([1], [[1, 20]]),
        ([10, 3], [[4, 0], [0, 6]]),
        ([7, 9], [[1, 0, 5, 3], [2, 2, 2, 2]]),
        ([5], [[0, 0]]),
        ([1], [[0, 0]]),
        ([30, 1], [[1, 2], [1, 1]]),
    ],
    ids=str,
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_edges_of_sharing(prompts: list[int], tails: list[list[int]], checkpointing: bool) -> None:
    assert error_of_sharing(roles_of("4", checkpointing), groups(prompts, tails)) < 1e-5


@given(batch=some_groups(), shift=st.integers(-5, 5), order=st.randoms(use_true_random=False))
@hypothesis_settings(max_examples=25)
def test_wrong_count_or_order_of_shared_tokens_changes_no_logp(batch: Batch, shift: int, order: Any) -> None:
    """`take` may tear groups apart and `shared` may be wrong: only what ids have in common is shared."""
    rows = list(range(len(batch)))
    order.shuffle(rows)
    batch.shared_prefix = (batch.shared_prefix + shift).clamp_min(0)
    assert error_of_sharing(roles_of("16"), batch.select_rows(torch.tensor(rows[: len(rows) // 2 + 1]))) < 1e-5


def test_shared_prompt_for_other_roles_inference_mode_and_scores() -> None:
    roles, batch = reward_roles(load_base_of(), lower=["sft"]), groups([20, 15], [[5, 9], [3, 8]])
    perturb(roles, "sft", "reward")
    found = []
    for share in (True, False):
        roles.decoder.share_prefixes = share
        assert (roles.decoder.pack(batch) is not None) == share
        with roles.inference_mode():
            logps, kl = roles.logps("reference", batch).logps, roles.full_vocab_kl("reward", "reference", batch)
            found.append(torch.stack([logps, kl, roles.scores("reward", batch)]))
    assert float((found[0] - found[1]).abs().max()) < 2e-5 and not torch.equal(*found)
    assert float((found[0][2] - found[1][2]).abs().max()) > 0


# --- planted bugs are found -------------------------------------------------------------------------------------------


def planted(monkeypatch: pytest.MonkeyPatch, change: Any) -> float:
    """Returns the error with a layout that is changed after `pack_shared_prefixes`. The probe of the model runs
    before."""
    roles, batch = roles_of("16"), groups([12, 7], [[5, 9], [6, 3]])
    assert error_of_sharing(roles, batch) < 1e-5
    monkeypatch.setattr(decoder_module, "pack_shared_prefixes", lambda *given: change(pack_shared_prefixes(*given)))
    return error_of_sharing(roles, batch)


def _causal(tree: PackedBatch) -> PackedBatch:
    width = tree.input_ids.shape[1]
    return PackedBatch(
        tree.input_ids,
        tree.position_ids,
        torch.ones(1, 1, width, width, dtype=torch.bool).tril().expand_as(tree.attention_mask),
        tree.slot_index,
    )


def _columns_as_positions(tree: PackedBatch) -> PackedBatch:
    return PackedBatch(
        tree.input_ids,
        torch.arange(tree.input_ids.shape[1]).expand_as(tree.input_ids),
        tree.attention_mask,
        tree.slot_index,
    )


def _one_too_far(tree: PackedBatch) -> PackedBatch:
    return PackedBatch(tree.input_ids, tree.position_ids, tree.attention_mask, tree.slot_index.roll(1, dims=1))


def _prompt_unseen(tree: PackedBatch) -> PackedBatch:
    columns = torch.arange(tree.input_ids.shape[1])
    own = tree.position_ids[:, None, :, None] - tree.position_ids[:, None, None, :] == columns[:, None] - columns
    return PackedBatch(tree.input_ids, tree.position_ids, tree.attention_mask & own, tree.slot_index)


class _Cut(PackedBatch):
    def unpack(self, hidden: Tensor) -> Tensor:
        """Every other row's gradient is lost."""
        rows = super().unpack(hidden)
        return torch.cat([torch.stack([a, b.detach()]) for a, b in zip(rows[::2], rows[1::2], strict=True)])


@pytest.mark.parametrize(
    "change",
    [
        _causal,
        _columns_as_positions,
        _one_too_far,
        _prompt_unseen,
        lambda tree: _Cut(tree.input_ids, tree.position_ids, tree.attention_mask, tree.slot_index),
    ],
)
def test_wrong_layout_is_found(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    assert planted(monkeypatch, change) > 1e-3


# --- where rows stay apart --------------------------------------------------------------------------------------------


def shares(roles: Roles, batch: Batch) -> bool:
    """Whether packed rows really went through the decoder."""
    seen: list[int] = []
    handle = roles.base.model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    with roles.inference_mode():
        roles.hidden("policy", batch)
        seen.clear()  # the first time, the probe ran too
        roles.hidden("policy", batch)
    handle.remove()
    assert len(seen) == 1
    return seen[0] < batch.input_ids.numel()


LONG = groups([20, 18], [[5, 9], [3, 8]])


def test_it_is_used_where_it_saves_something() -> None:
    roles = roles_of("16")
    assert shares(roles, LONG) and shares(roles, LONG.select_rows(torch.tensor([2, 3])))
    assert not shares(roles, groups([1], [[20, 20]])) and not shares(roles, groups([0], [[20, 20]]))
    left = groups([20], [[5, 9]], left=True)
    alone = Batch(LONG.input_ids, LONG.attention_mask, LONG.completion_mask)
    assert not shares(roles, left) and not shares(roles, alone)
    roles.decoder.share_prefixes = False
    assert not shares(roles, LONG)
    roles.decoder.share_prefixes = True


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("mistral", {"sliding_window": 16}, False),
        ("mistral", {"sliding_window": 29}, True),
        ("mistral", {"sliding_window": 28}, False),
        ("mistral", {"sliding_window": None}, True),
        ("gemma3_text", {"sliding_window": 16}, False),
        ("gpt_neo", {}, False),
        ("bloom", {}, False),
        ("gpt2", {}, True),
        ("opt", {}, True),
    ],
)
def test_windows_and_models_without_such_masks_keep_rows_apart(
    kind: str, changes: dict[str, Any], expected: bool
) -> None:
    roles = (
        roles_over(unquantized_base(kind, **changes), target_modules=("query_key_value",))
        if kind == "bloom"
        else roles_over(unquantized_base(kind, **changes))
    )
    roles.decoder.packed_rows.enabled = False
    assert LONG.input_ids.shape[1] == 29 and shares(roles, LONG) == expected


def test_recurrent_layers_and_other_attention_are_never_probed() -> None:
    config = unquantized_base("llama").model.config
    assert longest_shareable(config) > 1 << 30
    for name, value in (
        ("layer_types", ["full_attention", "linear_attention"]),
        ("_attn_implementation", "flash_attention_2"),
    ):
        other = unquantized_base("llama").model.config
        setattr(other, name, value)
        assert longest_shareable(other) == 0
    config.layer_types, config.sliding_window = ["full_attention"] * 2, 4
    assert longest_shareable(config) > 1 << 30


@pytest.mark.parametrize("dropped", ["attention_mask", "position_ids"])
def test_the_probe_refuses_a_model_that_ignores_its_mask_or_positions(
    monkeypatch: pytest.MonkeyPatch, dropped: str
) -> None:
    roles = roles_over(unquantized_base("llama"))
    decoder = roles.base.model.get_decoder()
    monkeypatch.setattr(
        roles.base.model, "get_decoder", lambda: lambda **given: decoder(**{**given, dropped: None}), raising=False
    )
    assert roles.decoder.max_shareable_length == 0


@pytest.mark.parametrize("dropped", [None, "attention_mask", "position_ids"])
def test_rounding_of_another_batch_shape_keeps_prompts_shared(
    monkeypatch: pytest.MonkeyPatch, dropped: str | None
) -> None:
    """Hidden states in bf16 that change by 7 % with the shape of the batch, as a deep model's do on a GPU."""
    base = unquantized_base("llama")
    base.model.bfloat16()
    roles = roles_over(base)
    decoder = base.model.get_decoder()
    differences: list[float] = []

    def rounded(**given: Any) -> Any:
        output = decoder(**{**given, dropped: None} if dropped else given)
        states = output.last_hidden_state
        noise = torch.randn(states.shape[-1], generator=torch.Generator().manual_seed(states.shape[0]))
        output.last_hidden_state = states + 0.05 * states.norm(dim=-1, keepdim=True) * (noise / noise.norm()).to(
            states.dtype
        )
        return output

    def recorded(computed: Tensor, expected: Tensor) -> float:
        differences.append(rounding.relative_difference(computed, expected))
        return differences[-1]

    monkeypatch.setattr(base.model, "get_decoder", lambda: rounded, raising=False)
    monkeypatch.setattr(tree_module, "relative_difference", recorded)
    assert bool(roles.decoder.max_shareable_length) == (dropped is None)
    assert differences[0] > tree_module.BF16_TOLERANCE, "the rounding is larger than what is always allowed"


def test_the_probe_draws_no_random_number_and_leaves_the_mode() -> None:
    roles = roles_over(unquantized_base("llama"), dropout=0.5)
    before = torch.get_rng_state()
    assert roles.decoder.max_shareable_length
    assert torch.equal(torch.get_rng_state(), before) and roles.base.model.training


def test_by_hand() -> None:
    """P P P a b | P P P c, and a pair with nothing in common, which is two groups."""
    batch = make_batch([[5, 6, 7, 8, 9], [5, 6, 7, 4], [3, 2], [2]])
    batch.shared_prefix = torch.tensor([0, 3, 0, 0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_module, "MAX_RELATIVE_FLOPS", 100.0)
        tree = pack_shared_prefixes(batch, 4)
    assert tree is not None
    assert tree.input_ids.tolist() == [[5, 6, 7, 8, 9, 4, 0, 0], [3, 2, 0, 0, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0, 0, 0]]
    assert tree.position_ids[0, :6].tolist() == [0, 1, 2, 3, 4, 3]
    assert tree.slot_index.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 5, 5], [8, 9, 9, 9, 9], [16, 16, 16, 16, 16]]
    seen = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 1],
    ]
    assert tree.attention_mask[0, 0, :6].long().tolist() == [row + [0, 0] for row in seen]
    assert bool(tree.attention_mask.any(dim=-1).all())  # a query that sees nothing would be NaN


def test_masked_attention_costs_more_on_a_gpu() -> None:
    """The CPU shares a batch that a GPU computes in separate rows, because its kernel with a mask is slower."""
    batch = groups([64], [[32] * 6])
    assert pack_shared_prefixes(batch, 64) is not None
    assert pack_shared_prefixes(batch, 64, torch.device("cpu")) is not None
    assert pack_shared_prefixes(batch, 64, torch.device("cuda")) is None


def test_a_group_of_eight_is_shared_on_a_gpu() -> None:
    """GRPO with 8 completions of 400 tokens after a prompt of 256, hidden size 4,096."""
    batch = groups([256], [[400] * 8])
    packed = pack_shared_prefixes(batch, 4096, torch.device("cuda"))
    assert packed is not None and packed.input_ids.shape == (1, 256 + 8 * 400)


@pytest.mark.parametrize(("name", "hidden"), [("sdpa", -torch.inf), ("lowrank_tune_grouped_sdpa", -torch.inf)])
def test_a_gpu_gets_an_additive_mask_in_the_dtype_of_the_model(name: str, hidden: float) -> None:
    text_config = SimpleNamespace(_attn_implementation=name)
    config = SimpleNamespace(get_text_config=lambda: text_config)
    on_gpu = SimpleNamespace(config=config, dtype=torch.bfloat16, device=torch.device("cuda"))
    mask = torch.tensor([[True, False], [True, True]])
    with fake_device_mode(torch.device("cuda")):
        found = tree_module.mask_for(mask.to("meta"), on_gpu)
    assert found.dtype == torch.bfloat16 and found.shape == mask.shape
    on_gpu.device = torch.device("cpu")
    assert tree_module.mask_for(mask, on_gpu) is mask
    additive = tree_module.additive_mask(mask, on_gpu, hidden)
    assert additive.tolist() == [[0.0, hidden], [0.0, 0.0]]


def test_an_additive_mask_changes_no_hidden_state(monkeypatch: pytest.MonkeyPatch) -> None:
    roles = roles_of("16")
    batch = groups([12, 7], [[5, 9], [6, 3]])
    with torch.no_grad():
        expected = roles.hidden("policy", batch)
        monkeypatch.setattr(
            decoder_module, "mask_for", lambda mask, model: tree_module.additive_mask(mask, model, -torch.inf)
        )
        found = roles.hidden("policy", batch)
    assert roles.decoder.pack(batch) is not None and relative_error(found, expected) < 1e-6
