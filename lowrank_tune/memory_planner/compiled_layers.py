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

from lowrank_tune.config import RecipeConfig
from lowrank_tune.memory_planner.fake_device import FakeDeviceMode
from lowrank_tune.memory_planner.graph_program import GraphProgram
from lowrank_tune.memory_planner.kernel_counter import KernelCounter
from lowrank_tune.memory_planner.layer_graphs import LayerGraphs
from lowrank_tune.memory_planner.traced_layer import Forward, LayerCall
from lowrank_tune.model.compiler_check import missing_for_compile
from lowrank_tune.model.decoder_layers import layer_forward

MAX_PROGRAMS = 64
"""Programs that are kept for later simulations of the process; a plan has about ten."""
_programs = dict[tuple[Any, ...], "LayerProgram | None"]()


def plans_compiled_layers(recipe: RecipeConfig, device: torch.device) -> bool:
    """Returns whether a run of this recipe compiles its layers (`assembly.model.compiles_layers`). A GPU that is not in
    this machine is taken to have a compiler."""
    setting = recipe.train.torch_compile
    if not setting or recipe.base.backend != "transformers" or recipe.train.mlp_chunks > 1:
        return False
    if device.type == "cpu":
        return setting is True and not missing_for_compile("cpu")
    return not (torch.cuda.is_available() and missing_for_compile(device.type))


def forget_programs() -> None:
    """Frees the programs of earlier simulations."""
    _programs.clear()


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
class SimulatedLayer:
    """A layer with its kind of attention. `before` is called each time that it runs, also in a recomputation."""

    kind: str
    before: Callable[[], None]


@dataclass
class SimulatedCompiledLayers:
    """The compiled twin of the layers (`model.decoder_layers.CompiledForward`). `base` is what the graphs depend on
    besides shapes."""

    base: str
    mode: FakeDeviceMode
    counter: KernelCounter | None
    active_stack: Callable[[], Sequence[str]]
    layers: dict[nn.Module, SimulatedLayer] = field(default_factory=dict)
    is_used: bool = False

    def install(self, layer: nn.Module, kind: str, before: Callable[[], None]) -> None:
        """Makes a layer run as a compiled one inside `running`."""
        self.layers[layer] = SimulatedLayer(kind, before)
        layer_forward(layer).compiled = self

    @contextmanager
    def running(self) -> Iterator[None]:
        """Makes the layers run as compiled ones."""
        before = self.is_used
        self.is_used = True
        try:
            yield
        finally:
            self.is_used = before

    def of(self, layer: nn.Module) -> Forward:
        """Returns the simulated forward method of a layer."""
        return partial(self._run, layer)

    def attempt(self, work: Callable[[], Any]) -> tuple[Any] | None:
        """Returns the result of `work` in a tuple."""
        return (work(),)

    def _run(self, layer: nn.Module, *args: Any, **named: Any) -> Any:
        simulated = self.layers[layer]
        simulated.before()
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
        key = (self.base, type(layer), kind, stack, layer.training, needs_gradient, call.key)
        if key not in _programs:
            if len(_programs) >= MAX_PROGRAMS:
                _programs.clear()
            try:
                graphs, outputs = call.trace(layer, layer_forward(layer).plain, self.mode)
                _programs[key] = LayerProgram(graphs, outputs)
            # torch's tracer raises errors of many classes.
            except Exception:
                _programs[key] = None
        return _programs[key]


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
