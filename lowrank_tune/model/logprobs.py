"""Log-probs of chosen tokens without the logits of all of them: `(B, T, V)` never exists, forward or backward.

For hidden states h (N, d), head W (V, d) and targets y (N,):

    z = head(h)    logp = z_y - logsumexp(z)    H = logsumexp(z) - E_p[z]

The head is frozen, so the backward pass needs only one vector for each row, d logp / d h = s (W_y - p W), with s the
head's scale over the temperature (a soft cap adds its derivative inside p). It is computed in the forward pass, while
the logits of the chunk exist, so logits are computed once. A chunk has a fixed number of logits: memory depends on it,
results do not, and each chunk reads the head's weight again.
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
"""Relative differences of logits that rounding explains. One rounding to bf16 changes them by 1.6e-3, and a head rounds
its product, its scale and its soft cap: 2.9e-3 for Gemma 2."""
SOFTCAP_NAMES = ("final_logit_softcapping", "logit_softcap", "softcap", "logits_soft_cap")
"""Names of the soft cap of the logits in configurations; the last is RecurrentGemma's."""
CHUNK_LOGITS = 1 << 24
"""Logits of a chunk by default: 64 MiB in fp32. Two such buffers exist at once."""
CPU_CHUNK_ROWS = 256
MIN_CPU_CHUNK_LOGITS = 1 << 21
"""Rows of a chunk on the CPU, and the fewest logits. The operations on a chunk then find its logits in the cache: at a
vocabulary of 8,192 a chunk of 2,048 rows takes a third longer for each row."""
LARGE_CHUNK_LOGITS = 1 << 26
"""Logits of a chunk on a GPU with enough memory: the head's weight is read a quarter as often."""


@dataclass(frozen=True)
class LogProbs:
    """log p(token t | tokens before t) and the entropy of that distribution, (B, T) fp32; 0 where nothing was
    scored."""

    logps: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class Head:
    """The model's output head: weight (V, d), bias (V,) or None, factor of the logits, and soft cap or None."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(
        self,
        hidden: Tensor,
        temperature: float = 1.0,
    ) -> Tensor:
        """(N, d) -> (N, V) fp32."""
        z = self.product(hidden)
        if self.bias is not None:
            z += self.bias
        if self.scale != 1.0:
            z *= self.scale
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        if temperature != 1.0:
            z.div_(temperature)
        return z

    def product(self, hidden: Tensor) -> Tensor:
        """Returns the product with the weight, (N, d) -> (N, V), a new tensor. It is fp32, because bf16 logits change a
        log-prob by up to 0.1."""
        if self.weight.is_cuda and self.weight.dtype != torch.float32:
            return torch.mm(
                hidden.to(self.weight.dtype),
                self.weight.T,
                out_dtype=torch.float32,
            )
        return torch.mm(hidden.float(), self.weight.float().T)

    def hidden_gradient(
        self,
        slope: Tensor,
        z: Tensor,
        temperature: float,
    ) -> Tensor:
        """Returns the gradient for hidden states (N, d) fp32 of a value with the gradient `slope` (N, V) for the logits
        `z` (N, V). Overwrites `slope`."""
        if self.softcap is not None:
            slope *= 1 - (z * temperature / self.softcap) ** 2
        return self.expected_weight(slope).float() * (self.scale / temperature)

    def expected_weight(self, weights: Tensor) -> Tensor:
        """(N, V) -> (N, d): the product with the head's weight, in the weight's dtype on a GPU, else in fp32."""
        dtype = torch.float32
        if self.weight.is_cuda:
            dtype = self.weight.dtype
        return weights.to(dtype) @ self.weight.to(dtype)


def default_chunk_logits(vocab_size: int, device: torch.device) -> int:
    """Returns the logits of a chunk where nothing else is set, a power of two."""
    if device.type != "cpu":
        return CHUNK_LOGITS
    logits = 1 << (CPU_CHUNK_ROWS * vocab_size).bit_length() - 1
    return max(MIN_CPU_CHUNK_LOGITS, min(CHUNK_LOGITS, logits))


def head_of(model: Any) -> Head:
    """Returns the head of a causal model, with the scale and soft cap of its config. `check_head` verifies it."""
    linear = model.get_output_embeddings()
    config = model.config.get_text_config()
    scale = 1.0
    # `logit_scale` is Cohere's. Granite divides by `logits_scaling`, HyperCLOVA X multiplies.
    if getattr(config, "logit_scale", None) is not None:
        scale = float(config.logit_scale)
    elif getattr(config, "logits_scaling", None) is not None:
        scale = float(config.logits_scaling)
        if config.model_type.startswith("granite"):
            scale = 1.0 / scale
    softcap = None
    for name in SOFTCAP_NAMES:
        if softcap is None and getattr(config, name, None):
            softcap = float(getattr(config, name))
    return Head(
        linear.weight,
        getattr(linear, "bias", None),
        scale,
        softcap,
    )


@torch.no_grad()
def check_head(model: Any, head: Head) -> None:
    """Compares the head's logits with the model's own on a few tokens. Raises UserError if they differ by more than
    the rounding of the model's dtype."""
    ids = torch.arange(2, 10, device=head.weight.device)[None] % head.weight.shape[0]
    states: list[Tensor] = []
    decoder = model.get_decoder()
    # The hidden states of the same pass, because another pass may round them differently.
    handle = decoder.register_forward_hook(lambda module, inputs, output: states.append(output.last_hidden_state))
    try:
        expected = model(input_ids=ids, use_cache=False).logits[0]
        if not states:
            decoder(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    tolerance = HEAD_TOLERANCE
    if head.weight.dtype != torch.float32:
        tolerance = HALF_PRECISION_HEAD_TOLERANCE
    # The comparison is false for NaN.
    if not relative_difference(head.logits(states[0][0]), expected) <= tolerance:
        raise UserError(
            f"base.model: the output head of {model.config.model_type} models computes something that this kit does "
            "not support: use another base",
        )


def chunked_logps(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    chunk_logits: int = CHUNK_LOGITS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns log-probs, entropies, and whether the target is the most likely token, (N,) each, from hidden (N, d) and
    targets (N,). Log-probs have a gradient. At most `chunk_logits` logits exist at once, but always those of one
    row."""
    return _ChunkedLogps.apply(  # type: ignore[no-any-return,no-untyped-call]
        hidden,
        targets,
        head,
        temperature,
        chunk_logits,
    )


def chunked_kl(
    head: Head,
    hidden: Tensor,
    reference_hidden: Tensor,
    temperature: float = 1.0,
    chunk_logits: int = CHUNK_LOGITS,
) -> Tensor:
    """Returns KL(p || q) over the whole vocabulary at each of N positions, from hidden states; (N,) fp32, with a
    gradient for `hidden`."""
    return _ChunkedKL.apply(  # type: ignore[no-any-return,no-untyped-call]
        hidden,
        reference_hidden,
        head,
        temperature,
        chunk_logits,
    )


def chunked_entropy(
    head: Head,
    hidden: Tensor,
    temperature: float = 1.0,
    chunk_logits: int = CHUNK_LOGITS,
) -> Tensor:
    """Returns the entropy of each of N distributions, from hidden states; (N,) fp32, with a gradient."""
    return _ChunkedEntropy.apply(  # type: ignore[no-any-return,no-untyped-call]
        hidden,
        head,
        temperature,
        chunk_logits,
    )


def _chunks(
    rows: Tensor,
    head: Head,
    chunk_logits: int,
) -> tuple[Tensor, ...]:
    if len(rows):
        return torch.split(rows, max(1, chunk_logits // head.weight.shape[0]))
    return ()


class _ChunkedLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: Head,
        temperature: float,
        chunk_logits: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logps = torch.zeros(
            len(hidden),
            dtype=torch.float32,
            device=hidden.device,
        )
        entropy = torch.zeros_like(logps)
        is_top = torch.zeros_like(logps, dtype=torch.bool)
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        start = 0
        for chunk in _chunks(hidden, head, chunk_logits):
            rows = slice(start, start + len(chunk))
            start += len(chunk)
            chunk_logps(
                head,
                chunk,
                targets[rows],
                temperature,
                logps[rows],
                entropy[rows],
                is_top[rows],
                None if slope is None else slope[rows],
            )
        if slope is not None:
            ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(entropy, is_top)
        return logps, entropy, is_top

    @staticmethod
    def backward(
        ctx: Any,
        grad: Tensor,
        *_: Tensor,
    ) -> tuple[Tensor, None, None, None, None]:
        return _times_saved_slope(ctx, grad), None, None, None, None


class _ChunkedKL(torch.autograd.Function):
    """d KL / d z = p (log p - log q - KL)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        reference: Tensor,
        head: Head,
        temperature: float,
        chunk_logits: int,
    ) -> Tensor:
        kls = [hidden.new_zeros(0, dtype=torch.float32)]
        slopes = []
        hidden_chunks = _chunks(hidden, head, chunk_logits)
        reference_chunks = _chunks(reference, head, chunk_logits)
        for hidden_chunk, reference_chunk in zip(hidden_chunks, reference_chunks, strict=True):
            z = head.logits(hidden_chunk, temperature)
            p = torch.log_softmax(z, dim=-1)
            q = torch.log_softmax(head.logits(reference_chunk, temperature), dim=-1)
            probs = p.exp()
            kl = (probs * (p - q)).sum(dim=-1)
            kls.append(kl)
            if ctx.needs_input_grad[0]:
                slope = probs * (p - q - kl[:, None])
                slopes.append(head.hidden_gradient(slope, z, temperature))
        _save_slope(ctx, slopes, hidden)
        return torch.cat(kls)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _times_saved_slope(ctx, grad), None, None, None, None


class _ChunkedEntropy(torch.autograd.Function):
    """d H / d z = -p (log p + H)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Head,
        temperature: float,
        chunk_logits: int,
    ) -> Tensor:
        entropies = [hidden.new_zeros(0, dtype=torch.float32)]
        slopes = []
        for chunk in _chunks(hidden, head, chunk_logits):
            z = head.logits(chunk, temperature)
            p = torch.log_softmax(z, dim=-1)
            probs = p.exp()
            entropy = -(probs * p).sum(dim=-1)
            entropies.append(entropy)
            if ctx.needs_input_grad[0]:
                slope = -probs * (p + entropy[:, None])
                slopes.append(head.hidden_gradient(slope, z, temperature))
        _save_slope(ctx, slopes, hidden)
        return torch.cat(entropies)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _times_saved_slope(ctx, grad), None, None, None


def _save_slope(
    ctx: Any,
    slopes: list[Tensor],
    hidden: Tensor,
) -> None:
    """Saves d value / d hidden (N, d) for the backward pass, if one is needed."""
    if slopes:
        ctx.save_for_backward(torch.cat(slopes).to(hidden.dtype))
    elif ctx.needs_input_grad[0]:
        ctx.save_for_backward(torch.zeros_like(hidden))


def _times_saved_slope(ctx: Any, grad: Tensor) -> Tensor:
    slope: Tensor = ctx.saved_tensors[0]
    return (slope * grad[:, None]).to(slope.dtype)


def chunk_logps(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    temperature: float,
    logps: Tensor,
    entropy: Tensor,
    is_top: Tensor,
    slope: Tensor | None,
) -> None:
    """Writes the log-probs, entropies, is-top flags, and the gradients for hidden states (if `slope` is not None) of
    one chunk. The memory planner replaces this function to skip chunks."""
    z = head.logits(hidden, temperature)
    target = z.gather(1, targets[:, None]).squeeze(1)
    largest = z.amax(dim=1)
    is_top.copy_(target >= largest)
    z -= largest[:, None]
    e = z.exp()
    total = e.sum(dim=1)
    log_total = total.log()
    logps.copy_(target - largest - log_total)
    needs_logits = slope is not None and head.softcap is not None
    dots = torch.linalg.vecdot(e, z) if needs_logits else _dot_in_place(z, e)
    entropy.copy_(log_total - dots / total)
    if slope is None:
        return
    at_target = torch.ones_like(target)
    if head.softcap is not None:
        # d cap tanh(x / cap) / dx = 1 - tanh^2
        cap = head.softcap / temperature
        e *= 1 - ((z + largest[:, None]) / cap) ** 2
        at_target = 1 - (target / cap) ** 2
    e /= total[:, None]
    expected = head.expected_weight(e).float()
    difference = at_target[:, None] * head.weight[targets].float() - expected
    slope.copy_(difference * (head.scale / temperature))


def _dot_in_place(x: Tensor, y: Tensor) -> Tensor:
    """Returns the dot products of rows (N, V), (N,). Overwrites `x`, because a third tensor of this size takes as long
    as the product."""
    return x.mul_(y).sum(dim=1)
