"""SFT: one gradient for any split, no effect of tokens outside the mask, and the formula by hand, in float64 and by
TRL."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from models import (
    VOCAB,
    gradients,
    llama_roles,
    load_base_of,
    make_batch,
    perturb,
    ragged_batch,
    relative_error,
    same_bytes,
    sft_over,
    with_token_weights,
    zero_grad,
)
from safetensors.torch import save_file
from torch import Tensor

from lowrank_tune import functional
from lowrank_tune.algorithms import sft as sft_module
from lowrank_tune.algorithms.base import LossTerm
from lowrank_tune.algorithms.sft import SFT, sft_loss
from lowrank_tune.batch import Batch
from lowrank_tune.functional import token_mean_weights
from lowrank_tune.model.adapters import CONFIG, WEIGHTS
from lowrank_tune.model.roles import Roles
from lowrank_tune.stats import add_stats, to_floats


def accumulated(roles: Roles, batch: Batch, **split: int | None) -> tuple[float, Tensor, dict[str, float]]:
    """Loss, gradient and statistics of one optimizer step, split into micro-batches as the loop does it."""
    zero_grad(roles)
    algorithm = sft_over(roles)
    with_token_weights(algorithm, batch)
    loss, stats = 0.0, {}
    for micro in batch.split(**split):
        for term in algorithm.compute_losses(micro):
            term.loss.backward()
            loss += float(term.loss.detach().double())
            add_stats(stats, term.stats)
    return loss, gradients(roles), to_floats(stats)


# --- 4: any split gives one gradient ----------------------------------------------------------------------------------

LENGTHS = (9, 3, 12, 1, 7, 0, 2, 11)  # one with a single token, one with none, one (the fifth) without a scored token


def error_of_splits(roles: Roles, splits: Sequence[dict[str, int | None]]) -> float:
    batch = ragged_batch(LENGTHS)
    loss, gradient, stats = accumulated(roles, batch)
    errors = []
    for split in splits:
        other_loss, other_gradient, other_stats = accumulated(roles, batch, **split)
        errors += [
            relative_error(other_gradient, gradient),
            abs(other_loss - loss) / abs(loss),
            abs(stats["loss"] - loss) / abs(loss),
        ]
        errors += [abs(other_stats[name] - stats[name]) / (abs(stats[name]) + 1e-3) for name in stats]
    return max(error if error == error else math.inf for error in errors)


SPLITS: list[dict[str, int | None]] = [
    {"rows": 1},
    {"rows": 2},
    {"rows": 3},
    {"rows": 8},
    {"tokens": 1},
    {"tokens": 12},
    {"tokens": 24},
    {"tokens": 1000},
    {"rows": 2, "tokens": 20},
]


@pytest.mark.parametrize("bits", [4, 16])
def test_any_split_gives_one_gradient(bits: int) -> None:
    roles = llama_roles(bits, lower=["sft"], checkpointing=True)
    perturb(roles, "sft", "policy", size=0.03)
    assert error_of_splits(roles, SPLITS) <= 1e-6


def _mean_of_micro_batch_means(self: SFT, micro: Batch) -> Iterator[LossTerm]:
    micro.token_weights = token_mean_weights(micro.loss_mask) * len(micro) / 8
    yield from real_terms(self, micro)


def _mean_over_all_tokens(self: SFT, micro: Batch) -> Iterator[LossTerm]:
    assert micro.token_weights is not None
    micro.token_weights = micro.token_weights * (micro.loss_mask.sum() / micro.attention_mask.sum())
    yield from real_terms(self, micro)


real_terms = SFT.compute_losses


@pytest.mark.parametrize("bug", [_mean_of_micro_batch_means, _mean_over_all_tokens])
def test_mean_of_micro_batch_means_is_found(monkeypatch: pytest.MonkeyPatch, bug: Any) -> None:
    roles = llama_roles(16)
    perturb(roles, "policy")
    monkeypatch.setattr(SFT, "compute_losses", bug)
    for split in SPLITS[:3]:
        assert error_of_splits(roles, [split]) > 1e-3


@dataclass
class NumberedBatch(Batch):
    """Rows and tokens with numbers, to find them again in a split."""

    row: Tensor | None = None
    """(B,)"""
    token: Tensor | None = None
    """(B, T)"""


def numbered(batch: Batch) -> NumberedBatch:
    positions = torch.arange(1, batch.input_ids.shape[1] + 1)
    return NumberedBatch(**batch.tensors(), row=torch.arange(len(batch)), token=batch.attention_mask.long() * positions)


def wrong_split(batch: NumberedBatch, rows: int | None, tokens: int | None, together: int) -> list[str]:
    """What is wrong with a split: rows lost, twice, apart, cut, over the budget, or short of it. Empty is right."""
    wrong, seen = [], []
    micros = list(batch.split(rows, tokens, together))
    for micro, following in itertools.pairwise(micros):
        count, first = len(micro) + together, int(following.lengths[:together].max())
        width = max(micro.input_ids.shape[1], first)
        if not ((rows is not None and count > rows) or (tokens is not None and count * width > tokens)):
            wrong.append("the next unit would have fitted")
    for micro in micros:
        which = micro.row.tolist()
        seen += which
        units = len(which) // together
        heads = which[::together]
        if which != [row for head in heads for row in range(head, head + together)] or any(
            head % together for head in heads
        ):
            wrong.append("a unit is apart")
        if units > 1 and (
            (rows is not None and len(which) > rows) or (tokens is not None and micro.input_ids.numel() > tokens)
        ):
            wrong.append("over the budget")
        for i, row in enumerate(which):
            if (
                micro.input_ids[i][micro.attention_mask[i]].tolist()
                != batch.input_ids[row][batch.attention_mask[row]].tolist()
            ):
                wrong.append("a row is cut")
            if micro.loss_mask[i].sum() != batch.loss_mask[row].sum() or micro.token[i].sum() != batch.token[row].sum():
                wrong.append("a row lost something")
    if sorted(seen) != list(range(len(batch))):
        wrong.append(f"rows {seen}")
    return wrong


@hypothesis_settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    rows=st.one_of(st.none(), st.integers(1, 9)),
    tokens=st.one_of(st.none(), st.integers(1, 60)),
    together=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_split_loses_no_token(
    lengths: list[int], rows: int | None, tokens: int | None, together: int, seed: int
) -> None:
    lengths = [length for length in lengths for _ in range(together)]
    lengths[0] = max(1, lengths[0])
    batch = numbered(ragged_batch(lengths, seed=seed))
    assert wrong_split(batch, rows, tokens, together) == []
    stream = torch.Generator().manual_seed(seed)
    # of pairs and groups, torn ones too
    batch.shared_prefix = torch.where(torch.rand(len(batch), generator=stream) < 0.4, 0, 3)
    assert wrong_split(batch, rows, tokens, together) == []
    family = (batch.shared_prefix[::together] == 0).cumsum(0)
    heads = [int(row) // together for micro in batch.split(rows, tokens, together) for row in micro.row[::together]]
    families = [int(family[head]) for head in heads]
    assert [one for place, one in enumerate(families) if place == 0 or families[place - 1] != one] == list(
        dict.fromkeys(families)
    ), "a family is apart"


@pytest.mark.parametrize(
    ("rows", "tokens", "together", "sizes"),
    [
        (None, 10, 1, [2, 2, 2]),
        (None, 9, 1, [1] * 6),
        (None, 20, 2, [4, 2]),
        (None, 15, 1, [3, 3]),
        (3, 10, 1, [2, 2, 2]),
    ],
)
def test_a_micro_batch_of_exactly_the_budget_is_whole(
    rows: int | None, tokens: int, together: int, sizes: list[int]
) -> None:
    """Six rows of five tokens."""
    batch = numbered(ragged_batch([5] * 6))
    assert [len(micro) for micro in batch.split(rows, tokens, together)] == sizes
    assert wrong_split(batch, rows, tokens, together) == []


def test_split_that_cuts_rows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = numbered(ragged_batch(LENGTHS))
    real = Batch.select_rows
    assert wrong_split(batch, 3, None, 2) == wrong_split(batch, None, 30, 1) == []
    monkeypatch.setattr(Batch, "select_rows", lambda self, rows, width=None: real(self, rows, 5))
    assert "a row is cut" in wrong_split(batch, 3, None, 2)
    monkeypatch.setattr(Batch, "select_rows", lambda self, rows, width=None: real(self, rows.flip(0), width))
    assert "a unit is apart" in wrong_split(batch, 4, None, 2)


# --- 5: nothing outside the mask is read ------------------------------------------------------------------------------

POISONS = [math.nan, math.inf, -math.inf, 1e30, -1e30]


def loss_reads_outside(poison: float) -> bool:
    """Whether something outside the mask reaches sft_loss's value or gradient."""
    batch = ragged_batch()
    stream = torch.Generator().manual_seed(0)
    clean = -torch.rand(batch.input_ids.shape, generator=stream)
    weight, scored = token_mean_weights(batch.loss_mask), batch.loss_mask
    found = []
    for logps, weights in (
        (clean, weight),
        (clean.masked_fill(~scored, poison), weight),
        (clean, weight.masked_fill(~scored, poison)),
        (clean.masked_fill(~scored, poison), weight.masked_fill(~scored, poison)),
    ):
        logps = logps.clone().requires_grad_()
        loss = sft_module.sft_loss(logps, scored, weights)
        loss.backward()
        assert logps.grad is not None
        found.append(
            torch.cat([loss.detach()[None], logps.grad.flatten(), functional.masked_mean(logps, scored).total[None]])
        )  # type: ignore[index]
    return not all(same_bytes(found[0] + 0.0, other + 0.0) for other in found[1:])


@pytest.mark.parametrize("poison", POISONS)
def test_values_outside_the_mask_change_no_loss(poison: float) -> None:
    assert not loss_reads_outside(poison)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_masking_by_multiplication_is_found(monkeypatch: pytest.MonkeyPatch, poison: float) -> None:
    monkeypatch.setattr(sft_module, "sft_loss", lambda logps, scored, weight: -(logps * scored * weight).sum())
    assert loss_reads_outside(poison)
    monkeypatch.undo()
    monkeypatch.setattr(
        sft_module, "sft_loss", lambda logps, scored, weight: -torch.where(scored, logps * weight, 0.0).sum()
    )
    assert loss_reads_outside(poison)  # the forward pass is clean, the gradient is not


def padding_is_read(roles: Roles) -> bool:
    """Whether ids in padding slots, or a mask that is True there, or on a row's first token, reach loss or gradient."""
    clean = ragged_batch(LENGTHS)
    expected_loss, expected, _ = accumulated(roles, clean)
    for garbage in (1, VOCAB - 1, 10**9, -7):
        dirty = ragged_batch(LENGTHS)
        dirty.input_ids = torch.where(dirty.attention_mask, dirty.input_ids, garbage)
        dirty.completion_mask = dirty.completion_mask | ~dirty.attention_mask
        dirty.completion_mask[:, 0] = True
        loss, gradient, _ = accumulated(roles, dirty)
        if loss != expected_loss or not same_bytes(gradient, expected):
            return True
    return False


def test_padding_changes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    roles = llama_roles(dropout=0.0)
    perturb(roles, "policy")
    assert not padding_is_read(roles)
    monkeypatch.setattr(
        Batch, "loss_mask", property(lambda self: self.completion_mask & (torch.arange(self.input_ids.shape[1]) > 0))
    )
    with suppress(IndexError):  # an id that no vocabulary has was scored
        assert padding_is_read(roles)


def test_nan_at_unscored_positions_changes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states that predict no scored token are not read, in value or gradient."""
    roles = llama_roles(16)
    perturb(roles, "policy")
    batch = ragged_batch()
    used = torch.zeros_like(batch.loss_mask)
    used[:, :-1] = batch.loss_mask[:, 1:]
    norm = roles.base.model.get_decoder().norm
    expected = accumulated(roles, batch)[:2]

    def poison(_: Any, __: Any, output: Tensor) -> Tensor:
        return torch.where(used[:, : output.shape[1], None], output, torch.nan) if len(output) == 8 else output

    handle = norm.register_forward_hook(poison)
    # The batch as it is, because the hook uses the order of its rows.
    monkeypatch.setattr(Batch, "select_rows", lambda self, rows, width=None: self)
    found = accumulated(roles, batch)[:2]
    monkeypatch.undo()
    handle.remove()
    assert found[0] == pytest.approx(expected[0], rel=1e-6) and relative_error(found[1], expected[1]) < 1e-6


# --- 8: the numbers ---------------------------------------------------------------------------------------------------


def test_by_hand() -> None:
    """Two rows; the second token of each is scored, and the third of the first: three tokens in all, one third each."""
    batch = make_batch([[5, 6, 7], [8, 9]], [[True, True, True], [False, True]])
    assert batch.loss_mask.tolist() == [[False, True, True], [False, True, False]]
    weight = SFT.token_weights(None, batch)  # type: ignore[arg-type]
    assert torch.equal(weight, torch.tensor([[0.0, 1 / 3, 1 / 3], [0.0, 1 / 3, 0.0]]))
    logps = torch.tensor([[-99.0, -0.5, -1.0], [-99.0, -3.0, -99.0]], requires_grad=True)
    loss = sft_loss(logps, batch.loss_mask, weight)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(1.5)
    assert logps.grad is not None and torch.equal(logps.grad, -weight)


def test_step_without_tokens_has_no_weight() -> None:
    roles = llama_roles(16)
    loss, gradient, stats = accumulated(roles, make_batch([[5, 6, 7], [8]], [[False] * 3, [True]]))
    assert loss == 0.0 and not gradient.any() and math.isnan(stats["loss"])


def reference_loss(rows: Sequence[Sequence[float]], masks: Sequence[Sequence[bool]]) -> float:
    """Plain Python: the mean over all scored tokens of the step; the first token of a row has nothing before it."""
    total, count = 0.0, 0
    for logps, row in zip(rows, masks, strict=True):
        for position, (logp, in_mask) in enumerate(zip(logps, row, strict=True)):
            if in_mask and position > 0:
                total, count = total - logp, count + 1
    return total / count if count else 0.0


def error_of_formula(rows: list[list[float]], masks: list[list[bool]], weigh: Callable[[Any, Batch], Tensor]) -> float:
    batch = make_batch([[3] * len(row) for row in rows], masks)
    logps = torch.full(batch.input_ids.shape, torch.nan)
    for i, row in enumerate(rows):
        logps[i, : len(row)] = torch.tensor(row)
    expected = reference_loss(rows, masks)
    return abs(float(sft_loss(logps, batch.loss_mask, weigh(None, batch))) - expected) / (1e-6 + abs(expected))


ROW = st.lists(st.tuples(st.floats(-50, 0, width=32), st.booleans()), max_size=12)


@given(st.lists(ROW, min_size=1, max_size=6).filter(lambda rows: any(rows)))
def test_the_formula_equals_a_python_loop(pairs: list[list[tuple[float, bool]]]) -> None:
    rows, masks = [[logp for logp, _ in row] for row in pairs], [[in_mask for _, in_mask in row] for row in pairs]
    assert error_of_formula(rows, masks, SFT.token_weights) < 2e-5  # type: ignore[arg-type]


def test_other_means_are_found() -> None:
    rows, masks = [[-1.0, -2.0, -3.0], [-1.0, -5.0]], [[False, True, True], [True, True]]

    def mean_of_rows(_: Any, batch: Batch) -> Tensor:
        return batch.loss_mask / batch.loss_mask.sum(dim=1, keepdim=True) / len(batch)

    def first_token_counted(_: Any, batch: Batch) -> Tensor:
        return token_mean_weights(batch.completion_mask)

    assert error_of_formula(rows, masks, SFT.token_weights) < 1e-6 < 1e-2 < error_of_formula(rows, masks, mean_of_rows)  # type: ignore[arg-type]
    assert error_of_formula(rows, masks, first_token_counted) > 1e-2


def test_metrics_equal_those_of_the_models_own_logits() -> None:
    """loss, accuracy and entropy against full logits in float64."""
    roles = llama_roles(lower=["sft"])
    perturb(roles, "sft", "policy")
    batch = ragged_batch(LENGTHS)
    loss, _, stats = accumulated(roles, batch)
    with roles.activate("policy"), torch.no_grad():
        logp = torch.log_softmax(roles.base.model(input_ids=batch.input_ids).logits.double(), dim=-1)[:, :-1]
    mask, targets = batch.loss_mask[:, 1:], batch.input_ids[:, 1:]
    mean_nll = -logp.gather(2, targets[:, :, None]).squeeze(2)[mask].mean().item()
    assert loss == pytest.approx(mean_nll, rel=1e-5) and stats["loss"] == pytest.approx(mean_nll, rel=1e-5)
    assert stats["mean_token_accuracy"] == pytest.approx((logp.argmax(-1) == targets)[mask].double().mean().item())
    assert stats["entropy"] == pytest.approx(-(logp.exp() * logp).sum(-1)[mask].mean().item(), rel=1e-5)


def kl_error(roles: Roles) -> float:
    """The metric against brute force over the whole vocabulary."""
    batch = ragged_batch()
    found = to_floats(sft_over(roles).step_metrics(batch))["kl"]
    values = []
    with roles.inference_mode():
        for role in ("policy", "reference"):
            with roles.activate(role):
                values.append(
                    torch.log_softmax(roles.base.model(input_ids=batch.input_ids).logits.double(), dim=-1)[:, :-1]
                )
    p, q = values
    return abs(found - float((p.exp() * (p - q)).sum(-1)[batch.loss_mask[:, 1:]].mean()))


def test_kl_is_zero_at_first_and_brute_force_later(monkeypatch: pytest.MonkeyPatch) -> None:
    roles = llama_roles(lower=["sft"], dropout=0.0, checkpointing=True)
    perturb(roles, "sft")
    assert to_floats(sft_over(roles).step_metrics(ragged_batch()))["kl"] == 0.0
    perturb(roles, "policy")
    assert kl_error(roles) < 1e-5
    real = Roles.full_vocab_kl
    monkeypatch.setattr(
        Roles, "full_vocab_kl", lambda self, role, reference, batch, temperature: real(self, role, "base", batch)
    )
    assert kl_error(roles) > 1e-2  # the raw base where the SFT adapter was meant


def test_kl_is_computed_without_dropout() -> None:
    roles = llama_roles(lower=["sft"], dropout=0.5)
    perturb(roles, "sft")
    assert to_floats(sft_over(roles).step_metrics(ragged_batch()))["kl"] == 0.0
    perturb(roles, "policy")
    assert kl_error(roles) < 1e-5


def can_learn(roles: Roles) -> bool:
    """Returns whether twenty steps on one batch halve the loss."""
    batch = ragged_batch()
    optimizer = torch.optim.AdamW(roles.parameters("policy"), lr=1e-2)
    losses = []
    for _ in range(20):
        losses.append(accumulated(roles, batch)[0])
        optimizer.step()
    return losses[-1] < 0.5 * losses[0]


def test_it_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_learn(llama_roles(checkpointing=True))
    monkeypatch.setattr(
        sft_module, "sft_loss", lambda logps, scored, weight: sft_loss(logps, scored, weight).detach().requires_grad_()
    )
    with pytest.raises(AssertionError):
        assert can_learn(llama_roles())


# --- TRL as an oracle -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_loss_and_gradient_equal_trl(tmp_path: Path) -> None:
    """TRL's SFTTrainer, fp32, with the same adapter on the same base and the same rows (accumulation over two
    micro-batches of four)."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from peft import PeftModel
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    roles = llama_roles(16)
    perturb(roles, "policy")
    batch = ragged_batch((9, 3, 12, 4, 7, 6, 2, 11), unscored=())
    save_file(roles.adapter_tensors("policy"), tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps(roles.adapter_config("policy")))
    plain = AutoModelForCausalLM.from_pretrained(load_base_of(16).name, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, str(tmp_path), is_trainable=True)
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w3")), eos_token="w1", pad_token="w0", bos_token="w2"
    )
    rows = [
        {"input_ids": ids[mask].tolist(), "completion_mask": completion[mask].long().tolist()}
        for ids, mask, completion in zip(batch.input_ids, batch.attention_mask, batch.loss_mask, strict=True)
    ]
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        bf16=False,
        use_cpu=True,
        report_to="none",
        gradient_checkpointing=False,
        max_length=None,
        completion_only_loss=True,
        learning_rate=0.0,
        max_grad_norm=0.0,
        max_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    kept: dict[str, Tensor] = {}

    class Keep(trl.trainer.sft_trainer.TrainerCallback):  # type: ignore[misc,name-defined]
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            kept.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    trainer.add_callback(Keep())
    theirs = trainer.train().training_loss
    loss, _, _ = accumulated(roles, batch, rows=3)
    mine = {name.removeprefix("base_model.model."): p.grad for name, p in roles.named_parameters("policy").items()}
    names = {name: name.removeprefix("base_model.model.").replace(".default.", ".lt_policy.") for name in kept}
    assert set(names.values()) == set(mine)
    assert loss == pytest.approx(theirs, rel=1e-5)
    assert (
        relative_error(
            torch.cat([mine[names[n]].flatten() for n in kept]), torch.cat([kept[n].flatten() for n in kept])
        )
        < 1e-4
    )  # type: ignore[union-attr]


def test_helpers_pad_as_documented() -> None:
    batch = make_batch([[1, 2], [3]], left=True, more=1, filler=9)
    assert batch.input_ids.tolist() == [[9, 1, 2], [9, 9, 3]] and batch.attention_mask.tolist() == [
        [False, True, True],
        [False, False, True],
    ]
