"""Traces a decoder layer with all its tensors as inputs: its weights, the scales of 4-bit weights, its adapters, and
the arguments of the call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lowrank_tune.memory_planner.fake_device import FakeDeviceMode
from lowrank_tune.memory_planner.layer_graphs import LayerGraphs, trace_graphs
from lowrank_tune.model.autocast_cache import without_autocast_cache

Forward = Callable[..., Any]
STATE = ".quant_state."
"""Separates the name of a 4-bit weight from that of a tensor of its state."""
STATE_TENSORS = ("absmax", "code", "offset", "state2.absmax", "state2.code")
"""Tensors of bitsandbytes' `QuantState`."""


@dataclass(frozen=True)
class LayerCall:
    """A call of a layer: the tensors of its modules with their names, and then those of its arguments. `leaves` are the
    arguments that are no tensors, and `spec` is their structure."""

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    leaves: tuple[Any, ...]
    spec: TreeSpec

    @classmethod
    def of(cls, layer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> LayerCall:
        """Returns the call with these arguments, as meta tensors."""
        named = dict(_tensors_of(layer))
        leaves, spec = tree_flatten((tuple(args), dict(kwargs)))
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            given = [_on_meta(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
        others = tuple(Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        return cls(tuple(named), (*named.values(), *given), others, spec)

    @property
    def key(self) -> tuple[Any, ...]:
        """What the graphs depend on besides the code of the layer."""
        with torch._C.DisableTorchFunction():
            tensors = [(x.shape, x.stride(), x.dtype, x.requires_grad) for x in self.tensors]
        return self.names, tuple(tensors), tuple(map(str, self.leaves)), str(self.spec)

    def trace(self, layer: nn.Module, forward: Forward, mode: FakeDeviceMode) -> tuple[LayerGraphs, TreeSpec]:
        """Returns the graphs of `forward`, a method of the layer, under the mode, and the structure of its outputs."""
        specs = list[TreeSpec]()

        def run(*tensors: Tensor) -> Any:
            named = dict(zip(self.names, tensors, strict=False))
            given = iter(tensors[len(self.names) :])
            leaves = [next(given) if leaf is Tensor else leaf for leaf in self.leaves]
            args, kwargs = tree_unflatten(leaves, self.spec)
            _set_tensors(layer, _with_states(layer, named))
            with mode, without_autocast_cache():
                outputs, spec = tree_flatten(forward(*args, **kwargs))
            specs.append(spec)
            return outputs

        # Functions of autograd read weights in their backward pass too, so that the layer keeps the traced tensors
        # until its gradients are traced.
        own = {name: tensor for name, tensor in zip(self.names, self.tensors, strict=False) if STATE not in name}
        try:
            return trace_graphs(run, self.tensors, len(self.names)), specs[0]
        finally:
            _set_tensors(layer, own)


def _tensors_of(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from layer.named_buffers()
    for name, parameter in layer.named_parameters():
        yield name, parameter
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            for part in STATE_TENSORS:
                owner, _, attribute = part.rpartition(".")
                value = getattr(state.state2 if owner else state, attribute, None)
                if isinstance(value, Tensor):
                    yield f"{name}{STATE}{part}", value


def _set_tensors(layer: nn.Module, named: Mapping[str, Tensor]) -> None:
    """Sets parameters and buffers of a layer, without a check of their type."""
    for name, tensor in named.items():
        path, _, attribute = name.rpartition(".")
        module = layer.get_submodule(path)
        tensors: Any = module._parameters if attribute in module._parameters else module._buffers
        tensors[attribute] = tensor


def _with_states(layer: nn.Module, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the parameters and buffers of `named`, 4-bit weights with a state of the tensors in `named`."""
    for name, parameter in layer.named_parameters(remove_duplicate=False):
        state = copy.copy(getattr(parameter, "quant_state", None))
        if state is None:
            continue
        state.state2 = copy.copy(state.state2)
        for part in STATE_TENSORS:
            owner, _, attribute = part.rpartition(".")
            value = named.get(f"{name}{STATE}{part}")
            if value is not None:
                setattr(state.state2 if owner else state, attribute, value)
        weight: Any = named[name]
        weight.quant_state = state
    return {name: tensor for name, tensor in named.items() if STATE not in name}


def _on_meta(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
