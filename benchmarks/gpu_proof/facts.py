"""Properties of the device and its libraries on which the fast paths of the kit depend."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import bitsandbytes
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor
from torch.nn.attention import SDPBackend

from gpu_proof.base import quantized_linear
from gpu_proof.factories import make_roles
from gpu_proof.machine import best_seconds
from gpu_proof.profiling import profiled
from gpu_proof.records import Record
from gpu_proof.synthetic import Size, ragged_rows
from lowrank_tune.generation.attention import grouped_sdpa
from lowrank_tune.model.base import Base

GEMM_ROWS = (1, 8, 64, 4096)
BF16_ERROR = 0.02
"""Largest relative error of a product of bf16 operands."""


@dataclass(frozen=True)
class AttentionShape:
    """Query heads, key heads, width of a head, and tokens of a row."""

    heads: int = 32
    key_heads: int = 8
    head_dim: int = 128
    rows: int = 4
    tokens: int = 2048


@dataclass(frozen=True)
class FactSizes:
    attention: AttentionShape = AttentionShape()
    linear: tuple[int, int] = (4096, 14336)
    """Features in and out."""
    repeats: int = 20


TINY = FactSizes(AttentionShape(heads=4, key_heads=2, head_dim=16, rows=2, tokens=64), (64, 192), 2)


def dtype_of(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def relative_error(computed: Tensor, expected: Tensor) -> float:
    norm = torch.linalg.vector_norm
    return float(norm(computed.double() - expected.double()) / norm(expected.double()))


def allocator(device: torch.device, sizes: FactSizes) -> Record:
    """Return whether the allocator uses expandable segments, which the package requests before torch is imported."""
    record: Record = {"setting": os.environ.get("PYTORCH_ALLOC_CONF")}
    if device.type == "cuda":
        block = torch.empty(64 << 20, dtype=torch.uint8, device=device)
        segments = torch.cuda.memory_snapshot()
        record["expandable_segments"] = any(segment.get("is_expandable", False) for segment in segments)
        del block
    return record


@dataclass(frozen=True)
class AttentionCall:
    """One call of SDPA. Without a mask it is causal, and query heads share key heads inside the kernel."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    is_causal: bool = False

    def __call__(self) -> Tensor:
        tensors = (self.query, self.key, self.value)
        return F.scaled_dot_product_attention(
            *tensors, attn_mask=self.mask, is_causal=self.is_causal, enable_gqa=self.is_causal
        )

    @property
    def backend(self) -> str:
        tensors = (self.query, self.key, self.value)
        choice = torch._fused_sdp_choice(
            *tensors, attn_mask=self.mask, is_causal=self.is_causal, enable_gqa=self.is_causal
        )
        return SDPBackend(choice).name


def sdpa_kernels(device: torch.device, sizes: FactSizes) -> Record:
    """Return the backend, the slowest kernel and the time of attention in training, in a step of decoding, and with the
    mask of shared prompts."""
    shape, dtype = sizes.attention, dtype_of(device)
    generator = torch.Generator(device).manual_seed(0)

    def random(heads: int, tokens: int) -> Tensor:
        size = (shape.rows, heads, tokens, shape.head_dim)
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    keys, values = (random(shape.key_heads, shape.tokens) for _ in range(2))
    queries, query = random(shape.heads, shape.tokens), random(shape.heads, 1)
    groups = shape.heads // shape.key_heads
    lengths = torch.full((shape.rows, 1, 1, 1), shape.tokens - 1, device=device)
    mask = torch.arange(shape.tokens, device=device) <= lengths
    causal = torch.ones(shape.tokens, shape.tokens, dtype=torch.bool, device=device).tril()[None, None]
    packed = query.reshape(shape.rows, shape.key_heads, groups, shape.head_dim)
    repeated = [tensor.repeat_interleave(groups, dim=1) for tensor in (keys, values)]
    calls = {
        "training": AttentionCall(queries, keys, values, None, True),
        "decoding": AttentionCall(packed, keys, values, mask),
        "tree": AttentionCall(queries, *repeated, causal),
    }
    record: Record = {}
    for name, call in calls.items():
        record[f"{name}_backend"] = call.backend
        record[f"{name}_us"] = 1e6 * best_seconds(call, sizes.repeats, device)
        with profiled(device) as profile:
            call()
        record[f"{name}_kernel"] = profile.kernels[0]["name"] if profile.kernels else None
    module = torch.nn.Module()
    module.num_key_value_groups = groups
    output, _ = grouped_sdpa(module, query, keys, values, mask)
    expected = F.scaled_dot_product_attention(query.double(), *(tensor.double() for tensor in repeated), attn_mask=mask)
    error = relative_error(output, expected.transpose(1, 2))
    return record | {"grouped_decoding_error": error, "checks": {"grouped attention is right": error < BF16_ERROR}}


def cudnn_attention(device: torch.device, sizes: FactSizes) -> Record:
    """Return the milliseconds of a decoding step's attention at a width that was not seen before, and again at that
    width, with and without cuDNN, which builds a plan for each shape; the same for a forward and backward pass with a
    mask. Widths are odd, as in most steps."""
    if device.type != "cuda":
        return {"skipped": "CUDA only"}
    shape, allowed = sizes.attention, torch.backends.cuda.cudnn_sdp_enabled()
    groups, width = shape.heads // shape.key_heads, shape.tokens // 2 + 1
    size = (shape.rows, shape.key_heads, shape.tokens, shape.head_dim)
    keys, values = (torch.randn(size, device=device, dtype=torch.bfloat16) for _ in range(2))
    query = torch.randn((*size[:2], groups, shape.head_dim), device=device, dtype=torch.bfloat16)

    def decoding(columns: int) -> None:
        mask = torch.ones(shape.rows, 1, 1, columns, device=device, dtype=torch.bool)
        F.scaled_dot_product_attention(query, keys[:, :, :columns], values[:, :, :columns], attn_mask=mask)

    def training(columns: int) -> None:
        rows = [keys[:, :, :columns].detach().requires_grad_() for _ in range(3)]
        mask = torch.ones(columns, columns, device=device, dtype=torch.bool).tril()[None, None]
        F.scaled_dot_product_attention(*rows, attn_mask=mask).sum().backward()  # type: ignore[no-untyped-call]

    record: Record = {}
    try:
        for uses_cudnn in (True, False):
            torch.backends.cuda.enable_cudnn_sdp(uses_cudnn)
            for name, call in {"decoding": decoding, "training": training}.items():
                key = f"{name}_{'cudnn' if uses_cudnn else 'without'}_ms"
                call(width - 8)  # loads the library
                record[f"{key}_new_width"] = 1e3 * best_seconds(partial(call, width), 1, device, rounds=1)
                record[key] = 1e3 * best_seconds(partial(call, width), sizes.repeats, device)
                with profiled(device) as profile:
                    call(width)
                record[f"{key}_busy"] = 1e3 * profile.busy_seconds
    finally:
        torch.backends.cuda.enable_cudnn_sdp(allowed)
    return record


def mm_out_dtype(device: torch.device, sizes: FactSizes) -> Record:
    """Return the error of `torch.mm(out_dtype=torch.float32)`, and its time relative to a product in bf16."""
    if device.type != "cuda":
        return {"skipped": "CUDA only"}
    inner, outer = sizes.linear
    left, right = (torch.randn(size, device=device, dtype=torch.bfloat16) for size in ((512, inner), (inner, outer)))
    expected = left.double() @ right.double()
    exact = torch.mm(left, right, out_dtype=torch.float32)
    rounded = left @ right
    exact_s = best_seconds(partial(torch.mm, left, right, out_dtype=torch.float32), sizes.repeats, device)
    rounded_s = best_seconds(partial(torch.mm, left, right), sizes.repeats, device)
    figures = {"fp32_error": relative_error(exact, expected), "bf16_error": relative_error(rounded, expected)}
    return figures | {"time_ratio": exact_s / rounded_s}


def gemm_4bit(device: torch.device, sizes: FactSizes) -> Record:
    """Return time and error of a product with an NF4 weight, by rows: as bitsandbytes chooses, fused, and
    dequantized."""
    dtype, (inner, outer) = dtype_of(device), sizes.linear
    generator = torch.Generator(device).manual_seed(0)
    layer = quantized_linear(torch.nn.Linear(inner, outer, bias=False, device="meta"), dtype, device, generator)
    weight, state = layer.weight.data, layer.weight.quant_state
    record: Record = {"in_features": inner, "out_features": outer}
    errors = []

    def chosen(x: Tensor) -> Tensor:
        return bitsandbytes.matmul_4bit(x, weight, quant_state=state)  # type: ignore[no-any-return]

    def dequantized(x: Tensor) -> Tensor:
        return F.linear(x, dequantize_4bit(weight, state).to(dtype))

    with torch.no_grad():
        for rows in GEMM_ROWS if device.type == "cuda" else GEMM_ROWS[:2]:
            x = torch.randn(rows, inner, device=device, dtype=dtype)
            expected = F.linear(x.double(), dequantize_4bit(weight, state).double())
            calls: dict[str, Callable[[Tensor], Tensor]] = {"chosen": chosen, "dequantized": dequantized}
            if device.type == "cuda":
                calls["fused"] = fused_4bit(layer)
            for name, call in calls.items():
                record[f"{name}_us_{rows}"] = 1e6 * best_seconds(partial(call, x), sizes.repeats, device)
                errors.append(relative_error(call(x), expected))
                record[f"{name}_error_{rows}"] = errors[-1]
            record[f"chosen_equals_dequantized_{rows}"] = bool(torch.equal(chosen(x), dequantized(x)))
    record["checks"] = {"the products are right": max(errors) < BF16_ERROR}
    return record


def fused_4bit(layer: Any) -> Callable[[Tensor], Tensor]:
    """Return bitsandbytes' fused kernel for any number of rows; its public function takes it for few rows only."""
    from bitsandbytes.backends.cuda.ops import _gemm_4bit_kernel_impl  # exists on CUDA only, and is private

    state = layer.weight.quant_state

    def call(x: Tensor) -> Tensor:
        return _gemm_4bit_kernel_impl(  # type: ignore[no-any-return]
            x,
            layer.weight.data.view(-1, 1),
            state.shape,
            state.state2.absmax,
            state.blocksize,
            state.quant_type,
            absmax_8bit=state.absmax,
            absmax_code=state.state2.code,
            absmax_offset=state.offset,
        )

    return call


def varlen_alignment(device: torch.device, sizes: FactSizes) -> Record:
    """Return whether the causal mask of `varlen_attn` is aligned to the bottom right where a sequence has fewer queries
    than keys."""
    if device.type != "cuda":
        return {"skipped": "CUDA only"}
    from torch.nn.attention.varlen import varlen_attn  # new in torch 2.10

    heads, width, queries, keys = 4, 64, 3, 8
    q, k, v = (torch.randn(n, heads, width, device=device, dtype=torch.bfloat16) for n in (queries, keys, keys))
    offsets = [torch.tensor([0, n], device=device, dtype=torch.int32) for n in (queries, keys)]
    output = varlen_attn(q, k, v, *offsets, queries, keys, window_size=(-1, 0))
    record: Record = {}
    for name, diagonal in (("bottom_right", keys - queries), ("top_left", 0)):
        mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(diagonal)
        batched = [tensor.transpose(0, 1)[None].double() for tensor in (q, k, v)]
        expected = F.scaled_dot_product_attention(*batched, attn_mask=mask)[0].transpose(0, 1)
        record[f"{name}_error"] = relative_error(output, expected)
    record["is_bottom_right"] = record["bottom_right_error"] < BF16_ERROR < record["top_left_error"]
    return record


def torch_compile(device: torch.device) -> Record:
    """Compile a small function, which on a GPU needs Triton and a C compiler, and return the duration."""
    if device.type != "cuda":
        return {"skipped": "CUDA only"}
    x = torch.randn(256, 256, device=device)

    def silu_times(x: Tensor) -> Tensor:
        return F.silu(x) * x

    start = time.perf_counter()
    output = torch.compile(silu_times, fullgraph=True)(x)
    torch.cuda.synchronize(device)
    return {"seconds": time.perf_counter() - start, "error": relative_error(output, silu_times(x))}


def policy_equals_reference(base: Base, size: Size) -> Record:
    """Return the largest difference between the log-probs of a new policy and of the base in one batch, which must be
    0, and the mean difference of a row that is computed alone."""
    roles = make_roles(base, ("policy",), True)
    batch = ragged_rows(size, base.model.config.vocab_size).to(base.device)
    row = batch.select_rows(torch.tensor([0], device=base.device))
    with roles.inference_mode():
        policy, reference = (roles.logps(role, batch).logps for role in ("policy", "reference"))
        alone = roles.logps("policy", row).logps
    difference = (policy[:1, : alone.shape[1]] - alone).abs()
    roles.unload_adapters()
    return {
        "max_difference": float((policy - reference).abs().max()),
        "row_alone_mean_difference": float(difference[row.loss_mask].mean()),
        "checks": {"the policy starts as the reference, bit for bit": bool(torch.equal(policy, reference))},
    }


FACTS: dict[str, Callable[[torch.device, FactSizes], Record]] = {
    "allocator": allocator,
    "sdpa_kernels": sdpa_kernels,
    "cudnn_attention": cudnn_attention,
    "mm_out_dtype": mm_out_dtype,
    "varlen_alignment": varlen_alignment,
}
"""Facts that need no base. `gemm_4bit` is measured after all others."""
