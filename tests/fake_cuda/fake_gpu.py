"""Makes this process one with a fake GPU: `torch.cuda` describes one, and tensors on it have no numbers.

A CPU build of torch needs the library of `fake_guard.py` preloaded. The changes stay until the process ends.
"""

from __future__ import annotations

import importlib
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes  # noqa: F401  (chooses its backends when it is imported: before torch has the fake GPU)
import torch
import torch._dynamo  # noqa: F401  (makes a table of torch's functions, in which each may be only once)
import torch.nn.functional as F
from fake_attention import fake_attention
from fake_norm import make_fake_rms_norm
from integer_values import stand_in
from kernel_counter import KernelCounter
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.cuda.amp import common
from torch.utils._python_dispatch import _disable_current_modes
from transformers import masking_utils

PROPERTIES = types.SimpleNamespace(
    name="fake RTX 4090",
    total_memory=24_564 << 20,
    major=8,
    minor=9,
    multi_processor_count=128,
)
_real_tensor = torch.tensor
_real_as_tensor = torch.as_tensor
_real_tolist = Tensor.tolist
_counters: list[KernelCounter] = []


def install() -> None:
    """Makes torch, transformers and bitsandbytes take the fake GPU for one. Call it before they are used."""
    warnings.filterwarnings("ignore")
    for owner, name, replacement in _replacements():
        setattr(owner, name, replacement)
    # Its module of CUDA kernels, whose choice between kernels is used, is not imported in a CPU build.
    importlib.import_module("bitsandbytes.backends.cuda.ops")


@contextmanager
def fake_gpu() -> Iterator[KernelCounter]:
    """Enters the modes in which tensors on `cuda` are fake, and yields the counter of what the GPU would do."""
    counter = KernelCounter()
    with FakeTensorMode(allow_non_fake_inputs=True), counter:
        _counters.append(counter)
        try:
            yield counter
        finally:
            _counters.remove(counter)


def _replacements() -> Iterator[tuple[Any, str, Any]]:
    """Yields objects, and their attributes with new values."""
    yield common, "amp_definitely_not_available", _no
    for name, replacement in _cuda_functions().items():
        yield torch.cuda, name, replacement
    yield torch._C, "_cuda_getCurrentRawStream", _zero
    yield torch, "tensor", _tensor
    yield torch, "as_tensor", _as_tensor
    yield Tensor, "tolist", _tolist
    yield FakeTensor, "tolist", _tolist
    yield nn.Module, "to", _move_module
    yield F, "scaled_dot_product_attention", fake_attention
    yield F, "rms_norm", make_fake_rms_norm(_counters)
    # transformers would take a tensor without numbers for one of a compilation, whose values it does not read.
    if hasattr(masking_utils, "is_tracing"):
        yield masking_utils, "is_tracing", _no


def _cuda_functions() -> dict[str, Callable[..., Any]]:
    return {
        "is_available": _yes,
        "is_bf16_supported": _yes,
        "is_initialized": _no,
        "device_count": _one,
        "current_device": _zero,
        "get_device_properties": _properties,
        "get_device_name": _name,
        "get_device_capability": _capability,
        "mem_get_info": _memory_info,
        "max_memory_allocated": _zero,
        "max_memory_reserved": _zero,
        "memory_allocated": _zero,
        "memory_reserved": _zero,
        "synchronize": _nothing,
        "empty_cache": _nothing,
        "reset_peak_memory_stats": _nothing,
        "set_per_process_memory_fraction": _nothing,
        "set_sync_debug_mode": _nothing,
        "manual_seed_all": _nothing,
        "set_rng_state": _nothing,
        "get_rng_state": _rng_state,
    }


def _yes(*_: Any, **__: Any) -> bool:
    return True


def _no(*_: Any, **__: Any) -> bool:
    return False


def _zero(*_: Any, **__: Any) -> int:
    return 0


def _one(*_: Any, **__: Any) -> int:
    return 1


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _properties(*_: Any) -> Any:
    return PROPERTIES


def _name(*_: Any) -> str:
    return str(PROPERTIES.name)


def _capability(*_: Any) -> tuple[int, int]:
    return PROPERTIES.major, PROPERTIES.minor


def _memory_info(*_: Any) -> tuple[int, int]:
    return PROPERTIES.total_memory, PROPERTIES.total_memory


def _rng_state(*_: Any, **__: Any) -> Tensor:
    with _disable_current_modes():
        return torch.zeros(16, dtype=torch.uint8)


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
    """`torch.tensor`, whose copy to the GPU no mode sees."""
    if not _is_cuda(device):
        kwargs["device"] = device
        return _real_tensor(data, *args, **kwargs)
    with _disable_current_modes():
        values = _real_tensor(data, *args, **kwargs)
    return values.to(device)


def _as_tensor(data: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
    if isinstance(data, Tensor) or not _is_cuda(device):
        return _real_as_tensor(data, dtype=dtype, device=device)
    return _tensor(data, dtype=dtype, device=device)


def _tolist(tensor: Tensor) -> Any:
    """`Tensor.tolist`, which reads memory without an operation."""
    if not tensor.is_cuda:
        return _real_tolist(tensor)
    _counters[-1].wait()
    with _disable_current_modes():
        return _real_tolist(stand_in(tensor))


def _move_module(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """`Module.to`, which would put a tensor without numbers into a parameter that has some."""
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    for child in module.modules():
        for name, parameter in list(child._parameters.items()):
            if parameter is not None:
                moved = parameter.detach().to(device, dtype if parameter.is_floating_point() else None)
                child._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
        for name, buffer in list(child._buffers.items()):
            if buffer is not None:
                child._buffers[name] = buffer.to(device)
    return module
