"""Decoding steps as CUDA graphs: the kernels of a step are launched at once, without Python.

Each number of slots and columns has its own graph, of which all share one memory pool. A kind of step runs plain the
first time, as the warm-up that a capture needs, and is captured when it is needed again. The first graph is compared
with the plain step; a step that cannot be captured, or that computes something else, is left plain, with one warning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from lowrank_tune.errors import first_line
from lowrank_tune.events import Emit, warning
from lowrank_tune.generation.decode_steps import BufferedSteps
from lowrank_tune.model.decoding_options import DecodingOptions
from lowrank_tune.model.oom import is_out_of_memory

NAME = "CUDA graphs of decoding"
LOGP_TOLERANCE = 1e-2
"""Difference of log-probs, in nats, that is allowed between a graph and the plain step on the same device."""
ROWS_PER_OTHER_TOKEN = 8
"""One token of so many may differ: a number near the border of two tokens draws either."""


class Graph(Protocol):
    """A captured step."""

    def replay(self) -> None:
        """Runs the step once."""


Capture = Callable[[Callable[[], None]], Graph]


class StepGraphs:
    """The graphs of the steps of one rollout. `capture` makes a graph of a function without running it. If graphs
    cannot be used, `options.cuda_graphs` is False afterwards, so that no later rollout tries again."""

    def __init__(
        self,
        capture: Capture,
        options: DecodingOptions,
        emit: Emit,
    ) -> None:
        self.num_graphs = 0
        self._capture = capture
        self._options = options
        self._emit = emit
        self._graphs: dict[tuple[int, int], Graph | None] = {}

    def step(
        self,
        steps: BufferedSteps,
        rows: int,
        width: int,
    ) -> None:
        """Runs a step of the first `rows` slots over `width` columns."""
        key = (rows, width)
        if not self._options.cuda_graphs or key not in self._graphs:
            self._graphs[key] = None
            steps.step(rows, width)
            return
        graph = self._graphs[key]
        if graph is not None:
            graph.replay()
            return
        self._capture_and_run(steps, rows, width)

    def _capture_and_run(
        self,
        steps: BufferedSteps,
        rows: int,
        width: int,
    ) -> None:
        def run() -> None:
            steps.step(rows, width)

        try:
            graph = self._capture(run)
        # CUDA raises errors of several classes for operations that cannot be captured.
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self._disable(f"an error ({first_line(error)})")
            run()
            return
        if self.num_graphs == 0 and not _is_equal(steps, rows, graph, run):
            self._disable("other tokens than those of the plain step")
            return
        self._graphs[rows, width] = graph
        if self.num_graphs > 0:
            graph.replay()
        self.num_graphs += 1

    def _disable(self, reason: str) -> None:
        self._options.cuda_graphs = False
        self._graphs.clear()
        self._emit(warning(f"{NAME}: {reason}; the plain path is used"))


def _is_equal(
    steps: BufferedSteps,
    rows: int,
    graph: Graph,
    run: Callable[[], None],
) -> bool:
    """Runs a step by the graph and plain, from the same buffers, which then are as after the plain step. Returns
    whether both draw the same tokens with the same log-probs, but for a few tokens that rounding changes."""
    index = steps.step_index.clone()
    buffers = (steps.token_ids, steps.position_ids, steps.step_index, steps.drawn)
    before = [buffer.clone() for buffer in buffers]
    graph.replay()
    graph_tokens, graph_logps = steps.drawn[index, :rows].clone().unbind(-1)
    for buffer, values in zip(buffers, before, strict=True):
        buffer.copy_(values)
    run()
    tokens, logps = steps.drawn[index, :rows].unbind(-1)
    is_other_token = tokens != graph_tokens
    is_close = (logps - graph_logps).abs() <= LOGP_TOLERANCE
    return int(is_other_token.sum()) <= rows // ROWS_PER_OTHER_TOKEN and bool((is_close | is_other_token).all())


class CudaCapture:
    """Captures functions as CUDA graphs that share one memory pool."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Callable[[], None]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        with without_autocast_cache(), torch.cuda.graph(graph, pool=self._pool):
            run()
        self._pool = graph.pool()
        return graph


@contextmanager
def without_autocast_cache() -> Iterator[None]:
    """Disables autocast's cache of casts: they would be in the memory of a graph."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
