"""Modules with few launches compute what PEFT's and transformers' own modules compute, and leave them as they were."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import all_tensors, changed_tensors, llama_roles, perturb, relative_error, roles_over, unquantized_base
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from lowrank_tune.generation import Engine
from lowrank_tune.generation.gpu_linears import GpuLinears, gpu_linears
from lowrank_tune.generation.gpu_norms import fused_norms
from lowrank_tune.generation.joined_linears import JoinedLinears
from lowrank_tune.generation.joined_rotary import JoinedRotary
from lowrank_tune.generation.rollout_weights import rollout_weights, verify_rollout_weights
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.model.roles import Roles

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text")
PROMPTS = [[5, 9, 12, 7, 33, 8, 2, 14, 6, 21, 4], [3, 4, 8], [11]]
SAMPLING = SamplingParams(12, frozenset(), temperature=1.0, seed=3)
NO_LIMIT = 1 << 40


class Attention(nn.Module):
    """Linears with the names of a model, without anything between them."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q_proj = nn.Linear(16, 24, bias=bias)
        self.k_proj = nn.Linear(16, 8, bias=bias)
        self.v_proj = nn.Linear(16, 8, bias=bias)
        self.o_proj = nn.Linear(24, 16, bias=False)
        self.gate_proj = nn.Linear(16, 12, bias=bias)
        self.up_proj = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        states = [module(x) for module in (self.q_proj, self.k_proj, self.v_proj)]
        hidden = self.o_proj(states[0] + torch.cat([states[1], states[2], states[1]], dim=-1))
        return torch.cat([*states, hidden, self.gate_proj(hidden) * self.up_proj(hidden)], dim=-1)


adapters = st.lists(
    st.fixed_dictionaries(
        {
            "r": st.integers(1, 5),
            "lora_alpha": st.sampled_from([1, 3, 16]),
            "use_rslora": st.booleans(),
            "target_modules": st.sets(
                st.sampled_from(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]), min_size=1
            ),
        }
    ),
    min_size=1,
    max_size=2,
)


@settings(max_examples=40, deadline=None)
@given(adapters=adapters, bias=st.booleans(), rows=st.integers(1, 12), seed=st.integers(0, 99))
def test_any_stack_computes_what_peft_computes(
    adapters: Sequence[dict[str, Any]], bias: bool, rows: int, seed: int
) -> None:
    torch.manual_seed(seed)
    model: Any = Attention(bias)
    stack = []
    for number, options in enumerate(adapters):
        stack.append(f"a{number}")
        inject_adapter_in_model(LoraConfig(**options), model, stack[-1])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    for module in model.modules():
        if hasattr(module, "set_adapter"):
            module.set_adapter(stack)
    x = torch.randn(rows, 1, 16)
    with torch.no_grad():
        expected = model(x)
        with gpu_linears(model, stack, torch.float32) as linears, linears:
            assert isinstance(linears, GpuLinears)
            assert all("forward" in vars(module) for group in linears.groups for module in group.modules)
            computed = model(x)
        precise = model.double()(x.double())
    assert relative_error(computed, expected) <= 1e-6
    assert relative_error(computed, precise) <= 1e-6


def stacked(kind: str, bits: int = 16, **more: Any) -> Roles:
    if bits == 4:
        roles = llama_roles(4, lower=["sft"], **more)
    else:
        roles = roles_over(unquantized_base(kind), lower=["sft"], **more)
    perturb(roles, "sft", "policy")
    return roles


def use_on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[GpuLinears]:
    """Makes engines on the CPU use the modules of a GPU, with copies. Returns the list of those that are made."""
    made = []
    init = GpuLinears.__init__

    def recorded(self: GpuLinears, *arguments: Any) -> None:
        init(self, *arguments)
        made.append(self)

    def prepared(self: Engine, rows: int = 1, copy_limit: int = 0) -> Any:
        return gpu_linears(self.roles.base.model, self._stack, torch.float32, rows, NO_LIMIT)

    monkeypatch.setattr(GpuLinears, "__init__", recorded)
    monkeypatch.setattr(Engine, "prepared_weights", prepared)
    return made


@pytest.mark.parametrize(("kind", "bits"), [(kind, 16) for kind in FAMILIES] + [("llama", 4)])
def test_completions_are_those_of_plain_modules(kind: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    roles = stacked(kind, bits)

    def completions() -> Any:
        found = list(Engine(roles, "policy").generate(PROMPTS, 5, SAMPLING))
        return {(each.prompt, each.sample): each for each in found}

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "prepared_weights", lambda self, *_: nullcontext(nullcontext()))
        expected = completions()
    made = use_on_cpu(monkeypatch)
    computed = completions()
    assert len(made) == 1 and not made[0].groups, "freed"
    for key, one in expected.items():
        assert computed[key].token_ids == one.token_ids
        assert torch.allclose(torch.tensor(computed[key].logps), torch.tensor(one.logps), atol=1e-5)


def test_steps_of_many_rows_use_copies_if_they_fit() -> None:
    roles = stacked("llama", 4)
    model, stack = roles.base.model, roles.stacks["policy"]
    # q, o: 64 x 64; k, v: 64 x 32, in two layers; B of two adapters of rank 4 for each, those of q, k, v as one matrix.
    num_bytes = 2 * 4 * (64 * (64 + 32 + 32 + 64) + 24 * (64 + 32 + 32) + 8 * 64)
    for rows, limit, copied in ((9, num_bytes, num_bytes), (9, num_bytes - 1, 0), (8, num_bytes, 0)):
        with gpu_linears(model, stack, torch.float32, rows, limit) as linears:
            assert isinstance(linears, GpuLinears)
            assert linears.copied_bytes == copied
            groups = linears.groups[:]
            assert sum(group.copy is not None for group in groups) == (4 if copied else 0)
        assert linears.copied_bytes == 0 and not linears.groups


@pytest.mark.parametrize("rows", [1, 9])
def test_copies_are_read_by_many_rows_only(rows: int) -> None:
    """With its copy set to zero, a module has no product of its weight."""
    roles = stacked("llama", 4)
    ids = torch.arange(3, 3 + rows)[:, None]

    def hidden() -> Tensor:
        with torch.no_grad(), roles.activate("policy"):
            return roles.base.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state  # type: ignore[no-any-return]

    expected = hidden()
    with gpu_linears(roles.base.model, roles.stacks["policy"], torch.float32, 9, NO_LIMIT) as linears, linears:
        assert isinstance(linears, GpuLinears)
        assert relative_error(hidden(), expected) <= 1e-6
        for group in linears.groups:
            if group.copy is not None:
                group.copy.weight.zero_()
        assert (relative_error(hidden(), expected) <= 1e-6) == (rows == 1)


def test_copies_get_what_the_slots_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    roles = stacked("llama", 4)
    requested = []

    def prepared(self: Engine, rows: int, copy_limit: int) -> Any:
        requested.append((rows, copy_limit))
        return nullcontext(nullcontext())

    monkeypatch.setattr(Engine, "prepared_weights", prepared)
    # Keys and values of 2 heads of 16 numbers in 2 layers, in fp32.
    sequence = (len(PROMPTS[0]) + SAMPLING.max_new_tokens) * 2 * 2 * 16 * 2 * 4
    for slots, num_bytes, expected in ((4, 1 << 20, (4, (1 << 20) * 4 // 5 - 4 * sequence)), (4, 1, (1, 0))):
        list(Engine(roles, "policy", slots, cache_bytes=num_bytes).generate(PROMPTS, 2, SAMPLING))
        assert requested.pop() == expected
    roles.limits.cache_tokens = 1 << 20
    list(Engine(roles, "policy", 4, cache_bytes=1 << 20).generate(PROMPTS, 2, SAMPLING))
    assert requested.pop() == (4, 0), "after an out-of-memory error there are none"


def test_values_of_prompts_are_stored_alone() -> None:
    """As a part of one product of query, key and value they would keep it until their slots are filled."""
    roles = stacked("llama", 4)
    group = JoinedLinears([*_query_key_value(roles)], roles.stacks["policy"], torch.float32)
    group.make_copy()
    for columns, is_alone in ((1, False), (3, True)):
        x = torch.randn(20, columns, 64)
        values = group.forward(2, x)
        assert (values.untyped_storage().nbytes() == values.nbytes) == is_alone


def _query_key_value(roles: Roles) -> Sequence[nn.Module]:
    attention = roles.base.model.get_decoder().layers[0].self_attn
    return attention.q_proj, attention.k_proj, attention.v_proj


@pytest.mark.parametrize("kind", FAMILIES)
def test_half_precision_is_as_close_as_that_of_plain_modules(kind: str) -> None:
    roles = stacked(kind)
    precise = roles.base.model
    ids = torch.tensor([[5, 9, 12, 7], [3, 4, 8, 6], [11, 2, 9, 9]])

    def hidden() -> Tensor:
        with torch.no_grad(), roles.activate("policy"):
            return precise.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state.double()  # type: ignore[no-any-return]

    precise.bfloat16().double()
    expected = hidden()
    precise.bfloat16()
    plain = relative_error(hidden(), expected)
    with gpu_linears(precise, roles.stacks["policy"], torch.bfloat16) as linears, linears:
        computed = relative_error(hidden(), expected)
    assert 1e-4 < plain < 0.1
    assert computed <= 1.2 * plain


@pytest.mark.parametrize("kind", FAMILIES)
def test_norms_keep_their_dtype_under_autocast(kind: str) -> None:
    model = stacked(kind).base.model.bfloat16()
    found = list(fused_norms(model))
    assert len(found) == sum(type(module).__name__.endswith("RMSNorm") for module in model.modules())
    for module, forward in found:
        x = torch.randn(3, 2, len(module.weight)).bfloat16()  # type: ignore[arg-type]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            computed = forward(x)
        assert computed.dtype == torch.bfloat16
        assert torch.allclose(computed.float(), module(x).float(), rtol=2**-7, atol=0)


def test_other_modules_keep_their_own_forward() -> None:
    roles = stacked("llama")
    model = roles.base.model
    layers = model.get_decoder().layers
    seen: list[Tensor] = []
    hooked = (layers[0].self_attn.q_proj, layers[1].mlp.up_proj.base_layer, layers[1].input_layernorm)
    for module in hooked:
        module.register_forward_hook(lambda *arguments: seen.append(arguments[2]))
    layers[1].self_attn.v_proj.lora_variant["lt_policy"] = object()
    with gpu_linears(model, roles.stacks["policy"], torch.float32) as linears:
        assert isinstance(linears, GpuLinears)
        replaced = {id(module) for module, _ in linears.forwards}
    own = (layers[0].self_attn.q_proj, layers[1].mlp.up_proj, layers[1].input_layernorm, layers[1].self_attn.v_proj)
    assert replaced.isdisjoint(map(id, own))
    assert id(layers[0].self_attn.k_proj) in replaced


def test_a_module_with_dora_computes_its_own_forward() -> None:
    torch.manual_seed(0)
    model: Any = Attention(bias=True)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["k_proj", "o_proj"], use_dora=True), model, "a")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model, "b")
    for module in model.modules():
        if hasattr(module, "set_adapter"):
            module.set_adapter(["a", "b"])
    x = torch.randn(3, 1, 16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        expected = model(x)
        with gpu_linears(model, ["a", "b"], torch.float32) as linears, linears:
            assert "forward" not in vars(model.k_proj) and "forward" in vars(model.q_proj)
            assert relative_error(model(x), expected) <= 1e-6


def state_of(roles: Roles) -> Any:
    """What a rollout may change only while it runs."""
    import transformers.models.llama.modeling_llama as llama

    attributes = [dict(vars(module)) for module in roles.base.model.modules()]
    parameters = [dict(module._parameters) for module in roles.base.model.modules()]
    return llama.apply_rotary_pos_emb, [list(each) for each in attributes], parameters


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_before_between_tokens(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    roles = stacked("llama", 4)
    made = use_on_cpu(monkeypatch)
    tensors = all_tensors(roles.base.model)
    before = state_of(roles)
    tokens = Engine(roles, "policy").stream(PROMPTS, 5, SAMPLING)
    for _ in range(20):
        next(tokens)
        after = state_of(roles)
        assert after[:2] == before[:2]
        for one, other in zip(after[2], before[2], strict=True):
            assert one.keys() == other.keys() and all(one[name] is other[name] for name in one)
    assert made[0].copied_bytes
    if fails:
        monkeypatch.setattr(JoinedLinears, "_compute", None)
        with pytest.raises(TypeError):
            list(tokens)
        assert state_of(roles)[:2] == before[:2]
    else:
        tokens.close()
    assert not made[0].copied_bytes and not made[0].groups
    assert not changed_tensors(tensors, all_tensors(roles.base.model))


def verify(roles: Roles, role: str = "policy") -> list[str]:
    """Compares the modules on the CPU. Returns the warnings."""
    messages: list[str] = []
    roles.limits.emit = lambda event: messages.append(event.message)  # type: ignore[union-attr]

    def hidden(ids: Tensor) -> Tensor:
        with torch.no_grad(), roles.activate(role):
            return roles.base.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state  # type: ignore[no-any-return]

    verify_rollout_weights(roles, roles.stacks[role], torch.float32, hidden, 9, NO_LIMIT)
    return messages


def test_modules_are_compared_once_for_each_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    roles = stacked("llama", 4)
    tensors = all_tensors(roles.base.model)
    assert verify(roles) == [] and roles.decoding.few_launches
    assert not changed_tensors(tensors, all_tensors(roles.base.model))
    monkeypatch.setattr(GpuLinears, "__init__", None)
    assert verify(roles) == [] and roles.decoding.few_launches
    (message,) = verify(roles, "reference")
    assert message.startswith("decoding with few launches: an error") and not roles.decoding.few_launches


@pytest.mark.parametrize("fault", ["no scaling", "not the copy", "not a number", "no memory"])
def test_modules_that_compute_something_else_are_not_used(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh adapter changes nothing, so the comparison sets its values."""
    roles = llama_roles(4) if fault == "not the copy" else roles_over(unquantized_base("llama"))
    make_copy, compute = JoinedLinears.make_copy, JoinedLinears._compute

    def wrong_copy(self: JoinedLinears) -> None:
        make_copy(self)
        self.copy.weight.mul_(1.01)  # type: ignore[union-attr]

    def wrong_outputs(self: JoinedLinears, x: Tensor) -> Any:
        if fault == "no memory":
            raise torch.OutOfMemoryError("out of memory")
        if fault == "no scaling":
            self.ups = [up * 1.01 for up in self.ups]
        return [output * (torch.nan if fault == "not a number" else 1) for output in compute(self, x)]

    if fault == "not the copy":
        monkeypatch.setattr(JoinedLinears, "make_copy", wrong_copy)
    else:
        monkeypatch.setattr(JoinedLinears, "_compute", wrong_outputs)
    (message,) = verify(roles)
    assert message.endswith("the plain modules are used")
    assert ("memory ran out" in message) == (fault == "no memory")
    assert not roles.decoding.few_launches
    with rollout_weights(roles, roles.stacks["policy"], torch.float32) as weights:
        assert not isinstance(weights, GpuLinears)


def test_the_rotary_embedding_is_replaced_where_it_is_the_same() -> None:
    for kind in (*FAMILIES, "granite"):
        assert len(JoinedRotary(unquantized_base(kind).model).functions) == 1, kind
    # Neighbouring numbers are rotated, not halves.
    assert JoinedRotary(unquantized_base("cohere").model).functions == []
