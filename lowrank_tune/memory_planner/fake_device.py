"""Runs the recipe's own code on tensors without data, as if it ran on the planned device.

Floating-point tensors are on torch's `meta` device: a shape and no bytes. Integers and masks are few and real, so code
that reads their values (how many tokens are scored, which prompts rows share) takes the same branches as in a run. Meta
tensors report the planned device; their values are read as 0 and True. Under CUDA's autocast they are cast as torch
casts them (`torch/amp`: half precision for products, fp32 for sums that need it), which torch does not do for meta
tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.cuda.amp import common
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils import checkpoint

from lowrank_tune.memory_planner.attention import attend
from lowrank_tune.memory_planner.offload_hooks import OffloadedTensorHooks
from lowrank_tune.model import activation_checkpointing

META = torch.device("meta")
CPU = torch.device("cpu")
AUTOCAST_TO_HALF_OPS = {
    F.linear,
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.addmm,
    torch.baddbmm,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.Tensor.mm,
    torch.Tensor.bmm,
    F.scaled_dot_product_attention,
    torch.conv1d,
    F.conv1d,
}
AUTOCAST_TO_FP32_OPS = {
    torch.pow,
    torch.Tensor.pow,
    torch.Tensor.__pow__,
    torch.rsqrt,
    torch.Tensor.rsqrt,
    torch.exp,
    torch.Tensor.exp,
    torch.log,
    torch.Tensor.log,
    torch.cumsum,
    torch.Tensor.cumsum,
    torch.sum,
    torch.Tensor.sum,
    torch.prod,
    torch.Tensor.prod,
    torch.softmax,
    torch.Tensor.softmax,
    F.softmax,
    torch.log_softmax,
    F.log_softmax,
    F.layer_norm,
    F.softplus,
}
"""What CUDA's autocast runs in half precision, and in fp32."""


class FakeDeviceMode(TorchFunctionMode):
    """While it is entered, meta tensors are taken to be on `device`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.planned = device
        self.cast_cache: dict[int, tuple[Tensor, Tensor]] = {}
        """Autocast's own cache of weights, which ends with its outermost context."""
        self.replacements: dict[Any, Callable[..., Any]] = {
            _getter("device"): self._device,
            _getter("is_cuda"): self._is_cuda,
            _getter("is_cpu"): self._is_cpu,
            torch.Tensor.get_device: self._get_device,
            torch.Tensor.to: self._to,
            torch.Tensor.cpu: self._cpu,
            torch.Tensor.tolist: _tolist,
            torch.Tensor.item: _item,
            torch.Tensor.__bool__: _bool,
            torch.Tensor.__float__: _float,
            torch.Tensor.__int__: _int,
            torch.equal: _equal,
            torch.allclose: _allclose,
            F.scaled_dot_product_attention: self._attend,
            F.rms_norm: self._rms_norm,
            torch._grouped_mm: _grouped_mm,
        }

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self.planned.type == "cuda" and torch.is_autocast_enabled("cuda"):
            args, kwargs = self._autocast(func, args, kwargs)
        replacement = self.replacements.get(func)
        if replacement is not None:
            return replacement(*args, **kwargs)
        device = kwargs.get("device")
        if device is not None and _device_type(device) == self.planned.type:
            return self._create(func, args, kwargs)
        return func(*args, **kwargs)

    def with_recompute(
        self,
        module: Any,
        before: Callable[[], None],
    ) -> None:
        """Makes a module run under this mode also if a backward pass computes it again, which autograd does without
        any mode. `before` is called each time."""
        original_forward = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            before()
            with self.active():
                return original_forward(*args, **kwargs)

        module.forward = forward

    def active(self) -> AbstractContextManager[Any]:
        """Returns the mode, or a context without effect inside it. Autograd computes layers again without any mode."""
        if _get_current_function_mode() is self:  # type: ignore[no-untyped-call]
            return nullcontext()
        return self

    def _device(self, x: Tensor) -> torch.device:
        if x.is_meta:
            return self.planned
        return x.device

    def _is_cuda(self, x: Tensor) -> bool:
        return self._device(x).type == "cuda"

    def _is_cpu(self, x: Tensor) -> bool:
        return self._device(x).type == "cpu"

    def _get_device(self, x: Tensor) -> int:
        if self._is_cuda(x):
            return 0
        return x.get_device()

    def _attend(self, *args: Any, **kwargs: Any) -> Tensor:
        return attend(self.planned.type, *args, **kwargs)

    def _rms_norm(
        self,
        x: Tensor,
        shape: Sequence[int],
        weight: Tensor | None = None,
        eps: float | None = None,
    ) -> Tensor:
        is_fused = self.planned.type == "cuda" and not torch.is_grad_enabled()
        if not is_fused or weight is None or weight.dtype != x.dtype:
            return F.rms_norm(x, list(shape), weight, eps)
        # CUDA's kernel reads and writes what this product does.
        return x * weight

    def _create(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> Any:
        """Creates a tensor on the planned device: a real one of integers, a meta tensor of floating-point numbers."""
        dtype = kwargs.get("dtype")
        options = {key: value for key, value in kwargs.items() if key != "device"}
        if func in (torch.tensor, torch.as_tensor):
            data = args[0] if args else kwargs["data"]
            if isinstance(data, Tensor) and data.is_meta:
                return data if dtype is None else data.to(dtype)
            created = func(*args, **options)
            if created.is_floating_point():
                return torch.empty_like(created, device=META)
            return created
        if dtype is not None:
            is_integer = not dtype.is_floating_point
        else:
            is_integer = _creates_integers(func, args, kwargs)
        if is_integer:
            return func(*args, **options, device=CPU)
        return func(*args, **options, device=META)

    def _to(
        self,
        x: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        target = kwargs.get("device")
        dtype = kwargs.get("dtype")
        for argument in args:
            if isinstance(argument, Tensor):
                target = self._device(argument)
                dtype = argument.dtype
            elif target is None and isinstance(argument, (str, torch.device)):
                target = argument
            elif dtype is None and isinstance(argument, torch.dtype):
                dtype = argument
        if target is None:
            target = self._device(x)
        kind = _device_type(target)
        if kind == "meta":
            return x.to(target, dtype)
        if kind == self.planned.type == "cuda" and not x.is_meta:
            if x.is_floating_point():
                x = torch.empty_like(x, device=META)
            else:
                x = x.clone()
        elif kind == "cpu" != self.planned.type and x.is_meta:
            x = _to_host(x)
        if dtype is None or dtype == x.dtype:
            return x
        return x.to(dtype)

    def _cpu(self, x: Tensor, **_: Any) -> Tensor:
        return self._to(x, "cpu")

    def _autocast(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> tuple[Sequence[Any], dict[str, Any]]:
        """Returns the arguments as CUDA's autocast passes them to `func`."""
        cast: Callable[[Any], Any]
        if func in AUTOCAST_TO_HALF_OPS:
            cast = self._to_half
        elif func in AUTOCAST_TO_FP32_OPS and kwargs.get("dtype") is None:
            cast = _to_fp32
        else:
            return args, kwargs
        cast_kwargs = {key: cast(argument) for key, argument in kwargs.items()}
        return [cast(argument) for argument in args], cast_kwargs

    def _to_half(self, x: Any) -> Any:
        """Casts as autocast does: trained weights once, until its outermost context ends."""
        dtype = torch.get_autocast_dtype("cuda")
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype in (dtype, torch.float64):
            return x
        if not (x.requires_grad and x.is_leaf and torch.is_autocast_cache_enabled()):
            return x.to(dtype)
        if id(x) not in self.cast_cache:
            self.cast_cache[id(x)] = x, x.to(dtype)
        return self.cast_cache[id(x)][1]


@contextmanager
def replaced(
    owner: Any,
    name: str,
    value: Any,
) -> Iterator[None]:
    """Replaces an attribute of a module or an object, and restores it on exit."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def fake_device_mode(device: torch.device) -> Iterator[FakeDeviceMode]:
    """Enters the mode. Without a GPU, torch would disable its autocast for CUDA: here torch's checks for a GPU are
    replaced."""
    mode = FakeDeviceMode(device)
    clear_autocast_cache = torch.clear_autocast_cache

    def clear_both_caches() -> None:
        mode.cast_cache.clear()
        clear_autocast_cache()

    with ExitStack() as entered:
        entered.enter_context(replaced(checkpoint, "_allowed_determinism_checks_to_fns", {"default": _metadata}))
        if device.type == "cuda":
            entered.enter_context(replaced(torch, "clear_autocast_cache", clear_both_caches))
            entered.enter_context(replaced(activation_checkpointing, "save_on_cpu", OffloadedTensorHooks))
            if not torch.cuda.is_available():
                entered.enter_context(replaced(common, "amp_definitely_not_available", _no))
                entered.enter_context(replaced(torch.cuda, "is_bf16_supported", _yes))
                entered.enter_context(replaced(torch.cuda, "get_device_capability", _capability))
        yield entered.enter_context(mode)


def _metadata(x: Tensor) -> dict[str, Any]:
    """Returns what must be equal when a checkpoint computes a tensor again. torch compares the device too, which the
    mode changes and autograd runs without."""
    return {"shape": x.shape, "dtype": x.dtype}


def _no() -> bool:
    return False


def _yes(including_emulation: bool = True) -> bool:
    return True


def _capability(device: Any = None) -> tuple[int, int]:
    """Returns that of the oldest GPUs with bf16 in hardware."""
    return 8, 0


def _grouped_mm(
    x: Tensor,
    weights: Tensor,
    offs: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Returns the products of the experts. torch computes the shape for bf16 only: in another dtype each row is
    multiplied with the weights of one expert, which needs the same memory."""
    if x.is_meta and x.dtype != torch.bfloat16:
        return torch.mm(x, weights[0])
    return torch._grouped_mm(x, weights, offs=offs, **options)


def _getter(name: str) -> Any:
    """Returns the function that a mode receives if a property of a tensor is read."""
    return getattr(torch.Tensor, name).__get__


def _item(x: Tensor) -> Any:
    """The value of a tensor with one element; True or 0 for a meta tensor."""
    if not x.is_meta:
        return x.item()
    if x.dtype == torch.bool:
        return True
    return 0


def _tolist(x: Tensor) -> Any:
    return _to_host(x).tolist()


def _bool(x: Tensor) -> bool:
    return bool(_item(x))


def _float(x: Tensor) -> float:
    return float(_item(x))


def _int(x: Tensor) -> int:
    return int(_item(x))


def _to_host(x: Tensor) -> Tensor:
    if not x.is_meta:
        return x
    if x.dtype == torch.bool:
        return torch.ones(x.shape, dtype=x.dtype)
    return torch.zeros(x.shape, dtype=x.dtype)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.is_meta or b.is_meta or torch.equal(a, b)


def _allclose(
    a: Tensor,
    b: Tensor,
    **options: Any,
) -> bool:
    return a.is_meta or b.is_meta or torch.allclose(a, b, **options)


def _device_type(device: Any) -> str:
    if isinstance(device, int):
        return "cuda"
    return torch.device(device).type


def _creates_integers(
    func: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> bool:
    """Returns whether a factory function creates integers or masks if it gets no dtype."""
    if func is torch.arange:
        bounds = [*args]
        for key in ("start", "end", "step"):
            bounds.append(kwargs.get(key, 0))
        return all(isinstance(bound, int) for bound in bounds)
    if func is torch.full:
        fill_value = args[1] if len(args) > 1 else kwargs.get("fill_value", 0.0)
        return not isinstance(fill_value, float)
    # `zeros_like` and `new_zeros` keep the dtype of their first argument.
    if args and isinstance(args[0], Tensor):
        return not args[0].is_floating_point()
    return False


def _to_fp32(x: Any) -> Any:
    if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16):
        return x.float()
    return x
