"""The base as unsloth loads it (`base.backend: unsloth`): its attention, rotary embeddings and norms on a GPU, PEFT's
adapters on top.

unsloth must have been imported before (`unsloth_import.import_unsloth`). Its habits that matter here: it swaps a base
for its own copy of it, cuts rows that are longer than it was told, ignores masks while it trains, gives no logits where
it is given labels, and has a cache of its own. So the base is asked for by its exact name, the longest row is said,
rows go through whole and padded on the right, log-probs come from hidden states, completions are drawn with
transformers' own forwards, and before the first step the two are compared.
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
from transformers import AutoConfig

from lowrank_tune.batch import Batch
from lowrank_tune.errors import UserError
from lowrank_tune.model.base import (
    Base,
    check_quantization,
    describe_load_errors,
    freeze_base,
    pick_device,
    silence_transformers,
    weight_files,
)
from lowrank_tune.model.roles import Roles
from lowrank_tune.model.rotary import fixed_rope

if TYPE_CHECKING:  # as in `base`
    from lowrank_tune.config import BaseConfig

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Models that unsloth has forwards of its own for, and that were read through for this."""
LOGP_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Nats a token, in the mean, by which unsloth's forward may differ from transformers'; another batch shape alone moves
bf16 by 0.016."""
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""The same for the adapter's gradient, relative."""
UNKNOWN_VERSION_MESSAGE = (
    "base.backend: this unsloth replaces transformers' code in another way than this kit knows: install the version in "
    "constraints/unsloth.txt, or use `transformers`"
)


def load_base(base_config: BaseConfig, tokenizer: Any, max_seq_length: int, device: torch.device | None = None) -> Base:
    """As `base.load_base`; `max_seq_length` is the longest row in tokens that will be trained on. Raises UserError."""
    unsloth: Any = sys.modules["unsloth"]
    silence_transformers()
    device = device or pick_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with describe_load_errors(base_config) as (path_or_id, arguments), redirect_stdout(sys.stderr):
        config = AutoConfig.from_pretrained(path_or_id, **arguments)
        if config.model_type not in SUPPORTED_MODEL_TYPES:
            raise UserError(
                f"base.backend: `unsloth` is used for {', '.join(SUPPORTED_MODEL_TYPES)} models, and "
                f"{base_config.model} is {config.model_type}; use `transformers`, or leave it out"
            )
        if (rope := fixed_rope(config)) is not None:
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
        except torch.OutOfMemoryError:  # is a RuntimeError, and has an exit code of its own
            raise
        except (RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
            raise UserError(
                f"base.backend: unsloth cannot load {base_config.model}: {_first_line(error)}; use `transformers`"
            ) from error
    _check(model, config, base_config, four_bits)
    revision = arguments["revision"] or getattr(config, "_commit_hash", None)
    base = freeze_base(model, tokenizer, name=base_config.model, revision=revision, bits=4 if four_bits else 16)
    return replace(base, backend="unsloth", transformers_forward=_restore_transformers_forward(model, device))


def _check(model: Any, config: Any, base_config: BaseConfig, four_bits: bool) -> None:
    """What unsloth does without a word: other weights, weights that are missing, a longer vocabulary, 16 bits where 4
    were asked for."""
    linears = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    if four_bits != bool(linears):
        raise UserError(
            f"base.backend: unsloth loaded {base_config.model} {'without' if four_bits else 'in'} 4 bits, which was "
            "not asked for; use `transformers`"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if rows != config.vocab_size:
        raise UserError(
            f"base.backend: unsloth made {rows:,} of the {config.vocab_size:,} words of {base_config.model}; use "
            "`transformers`"
        )
    missing = {name for name, _ in model.named_parameters()} - weight_files(base_config).keys()
    if missing:
        raise UserError(
            f"base.model: {base_config.model} cannot be loaded: {len(missing)} of its weights are not there, "
            f"{min(missing)} for one"
        )


def _restore_transformers_forward(model: Any, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """A context in which the model runs by transformers' own code. unsloth's forwards run only in modules that it has
    marked; what else it replaced is the module of rotary embeddings. Without a GPU it replaces nothing. Raises
    UserError where it works otherwise."""
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
    """The rotary embeddings as transformers makes them: the class that unsloth put its own in the place of, which it
    keeps."""
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
    """Runs a few tokens forward and backward through unsloth and through transformers, with an adapter that does
    something. Raises UserError where they disagree. Adapters and gradients are then as they were."""
    base = roles.base
    named = roles.named_parameters(role)
    ups = [parameter for name, parameter in named.items() if "lora_B" in name]
    saved_weights = [parameter.detach().clone() for parameter in ups]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in ups:
                parameter.add_((torch.randn(parameter.shape, generator=generator) * 1e-2).to(parameter.device))
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
    gradient_error = float(
        torch.linalg.vector_norm(gradient - other_gradient) / torch.linalg.vector_norm(other_gradient)
    )
    dtype = torch.bfloat16 if base.device.type == "cuda" else torch.float32
    if not (logp_error <= LOGP_TOLERANCE[dtype] and gradient_error <= GRADIENT_TOLERANCE[dtype]):
        raise UserError(
            f"base.backend: unsloth does not compute what transformers does here: log-probs are {logp_error:.2g} nats "
            f"a token apart, the gradient is {gradient_error:.1%} off; use `transformers`, or leave it out"
        )


def _probe_batch(vocabulary: int, generator: torch.Generator) -> Batch:
    """Two rows of 24 tokens, the second one padded."""
    ids = torch.randint(0, vocabulary, (2, 24), generator=generator)
    attention_mask = torch.arange(24) < torch.tensor([[24], [17]])
    return Batch(ids, attention_mask, attention_mask & (torch.arange(24) >= 8))


def _logps_and_gradient(roles: Roles, role: str, batch: Batch) -> tuple[Tensor, Tensor]:
    logps = roles.logps(role, batch).logps
    logps.sum().backward()  # type: ignore[no-untyped-call]
    parts = []
    for parameter in roles.parameters(role):
        parts.append(torch.zeros_like(parameter).flatten() if parameter.grad is None else parameter.grad.flatten())
        parameter.grad = None
    return logps.detach(), torch.cat(parts)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
