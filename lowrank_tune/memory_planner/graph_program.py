"""Runs a traced graph on meta tensors as its compiled code would run: a tensor exists from the kernel that writes it to
the last that reads it, and values inside a fused kernel never exist."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from lowrank_tune.memory_planner.fused_groups import FusedGroups, Unit
from lowrank_tune.memory_planner.graph_nodes import is_tuple_output, is_view, name_of, storage_of
from lowrank_tune.memory_planner.kernel_costs import Kernel, KernelKind, stored_bytes
from lowrank_tune.memory_planner.kernel_counter import KernelCounter
from lowrank_tune.memory_planner.layer_graphs import results_of

LOOKUPS = ("index", "gather", "index_select")
"""Operators that read a part of their first input."""


@dataclass(frozen=True)
class Step:
    """A kernel, or a view. `kernel` is that of a group of operations, None for one operation, which is run as it is.
    `created` are the nodes that have a value afterwards, `freed` those that nothing reads later. A group writes some
    outputs into the memory of what it frees: of `overwritten`."""

    created: tuple[Node, ...]
    reads: tuple[Node, ...]
    kernel: Kernel | None = None
    freed: tuple[Node, ...] = ()
    overwritten: tuple[Node, ...] = ()


class GraphProgram:
    """The steps of a graph."""

    def __init__(self, module: GraphModule) -> None:
        self.results = results_of(module)
        self._given = [node for node in module.graph.nodes if node.op == "placeholder"]
        self._constants = [node for node in module.graph.nodes if node.op == "get_attr"]
        self.steps = _with_freed(_Scheduler(module, self.results).steps(), self.results)
        used = {node for step in self.steps for node in step.reads}
        self._unused = [node for node in self._given if node not in used and node not in self.results]

    def run(self, inputs: list[Any], counter: KernelCounter | None) -> list[Any]:
        """Returns the results, and empties `inputs`, so that an input is freed after its last use. `counter` counts the
        kernels of groups; other operations are counted by the modes that are entered."""
        values: dict[Node, Any] = dict(zip(self._given, inputs, strict=True))
        inputs.clear()
        for node in self._unused:
            del values[node]
        for node in self._constants:
            values[node] = _empty(node)
        for step in self.steps:
            if step.kernel is None:
                (node,) = step.created
                values[node] = _call(node, values)
            else:
                for node in step.overwritten:
                    del values[node]
                for node in step.created:
                    values[node] = _empty(node)
                if counter is not None:
                    counter.add(step.kernel)
            for node in step.freed:
                values.pop(node, None)
        return [None if node is None else values[node] for node in self.results]


def _with_freed(steps: Sequence[Step], results: Sequence[Any]) -> tuple[Step, ...]:
    """Returns the steps with what each frees: what no later step reads, and no result is."""
    kept = set(results)
    reversed_steps = []
    for step in reversed(steps):
        freed = tuple(node for node in dict.fromkeys((*step.created, *step.reads)) if node not in kept)
        kept.update(freed)
        reversed_steps.append(replace(step, freed=freed, overwritten=tuple(_overwritten(step, freed))))
    return tuple(reversed(reversed_steps))


def _overwritten(step: Step, freed: Sequence[Node]) -> Iterator[Node]:
    """Yields the inputs of a group whose memory its outputs take, as in inductor's code: an intermediate result of the
    same layout that nothing reads later. What was saved for the backward pass is not overwritten here, although torch
    does it in some cases."""
    if step.kernel is None:
        return
    layouts = [_layout(node) for node in step.created]
    for node in freed:
        if node.op == "call_function" and node in step.reads and _layout(node) in layouts:
            layouts.remove(_layout(node))
            yield node


def _layout(node: Node) -> tuple[Any, ...]:
    value = node.meta["val"]
    if not value.is_contiguous():
        return (value.dtype, value.shape, value.stride())
    # A matrix product has rows of all tokens, and the operations around it have them in the shape of a batch.
    return (value.dtype, value.numel(), value.shape[-1:])


class _Scheduler:
    """Makes the steps of a graph. Views are made when an operation that is no part of a group reads them."""

    def __init__(self, module: GraphModule, results: Sequence[Any]) -> None:
        self.units = FusedGroups(module.graph).units
        self.results = [node for node in results if node is not None]
        self.read_outside = {storage_of(node) for node in self.results}
        for unit in self.units:
            self.read_outside.update(_inputs_of(unit))
        self._made = list[Step]()
        self._has_value = set[Node]()

    def steps(self) -> list[Step]:
        for unit in self.units:
            if unit.is_group:
                self._add_group(unit)
            else:
                self._add_call(unit.nodes[0])
        for node in self.results:
            self._add_views(node)
        return self._made

    def _add_group(self, unit: Unit) -> None:
        inputs = _inputs_of(unit)
        outputs = [node for node in _outputs_of(unit) if node in self.read_outside]
        read = sum(_bytes_read(storage, unit) for storage in inputs)
        written = sum(stored_bytes(node.meta["val"]) for node in outputs)
        self._append(Step(tuple(outputs), tuple(inputs), Kernel(KernelKind.ELEMENTWISE, read + written)))

    def _add_call(self, node: Node) -> None:
        for given in node.all_input_nodes:
            self._add_views(given)
        self._append(Step((node,), tuple(node.all_input_nodes)))
        for user in node.users:
            # At once, so that the other outputs are freed.
            if is_tuple_output(user) and user in self.read_outside:
                self._append(Step((user,), (node,)))

    def _add_views(self, node: Node) -> None:
        if is_view(node) and node not in self._has_value:
            source = node.all_input_nodes[0]
            self._add_views(source)
            self._append(Step((node,), (source,)))

    def _append(self, step: Step) -> None:
        self._made.append(step)
        self._has_value.update(step.created)


def _inputs_of(unit: Unit) -> list[Node]:
    """Returns the tensors in memory that a unit reads, without views of them."""
    own = set(_outputs_of(unit))
    given = (storage_of(given) for node in unit.nodes for given in node.all_input_nodes)
    return list(dict.fromkeys(storage for storage in given if storage not in own))


def _outputs_of(unit: Unit) -> Iterator[Node]:
    """Yields the tensors that a unit computes."""
    for node in unit.nodes:
        yield node
        for user in node.users:
            if is_tuple_output(user):
                yield user


def _bytes_read(storage: Node, unit: Unit) -> int:
    """Returns the bytes of a tensor that a group reads: those of all its views, at most the whole tensor."""
    views = dict[Node, int]()
    for node in unit.nodes:
        for number, given in enumerate(node.all_input_nodes):
            if storage_of(given) is storage:
                is_lookup = number == 0 and name_of(node) in LOOKUPS
                views[given] = stored_bytes((node if is_lookup else given).meta["val"])
    return min(sum(views.values()), stored_bytes(storage.meta["val"]))


def _empty(node: Node) -> Tensor:
    value = node.meta["val"]
    return torch.empty_strided(
        value.shape,
        value.stride(),
        dtype=value.dtype,
        device="meta",
    )


def _call(node: Node, values: dict[Node, Any]) -> Any:
    args = map_arg(node.args, values.__getitem__)
    kwargs = map_arg(node.kwargs, values.__getitem__)
    return node.target(*args, **kwargs)  # type: ignore[operator]
