"""Decoder layers of a simulation that allocate and start what layers compiled by `torch.compile` do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_unflatten

from lowrank_tune.config import RecipeConfig
from lowrank_tune.memory_planner.fake_device import FakeDeviceMode
from lowrank_tune.memory_planner.graph_program import GraphProgram
from lowrank_tune.memory_planner.kernel_counter import KernelCounter
from lowrank_tune.memory_planner.layer_graphs import LayerGraphs
from lowrank_tune.memory_planner.traced_layer import Forward, LayerCall


def compiles_layers(recipe: RecipeConfig, device: torch.device) -> bool:
    """Returns whether a run of this recipe compiles its layers; `auto` does on a GPU. MLPs in chunks are recomputed
    inside a layer, which then is not compiled."""
    setting = getattr(recipe.train, "torch_compile", "auto")
    if recipe.train.mlp_chunks > 1 or recipe.base.backend != "transformers":
        return False
    return setting is True or (setting == "auto" and device.type == "cuda")


@dataclass
class LayerProgram:
    """The programs of a compiled layer."""

    graphs: LayerGraphs
    outputs: TreeSpec
    counter: KernelCounter | None

    def __post_init__(self) -> None:
        self.forward = GraphProgram(self.graphs.forward)
        backward = self.graphs.backward
        self.backward = None if backward is None else GraphProgram(backward)


@dataclass
class CompiledLayers:
    """Makes layers run as compiled ones where a gradient is needed. Layers of the same shapes are traced once; one that
    cannot be traced runs as it is."""

    mode: FakeDeviceMode
    counter: KernelCounter | None
    active_stack: Callable[[], Sequence[str]]
    programs: dict[tuple[Any, ...], LayerProgram | None] = field(default_factory=dict)

    def install(self, layer: Any, kind: str, before: Callable[[], None]) -> None:
        """Replaces the layer's forward method. `before` is called each time that it runs, also in a recomputation."""
        wrapped = getattr(type(layer).forward, "__wrapped__", None)
        plain = partial(wrapped or type(layer).forward, layer)
        run = partial(self._run, layer, kind, plain, before)

        def forward(*args: Any, **kwargs: Any) -> Any:
            # From version 5.18 of transformers on, `forward` itself recomputes, before that `__call__`.
            if wrapped is not None and layer.gradient_checkpointing and layer.training:
                return layer._gradient_checkpointing_func(partial(run, **kwargs), *args)
            return run(*args, **kwargs)

        layer.forward = forward

    def _run(
        self, layer: nn.Module, kind: str, plain: Forward, before: Callable[[], None], *args: Any, **kwargs: Any
    ) -> Any:
        before()
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        call = LayerCall.of(layer, args, kwargs)
        key = (type(layer), kind, tuple(self.active_stack()), layer.training, call.key)
        if key not in self.programs:
            self.programs[key] = self._program(call, layer, plain)
        program = self.programs[key]
        if program is None or program.backward is None:
            with self.mode.active():
                return plain(*args, **kwargs)
        outputs = _CompiledLayer.apply(program, *call.tensors)  # type: ignore[no-untyped-call]
        return tree_unflatten(outputs, program.outputs)

    def _program(self, call: LayerCall, layer: nn.Module, plain: Forward) -> LayerProgram | None:
        try:
            return LayerProgram(*call.trace(layer, plain, self.mode), self.counter)
        # torch's tracer raises errors of many classes.
        except Exception:
            return None


class _CompiledLayer(torch.autograd.Function):
    """A layer whose forward and backward pass are programs."""

    @staticmethod
    def forward(ctx: Any, program: LayerProgram, *inputs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            results = program.forward.run(list(inputs), program.counter)
        outputs = results[: program.graphs.num_outputs]
        ctx.save_for_backward(*results[program.graphs.num_outputs :])
        ctx.program = program
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        inputs = [*ctx.saved_tensors, *gradients]
        ctx.maybe_clear_saved_tensors()
        with torch._C.DisableTorchFunction():
            return None, *ctx.program.backward.run(inputs, ctx.program.counter)
