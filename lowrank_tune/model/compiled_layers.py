"""Decoder layers compiled with `torch.compile` (`train.torch_compile`).

The layers of one class share their graphs: one for each stack of adapters, with and without gradients. Rows are packed
into one where the model allows it, so that its length, which is dynamic, is all that differs; else rows with a mask and
one row alone have graphs of their own. Nothing is tuned by measurement, and all stacks are compiled before the first
step for the same rows (`Roles`), so that a run that is resumed computes the same, to the last bit. If a layer cannot be
compiled, all continue on the plain path, with one warning.
"""

from __future__ import annotations

import time
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor.config
import torch.fx.experimental._config
from transformers.modeling_layers import GradientCheckpointingLayer

from lowrank_tune.errors import first_line
from lowrank_tune.events import Emit, LogMessage, Progress, warning
from lowrank_tune.model.decoder_layers import Forward, layer_forward
from lowrank_tune.model.oom import is_out_of_memory
from lowrank_tune.model.saved_activations import fewer_saved_activations

BACKEND = "inductor"
MAX_GRAPHS = 64
"""Graphs of one class of layers. A run needs about ten; with more than this the layers continue plain."""
INDUCTOR_OPTIONS = {
    # Dropout draws the numbers that it draws without the compiler.
    "fallback_random": True,
    # Measurements that choose between kernels would choose others in a resumed run.
    "deterministic": True,
    "triton.autotune_pointwise": False,
    "max_autotune": False,
    "coordinate_descent_tuning": False,
}
DESCRIPTION = "compiling layers"


def inductor_options() -> dict[str, Any]:
    """Returns `INDUCTOR_OPTIONS` without those that this version of torch does not have."""
    config: Any = torch._inductor.config
    known = config.get_config_copy()
    return {name: value for name, value in INDUCTOR_OPTIONS.items() if name in known}


class CompiledLayers:
    """The compiled forward methods of a model's decoder layers, a `FastPath`. They are used inside `running` only."""

    name = "compiled layers"

    def __init__(self, model: Any, emit: Emit) -> None:
        self.enabled = True
        self.num_graphs = 0
        self.seconds = 0.0
        self._emit = emit
        self._is_running = False
        self._reports = True
        self._forwards: dict[type, Forward] = {}
        # torch keeps a backend for the rest of the process.
        self._backend = partial(_compile_graph, weakref.WeakMethod(self._graph_started))
        layers = [module for module in model.get_decoder().modules() if isinstance(module, GradientCheckpointingLayer)]
        if not layers:
            self.enabled = False
            emit(warning(f"{self.name}: the layers of {model.config.model_type} models are unknown; they stay plain"))
        for layer in layers:
            layer_forward(layer).compiled = self

    @property
    def is_used(self) -> bool:
        return self.enabled and self._is_running

    @contextmanager
    def running(self) -> Iterator[None]:
        """Makes the layers run compiled, if this path is enabled."""
        if not self.enabled or self._is_running:
            yield
            return
        graphs = self.num_graphs
        self._is_running = True
        try:
            with _compiler_settings():
                yield
        finally:
            self._is_running = False
        self._report_new_graphs(graphs)

    @contextmanager
    def one_report(self) -> Iterator[None]:
        """Reports the graphs of all passes inside with one message."""
        graphs = self.num_graphs
        self._reports = False
        try:
            yield
        finally:
            self._reports = True
        self._report_new_graphs(graphs)

    def of(self, layer: Any) -> Forward:
        kind = type(layer)
        if kind not in self._forwards:
            self._forwards[kind] = torch.compile(
                _own_code(_call_layer),
                backend=self._backend,
                fullgraph=True,
                dynamic=True,
            )
        return partial(self._call, self._forwards[kind], layer)

    def _call(
        self,
        forward: Forward,
        layer: Any,
        *args: Any,
        **named: Any,
    ) -> Any:
        # A backward pass recomputes layers outside `running`. A graph compiled there must save the same tensors.
        with nullcontext() if self._is_running else _compiler_settings():
            return forward(layer, *args, **named)

    def attempt(self, work: Callable[[], Any]) -> tuple[Any] | None:
        graphs = self.num_graphs
        started = time.monotonic()
        try:
            result = work()
        except Exception as error:
            if not _is_compiler_error(error) or is_out_of_memory(error):
                raise
            self.enabled = False
            reason = first_line(getattr(error, "inner_exception", error))
            self._emit(warning(f"{self.name}: an error ({reason}); the plain path is used"))
            return None
        if self.num_graphs > graphs:
            self.seconds += time.monotonic() - started
        return (result,)

    def _graph_started(self) -> None:
        self._emit(Progress(description=DESCRIPTION, done=self.num_graphs, total=self.num_graphs + 1))
        self.num_graphs += 1

    def _report_new_graphs(self, graphs_before: int) -> None:
        if self.num_graphs == graphs_before or not self.enabled or not self._reports:
            return
        self._emit(Progress(description=DESCRIPTION, done=self.num_graphs, total=self.num_graphs))
        noun = "graph" if self.num_graphs == 1 else "graphs"
        self._emit(LogMessage(message=f"layers compiled in {self.seconds:.0f} s: {self.num_graphs} {noun}"))


def _compile_graph(
    started: Callable[[], Callable[[], None] | None],
    graph: Any,
    inputs: Any,
) -> Any:
    """The backend of `torch.compile`."""
    report = started()
    if report is not None:
        report()
    compiler: Any = torch._dynamo.lookup_backend(BACKEND)
    if BACKEND != "inductor":
        return compiler(graph, inputs)
    return compiler(graph, inputs, config_patches=inductor_options())


@contextmanager
def _compiler_settings() -> Iterator[None]:
    """Sets options of torch for the time of a pass: many graphs of a function are allowed, numbers such as a scaling
    are constants, dimensions that happen to have the same size are different ones, and the graph of a backward pass is
    compiled with that of the forward pass, where an error can still be caught."""
    dynamo_config: Any = torch._dynamo.config
    shape_config: Any = torch.fx.experimental._config
    autograd_config: Any = torch._functorch.config
    with ExitStack() as settings:
        settings.enter_context(dynamo_config.patch(recompile_limit=MAX_GRAPHS, specialize_float=True))
        settings.enter_context(fewer_saved_activations())
        settings.enter_context(shape_config.patch(use_duck_shape=False))
        if hasattr(autograd_config, "force_non_lazy_backward_lowering"):
            settings.enter_context(autograd_config.patch(force_non_lazy_backward_lowering=True))
        yield


def _call_layer(
    layer: Any,
    *args: Any,
    **named: Any,
) -> Any:
    return type(layer).forward(layer, *args, **named)


def _own_code(function: Forward) -> Forward:
    """Returns a copy of a function with a code object of its own: torch stores graphs, and limits their number, by code
    object."""
    assert isinstance(function, types.FunctionType), "a function, not another callable object"
    return types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
    )


def _is_compiler_error(error: Exception) -> bool:
    modules = {kind.__module__ for kind in type(error).__mro__}
    return any(module.startswith(("torch._dynamo.", "torch._inductor.")) for module in modules)
