"""Compiled layers of the planner: kernels and bytes are those counted by hand, what is saved is what torch saves, and
no kernel is started before its inputs exist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_kernel_counter import counter_of, meta, spec_of
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from lowrank_tune.assembly.model import compiles_layers
from lowrank_tune.config import load_any
from lowrank_tune.events import Event, LogMessage, ignore_event
from lowrank_tune.memory_planner import cached_simulation, check_fit, compiled_layers, step_costs, update_times
from lowrank_tune.memory_planner.allocation_tracker import AllocationTracker
from lowrank_tune.memory_planner.cached_simulation import simulation_key
from lowrank_tune.memory_planner.compiled_layers import LayerProgram, LayerPrograms, plans_compiled_layers
from lowrank_tune.memory_planner.extrapolation import Peaks
from lowrank_tune.memory_planner.fake_device import FakeDeviceMode
from lowrank_tune.memory_planner.fused_groups import FusedGroups
from lowrank_tune.memory_planner.graph_nodes import is_fusable, is_view
from lowrank_tune.memory_planner.graph_program import GraphProgram
from lowrank_tune.memory_planner.kernel_costs import Kernel, KernelKind
from lowrank_tune.memory_planner.kernel_counter import KernelCounts
from lowrank_tune.memory_planner.layer_graphs import trace_graphs
from lowrank_tune.memory_planner.meta_model import Layer, layers_of
from lowrank_tune.memory_planner.planned_gpu import gpu_named
from lowrank_tune.memory_planner.planner import plan_of
from lowrank_tune.memory_planner.roofline import phase_time
from lowrank_tune.memory_planner.simulation import SimulationSpec, count_kernels, simulate
from lowrank_tune.memory_planner.specs import simulation_specs
from lowrank_tune.memory_planner.traced_layer import LayerCall
from lowrank_tune.memory_planner.update_times import fit_update_times, seconds_with
from lowrank_tune.model import decoder_layers
from lowrank_tune.model.compiled_layers import inductor_options

TOKENS, WIDTH, INNER = 64, 32, 96
HALF = 2
FP32 = 4


def block(x: Tensor, norm: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """A norm, two products, and SwiGLU."""
    wide = x.float()
    hidden = norm * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    return F.silu(hidden @ gate) * (hidden @ up)


def block_inputs() -> list[Tensor]:
    shapes = ((TOKENS, WIDTH), (WIDTH,), (WIDTH, INNER), (WIDTH, INNER))
    return [meta(*shape) for shape in shapes]


def kernels_of(program: GraphProgram, inputs: list[Tensor]) -> dict[Kernel, float]:
    counter = counter_of()
    with counter:
        program.run(inputs, counter)
    (found,) = counter.counts.values()
    return dict(found)


def test_pointwise_operations_between_products_are_one_kernel() -> None:
    """Four kernels: the norm, two products, and SwiGLU. Each reads its inputs once and writes its output once."""
    inputs = block_inputs()
    found = kernels_of(GraphProgram(trace_graphs(block, inputs).forward), block_inputs())
    norm = HALF * (2 * TOKENS * WIDTH + WIDTH)
    product = HALF * (TOKENS * WIDTH + WIDTH * INNER + TOKENS * INNER)
    assert found == {
        Kernel(KernelKind.ELEMENTWISE, norm): 1,
        Kernel(KernelKind.GEMM, product, 2 * TOKENS * WIDTH * INNER): 2,
        Kernel(KernelKind.ELEMENTWISE, HALF * 3 * TOKENS * INNER): 1,
    }


def test_what_a_group_writes_for_the_backward_pass_counts() -> None:
    """The input, both products and one factor per token are saved. SwiGLU's backward reads these and the gradient, and
    writes two gradients; that of the norm reads the input, the factor and two products."""
    inputs = block_inputs()
    inputs[0].requires_grad_()
    program = LayerProgram(trace_graphs(block, inputs, num_weights=0), torch.utils._pytree.tree_structure([0]))
    saved = {node.name: node for node in program.graphs.saved}
    sizes = sorted(tuple(node.meta["val"].shape) for node in saved.values() if node.meta["val"].ndim == 2)
    assert sizes.count((TOKENS, INNER)) == 2 and sizes.count((TOKENS, 1)) == 1
    assert program.backward is not None
    values = [node.meta["val"] for node in program.graphs.saved]
    given = [meta(*value.shape, dtype=value.dtype) for value in values]
    found = kernels_of(program.backward, [*given, meta(TOKENS, INNER)])
    assert found[Kernel(KernelKind.ELEMENTWISE, HALF * 5 * TOKENS * INNER)] == 1
    norm = HALF * (4 * TOKENS * WIDTH + WIDTH) + FP32 * TOKENS
    assert found[Kernel(KernelKind.ELEMENTWISE, norm)] == 1
    assert sum(found.values()) == 4


def test_a_value_inside_a_kernel_is_never_allocated() -> None:
    """At the peak of a forward pass: the hidden states, both products, and the output, which takes the memory of one of
    them."""
    program = GraphProgram(trace_graphs(block, block_inputs()).forward)
    tracker = AllocationTracker("cpu", vocabulary=7)
    inputs = block_inputs()
    with tracker:
        program.run(inputs, None)
    (peak,) = tracker.peaks.values()
    assert peak["activations"] == HALF * (TOKENS * WIDTH + 2 * TOKENS * INNER)


def test_dropout_is_the_operator_that_a_run_calls() -> None:
    """A run compiles with torch's own random numbers. Saved are the input, for the gradient of `direct`, and of dropout
    its output, which cannot be computed again, and its mask."""

    def adapter(direct: Tensor, lora: Tensor, x: Tensor) -> Tensor:
        return x @ direct + F.dropout(x, 0.1, training=True) @ lora

    inputs = [meta(*shape).requires_grad_() for shape in ((WIDTH, INNER), (WIDTH, INNER), (TOKENS, WIDTH))]
    graphs = trace_graphs(adapter, inputs, num_weights=2)
    assert torch.ops.aten.native_dropout.default in {node.target for node in graphs.forward.graph.nodes}
    saved = [node.meta["val"] for node in graphs.saved]
    stored = [value.nbytes for value in saved if value.shape != (WIDTH, INNER)]
    assert sorted(stored) == [TOKENS * WIDTH * size for size in (1, HALF, HALF)]


def test_two_operations_with_a_product_between_them_are_two_kernels() -> None:
    def around(x: Tensor, weight: Tensor) -> Tensor:
        first = torch.relu(x)
        return first + first @ weight

    inputs = [meta(WIDTH, WIDTH), meta(WIDTH, WIDTH)]
    found = kernels_of(GraphProgram(trace_graphs(around, inputs).forward), inputs)
    square = HALF * WIDTH * WIDTH
    assert found == {
        Kernel(KernelKind.ELEMENTWISE, 2 * square): 1,
        Kernel(KernelKind.GEMM, 3 * square, 2 * WIDTH**3): 1,
        Kernel(KernelKind.ELEMENTWISE, 3 * square): 1,
    }


OPERATIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor, torch.ops.aten.mm.default, torch.ops.aten.t.default)


def graph_of(choices: list[tuple[int, int, int]]) -> GraphModule:
    """A graph of square matrices: each choice is an operation and the places of its inputs among the nodes so far."""
    graph = Graph()
    nodes = [graph.placeholder("x"), graph.placeholder("y")]
    for operation, first, second in choices:
        target = OPERATIONS[operation]
        count = 1 if target is torch.ops.aten.t.default else 2
        nodes.append(graph.call_function(target, tuple(nodes[place % len(nodes)] for place in (first, second))[:count]))
    graph.output((nodes[-1],))
    for node in nodes:
        node.meta["val"] = meta(4, 4, dtype=torch.float64)
    return GraphModule(nn.Module(), graph)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=25))
def test_kernels_run_in_an_order_in_which_their_inputs_exist(choices: list[tuple[int, int, int]]) -> None:
    check_order(choices)


def test_a_group_does_not_join_one_that_it_reads_through_a_group_of_earlier_operations() -> None:
    """The sum of `v` and `s` must stay apart from `s`: `v` reads `W`, which reads the group of `p1` and `u`, and `u`
    reads a product of `s`. `W` is earlier than `s`."""
    x, y, p1, w, s, m, _u, v = range(8)
    add, multiply, product = range(3)
    check_order(
        [
            (add, x, y),
            (product, p1, y),
            (multiply, x, x),
            (product, s, y),
            (add, p1, m),
            (product, w, y),
            (add, v, s),
        ]
    )


def check_order(choices: list[tuple[int, int, int]]) -> None:
    """Each operation is in one kernel, a group has fusable operations alone, and all inputs of a kernel are computed by
    kernels before it or in it, in order."""
    module = graph_of(choices)
    operations = [node for node in module.graph.nodes if node.op == "call_function" and not is_view(node)]
    done = set[Node]()
    numbers = []
    for number, unit in enumerate(FusedGroups(module.graph).units):
        assert all(map(is_fusable, unit.nodes)) or len(unit.nodes) == 1
        for node in unit.nodes:
            for given_node in node.all_input_nodes:
                source = given_node
                while is_view(source):
                    source = source.all_input_nodes[0]
                assert source.op == "placeholder" or source in done
            done.add(node)
            numbers.append((node, number))
    assert done == set(operations) and len(numbers) == len(operations)


class TinyLayer(nn.Module):
    """A norm and a projection with LoRA, in fp32: as a decoder layer, without attention."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.RMSNorm(WIDTH)
        self.gate = nn.Linear(WIDTH, INNER, bias=False)
        self.up = nn.Linear(WIDTH, INNER, bias=False)
        self.down = nn.Linear(INNER, WIDTH, bias=False)
        self.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(8, INNER))
        self.lora_b = nn.Parameter(torch.randn(WIDTH, 8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(x)
        inner = F.silu(self.gate(hidden)) * self.up(hidden)
        return x + self.down(inner) + 2.0 * F.linear(F.linear(self.dropout(inner), self.lora_a), self.lora_b)


@pytest.mark.slow
@pytest.mark.parametrize(("fewer", "dropout"), [(False, 0.0), (True, 0.0), (True, 0.1)])
def test_saved_bytes_are_those_that_torch_saves(fewer: bool, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with the tensors that `torch.compile` itself hands to autograd, with the same partitioner."""
    from contextlib import nullcontext

    from lowrank_tune.memory_planner import layer_graphs
    from lowrank_tune.model.saved_activations import fewer_saved_activations

    context = fewer_saved_activations if fewer else nullcontext
    monkeypatch.setattr(layer_graphs, "fewer_saved_activations", context)
    layer = TinyLayer(dropout)
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    weights = {tensor.untyped_storage().data_ptr() for tensor in layer.parameters()}
    saved = dict[int, int]()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        return tensor

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager_decomp_partition", fullgraph=True)
    options: Any = torch._inductor.config
    with options.patch(inductor_options()), context(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        output = compiled(x)
    names = [name for name, _ in layer.named_parameters()]
    values = [tensor.detach().to("meta").requires_grad_(tensor.requires_grad) for tensor in layer.parameters()]

    def run(*tensors: Tensor) -> Tensor:
        named = dict(zip(names, tensors, strict=False))
        return torch.func.functional_call(layer, named, (tensors[-1],))

    inputs = [*values, x.detach().to("meta").requires_grad_()]
    graphs = trace_graphs(run, inputs, len(values))
    program = LayerProgram(graphs, torch.utils._pytree.tree_structure([0]))
    results = program.forward.run(list(inputs), None)
    stored = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in results[1:]}
    for weight in values:
        stored.pop(weight.untyped_storage()._cdata, None)
    assert sum(stored.values()) == sum(saved.values())
    assert (FP32 * TOKENS * INNER in [stored[key] for key in stored]) and output.requires_grad


class _ReadsWeight(torch.autograd.Function):
    """A product whose backward pass reads the weight of the layer, as that of a 4-bit weight does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Any) -> Tensor:
        ctx.linear = linear
        return x @ linear.weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.linear.weight, None


class ReadingLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(meta(WIDTH, WIDTH), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return _ReadsWeight.apply(x, self)  # type: ignore[no-any-return,no-untyped-call]


def test_functions_may_read_weights_in_their_backward_pass() -> None:
    layer = ReadingLayer()
    weight = layer.weight
    call = LayerCall.of(layer, (meta(TOKENS, WIDTH).requires_grad_(),), {})
    graphs, outputs = call.trace(layer, layer.forward, FakeDeviceMode(torch.device("cuda")))
    backward = LayerProgram(graphs, outputs).backward
    assert backward is not None and layer.weight is weight
    found = kernels_of(backward, [weight, meta(TOKENS, WIDTH)])
    assert [kernel.flops for kernel in found] == [2 * TOKENS * WIDTH * WIDTH]


@pytest.mark.slow
def test_a_compiled_layer_saves_less_and_starts_fewer_kernels(tmp_path: Path) -> None:
    """With the same FLOPs of products, besides the first layer's."""
    eager = replace(spec_of(tmp_path), compiled=False)
    compiled = replace(eager, compiled=True)
    kept = [[Layer(recomputed=False)] * count for count in (2, 3)]
    growth = {}
    launches = {}
    for spec in (eager, compiled):
        stored = [simulate(spec, layers, only_update=True)["update", "after"]["activations"] for layers in kept]
        growth[spec.compiled] = stored[1] - stored[0]
        counts = [sum(count_kernels(spec, layers, only_update=True)["update"].values()) for layers in kept]
        launches[spec.compiled] = counts[1] - counts[0]
    assert growth[True] < 0.65 * growth[False]
    assert launches[True] < 0.65 * launches[False]


@pytest.mark.slow
def test_the_time_of_an_update_is_that_of_all_its_kernels(tmp_path: Path) -> None:
    """Extrapolated from two and three layers of each kind, and counted with all of them."""
    gpu = gpu_named("3090")
    spec = replace(spec_of(tmp_path, 7), compiled=True)
    times = fit_update_times(spec, gpu)
    for recomputed in (0, 5):
        counts = count_kernels(spec, layers_of(spec.config, recomputed), only_update=True)["update"]
        counted = phase_time(counts, gpu).seconds / spec.sizes.tokens
        assert seconds_with(times, spec, recomputed) == pytest.approx(counted, rel=1e-3)


@pytest.mark.parametrize("overrides", [("tiny-ppo",), ("tiny-grpo", "grpo.num_iterations=3")])
def test_auto_and_the_estimate_of_hours_use_the_same_time_of_an_update(
    overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of one pass, of the two that a simulation makes. With made-up kernels."""

    def count(spec: SimulationSpec, layers: Sequence[Layer], only_update: bool = False) -> KernelCounts:
        size = 1000 * spec.sizes.tokens
        times = 2 * sum(3 if layer.recomputed else 2 for layer in layers)
        return {
            "update": {Kernel(KernelKind.ELEMENTWISE, size): times, Kernel(KernelKind.GEMM, size, 100 * size): times},
            "update of the value": {Kernel(KernelKind.ELEMENTWISE, 2 * size): times},
            "optimizer": {Kernel(KernelKind.ELEMENTWISE, size): 2},
        }

    for module in (step_costs, update_times):
        monkeypatch.setattr(module, "cached_kernels", count)
    check_times_of_an_update(*overrides)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [("tiny-ppo",), ("tiny-grpo", "grpo.num_iterations=2")])
def test_a_simulated_update_has_the_same_time_with_and_without_the_other_phases(overrides: tuple[str, ...]) -> None:
    check_times_of_an_update(*overrides)


def check_times_of_an_update(*overrides: str) -> None:
    gpu = gpu_named("3090")
    (spec,) = simulation_specs(load_any(*overrides), "cuda")
    cost = step_costs.step_costs(spec, 2, {})["update"]
    expected = phase_time(cost.kernels, gpu).seconds / cost.tokens
    assert seconds_with(fit_update_times(spec, gpu), spec, 2) == pytest.approx(expected, rel=1e-6)


def test_a_layer_that_cannot_be_traced_is_simulated_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes at every point, and the reason is kept."""
    eager = replace(spec_of(tmp_path), compiled=False)
    layers = [Layer(), Layer(recomputed=False)]

    def fail(*_: Any) -> Any:
        raise RuntimeError("another version of torch\nand more")

    monkeypatch.setattr(compiled_layers.LayerCall, "trace", fail)
    monkeypatch.setattr(decoder_layers, "_with_gradient", lambda args: args)
    compiled = replace(eager, compiled=True, programs=LayerPrograms())
    peaks = simulate(compiled, layers, only_update=True)
    plain = simulate(eager, layers, only_update=True)
    assert peaks == plain and compiled.programs.fault == "another version of torch"
    assert simulation_key(eager, layers, False) != simulation_key(replace(eager, compiled=True), layers, False)


def test_a_plan_has_a_note_if_layers_cannot_be_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a plan whose simulations are read from the cache, and the log of a run."""

    def untraced(spec: SimulationSpec, layers: Sequence[Layer], only_update: bool = False) -> Peaks:
        spec.programs.add_fault("another version of torch")
        return {("update", "backward", "last"): {"weights": 7}}

    monkeypatch.setattr(cached_simulation, "simulate", untraced)
    note = "layers are planned without the compiler: another version of torch"
    first = replace(spec_of(tmp_path), compiled=True)
    assert plan_of(first, 0, "sft").notes == (note,)
    again = replace(first, programs=LayerPrograms())
    with monkeypatch.context() as no_simulation:
        no_simulation.setattr(cached_simulation, "simulate", pytest.fail)
        assert plan_of(again, 0, "sft").notes == (note,)
    events: list[Event] = []
    check_fit(first.recipe, 24.0, events.append)
    assert f"{first.recipe.name}: {note}" in [event.message for event in events if isinstance(event, LogMessage)]


def test_an_error_in_the_program_of_a_traced_layer_is_raised() -> None:
    """Only an error of torch's tracer means that the layer is simulated plain."""
    programs = LayerPrograms()
    graphs = trace_graphs(block, block_inputs())
    assert programs.of(("traced",), lambda: (graphs, torch.utils._pytree.tree_structure([0]))) is not None

    def empty() -> Any:
        return None, torch.utils._pytree.tree_structure([0])

    with pytest.raises(AttributeError):
        programs.of(("empty",), empty)
    assert not programs.fault


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("missing", ["", "no compiler"])
@pytest.mark.parametrize("setting", ["auto", True, False])
@pytest.mark.parametrize("change", [{}, {"mlp_chunks": 2}, {"router_aux_loss_coef": 0.01}])
def test_layers_are_planned_as_they_run(
    device: str, missing: str, setting: Any, change: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU that is not in this machine has a compiler."""
    recipe = load_any("tiny-sft")
    train = recipe.train.model_copy(update={"torch_compile": setting, **change})
    recipe = recipe.model_copy(update={"train": train})
    monkeypatch.setattr("lowrank_tune.assembly.model.missing_for_compile", lambda kind: missing)
    monkeypatch.setattr(compiled_layers, "missing_for_compile", lambda kind: missing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    planned = plans_compiled_layers(recipe, torch.device(device))
    if device == "cuda":
        monkeypatch.setattr("lowrank_tune.assembly.model.missing_for_compile", lambda kind: "")
    assert planned is compiles_layers(recipe, torch.device(device), ignore_event)
