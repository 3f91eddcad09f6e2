"""Decoding steps as CUDA graphs: the kernels of a step are launched at once, without Python.

Each number of slots and columns has its own graph, of which all share one memory pool. A kind of step runs plain the
first time, as the warm-up that a capture needs, and is captured when it is needed again. The first plain step of a
rollout raises an error at any operation that waits for the GPU, because such a step cannot be captured, and a capture
that fails can leave CUDA in a state that is not defined. The first graph is compared with the plain step. A step that
cannot be captured, or that computes something else, stays plain, with one warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch

from lowrank_tune.errors import first_line
from lowrank_tune.events import Emit, warning
from lowrank_tune.generation.decode_steps import BufferedSteps
from lowrank_tune.model.autocast_cache import without_autocast_cache
from lowrank_tune.model.decoding_options import DecodingOptions
from lowrank_tune.model.oom import free_traceback, is_out_of_memory

NAME = "CUDA graphs of decoding"
MAX_GRAPHS = 8
"""Graphs that exist at once. Sequences grow, so that few kinds of steps return after others."""
GRAPH_BYTES = 32 << 20
"""Memory of the driver for one graph, outside of torch's allocator. vLLM reports 24 to 28 MiB for a graph of a whole
decoding step."""
LOGP_TOLERANCE = 1e-2
"""Difference of log-probs, in nats, that is allowed between a graph and the plain step on the same device."""
ROWS_PER_OTHER_TOKEN = 8
"""One token of so many may differ: a number near the border of two tokens draws either."""

Run = Callable[[], None]
Kind = tuple[int, int]
"""Slots and columns of a step."""


class Graph(Protocol):
    """A captured step."""

    def replay(self) -> None:
        """Runs the step once."""


class Capture(Protocol):
    """Makes graphs."""

    def check(self, run: Run) -> None:
        """Runs the function, and raises an exception at an operation that cannot be captured."""

    def __call__(self, run: Run) -> Graph:
        """Returns a graph of the function, which is not run."""


class StepGraphs:
    """The graphs of the steps of one rollout. If graphs cannot be used, `options.cuda_graphs` is False afterwards, so
    that no later rollout tries again. Without memory for a graph the steps of this rollout are plain."""

    def __init__(
        self,
        capture: Capture,
        options: DecodingOptions,
        emit: Emit,
    ) -> None:
        self._capture: Capture | None = capture
        self._options = options
        self._emit = emit
        self._is_compared = False
        self._seen = set[Kind]()
        self._graphs: dict[Kind, Graph] = {}
        """The graphs, the one that was used last at the end."""

    def step(
        self,
        steps: BufferedSteps,
        rows: int,
        width: int,
    ) -> None:
        """Runs a step of the first `rows` slots over `width` columns."""
        kind = (rows, width)
        run = partial(steps.step, rows, width)
        if self._capture is None or not self._options.cuda_graphs:
            run()
        elif kind in self._graphs:
            self._replay(kind)
        elif kind not in self._seen:
            self._run_first(self._capture, run)
            self._seen.add(kind)
        else:
            graph = self._capture_step(self._capture, run)
            if graph is None:
                run()
            elif self._is_compared:
                self._keep(kind, graph)
                self._replay(kind)
            elif _is_equal(steps, rows, graph, run):
                self._is_compared = True
                self._keep(kind, graph)
            else:
                self._disable("other tokens than those of the plain step")

    def _replay(self, kind: Kind) -> None:
        self._graphs[kind] = graph = self._graphs.pop(kind)
        graph.replay()
        self._options.num_replays += 1

    def _keep(
        self,
        kind: Kind,
        graph: Graph,
    ) -> None:
        """Stores a graph, in place of the one that was not used for the longest time."""
        if len(self._graphs) == MAX_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        self._graphs[kind] = graph

    def _run_first(
        self,
        capture: Capture,
        run: Run,
    ) -> None:
        """Runs a kind of step plain; the first one of the rollout with a check."""
        if self._seen:
            run()
            return
        try:
            capture.check(run)
        # Raised before the step changes its buffers, so that it can be run again.
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self._disable(f"an error ({first_line(_root_cause(error))})")
            run()

    def _capture_step(
        self,
        capture: Capture,
        run: Run,
    ) -> Graph | None:
        """Returns a graph of the step, None if there is none."""
        try:
            return capture(run)
        # CUDA raises errors of several classes for operations that cannot be captured.
        except Exception as error:
            if is_out_of_memory(error):
                free_traceback(error)
                self._free()
            else:
                self._disable(f"an error ({first_line(_root_cause(error))})")
        return None

    def _free(self) -> None:
        self._graphs.clear()
        self._capture = None

    def _disable(self, reason: str) -> None:
        self._options.cuda_graphs = False
        self._free()
        self._emit(warning(f"{NAME}: {reason}; the plain path is used"))


def _root_cause(error: Exception) -> Exception:
    """Returns the first exception: ending a capture that failed raises another one."""
    while isinstance(error.__context__, Exception):
        error = error.__context__
    return error


def _is_equal(
    steps: BufferedSteps,
    rows: int,
    graph: Graph,
    run: Run,
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

    def check(self, run: Run) -> None:
        """Runs the function, and raises RuntimeError at an operation that waits for the GPU."""
        before = torch.cuda.get_sync_debug_mode()
        # torch warns that the mode is a prototype.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def __call__(self, run: Run) -> Graph:
        graph = torch.cuda.CUDAGraph()
        # torch does not leave the stream of a capture that fails at its end.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            without_autocast_cache(),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            run()
        self._pool = graph.pool()
        return graph
