"""A rollout on the CPU with its own modules draws what it draws with transformers' modules, and restores what it
replaced and copied."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import llama_roles, perturb, relative_error, roles_over, unquantized_base
from rollout_helpers import Completions, assert_equal_completions, by_sample, ragged_prompts
from torch import Tensor

from lowrank_tune.events import Event, is_warning
from lowrank_tune.generation import Engine, cpu_comparison, cpu_weights, decoder_step
from lowrank_tune.generation.cpu_linears import FastLinears
from lowrank_tune.generation.linear_weights import ScratchLimits, scratch_plan
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.model.roles import Roles

PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17], [40, 41], [5, 6, 7, 8]]
SAMPLING = SamplingParams(14, frozenset(range(8)), 1.0, seed=3)
TOLERANCE = 2e-5
"""Log-probs of these bases differ from float64 by up to 1.3e-5, with transformers' modules too."""


def family_roles(kind: str) -> Roles:
    if kind == "nf4":
        roles = llama_roles(4, lower=["sft"])
        perturb(roles, "policy", "sft")
        return roles
    roles = roles_over(unquantized_base(kind))
    perturb(roles, "policy")
    return roles


@pytest.fixture(scope="module", params=["nf4", "llama", "qwen2", "qwen3"])
def roles(request: pytest.FixtureRequest) -> Iterator[Roles]:
    made = family_roles(request.param)
    yield made
    made.unload_adapters()


def completions(roles: Roles, sampling: SamplingParams, fast: bool, **more: Any) -> Completions:
    prompts = more.pop("prompts", PROMPTS)
    engine = Engine(roles, "policy", **more)
    engine.fast_modules = fast
    return by_sample(engine.generate(prompts, 2, sampling))


def count_layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how many layers have a step of their own."""
    count, run = [0], decoder_step._LayerStep.run

    def counted(self: Any, x: Tensor, step: Any) -> Tensor:
        count[0] += 1
        return run(self, x, step)

    monkeypatch.setattr(decoder_step._LayerStep, "run", counted)
    return count


@settings(max_examples=4, deadline=None)
@given(
    slots=st.integers(1, 9),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    max_new_tokens=st.integers(1, 16),
    scratch_bytes=st.sampled_from([0, 1 << 30]),
)
def test_its_own_modules_draw_what_transformers_modules_draw(
    roles: Roles, slots: int, lengths: list[int], max_new_tokens: int, scratch_bytes: int
) -> None:
    prompts = ragged_prompts(lengths)
    sampling = SamplingParams(max_new_tokens, frozenset(range(6)), 1.0)
    expected = completions(roles, sampling, False, prompts=prompts, slots=slots)
    with pytest.MonkeyPatch.context() as patch:
        count = count_layers(patch)
        found = completions(roles, sampling, True, prompts=prompts, slots=slots, scratch_bytes=scratch_bytes)
    assert_equal_completions(found, expected, TOLERANCE)
    steps = max(len(one.token_ids) for one in found.values()) - 1
    assert count[0] >= steps * len(roles.base.model.get_decoder().layers)


def float64_errors(roles: Roles, found: Completions) -> Tensor:
    """Differences of all log-probs from those of whole rows by transformers' modules in float64."""
    errors = []
    with torch.no_grad(), roles.activate("policy"):
        model = copy.deepcopy(roles.base.model).double().eval()
        for (prompt, _), one in found.items():
            start = len(PROMPTS[prompt])
            logits = model(input_ids=torch.tensor([PROMPTS[prompt] + one.token_ids])).logits.double()
            logps = logits.log_softmax(dim=-1)[0, start - 1 : -1]
            exact = logps.gather(1, torch.tensor(one.token_ids)[:, None])[:, 0]
            errors.append((torch.tensor(one.logps, dtype=torch.float64) - exact).abs())
    return torch.cat(errors)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_its_own_modules_are_as_exact_as_transformers_modules(kind: str) -> None:
    made = family_roles(kind)
    sampling = SamplingParams(20, frozenset(), 1.0)
    ours, plain = (float64_errors(made, completions(made, sampling, fast)) for fast in (True, False))
    assert ours.mean() < 1.5 * plain.mean() and ours.max() < TOLERANCE


@pytest.mark.parametrize("change", ["hook", "window", "forward", "gemma2", "phi"])
def test_a_decoder_that_computes_something_else_keeps_its_own_step(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = {"window": "mistral"}.get(change, change if change in ("gemma2", "phi") else "llama")
    made = roles_over(unquantized_base(kind, **({"sliding_window": 6} if change == "window" else {})))
    perturb(made, "policy")
    mlp = made.base.model.get_decoder().layers[0]
    calls = []
    if change == "hook":
        mlp.mlp.register_forward_hook(lambda *_: calls.append(1))
    elif change == "forward":
        plain = mlp.mlp.forward
        mlp.mlp.forward = lambda x: 1.5 * plain(x)
    count = count_layers(monkeypatch)
    assert_equal_completions(completions(made, SAMPLING, True), completions(made, SAMPLING, False), TOLERANCE)
    assert count == [0] and bool(calls) == (change == "hook")


@pytest.mark.parametrize("fault", ["step", "product", "head", "error"])
def test_a_fault_of_the_fast_modules_is_found_and_reported_once(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = family_roles("llama")
    events: list[Event] = []
    made.limits.emit = events.append
    expected = completions(made, SAMPLING, False)
    if fault in ("product", "head"):
        product = cpu_weights.BlockedWeight.product
        size = 97 if fault == "head" else 64

        def wrong(self: Any, rows: Tensor) -> Tensor:
            found = product(self, rows)
            return found * 1.01 if found.shape[1] == size else found

        assert cpu_weights.has_blocked_weights()
        monkeypatch.setattr(cpu_weights.BlockedWeight, "product", wrong)
    else:
        real = decoder_step._LayerStep._attend

        def attend(self: Any, qkv: Tensor, step: Any) -> Tensor:
            if fault == "error":
                raise RuntimeError("no such kernel")
            return 1.1 * real(self, qkv, step)

        monkeypatch.setattr(decoder_step._LayerStep, "_attend", attend)
    for _ in range(2):
        assert_equal_completions(completions(made, SAMPLING, True), expected, TOLERANCE)
    (found,) = [event for event in events if is_warning(event)]
    assert "transformers' own modules" in found.message
    assert not any("forward" in vars(module) for module in made.base.model.modules())


def test_copies_fit_the_scratch() -> None:
    made = family_roles("nf4")
    model, head = made.base.model, made.head
    whole = scratch_plan(model, head, ScratchLimits(1 << 40))
    for limit in (0, whole.num_bytes - 4 * head.weight.numel() - 1, whole.num_bytes - 1, whole.num_bytes):
        for copies_fp32 in (True, False):
            plan = scratch_plan(model, head, ScratchLimits(limit, copies_fp32))
            assert plan.num_bytes <= limit
            assert plan.copies_head == (copies_fp32 and limit == whole.num_bytes)
            assert bool(plan.copied) == (limit >= whole.num_bytes - 4 * head.weight.numel())
    linears = FastLinears(model, made.stacks["policy"], head, ScratchLimits(1 << 40))
    assert linears.head is not head
    linears.close()
    assert linears.head is head and not linears.products


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 40), width=st.integers(1, 70), out=st.integers(1, 70), has_bias=st.booleans())
def test_products_with_copies_are_products(rows: int, width: int, out: int, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows + 100 * width + out)
    weight, x = (torch.randn(size, width, generator=generator) for size in (out, rows))
    bias = torch.randn(out, generator=generator) if has_bias else None
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    for copied in (cpu_weights.copy_weight(weight, bias), cpu_weights.PlainWeight(weight.T.contiguous(), bias)):
        assert relative_error(copied.product(x).double(), expected) < 1e-6


def test_without_the_operators_weights_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any) -> None:
        raise AttributeError("no such operator")

    monkeypatch.setattr(cpu_weights.BlockedWeight, "__init__", absent)
    monkeypatch.setattr(cpu_weights, "has_blocked_weights", cpu_weights.has_blocked_weights.__wrapped__)
    assert not cpu_weights.has_blocked_weights()
    assert type(cpu_weights.copy_weight(torch.ones(2, 3), None)) is cpu_weights.PlainWeight


def test_one_comparison_for_each_model(monkeypatch: pytest.MonkeyPatch) -> None:
    made = family_roles("llama")
    count, fault = [0], cpu_comparison._fault
    monkeypatch.setattr(cpu_comparison, "_fault", lambda *given: count.__setitem__(0, count[0] + 1) or fault(*given))
    for slots in (3, 8):
        completions(made, SAMPLING, True, slots=slots)
    assert count == [1]
