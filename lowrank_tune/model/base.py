"""Loads the frozen base: a hub id, `id@revision`, a folder, or the tiny base of the package; NF4 or 16 bits; CUDA or
CPU.

Only this module decides the precision (`base.dtype`). By default, CUDA: weights, compute and autocast bf16, fp16 where
the GPU has no bf16; CPU: everything fp32.
"""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import bitsandbytes
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.utils import logging as transformers_logging

from lowrank_tune.errors import UserError
from lowrank_tune.model.base_source import describe_load_errors
from lowrank_tune.model.compute_dtype import cast_other_weights, set_compute_dtype
from lowrank_tune.model.model_config import (
    LOAD_ERRORS,
    build_on_meta,
    check_generation_config,
    check_stored_weights,
    describe_error,
    num_weights,
    parse_config,
)
from lowrank_tune.model.rotary import FixedRope, RopeFactors, check_frequencies, fix_frequencies, fixed_rope
from lowrank_tune.model.text_model import KEY_MAPPING, is_multimodal, text_config, text_name
from lowrank_tune.model.weight_files import StoredTensor, published_files

if TYPE_CHECKING:  # the model floor must run where pydantic is not installed (benchmarks/gpu.py)
    from lowrank_tune.config import BaseConfig

HALF_DTYPES = (torch.bfloat16, torch.float16)
"""The dtypes of autocast."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""Values of `base.dtype`."""
SINGLE_THREAD_MAX_PARAMS = 20_000_000
SINGLE_THREAD_ENV = "OMP_NUM_THREADS"
"""A model with fewer weights runs on one CPU thread, unless this variable is set: its results then do not depend on the
number of cores. Two threads save a third of the demo's time on an idle machine, but take ten times as long if other
work uses a core, because they wait for each other."""


@dataclass(frozen=True)
class Base:
    """The base as loaded: its model (frozen, in train mode), tokenizer, source, and device."""

    model: Any
    tokenizer: Any
    name: str
    revision: str | None
    device: torch.device
    bits: int
    end_ids: frozenset[int]
    backend: str = "transformers"
    """The library whose code runs the model's forward."""
    transformers_forward: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Returns the context in which the model runs transformers' own code, whatever the backend."""
    rope: FixedRope | None = None
    """The fixed rotary frequencies of a base whose RoPE type would select them in each call."""
    dtype: torch.dtype = torch.float32
    """The dtype of products, and of weights that are not packed."""
    is_multimodal: bool = False
    """Whether this is the text model of a multimodal checkpoint (`model/text_model.py`)."""

    @property
    def max_row_length(self) -> int | None:
        """Tokens of the longest row that the rotary frequencies are for; None if the RoPE type sets no limit."""
        if self.rope is not None:
            return self.rope.max_row_length
        return None

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns autocast of the base's dtype, without effect in fp32."""
        if self.dtype in HALF_DTYPES:
            return torch.autocast(self.device.type, self.dtype)
        return nullcontext()

    def inference_mode(self) -> AbstractContextManager[None]:
        """Returns a context with eval mode and without autograd (checkpointing needs train mode)."""
        return self._mode(train=False)

    def train_mode(self) -> AbstractContextManager[None]:
        """Returns a context with train mode and autograd."""
        return self._mode(train=True)

    @contextmanager
    def _mode(self, train: bool) -> Iterator[None]:
        before = self.model.training
        self.model.train(train)
        try:
            with torch.set_grad_enabled(train):
                yield
        finally:
            self.model.train(before)

    def hashes(self) -> dict[str, str]:
        """Returns `base_hashes`, which are the same for all backends."""
        with self.transformers_forward():
            return base_hashes(self.model)


@dataclass(frozen=True)
class HashedBase:
    """A base with the hashes of its tensors. A run ends only if they are the same at its end, so that the next stage of
    a chain begins with them and does not read all weights again."""

    base: Base
    hashes: dict[str, str]

    @classmethod
    def of(cls, base: Base) -> HashedBase:
        """Returns a base with the hashes that its tensors have now."""
        return cls(base, base.hashes())


def pick_device() -> torch.device:
    """Returns the CUDA device if present, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def base_dtype(
    base_config: BaseConfig,
    device: torch.device,
) -> torch.dtype:
    """Returns the dtype of `base.dtype` on a device."""
    return DTYPES.get(base_config.dtype) or default_dtype(device)


def default_dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype of weights and compute on a device: without bf16 in hardware (T4, V100, RTX 20 series) fp16."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_tokenizer(base_config: BaseConfig) -> Any:
    """Loads only the tokenizer, so that data can be checked before the weights are read. Raises UserError as
    `load_base`."""
    silence_transformers()
    with describe_load_errors(base_config) as (path_or_id, arguments):
        try:
            return AutoTokenizer.from_pretrained(path_or_id, **arguments)
        except LOAD_ERRORS:
            raise
        # The tokenizers library raises Exception itself.
        except Exception as error:
            raise ValueError(f"its tokenizer is not valid: {describe_error(error)}") from error


def load_config(base_config: BaseConfig) -> Any:
    """Loads only the base's configuration. Raises UserError as `load_base`."""
    silence_transformers()
    with describe_load_errors(base_config) as (path_or_id, arguments):
        return text_config(parse_config(path_or_id, arguments))


def load_base(
    base_config: BaseConfig,
    tokenizer: Any,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    rope_factors: RopeFactors = "short",
) -> Base:
    """Loads and freezes the base; `dtype` is by default that of `base.dtype`. `rope_factors` are those of RoPE
    type `longrope` (`model/rotary.py`). Raises UserError for errors that the user can correct."""
    silence_transformers()
    device = device or pick_device()
    dtype = dtype or base_dtype(base_config, device)
    with describe_load_errors(base_config) as (path_or_id, arguments):
        published_config = parse_config(path_or_id, arguments)
        config = text_config(published_config)
        quantized = check_quantization(config, base_config)
        check_generation_config(path_or_id, arguments)
        check_stored_weights(path_or_id, config, arguments)
        if base_config.bits == 4 and not quantized:
            arguments["quantization_config"] = nf4_config(device)
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            path_or_id,
            config=config,
            use_safetensors=True,
            device_map={"": device},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            dtype=dtype,
            key_mapping=KEY_MAPPING if is_multimodal(published_config) else None,
            **arguments,
        )
        _check_weights(model, loading_info, base_config.model)
    if quantized:
        cast_other_weights(model, dtype)
    is_small = num_weights(model) < SINGLE_THREAD_MAX_PARAMS
    if device.type == "cpu" and SINGLE_THREAD_ENV not in os.environ and is_small:
        torch.set_num_threads(1)
    base = freeze_base(
        model,
        tokenizer,
        name=base_config.model,
        revision=loaded_revision(config, arguments),
        bits=4 if quantized else base_config.bits,
        rope_factors=rope_factors,
    )
    if base.rope is not None:
        check_frequencies(model, base.rope)
    return replace(base, is_multimodal=is_multimodal(published_config))


def loaded_revision(config: Any, arguments: Mapping[str, Any]) -> str | None:
    """Returns the revision that the arguments of `describe_load_errors` name, or the commit that the hub resolved."""
    return arguments["revision"] or getattr(config, "_commit_hash", None)


def stored_tensors(base_config: BaseConfig) -> dict[str, StoredTensor]:
    """Returns where each published tensor of the base is stored, by its name in the text model. Raises UserError as
    `load_base`."""
    with describe_load_errors(base_config) as (path_or_id, arguments):
        files = published_files(path_or_id, arguments["revision"])
        if not files:
            raise OSError("no file named model.safetensors")
        return {text_name(name): StoredTensor(file, name) for name, file in files.items()}


def count_weights(base_config: BaseConfig) -> int:
    """Returns the number of the base's weights, a tied head counted once, without reading them. Raises UserError as
    `load_base`."""
    return num_weights(model_on_meta(base_config, load_config(base_config)))


def model_on_meta(base_config: BaseConfig, config: Any) -> Any:
    """Returns the model that a configuration describes, without weights. Raises UserError as `load_base`."""
    with describe_load_errors(base_config) as (_, arguments):
        return build_on_meta(config, arguments)


def _check_weights(
    model: Any,
    loading_info: dict[str, Any],
    name: str,
) -> None:
    """Raises UserError for missing weights, which transformers would initialize at random, and for weights of the wrong
    shape, which bitsandbytes accepts."""
    wrong_shapes = [key if isinstance(key, str) else key[0] for key in loading_info["mismatched_keys"]]
    for key, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # A missing weight has no state.
            state = getattr(module.weight, "quant_state", None)
            if state is not None and tuple(state.shape) != (module.out_features, module.in_features):
                wrong_shapes.append(f"{key}.weight")
    refuse_weights(name, loading_info["missing_keys"], "missing")
    refuse_weights(name, wrong_shapes, "of another shape than in config.json")


def refuse_weights(
    name: str,
    keys: Collection[str],
    problem: str,
) -> None:
    """Raises UserError if there are weights with this problem."""
    if keys:
        raise UserError(
            f"base.model: {name} cannot be loaded: {len(keys)} of its weights are {problem}, for example {min(keys)}",
        )


def freeze_base(
    model: Any,
    tokenizer: Any,
    name: str,
    bits: int,
    revision: str | None = None,
    rope_factors: RopeFactors = "short",
) -> Base:
    """Makes a loaded model a base: nothing trainable, train mode (transformers checkpoints only in train mode), no
    dropout, fixed rotary frequencies, 4-bit products in the model's dtype, and kernels that keep the weights."""
    fix_frequencies(model, rope_factors)
    set_compute_dtype(model, model.dtype)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # On CPUs with AVX512-BF16 an eval forward repacks the weight in place and runs without autograd.
            module.support_avx512bf16_for_cpu = False
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Most models store attention's dropout as a number (Granite 3.0: 0.1).
        for key, value in list(vars(module).items()):
            if "drop" in key and isinstance(value, float):
                setattr(module, key, 0.0)
    model.requires_grad_(False)
    model.train()
    model.config.use_cache = False
    device = next(model.parameters()).device
    if device.type == "cuda":
        # cuDNN's attention, which PyTorch prefers on some GPUs, builds a plan for each new shape. Lengths differ in
        # each micro-batch and in each decoding step, so the plans take longer than the products. This is not a context,
        # because recomputed layers must choose the same kernel.
        torch.backends.cuda.enable_cudnn_sdp(False)
    rope = fixed_rope(model.config, rope_factors)
    return Base(
        model,
        tokenizer,
        name,
        revision,
        device,
        bits,
        _end_ids(model, tokenizer),
        rope=rope,
        dtype=model.dtype,
    )


def nf4_config(device: torch.device) -> BitsAndBytesConfig:
    """Returns the configuration of NF4 with double quantization (arXiv:2305.14314)."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=default_dtype(device),
    )


def base_hashes(model: nn.Module) -> dict[str, str]:
    """Returns the blake2b hash of every frozen tensor as stored (packed 4-bit weights with their scales), with the
    names of the plain model."""
    return {name: _digest(tensors) for name, tensors in _stored_tensors(model)}


def combined_hash(hashes: dict[str, str]) -> str:
    """Returns one hash over all hashes."""
    lines = "\n".join(f"{name} {hashes[name]}" for name in sorted(hashes))
    return hashlib.blake2b(lines.encode(), digest_size=16).hexdigest()


def num_stored_bytes(tensor: Tensor) -> int:
    """Returns the bytes of a weight as stored, with the scales of a 4-bit weight."""
    return sum(part.nbytes for part in _with_quant_state(tensor))


def _stored_tensors(model: nn.Module) -> Iterator[tuple[str, list[Tensor]]]:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "lora_" not in name:
            plain_name = name.replace("base_layer.", "").removeprefix("base_model.model.")
            yield plain_name, _with_quant_state(tensor)


def _with_quant_state(tensor: Tensor) -> list[Tensor]:
    tensors = [tensor]
    state = getattr(tensor, "quant_state", None)
    if state is not None:
        tensors.append(state.absmax)
        if state.nested:
            tensors += [state.state2.absmax, state.offset]
    return tensors


def hash_of(tensor: Tensor) -> str:
    """Returns the blake2b hash of a tensor's bytes."""
    return _digest([tensor])


def _digest(tensors: list[Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        stored_bytes = tensor.detach().contiguous().flatten().view(torch.uint8)
        digest.update(stored_bytes.cpu().numpy().data)
    return digest.hexdigest()


def silence_transformers() -> None:
    """Disables progress bars and warnings of the libraries."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # Retries are not logged; the final error is.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    # PEFT uses a deprecated name of transformers, which the user of a recipe cannot change.
    warnings.filterwarnings(
        "ignore",
        message=".*gradient_checkpointing.*",
        category=FutureWarning,
    )


def check_quantization(config: Any, base_config: BaseConfig) -> bool:
    """Returns whether the repository is quantized with bitsandbytes in 4 bits. Raises UserError for other
    quantizations."""
    quantized = getattr(config, "quantization_config", None)
    if quantized is None:
        return False
    if not isinstance(quantized, dict):
        quantized = quantized.to_dict()
    if quantized.get("quant_method") != "bitsandbytes" or not quantized.get("load_in_4bit"):
        kind = quantized.get("quant_method", "an unknown method")
        raise UserError(
            f"base.model: {base_config.model} is quantized with {kind}; use the unquantized model, or one in "
            "bitsandbytes' 4 bits",
        )
    return True


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Returns all end-of-sequence ids of the tokenizer and the model's generation config."""
    ends: set[int] = set()
    for owner in (tokenizer, getattr(model, "generation_config", None)):
        value = getattr(owner, "eos_token_id", None)
        if isinstance(value, int):
            ends.add(value)
        elif value is not None:
            ends.update(value)
    return frozenset(ends)
