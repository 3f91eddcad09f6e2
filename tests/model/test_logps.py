"""Log-probs, entropies and KL by the chunked output head.

Oracles: float64 over the whole vocabulary, and the logits of the models of transformers. Logits of all tokens and the
whole vocabulary are never in memory at one time.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    ARCHITECTURES,
    gradients,
    perturb,
    ragged_batch,
    random_model,
    relative_error,
    roles_over,
    unquantized_base,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_tune.errors import UserError
from lowrank_tune.model import logprobs as logps_module
from lowrank_tune.model import roles as roles_module
from lowrank_tune.model.logprobs import Head, chunked_kl, chunked_logps
from lowrank_tune.model.roles import Roles


def full_logits(head: Head, hidden: Tensor, temperature: float) -> Tensor:
    """Returns the logits (N, V) in float64: scale, then cap, then temperature."""
    z = hidden.double() @ head.weight.double().T
    if head.bias is not None:
        z = z + head.bias.double()
    z = z * head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z / temperature


def make_head(
    rows: int, width: int, vocab: int, size: float, bias: bool, scale: float, cap: float | None, seed: int = 0
) -> tuple[Head, Tensor, Tensor]:
    stream = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, width, generator=stream)
    hidden = size * torch.randn(rows, width, generator=stream)
    targets = torch.randint(vocab, (rows,), generator=stream)
    return Head(weight, torch.randn(vocab, generator=stream) if bias else None, scale, cap), hidden, targets


def error_of_logps(head: Head, hidden: Tensor, targets: Tensor, temperature: float) -> float:
    """Returns the largest error of value, entropy and gradient against float64, relative to the size of the logits;
    infinite if `likeliest` is wrong."""
    upstream = torch.linspace(-1, 2, len(targets))
    mine = hidden.clone().requires_grad_()
    values, entropy, likeliest = logps_module.chunked_logps(head, mine, targets, temperature)
    (values * upstream).sum().backward()
    theirs = hidden.double().requires_grad_()
    z = full_logits(head, theirs, temperature)
    logp = torch.log_softmax(z, dim=-1)
    chosen = logp.gather(1, targets[:, None]).squeeze(1)
    (chosen * upstream.double()).sum().backward()
    if len(targets) == 0:
        has_right_shape = values.shape == entropy.shape == likeliest.shape == (0,)
        return 0.0 if has_right_shape and mine.grad is not None else float("inf")
    largest_sum = float((hidden.abs() @ head.weight.abs().T).max())
    reach = 1 + float(z.detach().abs().max()) + largest_sum * head.scale / temperature
    slope = float(head.weight.abs().max() * head.scale / temperature)
    gap = z.gather(1, targets[:, None]).squeeze(1) - z.scatter(1, targets[:, None], -torch.inf).amax(dim=1)
    clear = gap.abs() > 1e-5 * reach
    if (likeliest != (gap > 0))[clear].any():
        return float("inf")
    assert mine.grad is not None and theirs.grad is not None
    errors = [
        (values - chosen).abs().max() / reach,
        (entropy + (logp.exp() * logp).sum(dim=1)).abs().max() / reach,
        (mine.grad - theirs.grad).abs().max() / (slope * reach),
    ]
    worst = float(torch.stack([error.detach().double() for error in errors]).max())
    return worst if worst == worst else float("inf")


def error_of_kl(head: Head, mine: Tensor, other: Tensor, temperature: float) -> float:
    """Returns the largest error of the exact KL against float64; infinite if its shape is wrong."""
    found = logps_module.chunked_kl(head, mine, other, temperature)
    p, q = (torch.log_softmax(full_logits(head, hidden, temperature), dim=-1) for hidden in (mine, other))
    expected = (p.exp() * (p - q)).sum(dim=-1)
    if found.shape != expected.shape or found.requires_grad:
        return float("inf")
    reach = 1 + float(max(p.abs().max(), q.abs().max())) if len(mine) else 1.0
    return float((found - expected).abs().max() / reach) if len(mine) else 0.0


@dataclass
class HeadCase:
    """A random head, hidden states of N tokens and their ids, of another model too, and how they are evaluated."""

    head: Head
    hidden: Tensor
    other_hidden: Tensor
    targets: Tensor
    temperature: float
    chunk_logits: int


@st.composite
def head_cases(draw: st.DrawFn) -> HeadCase:
    """Draws 0 to 9 tokens over a vocabulary of 2 to 40, with or without bias, scale and soft cap."""
    seed = draw(st.integers(0, 999))
    head, hidden, targets = make_head(
        rows=draw(st.integers(0, 9)),
        width=draw(st.integers(1, 8)),
        vocab=draw(st.integers(2, 40)),
        size=draw(st.sampled_from([0.01, 1.0, 30.0, 1000.0])),
        bias=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 0.0625, 4.0])),
        cap=draw(st.sampled_from([None, 5.0, 30.0])),
        seed=seed,
    )
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed))
    return HeadCase(
        head,
        hidden,
        hidden + 0.3 * noise,
        targets,
        temperature=draw(st.sampled_from([0.5, 0.7, 1.0, 2.0])),
        chunk_logits=draw(st.sampled_from([1, 7, 64, 200, 1 << 24])),
    )


@settings(max_examples=150)
@given(case=head_cases())
def test_log_probs_equal_float64(case: HeadCase) -> None:
    """Log-probs, entropies and gradients are those of float64 over the whole vocabulary, for any head and any chunk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logps_module, "chunked_logps", partial(chunked_logps, chunk_logits=case.chunk_logits))
        assert error_of_logps(case.head, case.hidden, case.targets, case.temperature) < 2e-6


@settings(max_examples=80)
@given(case=head_cases())
def test_exact_kl_equals_float64(case: HeadCase) -> None:
    """KL(p || q) over the vocabulary is that of float64; exactly 0 for p = q."""
    head, mine, other, temperature = case.head, case.hidden, case.other_hidden, case.temperature
    with pytest.MonkeyPatch.context() as patch:
        in_chunks = partial(chunked_kl, chunk_logits=case.chunk_logits)
        patch.setattr(logps_module, "chunked_kl", in_chunks)
        assert error_of_kl(head, mine, other, temperature) < 5e-6
        assert torch.equal(in_chunks(head, mine, mine, temperature), torch.zeros(len(mine)))


def error_of_kl_slope(head: Head, mine: Tensor, other: Tensor, temperature: float) -> float:
    """Returns the largest error of the gradient of the exact KL by the hidden states, against float64."""
    upstream = torch.linspace(-1, 2, len(mine))
    leaf, theirs = mine.clone().requires_grad_(), mine.double().requires_grad_()
    (logps_module.chunked_kl(head, leaf, other, temperature) * upstream).sum().backward()
    p, q = (torch.log_softmax(full_logits(head, hidden, temperature), dim=-1) for hidden in (theirs, other))
    ((p.exp() * (p - q)).sum(dim=-1) * upstream.double()).sum().backward()
    if leaf.grad is None or leaf.grad.shape != mine.shape:
        return float("inf")
    if not len(mine):
        return 0.0
    # The rounding of fp32 logits is relative to their size, and so is that of p and of log p - log q, which the head
    # then multiplies.
    reach = 1 + float(max(p.detach().abs().max(), q.detach().abs().max()))
    worst = float((leaf.grad - theirs.grad).abs().max()) / (
        reach * reach * float(head.weight.abs().max()) * head.scale / temperature
    )
    return worst if worst == worst else float("inf")


@settings(max_examples=80)
@given(case=head_cases())
def test_gradient_of_exact_kl_equals_float64(case: HeadCase) -> None:
    """The gradient of KL(p || q) by the hidden states of p is that of float64; exactly 0 for p = q."""
    head, mine, other, temperature = case.head, case.hidden, case.other_hidden, case.temperature
    with pytest.MonkeyPatch.context() as patch:
        in_chunks = partial(chunked_kl, chunk_logits=case.chunk_logits)
        patch.setattr(logps_module, "chunked_kl", in_chunks)
        assert error_of_kl_slope(head, mine, other, temperature) < 5e-6
        leaf = mine.clone().requires_grad_()
        in_chunks(head, leaf, mine, temperature).sum().backward()
        # The gradient at the reference itself is exactly 0.
        assert leaf.grad is not None and not leaf.grad.any()


class _AbsoluteGradient(torch.autograd.Function):
    """The identity, with the absolute value of the gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.abs()


def _kl_without_sign(head: Head, mine: Tensor, other: Tensor, temperature: float) -> Any:
    return _AbsoluteGradient.apply(chunked_kl(head, mine, other, temperature))


def _kl_at_temperature_1(head: Head, mine: Tensor, other: Tensor, temperature: float) -> Tensor:
    return chunked_kl(head, mine, other, 1.0)


def _kl_with_wrong_scale(head: Head, mine: Tensor, other: Tensor, temperature: float) -> Tensor:
    return chunked_kl(replace(head, scale=0.6, softcap=9.0), mine, other, temperature)


def _kl_without_cap(head: Head, mine: Tensor, other: Tensor, temperature: float) -> Tensor:
    return chunked_kl(replace(head, softcap=None), mine, other, temperature)


@pytest.mark.parametrize("bug", [_kl_without_sign, _kl_at_temperature_1, _kl_with_wrong_scale, _kl_without_cap])
def test_wrong_gradient_of_kl_is_found(monkeypatch: pytest.MonkeyPatch, bug: Any) -> None:
    """`error_of_kl_slope` finds a KL without the sign of the gradient, the temperature, the scale or the cap."""
    head, mine, _ = make_head(6, 8, 40, 0.7, False, 0.5, 5.0)
    other = mine.flip(0)
    assert error_of_kl_slope(head, mine, other, 0.7) < 5e-6
    monkeypatch.setattr(logps_module, "chunked_kl", bug)
    assert error_of_kl_slope(head, mine, other, 0.7) > 1e-3


def test_forward_kl_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """`error_of_kl` finds KL(q || p) instead of KL(p || q)."""
    head, mine, _ = make_head(5, 8, 40, 1.0, False, 1.0, None)
    other = mine.flip(0)
    assert error_of_kl(head, mine, other, 1.0) < 5e-6
    monkeypatch.setattr(logps_module, "chunked_kl", lambda head, p, q, temperature: chunked_kl(head, q, p, temperature))
    assert error_of_kl(head, mine, other, 1.0) > 1e-2


real_chunk = logps_module.chunk_logps


def _cap_forgotten_in_gradient(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    t: float,
    logps: Tensor,
    entropy: Tensor,
    likeliest: Tensor,
    slope: Tensor | None,
) -> None:
    real_chunk(head, hidden, targets, t, logps, entropy, likeliest, None)
    if slope is not None:
        p = torch.softmax(head.logits(hidden, t), dim=-1)
        slope.copy_((head.weight[targets] - p @ head.weight) * head.scale / t)


def _temperature_forgotten_in_gradient(*args: Any) -> None:
    real_chunk(*args)
    if args[-1] is not None:
        args[-1].mul_(args[3])


def _entropy_without_sign(*args: Any) -> None:
    real_chunk(*args)
    args[5].neg_()


def _accuracy_by_log_prob(*args: Any) -> None:
    real_chunk(*args)
    args[6].copy_(args[4] > -1.0)


def _logits_without_scale(self: Head, hidden: Tensor, temperature: float = 1.0) -> Tensor:
    return real_logits(replace(self, scale=1.0), hidden, temperature)


def _scale_after_cap(self: Head, hidden: Tensor, temperature: float = 1.0) -> Tensor:
    return real_logits(replace(self, scale=1.0), hidden, temperature) * self.scale


def _logits_in_bf16(self: Head, hidden: Tensor, temperature: float = 1.0) -> Tensor:
    return real_logits(self, hidden, temperature).bfloat16().float()


real_logits = Head.logits


@pytest.mark.parametrize(
    ("place", "name", "bug"),
    [
        (logps_module, "chunk_logps", _cap_forgotten_in_gradient),
        (logps_module, "chunk_logps", _temperature_forgotten_in_gradient),
        (logps_module, "chunk_logps", _entropy_without_sign),
        (logps_module, "chunk_logps", _accuracy_by_log_prob),
        (Head, "logits", _logits_without_scale),
        (Head, "logits", _scale_after_cap),
        (Head, "logits", _logits_in_bf16),
    ],
)
def test_wrong_head_is_found(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, bug: Callable[..., Any]) -> None:
    """`error_of_logps` finds wrong caps, temperatures, scales, entropies, and bf16 logits."""
    head, hidden, targets = make_head(9, 8, 40, 1.0, True, 0.25, 5.0)
    targets[0] = full_logits(head, hidden, 0.7)[0].argmax()
    assert error_of_logps(head, hidden, targets, 0.7) < 2e-6
    monkeypatch.setattr(place, name, bug)
    assert error_of_logps(head, hidden, targets, 0.7) > 1e-4


def test_ties_count_as_likeliest() -> None:
    """Two tokens with the same largest logit are both the most likely one."""
    head = Head(torch.tensor([[1.0], [1.0], [0.0]]))
    _, _, likeliest = chunked_logps(head, torch.ones(3, 1), torch.tensor([0, 1, 2]))
    assert likeliest.tolist() == [True, True, False]


def test_log_prob_and_entropy_equal_numbers_by_hand() -> None:
    """Two tokens with logits ln 3 and 0 have the probabilities 3/4 and 1/4."""
    head = Head(torch.tensor([[1.0], [0.0]]))
    hidden = torch.tensor([[3.0]]).log().requires_grad_()
    logp, entropy, likeliest = chunked_logps(head, hidden, torch.tensor([1]))
    assert logp.item() == pytest.approx(-1.3862944, abs=1e-6)
    assert entropy.item() == pytest.approx(0.5623351, abs=1e-6)
    assert not likeliest.item()
    logp.sum().backward()
    assert hidden.grad is not None and hidden.grad.item() == pytest.approx(-0.75, abs=1e-6)


# --- every architecture -----------------------------------------------------------------------------------------------


def error_against_model(roles: Roles) -> float:
    """Returns the largest difference between log-probs from `roles.logps` and from `model(...).logits`, and of the
    gradients of the adapter (relative)."""
    batch = ragged_batch((9, 5, 12), unscored=())
    scored = batch.loss_mask
    roles.base.model.zero_grad(set_to_none=True)
    mine = roles.logps("policy", batch)
    mine.logps.sum().backward()
    my_gradient = gradients(roles)
    roles.base.model.zero_grad(set_to_none=True)
    with roles.activate("policy"):
        logits = roles.base.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False
        ).logits.double()
    logp = torch.log_softmax(logits[:, :-1], dim=-1)
    theirs = logp.gather(2, batch.input_ids[:, 1:, None]).squeeze(2)
    theirs.masked_fill(~scored[:, 1:], 0.0).sum().backward()
    entropy = -(logp.exp() * logp).sum(dim=-1).masked_fill(~scored[:, 1:], 0.0)
    assert not mine.logps[~scored].any() and not mine.entropy[~scored].any()
    values = max(
        float((mine.logps[:, 1:].double() - theirs.masked_fill(~scored[:, 1:], 0.0)).abs().max().detach()),
        float((mine.entropy[:, 1:].double() - entropy).abs().max().detach()),
    )
    return max(values, relative_error(my_gradient, gradients(roles)))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_log_probs_equal_logits_of_every_architecture(kind: str) -> None:
    """Log-probs, entropies and gradients are those of the model's own logits, for every architecture."""
    roles = roles_over(unquantized_base(kind))
    perturb(roles, "policy")
    assert error_against_model(roles) < 2e-5
    # A soft cap must change the logits, or this test does not check it.
    if roles.head.softcap:
        with roles.activate("policy"):
            raw = (
                roles.base.model.get_decoder()(input_ids=ragged_batch().input_ids, use_cache=False).last_hidden_state
                @ roles.head.weight.T
            )
        assert float(raw.detach().abs().max()) > 2 * roles.head.softcap


DROPPED: dict[str, dict[str, Any]] = {
    "gemma2": {"softcap": None},
    "gemma3_text": {"softcap": None},
    "cohere": {"scale": 1.0},
    "granite": {"scale": 1.0},
    "phi": {"bias": None},
    "recurrent_gemma": {"softcap": None},
}


@pytest.mark.parametrize("kind", DROPPED)
def test_head_without_cap_scale_or_bias_is_refused(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A head without its soft cap, scale or bias has other log-probs, and `Roles` raises UserError."""
    roles = roles_over(unquantized_base(kind))
    roles.head = replace(roles.head, **DROPPED[kind])
    assert error_against_model(roles) > 1e-2
    monkeypatch.setattr(roles_module, "head_of", lambda model: replace(logps_module.head_of(model), **DROPPED[kind]))
    with pytest.raises(UserError, match="^base.model: the output head of .* computes something"):
        roles_over(unquantized_base(kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_that_differs_by_more_than_rounding_is_refused(dtype: torch.dtype) -> None:
    """`check_head` finds a missing soft cap of 30 (RecurrentGemma), which changes these logits by less than 1 %."""
    model = random_model("recurrent_gemma", gain=3.0, logits_soft_cap=30.0)
    head = logps_module.head_of(model.to(dtype))
    assert head.softcap == 30.0
    logps_module.check_head(model, head)
    with pytest.raises(UserError, match="^base.model: the output head of recurrent_gemma models computes something"):
        logps_module.check_head(model, replace(head, softcap=None))


def test_granite_divides_and_hyperclova_multiplies() -> None:
    """`logits_scaling` is a divisor in Granite and a factor in HyperCLOVA X."""
    model = unquantized_base("granite").model
    assert logps_module.head_of(model).scale == 0.25
    monkey = type(
        "Config", (), {"logits_scaling": 4.0, "model_type": "hyperclovax", "get_text_config": lambda self: self}
    )()
    fake = type("Model", (), {"config": monkey, "get_output_embeddings": lambda self: torch.nn.Linear(2, 3)})()
    assert logps_module.head_of(fake).scale == 4.0


# --- size: (B, T, V) never exists -------------------------------------------------------------------------------------


class _Widest(TorchDispatchMode):
    """Records the largest number of rows of a tensor that is as wide as the vocabulary."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.rows = vocab, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, Tensor) and one.ndim and one.shape[-1] == self.vocab:
                self.rows = max(self.rows, one.numel() // self.vocab)
        return out


def widest(roles: Roles) -> int:
    """Returns the rows of logits that exist at one time in the forward and backward pass of `logps`."""
    batch = ragged_batch((40, 40, 40, 40), unscored=())
    with _Widest(97) as mode:
        roles.logps("policy", batch).logps.sum().backward()
        roles.full_vocab_kl("policy", "reference", batch)
    return mode.rows


def test_logits_are_computed_in_chunks() -> None:
    """No tensor as wide as the vocabulary has more rows than a chunk."""
    roles = roles_over(unquantized_base("llama"), r=3)
    # More rows than the widths of the model, so that only logits count.
    roles.logits_chunk = 97 * 70
    assert widest(roles) == 70
    # The check finds logits that are computed at once.
    roles.logits_chunk = 1 << 30
    assert widest(roles) > 90


def values_and_gradients(roles: Roles, chunk_logits: int) -> list[Tensor]:
    """Returns log-probs, entropies, the exact KL, and the gradients of the sums of all of them."""
    batch = ragged_batch()
    roles.logits_chunk = chunk_logits
    parameters = roles.parameters("policy")
    for parameter in parameters:
        parameter.grad = None
    found = roles.logps("policy", batch, entropy_gradient=True)
    kl = roles.full_vocab_kl("policy", "reference", batch, gradient=True)
    (found.logps + found.entropy + kl).sum().backward()
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return [found.logps.detach(), found.entropy.detach(), kl.detach(), *gradients]


@pytest.mark.parametrize("chunk_logits", [1, 97 * 3, 97 * 7, 1 << 26])
def test_values_and_gradients_do_not_depend_on_the_chunk(chunk_logits: int) -> None:
    roles = roles_over(unquantized_base("llama"), r=3)
    plain = values_and_gradients(roles, 1 << 24)
    for value, expected in zip(values_and_gradients(roles, chunk_logits), plain, strict=True):
        assert float((value - expected).norm()) <= 1e-5 * float(expected.norm())
    assert len(plain) > 3 and all(value.any() for value in plain[:2])


def rows_through_the_head(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Returns the rows that the head computes, and the scored tokens."""
    batch, seen = ragged_batch(), [0]

    def counted(self: Head, hidden: Tensor, temperature: float = 1.0) -> Tensor:
        seen[0] += len(hidden)
        return real_logits(self, hidden, temperature)

    monkeypatch.setattr(Head, "logits", counted)
    roles.logps("policy", batch)
    return seen[0], int(batch.loss_mask.sum())


def test_only_scored_positions_reach_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head computes the logits of scored tokens only."""
    seen, scored = rows_through_the_head(roles_over(unquantized_base("llama")), monkeypatch)
    assert seen == scored > 0


PEAK = """
import sys, torch
from lowrank_tune.model.logprobs import Head, chunked_logps
V = 151936
def full(head, hidden, targets):
    return torch.log_softmax(hidden @ head.weight.T, -1).gather(1, targets[:, None]).squeeze(1),
def high():
    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM')) / 1024
head = Head(torch.randn(V, 8))
(chunked_logps(head, torch.randn(120, 8, requires_grad=True), torch.zeros(120, dtype=torch.long))[0]).sum().backward()
for how, T in zip(sys.argv[1::2], map(int, sys.argv[2::2])):
    hidden, targets = torch.randn(T, 8, requires_grad=True), torch.randint(V, (T,))
    open('/proc/self/clear_refs', 'w').write('5')
    before = high()
    {'chunked': chunked_logps, 'full': full}[how](head, hidden, targets)[0].sum().backward()
    print(high() - before)
"""


def peaks(*runs: tuple[str, int]) -> list[float]:
    """Returns the peak memory in MiB of `chunked` or `full` log-probs of some tokens, forward and backward, V =
    151,936."""
    words = [str(word) for run in runs for word in run]
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", PEAK, *words], capture_output=True, text=True, cwd=root, timeout=300)
    assert done.returncode == 0, done.stderr
    return list(map(float, done.stdout.split()))


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)


@needs_proc
def test_peak_memory_does_not_grow_with_tokens() -> None:
    """256 tokens need no more memory than 128; full logits do, and the measurement finds that."""
    # 128 more rows of full logits are at least 74 MiB. The bound is lower, because the kernel may free pages meanwhile.
    few, many, full_few, full_many = peaks(("chunked", 128), ("chunked", 256), ("full", 48), ("full", 176))
    # The two buffers of one chunk, and not more than those.
    assert few > 60 and many - few < 20
    assert full_many - full_few > 50


@pytest.mark.slow
@needs_proc
def test_peak_memory_of_2048_tokens() -> None:
    """2048 tokens need no more memory than 256."""
    few, many = peaks(("chunked", 256), ("chunked", 2048))
    assert few > 60 and many - few < 20


@pytest.mark.parametrize(
    ("vocab_size", "device", "expected"),
    [
        (97, "cpu", 1 << 21),
        (8192, "cpu", 1 << 21),
        (49_152, "cpu", 1 << 23),
        (151_936, "cpu", 1 << 24),
        (97, "cuda", 1 << 24),
    ],
)
def test_a_chunk_has_256_rows_on_the_cpu(vocab_size: int, device: str, expected: int) -> None:
    assert logps_module.default_chunk_logits(vocab_size, torch.device(device)) == expected
