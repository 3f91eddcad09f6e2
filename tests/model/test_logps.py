"""Laws of the chunked head: equal to float64 over the whole vocabulary, to the model's own logits, and never the size
of both."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
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
    """float64, the whole vocabulary, written out: scale, then cap, then temperature."""
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
    """Largest error of value, entropy and gradient against float64, relative to the size of the logits; inf if
    `likeliest` is wrong."""
    upstream = torch.linspace(-1, 2, len(targets))
    mine = hidden.clone().requires_grad_()
    values, entropy, likeliest = chunked_logps(head, mine, targets, temperature)
    (values * upstream).sum().backward()
    theirs = hidden.double().requires_grad_()
    z = full_logits(head, theirs, temperature)
    logp = torch.log_softmax(z, dim=-1)
    chosen = logp.gather(1, targets[:, None]).squeeze(1)
    (chosen * upstream.double()).sum().backward()
    if len(targets) == 0:
        return (
            0.0 if values.shape == entropy.shape == likeliest.shape == (0,) and mine.grad is not None else float("inf")
        )
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
    found = chunked_kl(head, mine, other, temperature)
    p, q = (torch.log_softmax(full_logits(head, hidden, temperature), dim=-1) for hidden in (mine, other))
    expected = (p.exp() * (p - q)).sum(dim=-1)
    if found.shape != expected.shape or found.requires_grad:
        return float("inf")
    reach = 1 + float(max(p.abs().max(), q.abs().max())) if len(mine) else 1.0
    return float((found - expected).abs().max() / reach) if len(mine) else 0.0


SHAPES = {
    "rows": st.integers(0, 9),
    "width": st.integers(1, 8),
    "vocab": st.integers(2, 40),
    "size": st.sampled_from([0.01, 1.0, 30.0, 1000.0]),
    "bias": st.booleans(),
    "scale": st.sampled_from([1.0, 0.0625, 4.0]),
    "cap": st.sampled_from([None, 5.0, 30.0]),
    "temperature": st.sampled_from([0.5, 0.7, 1.0, 2.0]),
    "chunk": st.sampled_from([1, 7, 64, 200, 1 << 24]),
    "seed": st.integers(0, 999),
}


@settings(max_examples=150)
@given(**SHAPES)
def test_log_probs_equal_float64(
    rows: int,
    width: int,
    vocab: int,
    size: float,
    bias: bool,
    scale: float,
    cap: float | None,
    temperature: float,
    chunk: int,
    seed: int,
) -> None:
    head, hidden, targets = make_head(rows, width, vocab, size, bias, scale, cap, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logps_module, "CHUNK_LOGITS", chunk)
        assert error_of_logps(head, hidden, targets, temperature) < 2e-6


@settings(max_examples=80)
@given(**SHAPES)
def test_exact_kl_equals_float64(
    rows: int,
    width: int,
    vocab: int,
    size: float,
    bias: bool,
    scale: float,
    cap: float | None,
    temperature: float,
    chunk: int,
    seed: int,
) -> None:
    head, mine, _ = make_head(rows, width, vocab, size, bias, scale, cap, seed)
    other = mine + 0.3 * torch.randn(mine.shape, generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logps_module, "CHUNK_LOGITS", chunk)
        assert error_of_kl(head, mine, other, temperature) < 5e-6
        assert torch.equal(chunked_kl(head, mine, mine, temperature), torch.zeros(rows))


def error_of_kl_slope(head: Head, mine: Tensor, other: Tensor, temperature: float) -> float:
    """Largest error of the gradient of exact KL by the hidden states, against float64 through the whole vocabulary."""
    upstream = torch.linspace(-1, 2, len(mine))
    leaf, theirs = mine.clone().requires_grad_(), mine.double().requires_grad_()
    (logps_module.chunked_kl(head, leaf, other, temperature) * upstream).sum().backward()
    p, q = (torch.log_softmax(full_logits(head, hidden, temperature), dim=-1) for hidden in (theirs, other))
    ((p.exp() * (p - q)).sum(dim=-1) * upstream.double()).sum().backward()
    if leaf.grad is None or leaf.grad.shape != mine.shape:
        return float("inf")
    if not len(mine):
        return 0.0
    # fp32 logits are off by some eps of their size, and so are p and log p - log q, before they are multiplied with the
    # head.
    reach = 1 + float(max(p.detach().abs().max(), q.detach().abs().max()))
    worst = float((leaf.grad - theirs.grad).abs().max()) / (
        reach * reach * float(head.weight.abs().max()) * head.scale / temperature
    )
    return worst if worst == worst else float("inf")


@settings(max_examples=80)
@given(**SHAPES)
def test_the_gradient_of_exact_kl_equals_float64(
    rows: int,
    width: int,
    vocab: int,
    size: float,
    bias: bool,
    scale: float,
    cap: float | None,
    temperature: float,
    chunk: int,
    seed: int,
) -> None:
    head, mine, _ = make_head(rows, width, vocab, size, bias, scale, cap, seed)
    other = mine + 0.3 * torch.randn(mine.shape, generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logps_module, "CHUNK_LOGITS", chunk)
        assert error_of_kl_slope(head, mine, other, temperature) < 5e-6
        leaf = mine.clone().requires_grad_()
        chunked_kl(head, leaf, mine, temperature).sum().backward()
        assert leaf.grad is not None and not leaf.grad.any(), "at the reference itself there is no slope at all"


def _slope_of_log_odds(ctx: Any, grad: Tensor) -> Any:
    (slope,) = ctx.saved_tensors
    return slope * grad[:, None].abs(), None, None, None


@pytest.mark.parametrize("bug", ["sign", "temperature", "scale", "cap"])
def test_bugs_in_the_gradient_of_kl_are_seen(monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    head, mine, _ = make_head(6, 8, 40, 0.7, False, 0.5, 5.0)
    other = mine.flip(0)
    assert error_of_kl_slope(head, mine, other, 0.7) < 5e-6
    if bug == "sign":
        monkeypatch.setattr(logps_module._ChunkedKL, "backward", staticmethod(_slope_of_log_odds))
    else:
        wrong = {"scale": 0.6, "softcap": 9.0} if bug == "scale" else {"softcap": None} if bug == "cap" else {}
        real = logps_module._ChunkedKL.forward

        def forward(ctx: Any, hidden: Tensor, reference: Tensor, given: Head, temperature: float) -> Tensor:
            return real(ctx, hidden, reference, replace(given, **wrong), 1.0 if bug == "temperature" else temperature)

        monkeypatch.setattr(logps_module._ChunkedKL, "forward", staticmethod(forward))
    assert error_of_kl_slope(head, mine, other, 0.7) > 1e-3


def test_kl_the_wrong_way_round_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    head, mine, _ = make_head(5, 8, 40, 1.0, False, 1.0, None)
    other = mine.flip(0)
    right = error_of_kl(head, mine, other, 1.0)
    monkeypatch.setitem(globals(), "chunked_kl", lambda head, p, q, t: chunked_kl_of(head, q, p, t))
    assert right < 5e-6 < 1e-2 < error_of_kl(head, mine, other, 1.0)


chunked_kl_of = chunked_kl
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
def test_bugs_in_the_head_are_seen(
    monkeypatch: pytest.MonkeyPatch, place: Any, name: str, bug: Callable[..., Any]
) -> None:
    head, hidden, targets = make_head(9, 8, 40, 1.0, True, 0.25, 5.0)
    targets[0] = full_logits(head, hidden, 0.7)[0].argmax()
    assert error_of_logps(head, hidden, targets, 0.7) < 2e-6
    monkeypatch.setattr(place, name, bug)
    assert error_of_logps(head, hidden, targets, 0.7) > 1e-4


def test_ties_count_as_likeliest() -> None:
    head = Head(torch.tensor([[1.0], [1.0], [0.0]]))
    _, _, likeliest = chunked_logps(head, torch.ones(3, 1), torch.tensor([0, 1, 2]))
    assert likeliest.tolist() == [True, True, False]


def test_by_hand() -> None:
    """Two words with logits ln 3 and 0: probabilities 3/4 and 1/4."""
    head = Head(torch.tensor([[1.0], [0.0]]))
    hidden = torch.tensor([[3.0]]).log().requires_grad_()
    logp, entropy, likeliest = chunked_logps(head, hidden, torch.tensor([1]))
    assert logp.item() == pytest.approx(-1.3862944, abs=1e-6)
    assert entropy.item() == pytest.approx(0.5623351, abs=1e-6)
    assert not likeliest.item()
    logp.sum().backward()
    assert hidden.grad is not None and hidden.grad.item() == pytest.approx(-0.75, abs=1e-6)


# --- every architecture: the kit's log-probs are those of the model's own logits --------------------------------------


def error_against_model(roles: Roles) -> float:
    """Largest difference between log-probs from `roles.logps` and from `model(...).logits`, and the relative one of
    adapter gradients."""
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
def test_every_architecture_equals_its_own_logits(kind: str) -> None:
    roles = roles_over(unquantized_base(kind))
    perturb(roles, "policy")
    assert error_against_model(roles) < 2e-5
    if roles.head.softcap:  # it must bite, or this test is blind to it
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
def test_a_head_with_something_dropped_is_seen_and_refused(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    roles = roles_over(unquantized_base(kind))
    roles.head = replace(roles.head, **DROPPED[kind])
    assert error_against_model(roles) > 1e-2
    monkeypatch.setattr(roles_module, "head_of", lambda model: replace(logps_module.head_of(model), **DROPPED[kind]))
    with pytest.raises(UserError, match="^base.model: the output head of .* computes something"):
        roles_over(unquantized_base(kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_differs_by_more_than_rounding_is_refused(dtype: torch.dtype) -> None:
    """RecurrentGemma's soft cap of 30 moves logits of this size by less than 1 % in the norm."""
    model = random_model("recurrent_gemma", gain=3.0, logits_soft_cap=30.0)
    head = logps_module.head_of(model.to(dtype))
    assert head.softcap == 30.0
    logps_module.check_head(model, head)
    with pytest.raises(UserError, match="^base.model: the output head of recurrent_gemma models computes something"):
        logps_module.check_head(model, replace(head, softcap=None))


def test_granite_divides_and_hyperclova_multiplies() -> None:
    model = unquantized_base("granite").model
    assert logps_module.head_of(model).scale == 0.25
    monkey = type(
        "Config", (), {"logits_scaling": 4.0, "model_type": "hyperclovax", "get_text_config": lambda self: self}
    )()
    fake = type("Model", (), {"config": monkey, "get_output_embeddings": lambda self: torch.nn.Linear(2, 3)})()
    assert logps_module.head_of(fake).scale == 4.0


# --- size: (B, T, V) never exists -------------------------------------------------------------------------------------


class _Widest(TorchDispatchMode):
    """The most rows of any tensor that is as wide as the vocabulary (weights have as many rows as they have, and are
    let through)."""

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
    """Rows of logits that are alive at once in the forward and backward pass of `logps`."""
    batch = ragged_batch((40, 40, 40, 40), unscored=())
    with _Widest(97) as mode:
        roles.logps("policy", batch).logps.sum().backward()
        roles.full_vocab_kl("policy", "reference", batch)
    return mode.rows


def _all_at_once(hidden: Tensor, head: Head) -> Any:
    return hidden.split(1 << 30)


def test_logits_come_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    roles = roles_over(unquantized_base("llama"), r=3)
    # more rows than the widths of the model, so that only logits count
    monkeypatch.setattr(logps_module, "CHUNK_LOGITS", 97 * 70)
    assert widest(roles) == 70
    monkeypatch.setattr(logps_module, "_chunks", _all_at_once)
    assert widest(roles) > 90


def rows_through_the_head(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    batch, seen = ragged_batch(), [0]

    def counted(self: Head, hidden: Tensor, temperature: float = 1.0) -> Tensor:
        seen[0] += len(hidden)
        return real_logits(self, hidden, temperature)

    monkeypatch.setattr(Head, "logits", counted)
    roles.logps("policy", batch)
    return seen[0], int(batch.loss_mask.sum())


def test_only_scored_positions_reach_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
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
    """MiB of peak memory, forward and backward, at V = 151,936, of `chunked` or `full` log-probs of so many tokens."""
    words = [str(word) for run in runs for word in run]
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", PEAK, *words], capture_output=True, text=True, cwd=root, timeout=300)
    assert done.returncode == 0, done.stderr
    return list(map(float, done.stdout.split()))


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)


@needs_proc
def test_peak_memory_does_not_grow_with_the_tokens_and_full_logits_would_be_seen() -> None:
    # The kernel may reclaim pages while it counts, so the planted case is given room: 128 more rows of full logits are
    # 74 MiB at least.
    few, many, full_few, full_many = peaks(("chunked", 128), ("chunked", 256), ("full", 48), ("full", 176))
    assert few > 60 and many - few < 20  # one chunk's two buffers are seen, and never more than those
    assert full_many - full_few > 50


@pytest.mark.slow
@needs_proc
def test_peak_memory_at_two_thousand_tokens() -> None:
    few, many = peaks(("chunked", 256), ("chunked", 2048))
    assert few > 60 and many - few < 20
