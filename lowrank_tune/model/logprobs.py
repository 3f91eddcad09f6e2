"""Log-probs of chosen tokens without the logits of all of them: `(B, T, V)` never exists, forward or backward.

For hidden states h (N, d), head W (V, d) and targets y (N,):

    z = head(h)    logp = z_y - logsumexp(z)    H = logsumexp(z) - E_p[z]

The head is frozen, so all that the backward pass needs of a row is one vector, d logp / d h = s (W_y - p W), with s the
head's scale over the temperature (a soft cap adds its derivative inside p). It is taken while the chunk's logits are
there: logits are made once, not twice. Rows go through in chunks of a fixed number of logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_tune.errors import UserError
from lowrank_tune.model.rounding import relative_difference

HEAD_TOLERANCE = 1e-5
HALF_PRECISION_HEAD_TOLERANCE = 4e-3
"""Relative differences of logits that rounding explains. In bf16 one rounding makes 1.6e-3, and a head rounds its
product, its scale and its soft cap: 2.9e-3 of Gemma 2."""
SOFTCAP_NAMES = ("final_logit_softcapping", "logit_softcap", "softcap", "logits_soft_cap")
"""What configurations call the soft cap of the logits; the last is RecurrentGemma's."""
CHUNK_LOGITS = 1 << 24  # 64 MiB in fp32; two such buffers are alive at once


@dataclass(frozen=True)
class Head:
    """The model's output head: weight (V, d), bias (V,) or None, what its logits are multiplied by, and the soft
    cap."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor, temperature: float = 1.0) -> Tensor:
        """(N, d) -> (N, V) fp32, leaving the matrix product in fp32: bf16 logits cost 0.1 in one log-prob."""
        if self.weight.is_cuda and self.weight.dtype != torch.float32:
            z = torch.mm(hidden.to(self.weight.dtype), self.weight.T, out_dtype=torch.float32)
        else:
            z = torch.mm(hidden.float(), self.weight.float().T)
        if self.bias is not None:
            z += self.bias
        if self.scale != 1.0:
            z *= self.scale
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z.div_(temperature) if temperature != 1.0 else z


def head_of(model: Any) -> Head:
    """The head of a causal model, with the scale and cap that its config names. `check_head` proves it right."""
    linear = model.get_output_embeddings()
    config = model.config.get_text_config()
    scale = 1.0
    if getattr(config, "logit_scale", None) is not None:  # Cohere
        scale = float(config.logit_scale)
    elif getattr(config, "logits_scaling", None) is not None:  # Granite divides, HyperCLOVA X multiplies
        if config.model_type.startswith("granite"):
            scale = 1.0 / config.logits_scaling
        else:
            scale = float(config.logits_scaling)
    softcap = next((float(cap) for name in SOFTCAP_NAMES if (cap := getattr(config, name, None))), None)
    return Head(linear.weight, getattr(linear, "bias", None), scale, softcap)


@torch.no_grad()
def check_head(model: Any, head: Head) -> None:
    """Compares the head's logits with the model's own on a few tokens. Raises UserError where they differ by more than
    the rounding of the model's dtype."""
    ids = torch.arange(2, 10, device=head.weight.device)[None] % head.weight.shape[0]
    states: list[Tensor] = []
    decoder = model.get_decoder()
    # the hidden states of the same pass: those of another one may be rounded differently
    handle = decoder.register_forward_hook(lambda module, inputs, output: states.append(output.last_hidden_state))
    try:
        theirs = model(input_ids=ids, use_cache=False).logits[0]
        if not states:
            decoder(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    if head.weight.dtype == torch.float32:
        tolerance = HEAD_TOLERANCE
    else:
        tolerance = HALF_PRECISION_HEAD_TOLERANCE
    if not relative_difference(head.logits(states[0][0]), theirs) <= tolerance:
        raise UserError(
            f"base.model: the head of {model.config.model_type} models computes something that this kit does not know"
        )


def chunked_logps(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, d), targets (N,) -> log-probs, entropies, whether the target is the likeliest token; (N,) each.
    Log-probs have a gradient."""
    return _ChunkedLogps.apply(hidden, targets, head, temperature)  # type: ignore[no-any-return,no-untyped-call]


def chunked_kl(head: Head, hidden: Tensor, reference_hidden: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p || q) over the whole vocabulary at each of N positions, from their hidden states; (N,) fp32, with a gradient
    for `hidden`."""
    return _ChunkedKL.apply(hidden, reference_hidden, head, temperature)  # type: ignore[no-any-return,no-untyped-call]


def chunked_entropy(head: Head, hidden: Tensor, temperature: float = 1.0) -> Tensor:
    """The entropy of each of N distributions, from hidden states; (N,) fp32, with a gradient."""
    return _ChunkedEntropy.apply(hidden, head, temperature)  # type: ignore[no-any-return,no-untyped-call]


def _chunks(rows: Tensor, head: Head) -> tuple[Tensor, ...]:
    if len(rows):
        return torch.split(rows, max(1, CHUNK_LOGITS // head.weight.shape[0]))
    return ()


class _ChunkedLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: Head,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logps = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
        entropy = torch.zeros_like(logps)
        likeliest = torch.zeros_like(logps, dtype=torch.bool)
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        start = 0
        for chunk in _chunks(hidden, head):
            here = slice(start, start + len(chunk))
            start += len(chunk)
            slope_here = None if slope is None else slope[here]
            chunk_logps(
                head,
                chunk,
                targets[here],
                temperature,
                logps[here],
                entropy[here],
                likeliest[here],
                slope_here,
            )
        if slope is not None:
            ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(entropy, likeliest)
        return logps, entropy, likeliest

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return (slope * grad[:, None]).to(slope.dtype), None, None, None


class _ChunkedKL(torch.autograd.Function):
    """d KL / d z = p (log p - log q - KL), taken as above while the logits are there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        reference: Tensor,
        head: Head,
        temperature: float,
    ) -> Tensor:
        kls = [hidden.new_zeros(0, dtype=torch.float32)]
        slopes = []
        for hidden_chunk, reference_chunk in zip(_chunks(hidden, head), _chunks(reference, head), strict=True):
            z = head.logits(hidden_chunk, temperature)
            p = torch.log_softmax(z, dim=-1)
            q = torch.log_softmax(head.logits(reference_chunk, temperature), dim=-1)
            probs = p.exp()
            kl = (probs * (p - q)).sum(dim=-1)
            kls.append(kl)
            if ctx.needs_input_grad[0]:
                slope = probs * (p - q - kl[:, None])
                if head.softcap is not None:
                    slope *= 1 - (z * temperature / head.softcap) ** 2
                if head.weight.is_cuda:
                    dtype = head.weight.dtype
                else:
                    dtype = torch.float32
                slopes.append((slope.to(dtype) @ head.weight.to(dtype)).float() * (head.scale / temperature))
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.cat(slopes).to(hidden.dtype) if slopes else torch.zeros_like(hidden))
        return torch.cat(kls)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return (slope * grad[:, None]).to(slope.dtype), None, None, None


class _ChunkedEntropy(torch.autograd.Function):
    """d H / d z = -p (log p + H), taken as above while the logits are there."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, temperature: float) -> Tensor:
        entropies = [hidden.new_zeros(0, dtype=torch.float32)]
        slopes = []
        for chunk in _chunks(hidden, head):
            z = head.logits(chunk, temperature)
            p = torch.log_softmax(z, dim=-1)
            probs = p.exp()
            entropy = -(probs * p).sum(dim=-1)
            entropies.append(entropy)
            if ctx.needs_input_grad[0]:
                slope = -probs * (p + entropy[:, None])
                if head.softcap is not None:
                    slope *= 1 - (z * temperature / head.softcap) ** 2
                if head.weight.is_cuda:
                    dtype = head.weight.dtype
                else:
                    dtype = torch.float32
                slopes.append((slope.to(dtype) @ head.weight.to(dtype)).float() * (head.scale / temperature))
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.cat(slopes).to(hidden.dtype) if slopes else torch.zeros_like(hidden))
        return torch.cat(entropies)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return (slope * grad[:, None]).to(slope.dtype), None, None


def chunk_logps(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    temperature: float,
    logps: Tensor,
    entropy: Tensor,
    likeliest: Tensor,
    slope: Tensor | None,
) -> None:
    z = head.logits(hidden, temperature)
    target = z.gather(1, targets[:, None]).squeeze(1)
    largest = z.amax(dim=1)
    likeliest.copy_(target >= largest)
    z -= largest[:, None]
    e = z.exp()
    total = e.sum(dim=1)
    log_total = total.log()
    logps.copy_(target - largest - log_total)
    entropy.copy_(log_total - torch.linalg.vecdot(e, z) / total)
    if slope is None:
        return
    factor = head.scale / temperature
    at_target = torch.ones_like(target)
    if head.softcap is not None:  # d cap tanh(x / cap) / dx = 1 - tanh^2
        cap = head.softcap / temperature
        e *= 1 - ((z + largest[:, None]) / cap) ** 2
        at_target = 1 - (target / cap) ** 2
    dtype = head.weight.dtype if head.weight.is_cuda else torch.float32
    e /= total[:, None]
    expected = e.to(dtype) @ head.weight.to(dtype)
    slope.copy_((at_target[:, None] * head.weight[targets].float() - expected.float()) * factor)
