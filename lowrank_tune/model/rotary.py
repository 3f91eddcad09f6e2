"""Fixed frequencies for the RoPE types `longrope` and `dynamic`, whose frequencies transformers selects in each call by
the call's longest row.

A row in a batch with a longer one would then have other log-probs than alone, and a cache would contain keys of two
kinds. So the frequencies are set once, when the base is loaded, and every call uses them:

- `longrope` has two sets of factors, of which vLLM selects one by `max_model_len`. Here the longest row that a run may
  have selects it in the same way: above `original_max_position_embeddings` the long factors, else the short ones.
- `dynamic` keeps the frequencies of rows up to `max_position_embeddings`. Longer rows are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lowrank_tune.errors import UserError

RopeFactors = Literal["short", "long"]
FIXED = "fixed"
"""The RoPE type of a module whose frequencies are set: a name that transformers does not update."""
CALL_DEPENDENT_TYPES = ("longrope", "dynamic")


@dataclass(frozen=True)
class FixedRope:
    """The one set of frequencies of a base whose RoPE type would select them by the longest row of each call."""

    rope_type: Literal["longrope", "dynamic"]
    original_length: int
    """Tokens of the longest row that the frequencies of short rows are for."""
    factors: RopeFactors | None
    """The factors of `longrope`, None for `dynamic`."""

    @property
    def max_row_length(self) -> int | None:
        """Tokens of the longest row that these frequencies are for; None if only the base limits it."""
        if self.factors == "long":
            return None
        return self.original_length

    @property
    def name(self) -> str:
        """The frequencies as messages name them."""
        if self.factors is None:
            return "RoPE type `dynamic`"
        return f"{self.factors} factors of RoPE type `longrope`"

    def check_row_length(self, tokens: int) -> None:
        """Raises UserError for a prompt and its answer that together are longer than these frequencies are for."""
        limit = self.max_row_length
        if limit is not None and tokens > limit:
            raise UserError(
                f"a prompt and its answer may have {tokens:,} tokens together, above {limit:,}, the limit of the "
                f"base's {self.name}: use shorter prompts, or fewer new tokens"
            )

    def describe(self) -> str:
        """Returns a sentence for the log."""
        if self.factors is None:
            return (
                f"RoPE type `dynamic`: every call uses the frequencies of rows of up to {self.original_length:,} "
                "tokens, and longer rows are refused"
            )
        reach = "more than" if self.factors == "long" else "up to"
        return (
            f"RoPE type `longrope`: every call uses the {self.factors} factors, which are for contexts of {reach} "
            f"{self.original_length:,} tokens"
        )


def fixed_rope(config: Any, factors: RopeFactors = "short") -> FixedRope | None:
    """Returns the frequencies of a base with this configuration, and with these factors if its RoPE type has two sets;
    None for RoPE types that do not depend on the call."""
    text = config.get_text_config()
    lengths = dict[str, int]()
    for parameters in _rope_parameters(text):
        rope_type = _rope_type(parameters)
        if rope_type in CALL_DEPENDENT_TYPES:
            lengths[rope_type] = _original_length(text, rope_type, parameters)
    if "dynamic" in lengths:
        return FixedRope("dynamic", min(lengths.values()), None)
    if lengths:
        return FixedRope("longrope", lengths["longrope"], factors)
    return None


def select_factors(config: Any, longest_row: int) -> RopeFactors:
    """Returns the factors for rows of up to `longest_row` tokens."""
    rope = fixed_rope(config)
    if rope is not None and longest_row > rope.original_length:
        return "long"
    return "short"


def factors_of(rope: FixedRope | None) -> RopeFactors:
    """Returns the factors that `load_base` takes; `short` if there is nothing to select."""
    if rope is not None and rope.factors == "long":
        return "long"
    return "short"


def stored_factors(facts: Mapping[str, Any]) -> RopeFactors:
    """Returns the factors that a run stored in its `base.json`, `short` if it stored none."""
    if facts.get("rope_factors") == "long":
        return "long"
    return "short"


def fix_frequencies(model: Any, factors: RopeFactors) -> None:
    """Sets the frequencies of every rotary embedding, and disables transformers' own updates of them."""
    for module in _rotary_modules(model):
        for layer_type, rope_type in _rope_types(module):
            if rope_type == "longrope":
                _set_longrope(module, layer_type, factors)
        if isinstance(module.rope_type, dict):
            module.rope_type = {name: _fixed_type(rope_type) for name, rope_type in module.rope_type.items()}
        else:
            module.rope_type = _fixed_type(module.rope_type)


@torch.no_grad()
def check_frequencies(model: Any, rope: FixedRope) -> None:
    """Compares the rotations of a row with those in a batch with the longest row. Raises UserError for a model that
    still selects its frequencies by the call, or whose long factors cannot be set."""
    is_long = rope.factors == "long"
    last = rope.original_length - 1
    if is_long:
        last = rope.original_length
    fixed = []
    for module in _rotary_modules(model):
        for layer_type, rope_type in _rope_types(module):
            if rope_type == FIXED:
                is_constant = _is_constant(
                    module,
                    layer_type,
                    last,
                    model.dtype,
                )
                fixed.append(is_constant and (not is_long or _reads_buffer(module, layer_type, model.dtype)))
    if fixed and all(fixed):
        return
    cure = "use another base"
    if is_long:
        cure = f"use rows of up to {rope.original_length:,} tokens, or another base"
    raise UserError(
        f"base.model: {model.config.model_type} models compute the frequencies of RoPE type `{rope.rope_type}` in "
        f"code of their own, which cannot be set once for all calls; {cure}",
    )


def _rope_parameters(config: Any) -> list[Mapping[str, Any]]:
    """The RoPE parameters of a configuration: one mapping, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    by_layer_type = [value for value in parameters.values() if isinstance(value, Mapping)]
    return by_layer_type or [parameters]


def _rope_type(parameters: Mapping[str, Any]) -> Any:
    rope_type = parameters.get("rope_type", parameters.get("type"))
    # HunYuan has another type with the name `dynamic`, whose frequencies `alpha` sets once.
    if rope_type == "dynamic" and parameters.get("alpha"):
        return "default"
    return rope_type


def _original_length(
    config: Any,
    rope_type: Any,
    parameters: Mapping[str, Any],
) -> int:
    length = config.max_position_embeddings
    if rope_type == "longrope":
        length = parameters.get("original_max_position_embeddings") or length
    return int(length)


def _rotary_modules(model: Any) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(getattr(module, "rope_type", None), (str, dict)) and hasattr(module, "config"):
            yield module


def _rope_types(module: Any) -> list[tuple[str | None, str]]:
    """Returns the RoPE type of each layer type, which is None if all layers have the same."""
    if isinstance(module.rope_type, dict):
        return list(module.rope_type.items())
    return [(None, module.rope_type)]


def _fixed_type(rope_type: str) -> str:
    if rope_type in CALL_DEPENDENT_TYPES:
        return FIXED
    return rope_type


def _prefix(layer_type: str | None) -> str:
    """Returns how the names of a layer type's buffers begin."""
    return "" if layer_type is None else f"{layer_type}_"


def _set_longrope(
    module: Any,
    layer_type: str | None,
    factors: RopeFactors,
) -> None:
    parameters = module.config.rope_parameters
    parameters = parameters if layer_type is None else parameters[layer_type]
    length = parameters["original_max_position_embeddings"] + (factors == "long")
    buffers = [getattr(module, f"{_prefix(layer_type)}{name}") for name in ("inv_freq", "original_inv_freq")]
    frequencies, scaling = ROPE_INIT_FUNCTIONS["longrope"](
        module.config,
        buffers[0].device,
        seq_len=length,
        layer_type=layer_type,
    )
    for buffer in buffers:
        buffer.copy_(frequencies)
    setattr(module, f"{_prefix(layer_type)}attention_scaling", scaling)


def _rotations(
    module: Any,
    layer_type: str | None,
    positions: list[list[int]],
    dtype: torch.dtype,
) -> list[Tensor]:
    """Returns the first row of a module's output for these positions: cosines and sines, or complex numbers."""
    device = next(module.buffers()).device
    arguments: list[Any] = [
        torch.zeros(
            1,
            dtype=dtype,
            device=device,
        ),
        torch.tensor(positions, device=device),
    ]
    if layer_type is not None:
        arguments.append(layer_type)
    outputs = module(*arguments)
    if not isinstance(outputs, tuple):
        outputs = (outputs,)
    return [output[:1].clone() for output in outputs]


def _is_constant(
    module: Any,
    layer_type: str | None,
    last: int,
    dtype: torch.dtype,
) -> bool:
    """Returns whether the rotations of a row are the same in a batch with a row that ends at position `last`."""
    alone = _rotations(module, layer_type, [[0, 1]], dtype)
    return _are_equal(
        alone,
        _rotations(
            module,
            layer_type,
            [[0, 1], [0, last]],
            dtype,
        ),
    )


def _reads_buffer(
    module: Any,
    layer_type: str | None,
    dtype: torch.dtype,
) -> bool:
    """Returns whether the rotations depend on the buffer of the frequencies. (PhiMoE computes the short ones again.)"""
    buffer: Tensor = getattr(module, f"{_prefix(layer_type)}inv_freq")
    frequencies = buffer.clone()
    before = _rotations(module, layer_type, [[0, 1]], dtype)
    buffer.zero_()
    after = _rotations(module, layer_type, [[0, 1]], dtype)
    buffer.copy_(frequencies)
    return not _are_equal(before, after)


def _are_equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
