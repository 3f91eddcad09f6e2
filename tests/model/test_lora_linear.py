"""Laws of the LoRA linears as one function: they compute what PEFT computes, in values and gradients, and what a sum by
hand in float64 does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from models import (
    CPU,
    TOKENIZER,
    BaseConfig,
    LoraConfig,
    gradients,
    llama_roles,
    load_base,
    load_base_of,
    perturb,
    ragged_batch,
    relative_error,
    roles_over,
    saved_model,
    unquantized_base,
    zero_grad,
)
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from lowrank_tune.events import Event
from lowrank_tune.model import lora_forward, lora_product
from lowrank_tune.model.lora_forward import wider_stacks
from lowrank_tune.model.roles import Roles

Tensors = dict[str, Tensor]
RANK = 16
"""MKL adds up a product in the same order in both orientations for multiples of 16."""
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
FORGIVEN = 1e-6


def modules_of(roles: Roles, *names: str) -> list[Any]:
    """Returns the first modules of these names."""
    found = dict(reversed([(name.rpartition(".")[2], m) for name, m in roles.base.model.named_modules()]))
    return [found[name] for name in names]


def compute(roles: Roles, names: Sequence[str], role: str = "policy", dtype: torch.dtype = torch.float32) -> Tensors:
    """Returns outputs and gradients of modules that read the same input, one after the other."""
    modules = modules_of(roles, *names)
    stream = torch.Generator().manual_seed(0)
    x = torch.randn(3, 7, modules[0].in_features, generator=stream).to(dtype).requires_grad_()
    zero_grad(roles)
    with roles.activate(role):
        outputs = [module(x) for module in modules]
    tensors = {}
    total = x.new_zeros(())
    for name, output in zip(names, outputs, strict=True):
        tensors[f"{name} y"] = output.detach()
        weights = torch.randn(output.shape, generator=stream).to(output.dtype)
        total = total + (output * weights).sum()
    total.backward()
    assert x.grad is not None
    tensors["x"] = x.grad
    for name, module in zip(names, modules, strict=True):
        for key, parameter in module.named_parameters():
            if parameter.grad is not None:
                tensors[f"{name} {key}"] = parameter.grad
    return tensors


def by_hand(roles: Roles, names: Sequence[str]) -> Tensors:
    """Returns what `compute` returns for the policy, in float64 from the formula."""
    stream = torch.Generator().manual_seed(0)
    modules = modules_of(roles, *names)
    x = torch.randn(3, 7, modules[0].in_features, generator=stream).double().requires_grad_()
    tensors: Tensors = {}
    total = x.new_zeros(())
    leaves: Tensors = {}
    for name, module in zip(names, modules, strict=True):
        base = module.base_layer
        weight = base.weight
        if isinstance(base, Linear4bit):
            weight = dequantize_4bit(weight.data, weight.quant_state)
        output = x @ weight.double().T
        if base.bias is not None:
            output = output + base.bias.double()
        for adapter in roles.stacks["policy"]:
            if adapter in module.lora_A:
                pair = [matrices[adapter].weight.detach().double() for matrices in (module.lora_A, module.lora_B)]
                if adapter == "lt_policy":
                    for kind, leaf in zip("AB", pair, strict=True):
                        leaves[f"{name} lora_{kind}.{adapter}.weight"] = leaf.requires_grad_()
                output = output + module.scaling[adapter] * (x @ pair[0].T @ pair[1].T)
        tensors[f"{name} y"] = output.detach()
        total = total + (output * torch.randn(output.shape, generator=stream).double()).sum()
    total.backward()
    for name, leaf in {"x": x, **leaves}.items():
        assert leaf.grad is not None
        tensors[name] = leaf.grad
    return tensors


def plain(roles: Roles, *arguments: Any, **named: Any) -> Tensors:
    """Returns what `compute` returns with PEFT's forward."""
    (path,) = [path for path in roles.fast_paths if path is roles._linears]
    path.enabled = False
    try:
        return compute(roles, *arguments, **named)
    finally:
        path.enabled = True


def errors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns the relative errors above `FORGIVEN`."""
    assert found.keys() == expected.keys()
    distances = {name: relative_error(tensor, expected[name]) for name, tensor in found.items()}
    return {name: distance for name, distance in distances.items() if not distance <= FORGIVEN}


@contextmanager
def counted_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Yields a list that gets the number of linears of each product."""
    sizes: list[int] = []
    outputs_of = lora_product.outputs_of

    def counting(layout: Any, *others: Any) -> Any:
        sizes.append(len(layout.bases))
        return outputs_of(layout, *others)

    with monkeypatch.context() as patch:
        patch.setattr(lora_product, "outputs_of", counting)
        yield sizes


@pytest.mark.parametrize("name", ["q_proj", "o_proj", "down_proj"])
@pytest.mark.parametrize("kind", ["llama 4 bits", "llama", "qwen2"])
def test_one_adapter_is_pefts_bit_for_bit(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single linear, with and without a bias; the scaling is a power of two."""
    base = load_base_of(4) if "4" in kind else unquantized_base(kind)
    roles = roles_over(base, r=RANK, lora_alpha=32.0)
    perturb(roles, "policy")
    roles._linears.replaced[0][0].place.group.in_order = False
    with counted_products(monkeypatch) as sizes:
        found = compute(roles, [name])
    assert sizes == [1]
    expected = plain(roles, [name])
    assert {key for key, tensor in expected.items() if not torch.equal(found[key], tensor)} == set()


STACKS: dict[str, dict[str, Any]] = {
    "one": {"r": 3},
    "two": {"lower": ["sft"], "r": 5, "lora_alpha": 7.0},
    "rslora": {"lower": ["sft"], "r": 3, "use_rslora": True},
}


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("kind", ["llama 4 bits", "qwen2"])
@pytest.mark.parametrize("names", [*GROUPS, ("o_proj",)], ids="-".join)
def test_stacks_and_groups_are_the_formula(
    names: Sequence[str], kind: str, stack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """q, k and v, and gate and up, are one product; ranks and scalings are those of each adapter."""
    base = load_base_of(4) if "4" in kind else unquantized_base(kind)
    roles = roles_over(base, **STACKS[stack])
    perturb(roles, "policy", "sft")
    with counted_products(monkeypatch) as sizes:
        found = compute(roles, names)
    assert sizes == [len(names)] and roles._linears.pending is None
    assert errors(found, by_hand(roles, names)) == {}


def test_ranks_and_scalings_may_differ_by_module() -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "k_proj", "v_proj"],
        rank_pattern={"k_proj": 7, "v_proj": 1},
        alpha_pattern={"v_proj": 5},
        task_type="CAUSAL_LM",
    )
    stacks = {"policy": ["sft", "policy"], "reference": ["sft"]}
    roles = Roles(unquantized_base("qwen2"), {"sft": config, "policy": config}, ["policy"], stacks)
    perturb(roles, "policy", "sft")
    found = compute(roles, GROUPS[0])
    assert {tuple(found[f"{name} lora_A.lt_policy.weight"].shape) for name in GROUPS[0]} == {(4, 64), (7, 64), (1, 64)}
    assert errors(found, by_hand(roles, GROUPS[0])) == {}


def logps_and_gradients(roles: Roles) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    zero_grad(roles)
    logps = roles.logps("policy", ragged_batch()).logps
    logps.sum().backward()
    return logps.detach(), gradients(roles)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["llama 4 bits", "qwen2", "phi", "gemma2", "gpt_neox"])
def test_a_model_computes_what_it_does_on_the_plain_path(
    kind: str, dropout: float, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout draws PEFT's random numbers."""
    base = load_base_of(4) if "4" in kind else unquantized_base(kind)
    roles = roles_over(base, lower=["sft"], dropout=dropout, checkpointing=checkpointing)
    perturb(roles, "policy", "sft", size=0.03)
    with counted_products(monkeypatch) as sizes:
        found = logps_and_gradients(roles)
    assert len(sizes) > 0 and roles._linears.pending is None
    assert max(sizes) == (1 if kind == "gpt_neox" else 3)
    roles._linears.enabled = False
    with counted_products(monkeypatch) as sizes:
        expected = logps_and_gradients(roles)
    assert sizes == []
    for mine, theirs in zip(found, expected, strict=True):
        assert relative_error(mine, theirs) < 1e-5


def test_autocast_computes_in_bf16_with_fp32_gradients() -> None:
    """Within the noise of bf16, which is 0.2 to 0.4 % of a number."""
    base = load_base(BaseConfig(model=saved_model("qwen2"), bits=4), TOKENIZER, CPU, torch.bfloat16)  # type: ignore[arg-type]
    roles = roles_over(base, lower=["sft"])
    perturb(roles, "policy", "sft")
    for names in GROUPS:
        with torch.autocast("cpu", torch.bfloat16):
            found = compute(roles, names, dtype=torch.bfloat16)
            expected = plain(roles, names, dtype=torch.bfloat16)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert tensor.dtype == expected[name].dtype
            assert ("lora" in name) == (tensor.dtype == torch.float32)
            assert relative_error(tensor, expected[name]) < 1e-2


@pytest.mark.parametrize("case", ["no autocast", "another dtype"])
def test_other_dtypes_run_pefts_forward(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(BaseConfig(model=saved_model("llama"), bits=16), TOKENIZER, CPU, torch.bfloat16)  # type: ignore[arg-type]
    roles = roles_over(base)
    dtype = torch.bfloat16 if case == "no autocast" else torch.float32
    with counted_products(monkeypatch) as sizes, torch.autocast("cpu", torch.bfloat16, enabled=case == "another dtype"):
        compute(roles, ["o_proj"], dtype=dtype)
    assert sizes == []


def _hook_the_base(module: Any) -> None:
    module.base_layer.register_forward_hook(lambda *_: None)


def _merge(module: Any) -> None:
    module.merge(adapter_names=["lt_policy"])


def _disable(module: Any) -> None:
    module.enable_adapters(False)


@pytest.mark.parametrize("change", [_hook_the_base, _merge, _disable])
def test_other_modules_run_pefts_forward(change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a group alone is enough: the others are computed one by one."""
    roles = roles_over(unquantized_base("llama"))
    perturb(roles, "policy")
    change(modules_of(roles, "k_proj")[0])
    with counted_products(monkeypatch) as sizes:
        found = compute(roles, GROUPS[0])
    assert sizes == [1, 1]
    assert errors(found, plain(roles, GROUPS[0])) == {}


def test_dora_runs_pefts_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LoraConfig(r=4, target_modules=["o_proj"], use_dora=True, task_type="CAUSAL_LM")
    roles = Roles(unquantized_base("llama"), {"policy": config}, ["policy"], {"policy": ["policy"], "reference": []})
    with counted_products(monkeypatch) as sizes:
        compute(roles, ["o_proj"])
    assert sizes == []


def test_modules_in_another_order_are_computed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs that no module takes are computed once, and freed."""
    roles = roles_over(unquantized_base("llama"))
    perturb(roles, "policy")
    order = ("v_proj", "q_proj")
    expected = plain(roles, order)
    found = []
    with counted_products(monkeypatch) as sizes:
        found = [compute(roles, order) for _ in range(3)]
    assert sizes == [1, 3, 1, 3, 1, 3]
    assert [errors(tensors, expected) for tensors in found] == [{}, {}, {}]
    with counted_products(monkeypatch) as sizes, roles.activate("policy"):
        query, up = modules_of(roles, "q_proj", "up_proj")
        for _ in range(2):
            query(torch.zeros(1, 64))
        up(torch.zeros(1, 64))
    assert sizes == [3, 1, 1] and roles._linears.pending is None


def test_outputs_are_those_of_the_active_stack() -> None:
    """The same input again, for another role or without gradients, is computed again."""
    roles = roles_over(unquantized_base("llama"))
    perturb(roles, "policy")
    query, key = modules_of(roles, "q_proj", "k_proj")
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    with roles.activate("policy"):
        query(x)
        roles._active.clear()
        assert torch.equal(key(x), key.base_layer(x))
    with roles.activate("policy"):
        query(x)
        with torch.no_grad():
            assert not key(x).requires_grad


def saved_storages(roles: Roles, names: Sequence[str], role: str) -> dict[int, int]:
    """Returns the bytes of the tensors that are saved for the backward pass, without weights, by storage."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in roles.base.model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in weights:
            saved[pointer] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(3, 7, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), roles.activate(role):
        outputs = [module(x) for module in modules_of(roles, *names)]
    assert all(output.requires_grad for output in outputs)
    return saved


def test_the_input_is_saved_once() -> None:
    """The input, and the low-rank product of three adapters; only weights if no adapter is trained."""
    roles = roles_over(unquantized_base("llama"), lower=["sft"], r=RANK)
    low = 4 * 21 * 3 * 2 * RANK
    assert sorted(saved_storages(roles, GROUPS[0], "policy").values()) == sorted([4 * 21 * 64, low])
    assert [size for size in saved_storages(roles, GROUPS[0], "reference").values() if size >= 4 * 21 * 64] == []


@pytest.mark.parametrize(
    ("stacks", "trained", "expected"),
    [
        ([["a", "b"], ["a"]], ["b"], {("a",): ("a", "b")}),
        ([["b"], []], ["b"], {}),
        ([["a", "b"], ["a", "c"], ["a"]], ["b", "c"], {("a",): ("a", "b")}),
        ([["a", "b", "c"]], ["c"], {("a", "b"): ("a", "b", "c")}),
        ([["b", "a"]], ["b"], {}),
    ],
)
def test_a_reference_is_as_wide_as_the_trained_stack(
    stacks: list[list[str]], trained: list[str], expected: dict[tuple[str, ...], tuple[str, ...]]
) -> None:
    assert wider_stacks(stacks, trained) == expected


@pytest.mark.parametrize("train_mode", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_fresh_policy_is_its_reference(dropout: float, train_mode: bool) -> None:
    """Bit for bit over an odd rank, whatever the policy's A, and also if the reference runs in eval mode."""
    roles = roles_over(unquantized_base("qwen2"), lower=["sft"], dropout=dropout, r=5)
    perturb(roles, "sft")
    roles.base.model.train(train_mode)
    with torch.no_grad():
        policy = roles.logps("policy", ragged_batch()).logps
    with roles.inference_mode():
        assert torch.equal(roles.logps("reference", ragged_batch()).logps, policy)
        perturb(roles, "policy")
        assert not torch.equal(
            roles.logps("reference", ragged_batch()).logps, roles.logps("policy", ragged_batch()).logps
        )


@pytest.mark.parametrize("fault", ["output", "gradient"])
def test_a_planted_difference_falls_back(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start-up comparison disables a product that computes something else, with one warning."""
    roles = llama_roles()
    expected = roles.logps("policy", ragged_batch()).logps
    events: list[Event] = []
    roles.limits.emit = events.append
    roles.verified = False
    name = "outputs_of" if fault == "output" else "down_gradients"
    real = getattr(lora_product, name)

    def wrong(layout: Any, *others: Any) -> Any:
        if fault == "output":
            outputs, low = real(layout, *others)
            return tuple(output * 1.01 for output in outputs), low
        return [None if gradient is None else gradient * 1.01 for gradient in real(layout, *others)]

    monkeypatch.setattr(lora_product, name, wrong)
    assert torch.allclose(roles.logps("policy", ragged_batch()).logps, expected, atol=1e-5)
    assert not roles._linears.enabled
    (event,) = events
    assert event.message.startswith("LoRA linears as one function: another result")  # type: ignore[attr-defined]


def test_unloading_restores_pefts_forward() -> None:
    roles = llama_roles()
    (module,) = modules_of(roles, "q_proj")
    assert type(module).__module__ == lora_forward.__name__
    roles.unload_adapters()
    assert type(module).__module__.startswith("peft.") and "place" not in vars(module)


@pytest.mark.slow
def test_a_compiled_layer_is_the_plain_one() -> None:
    """One graph without breaks for all layers and lengths, and one for another stack, bit for bit. (Dynamo traces the
    first one again when it has learned which numbers are constant.)"""
    roles = llama_roles(4, lower=["sft"], r=RANK)
    perturb(roles, "policy", "sft")
    graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return aot_eager(graph, inputs)

    plain_layer = type(roles.base.model.model.layers[0]).forward
    compiled = torch.compile(plain_layer, backend=backend, fullgraph=True, dynamic=True)

    def run(forward: Callable[..., Any], layer: Any, length: int, role: str) -> list[Tensor]:
        zero_grad(roles)
        x = torch.randn(2, length, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        angles = roles.base.model.model.rotary_emb(x, torch.arange(length)[None])
        with roles.activate(role):
            output = forward(layer, x, position_embeddings=angles, attention_mask=None)
            output.square().sum().backward()
        assert x.grad is not None
        found = [parameter.grad for parameter in roles.parameters("policy") if parameter.grad is not None]
        return [output.detach(), x.grad, *found]

    first, second = roles.base.model.model.layers
    counts = []
    for layer, length in ((first, 9), (first, 17), (second, 9)):
        for role in ("policy", "reference"):
            expected = run(plain_layer, layer, length, role)
            found = run(compiled, layer, length, role)
            assert len(found) == len(expected) == (16 if role == "policy" else 2)
            assert all(map(torch.equal, found, expected))
            counts.append(len(graphs))
    assert counts[0] < counts[1] and set(counts[1:]) == {counts[1]}
