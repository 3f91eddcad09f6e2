"""How much arithmetic a step is, and how much a token that is decoded has to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import bitsandbytes

from card.makers import HEADS
from lowrank_tune.model.base import Base
from lowrank_tune.model.roles import Roles
from lowrank_tune.types import Batch


def work(base: Base, roles: Roles, role: str, micros: Sequence[Batch], recomputed: float) -> float:
    """Floating-point operations that the model's matrix products take for these micro-batches; padding and recomputation (of this share of
    the layers) counted, a shared prompt once.

    A frozen linear is run forward, perhaps again, and backward for its input only: 2 or 3 products; an adapter has one more, for its own
    gradient. Attention is counted as causal, its backward twice its forward. The head sees scored positions only, twice.
    """
    config = base.model.config
    linears = [module for module in base.model.get_decoder().modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    linear = sum(module.in_features * module.out_features for module in linears)
    adapter = sum(parameter.numel() for name, parameter in roles.named_parameters(role).items() if "lora_" in name)
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    forwards, total = 1 + float(recomputed), 0.0
    for part in micros:
        tree = roles._tree(part)
        rows, length = part.ids.shape if tree is None else tree.ids.shape
        attention = (forwards + 2) * 2.0 * length * width * config.num_hidden_layers
        total += rows * length * (2.0 * (forwards + 1) * linear + 2.0 * (forwards + 2) * adapter + attention)
        if role not in HEADS:
            total += int(part.scored.sum()) * 4.0 * config.vocab_size * config.hidden_size
    return total


def stored_bytes(model: Any) -> int:
    """Bytes of the weights that every decoded token reads: all but the embedding, of which it reads a row, where the head is another tensor."""
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    parameters = [parameter for name, parameter in model.named_parameters() if "lora_" not in name and parameter is not embedding]
    return sum(parameter.nbytes for parameter in parameters) + (head.nbytes if head is embedding else 0)
