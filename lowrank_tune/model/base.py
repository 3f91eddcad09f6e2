"""Loads the frozen base: a hub id, `id@revision`, a folder, or the tiny base of the package; NF4 or 16 bits; CUDA or
CPU.

Precision is decided here and nowhere else. CUDA: weights, compute and autocast bf16. CPU: everything fp32.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bitsandbytes
import torch
from huggingface_hub import is_offline_mode
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils import logging as transformers_logging

from lowrank_tune.errors import UserError
from lowrank_tune.model.rotary import FixedRope, RopeFactors, check_frequencies, fix_frequencies, fixed_rope

if TYPE_CHECKING:  # the model floor must run where pydantic is not installed (benchmarks/gpu.py)
    from lowrank_tune.config import BaseConfig

BUILTIN_MODEL = "tiny-tutor"
SINGLE_THREAD_MAX_PARAMS = 20_000_000
SINGLE_THREAD_ENV = "OMP_NUM_THREADS"
"""A model of so few weights runs on one thread of a CPU: what it learns then hangs on no number of cores. Two save a
third of the demo's time on a quiet machine, and take ten times as long where other work has a core and they wait for
each other. The variable decides."""


@dataclass(frozen=True)
class Base:
    """The base as loaded: its model (frozen, in train mode), tokenizer, where it came from, and where it runs."""

    model: Any
    tokenizer: Any
    name: str
    revision: str | None
    device: torch.device
    bits: int
    end_ids: frozenset[int]
    backend: str = "transformers"
    """Whose code runs the model's forward: `transformers` is transformers' own."""
    transformers_forward: Callable[[], AbstractContextManager[Any]] = nullcontext
    """What to enter where the model must run by transformers' own code, whatever the backend."""
    rope: FixedRope | None = None
    """The one set of rotary frequencies of a base whose RoPE type would select them anew in each call."""

    @property
    def max_row_length(self) -> int | None:
        """Tokens of the longest row that the rotary frequencies are for; None where the RoPE type sets no limit."""
        if self.rope is not None:
            return self.rope.max_row_length
        return None

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 autocast on CUDA, nothing on the CPU."""
        if self.device.type == "cuda":
            return torch.autocast("cuda", torch.bfloat16)
        return nullcontext()

    def hashes(self) -> dict[str, str]:
        """`base_hashes`, the same whatever the backend."""
        with self.transformers_forward():
            return base_hashes(self.model)


def pick_device() -> torch.device:
    """CUDA where there is one. Raises UserError for a GPU without bf16."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name()
        raise UserError(
            f"{name} has no bfloat16 (RTX 30 series and newer have it); set CUDA_VISIBLE_DEVICES= to use the CPU"
        )
    return torch.device("cuda", torch.cuda.current_device())


def load_tokenizer(base_config: BaseConfig) -> Any:
    """The base's tokenizer alone, so that data can be judged before gigabytes are read. Raises UserError as
    `load_base`."""
    silence_transformers()
    with describe_load_errors(base_config) as (path_or_id, arguments):
        return AutoTokenizer.from_pretrained(path_or_id, **arguments)


def load_config(base_config: BaseConfig) -> Any:
    """The base's configuration alone. Raises UserError as `load_base`."""
    silence_transformers()
    with describe_load_errors(base_config) as (path_or_id, arguments):
        return AutoConfig.from_pretrained(path_or_id, **arguments)


def load_base(
    base_config: BaseConfig,
    tokenizer: Any,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    rope_factors: RopeFactors = "short",
) -> Base:
    """Loads and freezes it, in the device's own `dtype` where none is given. `rope_factors` are those of RoPE type
    `longrope` (`model/rotary.py`). Raises UserError with one sentence for whatever a person can mend."""
    silence_transformers()
    device = device or pick_device()
    with describe_load_errors(base_config) as (path_or_id, arguments):
        config = AutoConfig.from_pretrained(path_or_id, **arguments)
        quantized = check_quantization(config, base_config)
        if base_config.bits == 4 and not quantized:
            arguments["quantization_config"] = nf4_config(device)
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            path_or_id,
            config=config,
            use_safetensors=True,
            device_map={"": device},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            dtype=dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32),
            **arguments,
        )
        _check_weights(model, loading_info, base_config.model)
    if (
        device.type == "cpu"
        and SINGLE_THREAD_ENV not in os.environ
        and sum(parameter.numel() for parameter in model.parameters()) < SINGLE_THREAD_MAX_PARAMS
    ):
        torch.set_num_threads(1)
    revision = arguments["revision"] or getattr(config, "_commit_hash", None)
    base = freeze_base(
        model,
        tokenizer,
        name=base_config.model,
        revision=revision,
        bits=4 if quantized else base_config.bits,
        rope_factors=rope_factors,
    )
    if base.rope is not None:
        check_frequencies(model, base.rope)
    return base


def weight_files(base_config: BaseConfig) -> dict[str, Path]:
    """The file of each tensor of the base as its author published it. Raises UserError as `load_base`."""
    with describe_load_errors(base_config) as (path_or_id, arguments):
        index = cached_file(
            path_or_id,
            SAFE_WEIGHTS_INDEX_NAME,
            revision=arguments["revision"],
            _raise_exceptions_for_missing_entries=False,
        )
        if index is None:
            single = Path(str(cached_file(path_or_id, SAFE_WEIGHTS_NAME, revision=arguments["revision"])))
            with safe_open(single, framework="pt") as opened:
                return dict.fromkeys(opened.keys(), single)
        weight_map = json.loads(Path(str(index)).read_bytes())["weight_map"]
        paths = {
            file: Path(str(cached_file(path_or_id, file, revision=arguments["revision"])))
            for file in set(weight_map.values())
        }
        return {name: paths[file] for name, file in weight_map.items()}


def count_weights(base_config: BaseConfig) -> int:
    """Numbers in the base's weights, a tied head counted once, without reading any. Raises UserError as `load_base`."""
    with describe_load_errors(base_config) as (path_or_id, arguments):
        config = AutoConfig.from_pretrained(path_or_id, **arguments)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=arguments["trust_remote_code"])
        return sum(parameter.numel() for parameter in model.parameters())


def _check_weights(model: Any, loading_info: dict[str, Any], name: str) -> None:
    # transformers makes up at random what the files lack, and bitsandbytes takes a weight of any shape.
    shapes = [key if isinstance(key, str) else key[0] for key in loading_info["mismatched_keys"]]
    for key, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = getattr(module.weight, "quant_state", None)  # a missing weight has none
            if state is not None and tuple(state.shape) != (module.out_features, module.in_features):
                shapes.append(f"{key}.weight")
    for keys, problem in (
        (loading_info["missing_keys"], "not there"),
        (shapes, "of another shape than config.json says"),
    ):
        if keys:
            raise UserError(
                f"base.model: {name} cannot be loaded: {len(keys)} of its weights are {problem}, {min(keys)} for one"
            )


def freeze_base(
    model: Any,
    tokenizer: Any,
    name: str,
    bits: int,
    revision: str | None = None,
    rope_factors: RopeFactors = "short",
) -> Base:
    """Makes a loaded model a base: nothing trainable, train mode (transformers checkpoints only there), one set of
    rotary frequencies, no trap of the CPU kernels."""
    fix_frequencies(model, rope_factors)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # On CPUs with AVX512-BF16 an eval forward repacks the weight in place and takes a path without autograd.
            module.support_avx512bf16_for_cpu = False
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # most models keep attention's dropout as a number (Granite 3.0: 0.1)
        for key, value in list(vars(module).items()):
            if "drop" in key and isinstance(value, float):
                setattr(module, key, 0.0)
    model.requires_grad_(False)
    model.train()
    model.config.use_cache = False
    device = next(model.parameters()).device
    if device.type == "cuda":
        # cuDNN's attention, which PyTorch prefers on some GPUs, builds a plan for each new shape. Lengths differ in
        # each micro-batch and in each decoding step, so the plans cost more than the products. Recomputed layers must
        # choose the same kernel: no context here.
        torch.backends.cuda.enable_cudnn_sdp(False)
    rope = fixed_rope(model.config, rope_factors)
    return Base(model, tokenizer, name, revision, device, bits, _end_ids(model, tokenizer), rope=rope)


def nf4_config(device: torch.device) -> BitsAndBytesConfig:
    """NF4 with double quantization (arXiv:2305.14314)."""
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def base_hashes(model: nn.Module) -> dict[str, str]:
    """blake2b of every frozen tensor as it is stored (packed 4-bit weights with their scales), under the names of the
    plain model."""
    return {name: _digest(tensors) for name, tensors in _stored_tensors(model)}


def combined_hash(hashes: dict[str, str]) -> str:
    """One hash over all of them."""
    return hashlib.blake2b(
        "\n".join(f"{name} {hashes[name]}" for name in sorted(hashes)).encode(), digest_size=16
    ).hexdigest()


def num_stored_bytes(tensor: Tensor) -> int:
    """Bytes of a weight as it is stored, with the scales of one in 4 bits."""
    return sum(one.nbytes for one in _with_quant_state(tensor))


def _stored_tensors(model: nn.Module) -> Iterator[tuple[str, list[Tensor]]]:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "lora_" not in name:
            yield name.replace("base_layer.", "").removeprefix("base_model.model."), _with_quant_state(tensor)


def _with_quant_state(tensor: Tensor) -> list[Tensor]:
    state = getattr(tensor, "quant_state", None)
    if state is None:
        return [tensor]
    return [tensor, state.absmax, *([state.state2.absmax, state.offset] if state.nested else ())]


def hash_of(tensor: Tensor) -> str:
    """blake2b of a tensor's bytes."""
    return _digest([tensor])


def _digest(tensors: list[Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def silence_transformers() -> None:
    """The libraries' own chatter goes."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # its retries; what they come to is told in one sentence
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    # PEFT asks transformers by a name that is deprecated there; nobody who runs a recipe can do anything about it.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)


@contextmanager
def describe_load_errors(base_config: BaseConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where the model lies and how to ask for it; what the libraries raise inside becomes one sentence."""
    name, _, revision = base_config.model.partition("@")
    if name == BUILTIN_MODEL:
        path_or_id = str(files("lowrank_tune.toy") / "base")
    else:
        path_or_id = _existing_folder(name) or name
    arguments: dict[str, Any] = {"revision": revision or None, "trust_remote_code": base_config.trust_remote_code}
    try:
        _refuse_remote_code(path_or_id, name, arguments)
        yield path_or_id, arguments
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise UserError(_load_error_message(name, revision, error)) from error


def _refuse_remote_code(path_or_id: str, name: str, arguments: dict[str, Any]) -> None:
    # transformers would ask the person in the middle of the run; this asks nobody and says what to do.
    try:
        raw, _ = PretrainedConfig.get_config_dict(path_or_id, revision=arguments["revision"])
        remote_code = raw.get("auto_map")
    except (AttributeError, TypeError) as error:
        raise UserError(f"base.model: {name} cannot be loaded: its config.json holds no JSON object") from error
    if remote_code and not arguments["trust_remote_code"]:
        raise UserError(
            f"base.model: {name} brings Python code of its own; set base.trust_remote_code: true only if you trust "
            f"its author"
        )


def _existing_folder(name: str) -> str | None:
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise UserError(f"base.model: the folder {name} holds no config.json, so it is no model")
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"base.model: there is no folder {name}")
    return None


def check_quantization(config: Any, base_config: BaseConfig) -> bool:
    """Whether the repository is quantized already: with bitsandbytes in 4 bits, or it is refused."""
    quantized = getattr(config, "quantization_config", None)
    if quantized is None:
        return False
    if not isinstance(quantized, dict):
        quantized = quantized.to_dict()
    if quantized.get("quant_method") != "bitsandbytes" or not quantized.get("load_in_4bit"):
        kind = quantized.get("quant_method", "an unknown method")
        raise UserError(
            f"base.model: {base_config.model} is quantized with {kind}; give the unquantized model, or one in "
            f"bitsandbytes' 4 bits"
        )
    return True


def _load_error_message(name: str, revision: str, error: Exception) -> str:
    text = str(error)
    where = f"{name} at revision {revision}" if revision else name
    if "gated" in text.lower() or "401" in text or "403" in text:
        return (
            f"base.model: {where} is gated or private: accept its terms at https://huggingface.co/{name}, then "
            f"`hf auth login`"
        )
    if "revision" in text.lower() and revision and "not a valid" in text.lower():
        return f"base.model: {name} has no revision {revision}"
    if "safetensors" in text.lower() and "no file named" in text.lower():
        return (
            f"base.model: {where} has no safetensors weights; other formats can run code when they are read and "
            f"are not loaded"
        )
    if any(
        word in text.lower()
        for word in ("couldn't connect", "offline", "can't load", "not a local folder", "connection", "resolve")
    ):
        if is_offline_mode():
            place = "HF_HUB_OFFLINE, which is set"
        else:
            place = "the network"
        return (
            f"base.model: {where} is no folder, not in the local cache, and could not be fetched; check the name and "
            f"{place}"
        )
    return (
        f"base.model: {where} cannot be loaded: "
        f"{text.strip().splitlines()[0] if text.strip() else type(error).__name__}"
    )


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every id that the tokenizer or the model's generation config calls an end of sequence."""
    ends: set[int] = set()
    generation: GenerationConfig | None = getattr(model, "generation_config", None)
    for value in (getattr(tokenizer, "eos_token_id", None), generation.eos_token_id if generation else None):
        if value is not None:
            ends.update([value] if isinstance(value, int) else value)
    return frozenset(ends)
