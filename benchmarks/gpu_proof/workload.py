"""How many floating-point operations a step takes, and how many bytes a decoded token reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import bitsandbytes

from gpu_proof.factories import HEADS
from lowrank_tune.batch import Batch
from lowrank_tune.model.base import Base
from lowrank_tune.model.roles import Roles


def computed_shape(roles: Roles, batch: Batch) -> tuple[float, int]:
    """Return the rows that the decoder computes for a batch, and their length. A packed row counts as a share of rows
    of the longest segment."""
    decoder = roles.decoder
    if decoder.packed_rows.enabled:
        packed = decoder.packed_rows.pack(batch, decoder.share_prefixes)
        if packed is not None:
            return packed.input_ids.numel() / packed.segments.max_length_k, packed.segments.max_length_k
    tree = decoder.pack(batch)
    rows, length = batch.input_ids.shape if tree is None else tree.input_ids.shape
    return rows, length


def flops(base: Base, roles: Roles, role: str, micro_batches: Sequence[Batch], recomputed: float) -> float:
    """Return the floating-point operations of the matrix products of these micro-batches. Padding and recomputation (of
    this share of the layers) count; a shared prompt counts once.

    A frozen linear runs forward, perhaps again, and backward for its input only: 2 or 3 products; an adapter has one
    more, for its own gradient. Attention counts as causal, its backward as two forwards. The head runs at scored
    positions only, twice.
    """
    config = base.model.config
    modules = base.model.get_decoder().modules()
    linears = [module for module in modules if isinstance(module, bitsandbytes.nn.Linear4bit)]
    linear = sum(module.in_features * module.out_features for module in linears)
    adapter = sum(parameter.numel() for name, parameter in roles.named_parameters(role).items() if "lora_" in name)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_dim
    forwards, total = 1 + float(recomputed), 0.0
    for batch in micro_batches:
        rows, length = computed_shape(roles, batch)
        attention = (forwards + 2) * 2.0 * length * width * config.num_hidden_layers
        total += rows * length * (2.0 * (forwards + 1) * linear + 2.0 * (forwards + 2) * adapter + attention)
        if role not in HEADS:
            total += int(batch.loss_mask.sum()) * 4.0 * config.vocab_size * config.hidden_size
    return total


def bytes_per_token(model: Any) -> int:
    """Return the bytes of the weights that every decoded token reads: all but the embedding, of which it reads a
    row."""
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    named = model.named_parameters()
    parameters = [parameter for name, parameter in named if "lora_" not in name and parameter is not embedding]
    return sum(parameter.nbytes for parameter in parameters) + (head.nbytes if head is embedding else 0)
