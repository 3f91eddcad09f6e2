"""Which operations of a traced graph run in one kernel.

Matrix products, attention, bitsandbytes' operators and all operators that are unknown here are kernels of their own.
Views are none. Pointwise operations, and reductions over the last dimensions, are *fusable*: a group of them that are
connected by their data, directly or by views, is one kernel, which reads each of its inputs once and writes once each
output that another kernel or the graph's result needs.

Groups are formed in the order of the graph: an operation joins the groups of its inputs, the last input first, unless a
path from the group through another kernel leads back to the operation (a cycle, so that no order of kernels would
exist). This is less than what inductor fuses: operations that only share an input stay apart, and a value that two
kernels need is written by the first, although inductor computes cheap ones twice.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from torch.fx import Graph, Node

from lowrank_tune.memory_planner.graph_nodes import is_fusable, is_view, source_of


@dataclass
class Unit:
    """A kernel: one node, or a group of fusable nodes. Views belong to the unit whose output they read."""

    nodes: list[Node]
    is_group: bool
    inputs: set[int] = field(default_factory=set)
    """Numbers of the units that it reads."""


class FusedGroups:
    """The kernels of a graph: `units`, each later than what it reads."""

    def __init__(self, graph: Graph) -> None:
        self._units = dict[int, Unit]()
        self._unit_of = dict[Node, int]()
        for number, node in enumerate(graph.nodes):
            if node.op == "call_function" and not is_view(node):
                self._add(number, node)

    @cached_property
    def units(self) -> list[Unit]:
        """All kernels in an order in which they can run, close to that of the graph."""
        waiting = {number: len(unit.inputs) for number, unit in self._units.items()}
        readers = dict[int, list[int]]()
        for number, unit in self._units.items():
            for source in unit.inputs:
                readers.setdefault(source, []).append(number)
        ready = [number for number, count in waiting.items() if not count]
        heapq.heapify(ready)
        ordered = []
        while ready:
            number = heapq.heappop(ready)
            ordered.append(self._units[number])
            for reader in readers.get(number, ()):
                waiting[reader] -= 1
                if not waiting[reader]:
                    heapq.heappush(ready, reader)
        assert len(ordered) == len(self._units), "the kernels of a graph have an order"
        return ordered

    def _add(self, number: int, node: Node) -> None:
        """Adds a node as a unit, and joins it with the groups that it reads. A unit has the number of its last node."""
        sources = [self._unit_of[source] for source in _sources(node) if source in self._unit_of]
        unit = Unit([node], is_fusable(node), set(sources))
        self._units[number] = unit
        self._unit_of[node] = number
        if not unit.is_group:
            return
        for source in sorted(set(sources), reverse=True):
            if self._units[source].is_group and not self._is_read_between(source, number):
                self._join(source, number)

    def _is_read_between(self, source: int, number: int) -> bool:
        """Returns whether `number` reads `source` through another unit."""
        stack = [other for other in self._units[number].inputs if other != source]
        seen = set(stack)
        while stack:
            other = stack.pop()
            if other == source:
                return True
            for earlier in self._units[other].inputs:
                if earlier not in seen:
                    seen.add(earlier)
                    stack.append(earlier)
        return False

    def _join(self, source: int, number: int) -> None:
        """Moves the nodes of `source` into `number`."""
        group = self._units[number]
        moved = self._units.pop(source)
        group.nodes = moved.nodes + group.nodes
        group.inputs = (group.inputs | moved.inputs) - {source, number}
        for node in moved.nodes:
            self._unit_of[node] = number
        for unit in self._units.values():
            if source in unit.inputs:
                unit.inputs = unit.inputs - {source} | {number}


def _sources(node: Node) -> Iterator[Node]:
    for given in node.all_input_nodes:
        yield source_of(given)
