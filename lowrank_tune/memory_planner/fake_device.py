"""The recipe's own code on tensors without numbers, as if it ran on the device that is planned for.

Floating-point tensors live on torch's `meta` device: a shape and no bytes. Whole numbers and masks are few and real, so
that code which asks them for values (how many tokens are scored, which prompts rows share) goes the way that it goes in
a run. Meta tensors say that they are on the planned device; what asks them for numbers hears 0, and yes. Under CUDA's
autocast they are cast as torch casts them (`torch/amp`: half precision for products, fp32 for sums that need it), which
torch itself does on no meta tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from lowrank_tune.memory_planner.attention import attend
from lowrank_tune.memory_planner.offload_hooks import OffloadedTensorHooks

META = torch.device("meta")
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
        # autocast's own cache of weights, which ends with its outermost context
        self.cast_cache: dict[int, tuple[Tensor, Tensor]] = {}
        self.replacements: dict[Any, Callable[..., Any]] = {
            _getter("device"): lambda x: device if x.is_meta else x.device,
            _getter("is_cuda"): lambda x: device.type == "cuda" and x.is_meta,
            _getter("is_cpu"): lambda x: device.type == "cpu" or not x.is_meta,
            torch.Tensor.get_device: lambda x: 0 if device.type == "cuda" and x.is_meta else x.get_device(),
            torch.Tensor.to: self._to,
            torch.Tensor.cpu: lambda x, **_: self._to(x, "cpu"),
            torch.Tensor.tolist: lambda x: _to_host(x).tolist(),
            torch.Tensor.item: lambda x: _scalar_of(x),
            torch.Tensor.__bool__: lambda x: bool(_scalar_of(x)),
            torch.Tensor.__float__: lambda x: float(_scalar_of(x)),
            torch.Tensor.__int__: lambda x: int(_scalar_of(x)),
            torch.equal: lambda a, b: _equal_or_meta(torch.equal, a, b),
            torch.allclose: lambda a, b, **options: _equal_or_meta(torch.allclose, a, b, **options),
            F.scaled_dot_product_attention: lambda *a, **k: attend(device.type, *a, **k),
        }

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if (
            self.planned.type == "cuda"
            and (func in AUTOCAST_TO_HALF_OPS or func in AUTOCAST_TO_FP32_OPS)
            and torch.is_autocast_enabled("cuda")
        ):
            args, kwargs = self._cast(func, args, kwargs)
        if (replacement := self.replacements.get(func)) is not None:
            return replacement(*args, **kwargs)
        if kwargs.get("device") is not None and _device_type(kwargs["device"]) == self.planned.type:
            return self._make(func, args, kwargs)
        return func(*args, **kwargs)

    def with_recompute(self, module: Any, before: Callable[[], None]) -> None:
        """Has a module run under this mode also where a backward pass computes it again, which autograd does without
        any mode; and is told `before` each time."""
        original_forward = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            before()
            with nullcontext() if _get_current_function_mode() is self else self:  # type: ignore[no-untyped-call]
                return original_forward(*args, **kwargs)

        module.forward = forward

    def _make(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What is made on the planned device: numbers are real where they are whole, else they are none."""
        dtype = kwargs.get("dtype")
        rest = {key: value for key, value in kwargs.items() if key != "device"}
        if func in (torch.tensor, torch.as_tensor):
            data = args[0] if args else kwargs["data"]
            if isinstance(data, Tensor) and data.is_meta:
                return data if dtype is None else data.to(dtype)
            created = func(*args, **rest)
            if created.is_floating_point():
                return torch.empty_like(created, device=META)
            return created
        if dtype is not None:
            is_integer = not dtype.is_floating_point
        else:
            is_integer = _makes_integers(func, args, kwargs)
        return func(*args, **rest, device=torch.device("cpu") if is_integer else META)

    def _to(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = (self.planned if args[0].is_meta else args[0].device, args[0].dtype, *args[1:])
        named = kwargs.get("device")
        dtype = kwargs.get("dtype")
        if named is not None:
            target = named
        else:
            target = next((argument for argument in args if isinstance(argument, (str, torch.device))), None)
        if dtype is None:
            dtype = next((argument for argument in args if isinstance(argument, torch.dtype)), None)
        if target is None and x.is_meta:
            kind = self.planned.type
        elif target is None:
            kind = "cpu"
        else:
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

    def _cast(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        if func in AUTOCAST_TO_HALF_OPS:
            return [self._to_half(argument) for argument in args], {
                key: self._to_half(argument) for key, argument in kwargs.items()
            }
        if kwargs.get("dtype") is not None:
            return list(args), dict(kwargs)
        return [_to_fp32(argument) for argument in args], {key: _to_fp32(argument) for key, argument in kwargs.items()}

    def _to_half(self, x: Any) -> Any:
        """As autocast casts: the weights that are trained once, until its outermost context ends."""
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype in (torch.bfloat16, torch.float64):
            return x
        if not (x.requires_grad and x.is_leaf and torch.is_autocast_cache_enabled()):
            return x.to(torch.bfloat16)
        if id(x) not in self.cast_cache:
            self.cast_cache[id(x)] = x, x.to(torch.bfloat16)
        return self.cast_cache[id(x)][1]


@contextmanager
def fake_device_mode(device: torch.device) -> Iterator[FakeDeviceMode]:
    """Enters the mode. Where torch has no GPU, its autocast for CUDA would switch itself off: here it is told that
    there is one."""
    mode = FakeDeviceMode(device)
    clear = torch.clear_autocast_cache

    def forget() -> None:
        mode.cast_cache.clear()
        clear()

    with ExitStack() as entered:
        if device.type == "cuda":
            entered.enter_context(patch("torch.clear_autocast_cache", forget))
            entered.enter_context(
                patch("lowrank_tune.model.activation_checkpointing.save_on_cpu", OffloadedTensorHooks)
            )
            if not torch.cuda.is_available():
                entered.enter_context(patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
                entered.enter_context(patch("torch.cuda.is_bf16_supported", lambda including_emulation=True: True))
        yield entered.enter_context(mode)


def _getter(name: str) -> Any:
    """What a mode is asked about where somebody reads a property of a tensor."""
    return getattr(torch.Tensor, name).__get__


def _scalar_of(x: Tensor) -> Any:
    """The number that a tensor of one element holds; of a meta tensor yes, or 0."""
    if not x.is_meta:
        return x.item()
    if x.dtype == torch.bool:
        return True
    if x.is_floating_point():
        return 0.0
    return 0


def _to_host(x: Tensor) -> Tensor:
    if x.is_meta:
        return (torch.ones if x.dtype == torch.bool else torch.zeros)(x.shape, dtype=x.dtype)
    return x


def _equal_or_meta(compare: Callable[..., bool], a: Tensor, b: Tensor, **options: Any) -> bool:
    if a.is_meta or b.is_meta:
        return True
    return compare(a, b, **options)


def _device_type(device: Any) -> str:
    if isinstance(device, int):
        return "cuda"
    return torch.device(device).type


def _makes_integers(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a factory that was told no dtype makes whole numbers or masks."""
    if func is torch.arange:
        return all(
            isinstance(argument, int)
            for argument in (*args, *(kwargs[key] for key in ("start", "end", "step") if key in kwargs))
        )
    if func is torch.full:
        return not isinstance(kwargs.get("fill_value", args[1] if len(args) > 1 else 0.0), float)
    template = args[0] if args and isinstance(args[0], Tensor) else None  # `zeros_like` and `new_zeros` keep the dtype
    return template is not None and not template.is_floating_point()


def _to_fp32(x: Any) -> Any:
    if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16):
        return x.float()
    return x
