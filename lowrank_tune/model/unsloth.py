"""Loads the base with unsloth (`base.backend: unsloth`): its attention, rotary embeddings and norms on a GPU, and
PEFT's adapters on top.

unsloth must be imported before (`unsloth_import.import_unsloth`). It replaces a base by its own copy, truncates rows
that are longer than its limit, ignores masks in training, returns no logits if it gets labels, and has its own cache.
So the base is loaded by its exact name with the longest row as the limit, rows are computed whole and padded on the
right, log-probs are computed from hidden states, completions are drawn with transformers' own forwards, and both are
compared before the first step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import bitsandbytes
import torch
from torch import Tensor, nn

from lowrank_tune.batch import Batch
from lowrank_tune.errors import UserError, first_line
from lowrank_tune.model.base import (
    Base,
    base_dtype,
    check_quantization,
    freeze_base,
    loaded_revision,
    pick_device,
    refuse_weights,
    silence_transformers,
    stored_tensors,
)
from lowrank_tune.model.base_source import describe_load_errors
from lowrank_tune.model.model_config import parse_config
from lowrank_tune.model.roles import Roles
from lowrank_tune.model.rotary import fixed_rope
from lowrank_tune.model.rounding import relative_difference

# As in `base`.
if TYPE_CHECKING:
    from lowrank_tune.config import BaseConfig

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Models for which unsloth has its own forwards, and whose code was reviewed for this module."""
LOGP_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05}
"""Mean difference of log-probs, in nats per token, that unsloth's forward may have; another batch shape alone changes
them by 0.016 in bf16."""
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Relative difference that the adapter's gradient may have."""
UNKNOWN_VERSION_MESSAGE = (
    "base.backend: this unsloth patches transformers in another way than this kit expects: install the version in "
    "constraints/unsloth.txt, or use `transformers`"
)


def load_base(
    base_config: BaseConfig,
    tokenizer: Any,
    max_seq_length: int,
    device: torch.device | None = None,
) -> Base:
    """Loads as `base.load_base`; `max_seq_length` is the longest row in tokens of the run. Raises UserError."""
    unsloth: Any = sys.modules["unsloth"]
    silence_transformers()
    device = device or pick_device()
    dtype = base_dtype(base_config, device)
    with describe_load_errors(base_config) as (path_or_id, arguments), redirect_stdout(sys.stderr):
        config = parse_config(path_or_id, arguments)
        if config.model_type not in SUPPORTED_MODEL_TYPES:
            raise UserError(
                f"base.backend: `unsloth` is used for {', '.join(SUPPORTED_MODEL_TYPES)} models, and "
                f"{base_config.model} is {config.model_type}; use `transformers`, or leave it out"
            )
        rope = fixed_rope(config)
        if rope is not None:
            raise UserError(
                f"base.backend: `unsloth` is not used for RoPE type `{rope.rope_type}`, whose frequencies must be set "
                "once for all calls; use `transformers`, or leave it out"
            )
        four_bits = check_quantization(config, base_config) or base_config.bits == 4
        try:
            model, _ = unsloth.FastLanguageModel.from_pretrained(
                model_name=path_or_id,
                max_seq_length=max_seq_length,
                dtype=dtype,
                load_in_4bit=four_bits,
                use_exact_model_name=True,
                device_map={"": device},
                use_gradient_checkpointing=False,
                **arguments,
            )
        # A RuntimeError that has its own exit code.
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
            raise UserError(
                f"base.backend: unsloth cannot load {base_config.model}: {first_line(error)}; use `transformers`"
            ) from error
    _check(model, config, base_config, four_bits)
    base = freeze_base(
        model,
        tokenizer,
        name=base_config.model,
        revision=loaded_revision(config, arguments),
        bits=4 if four_bits else 16,
    )
    return replace(
        base,
        backend="unsloth",
        transformers_forward=_restore_transformers_forward(model, device),
    )


def _check(
    model: Any,
    config: Any,
    base_config: BaseConfig,
    four_bits: bool,
) -> None:
    """Raises UserError for changes that unsloth makes without a warning: 16 bits instead of 4, a longer vocabulary,
    missing weights."""
    name = base_config.model
    has_four_bits = any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.modules())
    if four_bits != has_four_bits:
        change = "without" if four_bits else "in"
        raise UserError(f"base.backend: unsloth loaded {name} {change} 4 bits, which was not set; use `transformers`")
    rows = model.get_input_embeddings().weight.shape[0]
    if rows != config.vocab_size:
        raise UserError(
            f"base.backend: unsloth changed the vocabulary of {name} from {config.vocab_size:,} to {rows:,} tokens; "
            "use `transformers`",
        )
    missing = {key for key, _ in model.named_parameters()} - stored_tensors(base_config).keys()
    refuse_weights(name, missing, "missing")


def _restore_transformers_forward(model: Any, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Returns a context in which the model runs transformers' own code. unsloth's forwards run only in modules that it
    has marked, and it replaces the module of rotary embeddings. Without a GPU it replaces nothing. Raises UserError for
    a version that works otherwise."""
    marked = [module for module in model.modules() if getattr(module, "_unsloth_fast_path", False)]
    if not marked and device.type == "cuda":
        raise UserError(UNKNOWN_VERSION_MESSAGE)
    if not marked:
        return nullcontext
    decoder = model.get_decoder()
    rotary = _hf_rotary_embedding(model)

    @contextmanager
    def transformers_forward() -> Iterator[None]:
        before = decoder.rotary_emb
        for module in marked:
            module.__dict__["_unsloth_fast_path"] = False
        decoder.rotary_emb = rotary
        try:
            yield
        finally:
            decoder.rotary_emb = before
            for module in marked:
                module.__dict__["_unsloth_fast_path"] = True

    return transformers_forward


def _hf_rotary_embedding(model: Any) -> nn.Module:
    """Returns transformers' rotary embeddings, whose class unsloth replaces and stores."""
    decoder = model.get_decoder()
    modeling = sys.modules[type(decoder).__module__]
    name = type(decoder).__name__.removesuffix("Model") + "RotaryEmbedding"
    replaced: dict[str, Any] = getattr(modeling, "_unsloth_pre_patch_originals", ({},))[0]
    kind = replaced.get(name) or getattr(modeling, name)
    if not kind.__module__.startswith("transformers."):
        raise UserError(UNKNOWN_VERSION_MESSAGE)
    with model.device:
        return kind(config=model.config)  # type: ignore[no-any-return]


def check(roles: Roles, role: str) -> None:
    """Runs a few tokens forward and backward with unsloth and with transformers, with an adapter that is not zero.
    Raises UserError if they differ. Restores adapters and gradients."""
    base = roles.base
    named = roles.named_parameters(role)
    ups = [parameter for name, parameter in named.items() if "lora_B" in name]
    saved_weights = [parameter.detach().clone() for parameter in ups]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in ups:
                noise = torch.randn(parameter.shape, generator=generator) * 1e-2
                parameter.add_(noise.to(parameter.device))
        batch = _probe_batch(roles.head.weight.shape[0], generator).to(base.device)
        logps, gradient = _logps_and_gradient(roles, role, batch)
        with base.transformers_forward():
            other_logps, other_gradient = _logps_and_gradient(roles, role, batch)
    finally:
        with torch.no_grad():
            for parameter, value in zip(ups, saved_weights, strict=True):
                parameter.copy_(value)
        for parameter in named.values():
            parameter.grad = None
    logp_error = float((logps - other_logps)[batch.loss_mask].abs().mean())
    gradient_error = relative_difference(gradient, other_gradient)
    logp_limit, gradient_limit = LOGP_TOLERANCE[base.dtype], GRADIENT_TOLERANCE[base.dtype]
    if not (logp_error <= logp_limit and gradient_error <= gradient_limit):
        raise UserError(
            "base.backend: unsloth does not compute what transformers does here: log-probs differ by "
            f"{logp_error:.2g} nats per token, the gradient by {gradient_error:.1%}; use `transformers`, or leave it "
            "out",
        )


def _probe_batch(vocabulary: int, generator: torch.Generator) -> Batch:
    """Returns two rows of 24 tokens, the second one padded."""
    input_ids = torch.randint(
        0,
        vocabulary,
        (2, 24),
        generator=generator,
    )
    position = torch.arange(24)
    attention_mask = position < torch.tensor([[24], [17]])
    return Batch(input_ids, attention_mask, attention_mask & (position >= 8))


def _logps_and_gradient(
    roles: Roles,
    role: str,
    batch: Batch,
) -> tuple[Tensor, Tensor]:
    logps = roles.logps(role, batch).logps
    logps.sum().backward()  # type: ignore[no-untyped-call]
    gradients = []
    for parameter in roles.parameters(role):
        gradient = parameter.grad
        if gradient is None:
            gradient = torch.zeros_like(parameter)
        gradients.append(gradient.flatten())
        parameter.grad = None
    return logps.detach(), torch.cat(gradients)
