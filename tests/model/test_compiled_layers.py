"""Laws of `model/compiled_layers.py`: compiled layers compute what plain ones do, their graphs are few, and whatever
goes wrong ends in the plain path. Fast tests compile with `aot_eager` or `eager`, which call PyTorch's own kernels."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from algorithm_helpers import run_with_events
from crash import run_fingerprint, small_recipe
from models import CPU, load_base_of, make_batch, perturb, ragged_batch, relative_error, roles_over, unquantized_base
from test_loop import algorithm_over
from test_run import stopped_after
from torch import Tensor

from lowrank_tune.assembly.model import compiles_layers
from lowrank_tune.batch import Batch
from lowrank_tune.config import from_dict
from lowrank_tune.errors import ConfigError
from lowrank_tune.events import Event, LogMessage, Progress, is_warning
from lowrank_tune.model import compiled_layers, compiler_check
from lowrank_tune.model.base import Base
from lowrank_tune.model.compiled_layers import CompiledLayers
from lowrank_tune.model.compiler_check import missing_for_compile
from lowrank_tune.model.decoder_layers import LayerForward, layer_forward
from lowrank_tune.model.oom import is_out_of_memory
from lowrank_tune.model.roles import Roles

slow = pytest.mark.slow
Backend = str | Callable[..., Any]


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Backend], None]]:
    def use(wanted: Backend) -> None:
        monkeypatch.setattr(compiled_layers, "BACKEND", wanted)

    use("eager")
    yield use


def compiled_roles(base: Base, **more: Any) -> tuple[Roles, CompiledLayers, list[Event]]:
    """Roles with compiled layers over two adapters, without the comparison before the first pass."""
    roles = roles_over(base, lower=("sft",), torch_compile=True, **more)
    events: list[Event] = []
    roles.limits.emit = events.append
    roles.verified = True
    perturb(roles, "sft", "policy")
    return roles, path_of(roles), events


def path_of(roles: Roles) -> CompiledLayers:
    (path,) = [path for path in roles.fast_paths if isinstance(path, CompiledLayers)]
    return path


def batches() -> list[Batch]:
    """Rows padded on the right, of other numbers and lengths. The tokens of the first batch, which may run as one row,
    are as many as the dimensions of the model."""
    return [
        ragged_batch((5, 27, 30, 2), seed=2),
        ragged_batch((9, 3, 12)),
        ragged_batch((40, 17), seed=1),
    ]


def left_padded() -> Batch:
    return make_batch([[5, 9, 11, 13], [7, 8], [3, 4, 6]], left=True)


def outputs(roles: Roles, role: str, batch: Batch) -> list[Tensor]:
    """Log-probs, and the gradients of the trained adapter if the role has it."""
    torch.manual_seed(0)
    roles.base.model.train()
    logps = roles.logps(role, batch).logps
    if not logps.requires_grad:
        return [logps]
    return [logps.detach(), *torch.autograd.grad(logps.square().sum(), roles.parameters("policy"))]


def plain_outputs(roles: Roles, role: str, batch: Batch) -> list[Tensor]:
    path = path_of(roles)
    path.enabled = False
    found = outputs(roles, role, batch)
    path.enabled = True
    return found


def are_equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def messages(events: list[Event]) -> list[str]:
    return [event.message for event in events if isinstance(event, LogMessage)]


@pytest.mark.parametrize("compiler", ["eager", pytest.param("aot_eager", marks=slow)])
def test_compiled_is_plain_bit_for_bit_with_one_graph_for_each_stack(
    backend: Callable[[Backend], None], compiler: str
) -> None:
    """With dropout, and with one of two layers recomputed. Other lengths and numbers of rows need no graph, nor does a
    return to an earlier role."""
    backend(compiler)
    roles, path, events = compiled_roles(unquantized_base("llama"), checkpointing=1, dropout=0.1)
    for batch in batches():
        expected = plain_outputs(roles, "policy", batch)
        assert all(float(one.abs().max()) > 0 for one in expected)
        assert are_equal(outputs(roles, "policy", batch), expected)
    assert path.num_graphs == 1
    with roles.inference_mode():
        expected = [roles.logps(role, batch).logps for role in ("reference", "policy") for batch in batches()]
    # One stack more, and both without gradient.
    assert path.num_graphs == 3
    path.enabled = False
    with roles.inference_mode():
        plain = [roles.logps(role, batch).logps for role in ("reference", "policy") for batch in batches()]
    assert are_equal(expected, plain)
    path.enabled = True
    assert are_equal(outputs(roles, "policy", batches()[1]), plain_outputs(roles, "policy", batches()[1]))
    assert path.num_graphs == 3
    assert not any(map(is_warning, events))
    assert [text.rpartition(":")[2] for text in messages(events)] == [" 1 graph", " 2 graphs", " 3 graphs"]
    progress = [event for event in events if isinstance(event, Progress)]
    assert [(event.done, event.total) for event in progress] == [(0, 1), (1, 1), (1, 2), (2, 2), (2, 3), (3, 3)]


def test_only_passes_of_the_decoder_are_compiled_and_nothing_is_left(backend: Callable[[Backend], None]) -> None:
    roles, path, _ = compiled_roles(unquantized_base("llama"), checkpointing=True)
    model = roles.base.model
    with roles.inference_mode(), roles.activate("policy"):
        model(input_ids=torch.arange(3, 9)[None], use_cache=True)
        assert path.num_graphs == 0
        with path.running():
            model.get_decoder()(input_ids=torch.arange(3, 9)[None], use_cache=False)
    assert path.num_graphs == 1
    references = [weakref.ref(one) for one in (path, roles, *roles.lora_layers, *roles.parameters("policy"))]
    roles.unload_adapters()
    assert not any(isinstance(vars(module).get("forward"), LayerForward) for module in model.modules())
    del roles, path
    gc.collect()
    assert [reference() for reference in references if reference() is not None] == []


def scaled(factor: float) -> Backend:
    """A compiler that makes a mistake."""

    def compiler(graph: Any, inputs: Any) -> Any:
        def run(*arguments: Any) -> Any:
            first, *others = graph(*arguments)
            return (first * factor, *others)

        return run

    return compiler


def test_a_compiler_that_computes_something_else_is_found(backend: Callable[[Backend], None]) -> None:
    backend(scaled(1.001))
    roles, path, events = compiled_roles(unquantized_base("llama"))
    roles.verified = False
    batch = batches()[0]
    found = outputs(roles, "policy", batch)
    assert not path.enabled and are_equal(found, plain_outputs(roles, "policy", batch))
    (event,) = filter(is_warning, events)
    assert event.message.startswith("compiled layers: another result")


def failing(number: int, error: Exception) -> Backend:
    """A compiler that raises at its graph `number`."""
    count = [0]

    def compiler(graph: Any, inputs: Any) -> Any:
        count[0] += 1
        if count[0] == number:
            raise error
        return graph.forward

    return compiler


@pytest.mark.parametrize("number", [1, 2])
def test_a_compiler_that_fails_is_left_with_one_warning(backend: Callable[[Backend], None], number: int) -> None:
    """At the first graph, and at a later one, inside of a recomputed layer."""
    backend(failing(number, ValueError("cannot lower this")))
    roles, path, events = compiled_roles(unquantized_base("llama"), checkpointing=True)
    for batch in (batches()[0], left_padded()):
        expected = plain_outputs(roles, "policy", batch)
        path.enabled = number == 2 or not any(map(is_warning, events))
        assert are_equal(outputs(roles, "policy", batch), expected)
    assert not path.enabled
    assert [event.message for event in events if is_warning(event)] == [
        "compiled layers: an error (cannot lower this); the plain path is used"
    ]


def test_memory_that_runs_out_is_no_fault_of_the_compiler(backend: Callable[[Backend], None]) -> None:
    """While it compiles, and when compiled layers run."""

    def run_out(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for compiler in (run_out, lambda graph, inputs: run_out):
        backend(compiler)
        roles, path, events = compiled_roles(unquantized_base("llama"))
        with pytest.raises(RuntimeError) as caught:
            outputs(roles, "policy", batches()[0])
        assert is_out_of_memory(caught.value)
        assert path.enabled and not any(map(is_warning, events))
        roles.unload_adapters()


def test_layers_of_unknown_models_stay_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_layers, "GradientCheckpointingLayer", torch.nn.Conv3d)
    events: list[Event] = []
    path = CompiledLayers(unquantized_base("llama").model, events.append)
    assert not path.enabled
    assert messages(events) == ["compiled layers: the layers of llama models are unknown; they stay plain"]


def recipe(**changes: Any) -> dict[str, Any]:
    return {
        "algorithm": "sft",
        "base": {"backend": changes.pop("backend", "transformers")},
        "data": {"train": [{"dataset": "builtin:arithmetic"}]},
        "train": {"max_steps": 1, **changes},
    }


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"torch_compile": True, "mlp_chunks": 2}, "train.torch_compile: contradicts `train.mlp_chunks`"),
        (
            {"torch_compile": True, "router_aux_loss_coef": 0.01},
            "train.torch_compile: contradicts `train.router_aux_loss_coef`",
        ),
        (
            {"router_aux_loss_coef": 0.01, "backend": "unsloth"},
            "train.router_aux_loss_coef: does not work with `base.backend: unsloth`",
        ),
        ({"router_aux_loss_coef": -0.01}, "train.router_aux_loss_coef: "),
        (
            {"torch_compile": True, "backend": "unsloth"},
            "train.torch_compile: does nothing with `base.backend: unsloth`",
        ),
        ({"torch_compile": "yes"}, "train.torch_compile: expected"),
    ],
)
def test_settings_that_exclude_compiled_layers(changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(recipe(**changes))
    assert fault in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "device", "missing", "is_compiled", "level"),
    [
        ({}, "cpu", "", False, None),
        ({}, "cuda", "", True, None),
        ({}, "cuda", "no Triton", False, "info"),
        ({"torch_compile": True}, "cpu", "", True, None),
        ({"torch_compile": True}, "cpu", "no g++", False, "warning"),
        ({"torch_compile": False}, "cuda", "", False, None),
        ({"mlp_chunks": 2}, "cuda", "", False, None),
        ({"router_aux_loss_coef": 0.01}, "cuda", "", False, None),
        ({"backend": "unsloth"}, "cuda", "", False, None),
    ],
)
def test_when_layers_are_compiled(
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    device: str,
    missing: str,
    is_compiled: bool,
    level: str | None,
) -> None:
    monkeypatch.setattr("lowrank_tune.assembly.model.missing_for_compile", lambda device_type: missing)
    events: list[Any] = []
    assert compiles_layers(from_dict(recipe(**changes)), torch.device(device), events.append) is is_compiled
    assert [event.level for event in events] == ([] if level is None else [level])
    assert all(missing in event.message for event in events)


def test_what_the_machine_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_for_compile("mps").endswith("not for mps")
    monkeypatch.setattr(compiler_check, "find_spec", lambda name: None)
    assert missing_for_compile("cuda").startswith("Triton is not installed")
    monkeypatch.setattr(compiler_check, "find_spec", lambda name: name)
    compiler = tmp_path / "g++-12"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    nothing = {"PATH": str(tmp_path)}
    assert missing_for_compile("cpu", nothing).startswith("there is no g++: install")
    assert missing_for_compile("cuda", nothing).startswith("there is no gcc or clang: install")
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(compiler_check.sysconfig, "get_path", lambda name: str(tmp_path))
    assert missing_for_compile("cpu", nothing | {"CXX": "g++-12 -m64"}) == ""
    assert missing_for_compile("cuda", nothing | {"CC": str(compiler)}) == ""
    (tmp_path / "Python.h").unlink()
    assert "Python.h is missing" in missing_for_compile("cpu", nothing | {"CXX": "g++-12"})


@slow
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gemma2", "llama-4-bit"])
def test_families_are_bit_equal(backend: Callable[[Backend], None], kind: str) -> None:
    """With all layers recomputed from offloaded inputs, with some, and with none; with and without a mask. A single row
    needs no graph of its own where rows are packed."""
    backend("aot_eager")
    base = load_base_of(4) if kind == "llama-4-bit" else unquantized_base(kind)
    roles, path, events = compiled_roles(base, checkpointing=True, offload=True)
    for layer in [None, *base.model.get_decoder().layers]:
        if layer is not None:
            layer_forward(layer).recompute = None
        for batch in (batches()[0], left_padded()):
            assert are_equal(outputs(roles, "policy", batch), plain_outputs(roles, "policy", batch))
    assert path.num_graphs == 2
    if kind == "llama-4-bit":
        row = ragged_batch((30,), unscored=())
        assert are_equal(outputs(roles, "policy", row), plain_outputs(roles, "policy", row))
        assert path.num_graphs == 2
    assert not any(map(is_warning, events))


@slow
def test_a_graph_that_is_compiled_for_the_recomputation_saves_the_same_tensors(
    backend: Callable[[Backend], None],
) -> None:
    """A backward pass that finds another state of torch compiles the layer once more."""
    backend("aot_eager")
    roles, path, _ = compiled_roles(unquantized_base("llama"), checkpointing=True)
    batch = batches()[0]
    expected = plain_outputs(roles, "policy", batch)
    logps = roles.logps("policy", batch).logps
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        gradients = torch.autograd.grad(logps.square().sum(), roles.parameters("policy"))
    finally:
        torch.set_num_threads(threads)
    assert path.num_graphs == 2, "the layer was compiled in the backward pass"
    for one, other in zip(gradients, expected[1:], strict=True):
        torch.testing.assert_close(one, other)


def test_rows_that_save_nothing_are_packed_only_while_layers_are_compiled(backend: Callable[[Backend], None]) -> None:
    backend("eager")
    roles, path, _ = compiled_roles(unquantized_base("llama"))
    rows = make_batch([[5, 9, 11, 13], [7, 8, 4, 6], [3, 4, 6, 5]])
    packed_rows = roles.decoder.packed_rows
    assert packed_rows.pack(rows, share_prefixes=True) is not None
    path.enabled = False
    assert packed_rows.pack(rows, share_prefixes=True) is None


@slow
def test_inductor_is_within_rounding(backend: Callable[[Backend], None]) -> None:
    backend("inductor")
    roles, path, _ = compiled_roles(load_base_of(4), checkpointing=1, dropout=0.1)
    for batch in batches():
        for one, other in zip(outputs(roles, "policy", batch), plain_outputs(roles, "policy", batch), strict=True):
            assert relative_error(one, other) < 1e-4
    assert path.enabled and path.num_graphs == 1


def gradients_after(name: str, compiled: bool) -> list[Tensor]:
    """The gradients of the first batch of an algorithm, with its check before the first step."""
    algorithm, roles, _ = algorithm_over(name, 0.0, torch_compile=compiled)
    events: list[Event] = []
    roles.limits.emit = events.append
    perturb(roles, *roles.trainable, size=0.05)
    part = next(iter(algorithm.collect(0).minibatches()))
    part.token_weights = algorithm.token_weights(part)
    for micro in part.split(4, None, algorithm.rows_per_unit):
        for term in algorithm.compute_losses(micro.to(CPU)):
            term.loss.backward()
    assert not any(map(is_warning, events))
    assert not compiled or (path_of(roles).enabled and path_of(roles).num_graphs > 0)
    return [p.grad for role in sorted(roles.trainable) for p in roles.parameters(role) if p.grad is not None]


@slow
@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "kto", "grpo", "ppo"])
def test_algorithms_have_the_same_gradients(backend: Callable[[Backend], None], name: str) -> None:
    plain = gradients_after(name, False)
    assert plain and are_equal(gradients_after(name, True), plain)


@slow
def test_a_run_is_that_of_plain_layers(
    backend: Callable[[Backend], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole run of two steps, with the comparison, the check before the first step, rollouts and evaluations."""
    monkeypatch.setenv("LOWRANK_TUNE_CACHE", str(tmp_path / "cache"))
    prints = []
    for torch_compile in (True, False):
        recipe = small_recipe("grpo", max_steps=2, torch_compile=torch_compile)
        outcome, events = run_with_events(recipe, tmp_path / str(torch_compile))
        assert any(text.startswith("layers compiled in") for text in messages(events)) is torch_compile
        assert not any(text.startswith("compiled layers:") for text in messages(events))
        prints.append(run_fingerprint(outcome.folder))
    assert prints[0]["steps"] == prints[1]["steps"] and prints[0]["final"] == prints[1]["final"]


@slow
def test_a_continued_run_with_compiled_layers_is_bit_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWRANK_TUNE_CACHE", str(tmp_path / "cache"))
    recipe = small_recipe("sft", max_steps=4, torch_compile=True)
    recipe["data"]["eval_fraction"] = 0.0
    del recipe["evaluate"]
    straight, events = run_with_events(recipe, tmp_path / "straight")
    assert stopped_after(recipe, tmp_path / "run", 2) == 2
    continued, later_events = run_with_events(recipe, tmp_path / "run")
    for each in (events, later_events):
        # All graphs before the first step: one that is compiled for the rows of some step may divide work differently.
        (report,) = [text for text in messages(each) if text.startswith("layers compiled in")]
        assert report.endswith(": 4 graphs")
    # Not in the assertion: pytest's comparison of the two takes minutes.
    is_equal = run_fingerprint(continued.folder) == run_fingerprint(straight.folder)
    assert is_equal
