"""The forward and backward graphs into which `torch.compile` splits a function, without compiling them.

AOTAutograd traces the function on tensors without data, with inductor's decompositions for the options of a run, and
its min-cut partitioner decides what is saved for the backward pass and what is computed again there: pointwise
operations that cost less than reading a saved tensor (`model/saved_activations.py`). Shapes are static here. A run
compiles with a dynamic length, for which the partitioner decides with the sizes of the first rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch._inductor.config
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.overrides import _get_current_function_mode_stack, _pop_mode_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from lowrank_tune.model.compiled_layers import inductor_options
from lowrank_tune.model.saved_activations import fewer_saved_activations

try:
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table
except ImportError:
    aot_function = None  # type: ignore[assignment]


@dataclass(frozen=True)
class LayerGraphs:
    """The graphs of a function. `forward` returns `num_outputs` outputs and then what is saved; `backward`, None
    without autograd, takes what is saved and the gradients of the outputs, and returns a gradient for each input."""

    forward: GraphModule
    backward: GraphModule | None
    num_outputs: int

    @property
    def saved(self) -> list[Any]:
        """The nodes of the forward graph that are saved for the backward graph."""
        return results_of(self.forward)[self.num_outputs :]


class _GraphsExist(Exception):
    """Ends AOTAutograd before it compiles anything."""


def trace_graphs(function: Callable[..., Any], inputs: Sequence[Tensor], num_weights: int = 0) -> LayerGraphs:
    """Returns the graphs of a function of tensors, the first `num_weights` of which exist as long as the model, so that
    saving them is free. Raises RuntimeError if this version of torch has another tracer, and
    whatever torch raises for a function that cannot be traced."""
    if aot_function is None:
        raise RuntimeError("this version of torch has no AOTAutograd")
    found = list[LayerGraphs]()
    inductor_config: Any = torch._inductor.config
    with inductor_config.patch(inductor_options()), _without_modes(), fewer_saved_activations():
        traced = aot_function(
            function,
            partial(_keep_inference_graph, found),
            partition_fn=partial(_keep_partition, found, num_weights),
            decompositions=select_decomp_table(),
        )
        try:
            traced(*inputs)
        except _GraphsExist:
            return found[0]
    raise RuntimeError("AOTAutograd traced no graph")


def results_of(module: GraphModule) -> list[Any]:
    """Returns the nodes that a graph returns; None for an input without a gradient."""
    output: Node = next(iter(reversed(module.graph.nodes)))
    return list(output.args[0])  # type: ignore[arg-type]


def _keep_partition(
    found: list[LayerGraphs],
    num_weights: int,
    joint: GraphModule,
    joint_inputs: Any,
    **options: Any,
) -> Any:
    """The partitioner that AOTAutograd calls if a gradient is needed."""
    options["static_lifetime_input_indices"] = list(range(num_weights))
    forward, backward = min_cut_rematerialization_partition(joint, joint_inputs, **options)
    found.append(LayerGraphs(forward, backward, options["num_fwd_outputs"]))
    raise _GraphsExist


def _keep_inference_graph(
    found: list[LayerGraphs],
    module: GraphModule,
    _: Any,
) -> Any:
    """The compiler that AOTAutograd calls if no gradient is needed."""
    found.append(LayerGraphs(module, None, len(results_of(module))))
    raise _GraphsExist


@contextmanager
def _without_modes() -> Iterator[None]:
    """Leaves all modes of the simulation: AOTAutograd's own tensors are not a part of it."""
    with ExitStack() as left:
        for _ in _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
            left.enter_context(_pop_mode_temporarily())
        left.enter_context(_disable_current_modes())
        yield
