"""Decoder layers of a simulation that allocate and start what layers compiled by `torch.compile` do.

Layers of the same shapes are traced once. A layer that cannot be traced runs as it is, which needs more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_unflatten

from lowrank_tune.assembly.model import should_compile_layers
from lowrank_tune.config import RecipeConfig
from lowrank_tune.errors import first_line
from lowrank_tune.memory_planner.fake_device import FakeDeviceMode
from lowrank_tune.memory_planner.graph_program import GraphProgram
from lowrank_tune.memory_planner.kernel_counter import KernelCounter
from lowrank_tune.memory_planner.layer_graphs import LayerGraphs
from lowrank_tune.memory_planner.traced_layer import Forward, LayerCall
from lowrank_tune.model.compiler_check import missing_for_compile
from lowrank_tune.model.decoder_layers import layer_forward

MAX_PROGRAMS = 64
"""Programs that are kept for later simulations of a recipe; a plan has about ten."""


def plans_compiled_layers(recipe: RecipeConfig, device: torch.device) -> bool:
    """Returns whether a run of this recipe compiles its layers (`assembly.model.compiles_layers`). A GPU that is not in
    this machine is taken to have a compiler."""
    if not should_compile_layers(recipe, device):
        return False
    is_here = device.type == "cpu" or torch.cuda.is_available()
    return not (is_here and missing_for_compile(device.type))


@dataclass
class LayerProgram:
    """The programs of a compiled layer; without a backward one where no gradient is needed."""

    graphs: LayerGraphs
    outputs: TreeSpec

    def __post_init__(self) -> None:
        self.forward = GraphProgram(self.graphs.forward)
        backward = self.graphs.backward
        self.backward = None if backward is None else GraphProgram(backward)


@dataclass
class LayerPrograms:
    """The programs of layers of one recipe on one device, by what they depend on besides: their shapes and the active
    adapters. `fault` is the first reason why a layer could not be traced."""

    fault: str = ""
    _programs: dict[tuple[Any, ...], LayerProgram | None] = field(default_factory=dict)

    def of(
        self,
        key: tuple[Any, ...],
        trace: Callable[[], tuple[LayerGraphs, TreeSpec]],
    ) -> LayerProgram | None:
        """Returns the program under a key, traced if it is new; None for a layer that cannot be traced."""
        if key not in self._programs:
            if len(self._programs) >= MAX_PROGRAMS:
                self._programs.clear()
            self._programs[key] = self._traced(trace)
        return self._programs[key]

    def _traced(self, trace: Callable[[], tuple[LayerGraphs, TreeSpec]]) -> LayerProgram | None:
        try:
            graphs, outputs = trace()
        # torch's tracer raises errors of many classes.
        except Exception as error:
            self.add_fault(first_line(error))
            return None
        return LayerProgram(graphs, outputs)

    def add_fault(self, fault: str) -> None:
        """Stores why a layer could not be traced, if it is the first reason."""
        self.fault = self.fault or fault


@dataclass
class SimulatedLayer:
    """A layer with its kind of attention. `before_layer` is called each time that it runs, also in a recomputation."""

    kind: str
    before_layer: Callable[[], None]


@dataclass
class SimulatedCompiledLayers:
    """The compiled version of the layers (`model.decoder_layers.CompiledForward`)."""

    programs: LayerPrograms
    mode: FakeDeviceMode
    counter: KernelCounter | None
    active_stack: Callable[[], Sequence[str]]
    layers: dict[nn.Module, SimulatedLayer] = field(default_factory=dict)
    is_used: bool = False

    def install(self, layer: nn.Module, kind: str, before_layer: Callable[[], None]) -> None:
        """Makes a layer run as a compiled one inside `running`."""
        self.layers[layer] = SimulatedLayer(kind, before_layer)
        layer_forward(layer).compiled = self

    @contextmanager
    def running(self) -> Iterator[None]:
        """Makes the layers run as compiled ones."""
        was_used = self.is_used
        self.is_used = True
        try:
            yield
        finally:
            self.is_used = was_used

    def of(self, layer: nn.Module) -> Forward:
        """Returns the simulated forward method of a layer."""
        return partial(self._run, layer)

    def attempt(self, work: Callable[[], Any]) -> tuple[Any] | None:
        """Returns the result of `work` in a tuple."""
        return (work(),)

    def _run(self, layer: nn.Module, *args: Any, **named: Any) -> Any:
        simulated = self.layers[layer]
        simulated.before_layer()
        plain = layer_forward(layer).plain
        call = LayerCall.of(layer, args, named)
        program = self._program(layer, simulated.kind, call)
        if program is None:
            with self.mode.active():
                return plain(*args, **named)
        outputs = _CompiledLayer.apply(program, self.counter, *call.tensors)  # type: ignore[no-untyped-call]
        return tree_unflatten(outputs, program.outputs)

    def _program(self, layer: nn.Module, kind: str, call: LayerCall) -> LayerProgram | None:
        needs_gradient = torch.is_grad_enabled()
        stack = tuple(self.active_stack())
        key = (type(layer), kind, stack, layer.training, needs_gradient, call.key)
        trace = partial(call.trace, layer, layer_forward(layer).plain, self.mode)
        return self.programs.of(key, trace)


class _CompiledLayer(torch.autograd.Function):
    """A layer whose forward and backward pass are programs."""

    @staticmethod
    def forward(ctx: Any, program: LayerProgram, counter: KernelCounter | None, *inputs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            results = program.forward.run(list(inputs), counter)
        num_outputs = program.graphs.num_outputs
        ctx.save_for_backward(*results[num_outputs:])
        ctx.program = program
        ctx.counter = counter
        return tuple(results[:num_outputs])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        inputs = [*ctx.saved_tensors, *gradients]
        ctx.maybe_clear_saved_tensors()
        with torch._C.DisableTorchFunction():
            return None, None, *ctx.program.backward.run(inputs, ctx.counter)
