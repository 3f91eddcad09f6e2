"""A decoding step of a whole decoder in a third of the operations of transformers' modules, on the CPU, where a step is
hundreds of small operations.

Query, key and value are rotated together, the score of each key begins with its mask, and residuals are added in place.
Only decoders whose classes are known to compute exactly this have such a step; a prefill, and a step with another kind
of attention, cache or mask, is the decoder's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from lowrank_tune.generation.slot_cache import SlotCache
from lowrank_tune.model.causal_attention import DECODE_ATTENTION_NAME
from lowrank_tune.model.decoder_layers import LayerForward
from lowrank_tune.model.lora_modules import has_forward_hooks

FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
"""Model types whose layers compute x + attention(norm(x)), then x + MLP(norm(x)) with a gate, and the prefix of their
classes; read in transformers 5.17 and 5.23."""
Rows = Callable[[Tensor], Tensor]


def has_decoder_step(model: Any) -> bool:
    """Returns whether the model's decoder has a step here: by its classes, which nothing has changed."""
    decoder = model.get_decoder()
    config = decoder.config
    prefix = FAMILIES.get(config.model_type)
    if prefix is None or config.hidden_act not in ("silu", "swish"):
        return False
    modeling = f"transformers.models.{config.model_type}.modeling_{config.model_type}"
    expected = {decoder: "Model"}
    for layer in decoder.layers:
        expected |= {layer: "DecoderLayer", layer.self_attn: "Attention", layer.mlp: "MLP"}
    for module, suffix in expected.items():
        kind = type(module)
        if (kind.__module__, kind.__name__) != (modeling, prefix + suffix) or _is_changed(module):
            return False
    dtype: torch.dtype = next(decoder.parameters()).dtype
    return dtype == torch.float32


def _is_changed(module: nn.Module) -> bool:
    # The forward of training computes the same in a rollout.
    replaced = vars(module).get("forward")
    return has_forward_hooks(module) or not (replaced is None or isinstance(replaced, LayerForward))


@dataclass(frozen=True)
class _Pass:
    """What all layers of a step read. `mask` (B * KV, 1, W) is added to scores; rotation is x cos + roll(x) sin, with
    cos and sin (B, 1, D)."""

    cache: SlotCache
    mask: Tensor
    cos: Tensor
    sin: Tensor


class _LayerStep:
    """A step of one decoder layer."""

    def __init__(
        self,
        layer: Any,
        index: int,
        products: Mapping[Any, Rows],
        norms: Mapping[nn.Module, Rows],
    ) -> None:
        attention = layer.self_attn
        mlp = layer.mlp
        self.index = index
        self.scaling = attention.scaling
        self.head_dim = attention.head_dim
        self.input_norm = norms.get(layer.input_layernorm, layer.input_layernorm)
        self.mlp_norm = norms.get(layer.post_attention_layernorm, layer.post_attention_layernorm)
        self.head_norms: list[Rows] = []
        for name in ("q_norm", "k_norm"):
            norm = getattr(attention, name, None)
            if norm is not None:
                self.head_norms.append(norms.get(norm, norm))
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.qkv = _joined_product(projections, products)
        self.output = _joined_product((attention.o_proj,), products)
        self.gate_up = _joined_product((mlp.gate_proj, mlp.up_proj), products)
        self.down = _joined_product((mlp.down_proj,), products)

    def run(
        self,
        x: Tensor,
        step: _Pass,
    ) -> Tensor:
        """(B, d) -> (B, d)."""
        attended = self._attend(self.qkv(self.input_norm(x)), step)
        x = self.output(attended).add_(x)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=1)
        return self.down(F.silu(gate).mul_(up)).add_(x)

    def _attend(
        self,
        qkv: Tensor,
        step: _Pass,
    ) -> Tensor:
        layer = step.cache.layers[self.index]
        rows = len(qkv)
        heads = qkv.view(rows, -1, self.head_dim)
        num_kv = len(step.mask) // rows
        num_queries = heads.shape[1] - 2 * num_kv
        rotated = self._normalized(heads, num_queries, num_kv)
        rolled = rotated.roll(self.head_dim // 2, -1)
        rotated = rotated.mul(step.cos).addcmul_(rolled, step.sin)
        query, key = torch.split(rotated, [num_queries, num_kv], dim=1)
        value = heads[:, num_queries + num_kv :]
        keys, values = layer.update(key[:, :, None], value[:, :, None])
        scores = torch.baddbmm(
            step.mask,
            query.reshape(rows * num_kv, -1, self.head_dim),
            keys.flatten(0, 1).transpose(1, 2),
            alpha=self.scaling,
        )
        return torch.bmm(scores.softmax(dim=-1), values.flatten(0, 1)).view(rows, -1)

    def _normalized(
        self,
        heads: Tensor,
        num_queries: int,
        num_kv: int,
    ) -> Tensor:
        """Returns queries and keys (B, H + KV, D), with the norms of a model that has norms of heads."""
        if not self.head_norms:
            return heads[:, : num_queries + num_kv]
        query_norm, key_norm = self.head_norms
        query = heads[:, :num_queries]
        key = heads[:, num_queries : num_queries + num_kv]
        return torch.cat((query_norm(query), key_norm(key)), dim=1)


def _joined_product(modules: tuple[Any, ...], products: Mapping[Any, Rows]) -> Rows:
    """Returns one product for modules that read the same rows: a joined one if there is one, else one for each."""
    if modules in products:
        return products[modules]
    parts = [products.get((module,), module) for module in modules]
    if len(parts) == 1:
        return parts[0]  # type: ignore[no-any-return]

    def product(rows: Tensor) -> Tensor:
        return torch.cat([part(rows) for part in parts], dim=1)

    return product


class DecoderStep:
    """The steps of a decoder. `products` are products of rows (N, in), by the modules that are computed as one; `norms`
    faster forwards of norms."""

    def __init__(
        self,
        decoder: Any,
        products: Mapping[Any, Rows],
        norms: Mapping[nn.Module, Rows],
    ) -> None:
        self.decoder = decoder
        self.num_kv = decoder.config.num_key_value_heads
        self.norm = norms.get(decoder.norm, decoder.norm)
        self.layers: list[_LayerStep] = []
        for index, layer in enumerate(decoder.layers):
            self.layers.append(
                _LayerStep(
                    layer,
                    index,
                    products,
                    norms,
                )
            )

    def forward(self, *args: Any, **named: Any) -> Any:
        """Computes the decoder's forward, by its own method if this is not a step."""
        if args or self.decoder.config._attn_implementation != DECODE_ATTENTION_NAME or not _is_step(named):
            return type(self.decoder).forward(self.decoder, *args, **named)
        x = self.decoder.embed_tokens(named["input_ids"])[:, 0]
        cos, sin = self.decoder.rotary_emb(x, named["position_ids"])
        first, second = sin.chunk(2, dim=-1)
        mask = named["attention_mask"]
        step = _Pass(
            named["past_key_values"],
            mask.expand(-1, self.num_kv, -1, -1).flatten(0, 1),
            cos,
            torch.cat((-first, second), dim=-1),
        )
        for layer in self.layers:
            x = layer.run(x, step)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x)[:, None], past_key_values=step.cache)


def _is_step(named: Mapping[str, Any]) -> bool:
    """Returns whether a decoder is called for one token of each row, over a slot cache without windows, with an
    additive mask in fp32."""
    cache = named.get("past_key_values")
    mask = named.get("attention_mask")
    if not isinstance(cache, SlotCache) or not isinstance(mask, Tensor) or mask.dtype != torch.float32:
        return False
    return cache.step.positions is not None and not any(layer.window for layer in cache.layers)
