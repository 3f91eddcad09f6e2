"""Laws of `model/oom.py`: where memory runs short, the gradient is what it would have been, nothing is held, and
it is remembered."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import llama_roles, perturb, relative_error
from test_loop import ALGORITHMS, algorithm_over, loop_over, steps_of, warnings_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowrank_tune.events import Event, StepEnd
from lowrank_tune.generation import Engine, select_cache
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.generation.static_slot_cache import StaticSlotCache
from lowrank_tune.model import oom
from lowrank_tune.model.oom import DoesNotFit, MemoryLimits, is_out_of_memory
from lowrank_tune.model.roles import Roles
from lowrank_tune.training.trainer import Trainer

NEAR = dict.fromkeys(ALGORITHMS, 1e-6) | {"grpo": 4e-6}
"""Relative distance. Advantages of a group sum to 0, so most of GRPO's gradient cancels: there any split alone is
1.4e-6 from any other."""
CARD = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.31 GiB is free."
)


def fast(*names: str) -> list[Any]:
    """All algorithms, all but these on the slower tier."""
    return [pytest.param(name, marks=() if name in names else pytest.mark.slow) for name in ALGORITHMS]


def short_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError(CARD)


@contextmanager
def failing_at(roles: Roles, moments: Sequence[int], backward: bool) -> Iterator[list[int]]:
    """Memory runs short whenever the count of layer passes forward, or of gradients that have been *added* in backward
    passes, comes to one of the moments. Yields the count."""
    count = [0]

    def tick(*_: Any) -> None:
        count[0] += not getattr(roles, "resting", False)
        if count[0] in moments and not getattr(roles, "resting", False):
            raise short_of_memory()

    if backward:
        trained = [
            p
            for p in (*roles.base.model.parameters(), *(head.weight for head in roles.heads.values()))
            if p.requires_grad
        ]
        handles = [p.register_post_accumulate_grad_hook(tick) for p in trained]
    else:
        handles = [
            module.register_forward_hook(tick)
            for name, module in roles.base.model.named_modules()
            if name.endswith("mlp")
        ]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


class Watched(torch.optim.SGD):
    """Keeps the gradients that it is given, and moves nothing."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, lr=0.0)
        self.seen: list[Tensor] = []

    def step(self, closure: Any = None) -> None:
        parameters = self.param_groups[0]["params"]
        self.seen.append(
            torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]).clone()
        )


def watched_loop(name: str, steps: int = 2, **train: Any) -> tuple[Trainer, Roles, Watched, list[Event]]:
    """A loop over every trainable parameter, whose gradients are kept before they are clipped away."""
    algorithm, roles, _ = algorithm_over(name, 0.0)
    perturb(roles, *roles.trainable, size=0.05)
    real = algorithm.context.get_batch

    def rows(step: int) -> Any:
        roles.resting = True  # type: ignore[attr-defined]  # a run's rows are there before it begins, and so is DPO's reference
        try:
            return real(step)
        finally:
            roles.resting = False  # type: ignore[attr-defined]

    algorithm.context = replace(algorithm.context, fresh=False, get_batch=rows)
    parameters = [p for role in sorted(roles.trainable) for p in roles.parameters(role)]
    optimizer = Watched(parameters)
    loop, events = loop_over(
        algorithm,
        parameters,
        steps,
        optimizer,
        **{"micro_batch_size": 6, "max_grad_norm": 1e9, "logging_steps": 50} | train,
    )
    loop.limits = roles.limits
    roles.limits.emit = events.append
    return loop, roles, optimizer, events


@pytest.fixture(scope="module")
def unbroken() -> Callable[[str], tuple[list[Tensor], list[StepEnd], dict[bool, int]]]:
    """Gradients, steps and how far the counts go, of an algorithm whose memory suffices."""
    known: dict[str, Any] = {}

    def of(name: str) -> Any:
        if name not in known:
            counts = {}
            for backward in (False, True):
                loop, roles, optimizer, events = watched_loop(name)
                with failing_at(roles, (), backward) as count:
                    loop.run()
                counts[backward] = count[0]
            known[name] = optimizer.seen, steps_of(events), counts
        return known[name]

    return of


def broken_run(
    name: str, moments: Sequence[int], backward: bool
) -> tuple[list[Tensor], list[StepEnd], list[str], Roles]:
    loop, roles, optimizer, events = watched_loop(name)
    with failing_at(roles, moments, backward):
        assert loop.run() is True
    return optimizer.seen, steps_of(events), warnings_of(events), roles


def differs(unbroken: Any, name: str, backward: bool, draws: int) -> list[str]:
    """What is not as in the unbroken run where memory runs short at random moments, two of them. Empty is right."""
    gradients, steps, counts = unbroken(name)
    stream, splits, wrong = random.Random(f"{name}-{backward}"), 0, list[str]()
    for _ in range(draws):
        moments = sorted(stream.sample(range(1, counts[backward] + 1), 2))
        seen, logged, warnings, roles = broken_run(name, moments, backward)
        wrong += [
            f"{moments}: gradient {i}"
            for i, (a, b) in enumerate(zip(seen, gradients, strict=True))
            if relative_error(a, b) > NEAR[name]
        ]
        wrong += [f"{moments}: role"] if roles._active else []
        wrong += [f"{moments}: {each}" for each in warnings if "out of memory" not in each]
        wrong += (
            [f"{moments}: times"]
            if not roles.limits.num_ooms == len(warnings) == logged[-1].stats.get("oom_retries", 0)
            else []
        )
        splits += len(warnings)
        for now, then in zip(logged, steps, strict=True):
            other = {
                "memory_gib",
                "tokens_per_second",
                "rollout_seconds",
                "reward_seconds",
                *(("kl",) if name in ("sft", "dpo") else ()),
                "kl_per_token",
            }
            # KL that costs a pass of its own is of one micro-batch, which may have become a smaller one
            same = then.stats.keys() - other
            wrong += [
                f"{moments}: {key}"
                for key in same
                if now.stats[key] != pytest.approx(then.stats[key], rel=1e-4, abs=1e-6)
            ]
            wrong += [f"{moments}: tokens"] if now.tokens != then.tokens else []
    return wrong if splits else ["nothing was split"]


@pytest.mark.parametrize("backward", [pytest.param(False, marks=pytest.mark.slow), True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", fast("sft", "ppo"))
def test_gradient_and_figures_are_those_of_the_unbroken_run(unbroken: Any, name: str, backward: bool) -> None:
    assert differs(unbroken, name, backward, 1) == []


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_gradient_after_oom_at_any_call_is_that_of_the_whole_run(unbroken: Any, name: str, backward: bool) -> None:
    assert differs(unbroken, name, backward, 12) == []


@pytest.mark.parametrize("name", ["sft"])
def test_partial_gradient_that_remains_is_found(monkeypatch: pytest.MonkeyPatch, unbroken: Any, name: str) -> None:
    @contextmanager
    def careless(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        yield

    monkeypatch.setattr("lowrank_tune.training.trainer.atomic_grad_accumulation", careless)
    gradients, _, counts = unbroken(name)
    seen = broken_run(name, [20], True)[0]  # in the first micro-batch, some of whose gradients are added by then
    assert max(relative_error(a, b) for a, b in zip(seen, gradients, strict=True)) > 1e-4


def test_oom_in_the_value_loss_of_ppo_is_recovered(unbroken: Any) -> None:
    """The failures of the test above reach it: only the second term adds gradients of the value's parameters."""
    loop, roles, optimizer, events = watched_loop("ppo")
    value = roles.parameters("value")
    failed: list[int] = []

    def once(parameter: nn.Parameter) -> None:
        if not failed:
            failed.append(1)
            assert all(p.grad is None for p in roles.parameters("policy")) is False, "the first term was added"
            raise short_of_memory()

    handle = value[1].register_post_accumulate_grad_hook(once)
    loop.run()
    handle.remove()
    assert failed and all(relative_error(a, b) <= 1e-6 for a, b in zip(optimizer.seen, unbroken("ppo")[0], strict=True))


@contextmanager
def small_gpu(roles: Roles, tokens: int) -> Iterator[list[int]]:
    """Refuses memory to passes with gradient over more than some number of tokens, padding counted."""
    sizes: list[int] = []

    def guard(module: Any, arguments: Any, named: Any) -> None:
        size = named["input_ids"].numel()
        if size > tokens and torch.is_grad_enabled():
            raise short_of_memory()
        sizes.append(size)

    handle = roles.base.model.get_decoder().register_forward_pre_hook(guard, with_kwargs=True)
    try:
        yield sizes
    finally:
        handle.remove()


@pytest.mark.parametrize("name", fast("sft"))
def test_what_did_not_fit_is_not_tried_again(name: str) -> None:
    loop, roles, _, events = watched_loop(name, steps=4, micro_batch_size=50)
    # So that a micro-batch has the tokens that it is counted by.
    roles.decoder.share_prefixes = roles.decoder.packed_rows.enabled = False
    with small_gpu(roles, 40):
        assert loop.run()
    after_first = [warning for warning in warnings_of(events) if not warning.startswith("step 1: ")]
    assert 0 < roles.limits.update_tokens <= 40 and after_first == [], "one step finds out for all"
    assert (
        "from here on it has at most" in warnings_of(events)[-1]
        and "train.micro_batch_tokens=" in warnings_of(events)[-1]
    )
    resumed = MemoryLimits()
    resumed.restore(roles.limits.to_dict())
    assert resumed.to_dict() == roles.limits.to_dict()


def test_units_that_stay_together_are_never_split() -> None:
    loop, roles, _, _ = watched_loop("dpo", micro_batch_size=50)
    sizes: list[int] = []
    real = loop.algorithm.compute_losses

    def terms(micro: Any) -> Any:
        sizes.append(len(micro))
        rows = micro.reference_sequence_logps
        assert len(rows) % 2 == 0
        return real(micro)

    loop.algorithm.compute_losses = terms  # type: ignore[method-assign]
    with small_gpu(roles, 40):
        loop.run()
    assert all(size % 2 == 0 for size in sizes) and min(sizes) == 2


@pytest.mark.parametrize("name", fast("dpo"))
def test_a_row_that_does_not_fit_alone_ends_the_run(name: str) -> None:
    loop, roles, optimizer, _ = watched_loop(name)
    with small_gpu(roles, 5), pytest.raises(DoesNotFit) as caught:
        loop.run()
    assert caught.value.exit_code == 3 and caught.value.kind == "update_tokens" and optimizer.seen == []
    what = "a pair" if name in ("dpo", "reward") else "a row"
    assert str(caught.value).startswith(f"out of memory: {what} of ") and str(caught.value).endswith(
        "does not fit by itself"
    )


class Alive(TorchDispatchMode):
    """Counts the bytes of all storages that operations made and that still exist, without the weights of the model,
    which are the storages of views."""

    def __init__(self, roles: Roles) -> None:
        super().__init__()
        own = (
            *roles.base.model.parameters(),
            *roles.base.model.buffers(),
            *(head.weight for head in roles.heads.values()),
        )
        self.own = {tensor.untyped_storage()._cdata for tensor in own}
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = function(*arguments, **(named or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self.sizes and key not in self.own:
                    self.sizes[key] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, key, None)
        return result

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())


def held_after_failure(name: str, backward: bool, cleared: bool = True) -> tuple[int, int, int]:
    """Returns the bytes of operations at the start of an attempt, at its failure, and at the start of its halves."""
    loop, roles, _, _ = watched_loop(name, steps=1)
    moments: dict[str, int] = {}
    with failing_at(roles, (), backward) as count:
        loop.run()
    moment = count[0] // 2 if backward else max(2, 2 * (count[0] // 4))
    loop, roles, _, _ = watched_loop(name, steps=1)
    real, attempt = MemoryLimits.record_oom, MemoryLimits._try

    def watched(*arguments: Any) -> Any:
        if "before" not in moments:
            moments["baseline"] = alive.bytes
        return attempt(*arguments)

    def ran_short(self: MemoryLimits, *arguments: Any, **named: Any) -> None:
        moments["after"] = alive.bytes
        real(self, *arguments, **named)

    def at_failure() -> torch.OutOfMemoryError:
        moments["before"] = alive.bytes
        return torch.OutOfMemoryError(CARD)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryLimits, "record_oom", ran_short)
        patch.setattr(MemoryLimits, "_try", watched)
        patch.setitem(globals(), "short_of_memory", at_failure)
        if not cleared:
            kept: list[BaseException] = []
            patch.setattr(oom, "free_traceback", lambda error: kept.append(error))
        alive = Alive(roles)
        with alive, failing_at(roles, (moment,), backward):
            loop.run()
    return moments["baseline"], moments["before"], moments["after"]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", fast("sft"))
def test_memory_is_back_at_its_baseline_before_the_halves_begin(name: str, backward: bool) -> None:
    """What a failed attempt made is gone: graph, activations, and gradients that it had added."""
    gc.collect()
    baseline, before, after = held_after_failure(name, backward)
    assert before > baseline + 10_000 and after <= baseline, (baseline, before, after)
    if not backward:  # a graph is let go while it is walked
        baseline, before, after = held_after_failure(name, backward, cleared=False)
        assert after > baseline + 10_000, "an error that is kept keeps them all"


# --- work without gradient, and rollouts ------------------------------------------------------------------------------


def test_pieces_by_hand() -> None:
    """Units in order, each once; halves where it is too much; one that fails once and fits then costs no limit; then it
    ends."""
    limits, tried = MemoryLimits(), list[list[int]]()

    def work(units: Sequence[int]) -> int:
        tried.append(list(units))
        if len(units) > 2 or (units[0] == 6 and tried.count([6]) == 1):
            raise short_of_memory()
        return sum(units)

    found = list(limits.split_on_oom("forward_tokens", range(7), 10, work))
    assert [list(units) for units, _ in found] == [[0, 1], [2, 3], [4, 5], [6]] and [total for _, total in found] == [
        1,
        5,
        9,
        6,
    ]
    assert tried == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3], [0, 1], [2, 3], [4, 5], [6], [6]]
    assert limits.to_dict() == {"update_tokens": 0, "forward_tokens": 20, "cache_tokens": 0, "num_ooms": 2}
    tried.clear()
    assert [total for _, total in limits.split_on_oom("forward_tokens", range(3), 9, work)] == [1, 2] and tried == [
        [0, 1],
        [2],
    ]
    with pytest.raises(DoesNotFit, match="^out of memory: a pair of 9,000 tokens does not fit by itself$"):
        list(limits.split_on_oom("forward_tokens", [3], 9000, lambda units: work([1, 2, 3]), rows_per_unit=2))


def test_a_retry_draws_the_numbers_of_the_failed_attempt() -> None:
    """As with dropout: what runs out of memory after it has drawn draws the same again, alone and in halves; and what
    comes later goes on behind the last attempt."""
    drawn = list[tuple[list[int], float]]()

    def work(units: Sequence[int]) -> None:
        drawn.append((list(units), float(torch.rand(()))))
        if len(drawn) in (1, 3):
            raise short_of_memory()

    torch.manual_seed(6)
    first, second, third = torch.rand(3).tolist()
    torch.manual_seed(6)
    list(MemoryLimits().split_on_oom("update_tokens", [0, 1], 5, work))
    assert drawn == [([0, 1], first), ([0], first), ([1], second), ([1], second)]
    assert float(torch.rand(())) == third


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (torch.OutOfMemoryError(CARD), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                "to allocate 9."
            ),
            True,
        ),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_which_errors_mean_out_of_memory(error: BaseException, short: bool) -> None:
    assert is_out_of_memory(error) is short


def test_other_errors_go_through() -> None:
    with pytest.raises(ZeroDivisionError):
        list(MemoryLimits().split_on_oom("update_tokens", [1, 2], 5, lambda units: 1 // 0))


def test_real_error_of_the_allocator_is_recovered() -> None:
    """The CPU allocator refuses a quarter of an exabyte, and its message is recognized."""

    def work(units: Sequence[int]) -> int:
        return torch.empty(1 << 58 if len(units) > 1 else 4, dtype=torch.uint8).numel()

    assert [found for _, found in MemoryLimits().split_on_oom("update_tokens", [1, 2, 3], 5, work)] == [4, 4, 4]


def drawn(
    roles: Roles, moments: Sequence[int], slots: int = 8, **more: Any
) -> tuple[dict[tuple[int, int], Any], list[str]]:
    notes: list[str] = []
    roles.limits = MemoryLimits(emit=lambda event: notes.append(event.message))  # type: ignore[attr-defined]
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]
    with failing_at(roles, moments, False):
        found = list(
            Engine(roles, "policy", slots).generate(prompts, 3, SamplingParams(12, frozenset({1}), seed=3, **more))
        )
    assert len({(one.prompt, one.sample) for one in found}) == len(found) == 12, "each once"
    return {(one.prompt, one.sample): (one.token_ids, one.finish_reason) for one in found}, notes


@pytest.mark.slow
def test_rollout_with_fewer_sequences_draws_the_same_samples() -> None:
    roles = llama_roles(16)
    perturb(roles, "policy")
    whole, none = drawn(roles, (2,))
    assert len(none) == 1, "while it looks for the kind of cache that serves the model, too, it is no other fault"
    assert select_cache._cache_by_model[roles.base.model] is StaticSlotCache
    for moments in ((1,), (7,), (20, 31), (4, 5, 6)):
        found, notes = drawn(roles, moments)
        assert found == whole and len(notes) == len(moments) == roles.limits.num_ooms
        assert (
            roles._active == [] and roles.base.model.training and roles.limits.cache_tokens == (8 >> len(moments)) * 16
        )
        assert "drawn again from the same random numbers" in notes[0]


def test_a_rollout_remembers_by_tokens() -> None:
    roles = llama_roles(16)
    drawn(roles, ())
    drawn(roles, (7,))
    limits, sizes = roles.limits, list[int]()
    handle = roles.base.model.get_decoder().register_forward_pre_hook(
        lambda module, arguments, named: sizes.append(len(named["input_ids"])), with_kwargs=True
    )
    list(Engine(roles, "policy", 8).generate([[5, 6, 7, 8]], 8, SamplingParams(12, frozenset({1}), seed=3)))
    longest, sizes[:] = max(sizes), []
    list(Engine(roles, "policy", 8).generate([[5, 6, 7, 8]], 8, SamplingParams(4, frozenset({1}), seed=3)))
    handle.remove()
    assert limits.cache_tokens == 64 and (longest, max(sizes)) == (4, 8), "half as long, twice as many"


def test_a_budget_of_tokens_counts_what_had_ended() -> None:
    roles = llama_roles(16)
    perturb(roles, "policy")
    for moments in ((), (12,), (17,)):
        found, _ = drawn(roles, moments, budget=60)
        assert sum(len(ids) for ids, _ in found.values()) <= 60 and any(
            finish == "budget" for _, finish in found.values()
        )


def test_a_sequence_that_does_not_fit_alone_ends_the_run() -> None:
    roles = llama_roles(16)
    with pytest.raises(DoesNotFit, match="^out of memory: a sequence of 16 tokens does not fit by itself$") as caught:
        drawn(roles, range(1, 999))
    assert caught.value.kind == "cache_tokens" and roles.limits.num_ooms == 4


def test_keys_and_values_are_freed_before_the_update() -> None:
    """Rollouts and updates of GRPO and PPO share the memory: no cache of a rollout exists at the first micro-batch."""
    from lowrank_tune.generation import slot_cache

    roles, made = llama_roles(16), list[weakref.ref[Any]]()
    real = slot_cache.SlotLayer.allocate

    def allocate(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        made.extend(weakref.ref(tensor) for tensor in (self.keys, self.values))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slot_cache.SlotLayer, "allocate", allocate)
        for _ in Engine(roles, "policy", 8).generate([[5, 6, 7], [8, 9]], 3, SamplingParams(6, frozenset({1}))):
            pass
    assert len(made) >= 4 and all(one() is None for one in made)


def held_by_the_queue() -> bool:
    """Returns whether tasks that a failed backward pass had not run still exist when the halves start."""
    kept: list[weakref.ref[Any]] = []
    seen: list[bool] = []

    def fail(gradient: Tensor) -> None:
        raise short_of_memory()

    def work(units: Sequence[int]) -> None:
        seen.extend(storage() is not None for storage in kept[:1])
        leaf = torch.ones(100, requires_grad=True)
        older, younger = leaf.exp(), leaf.sin()  # both are ready at once, and the younger one comes first
        kept.append(weakref.ref(older.untyped_storage()))
        if len(units) > 1:
            younger.register_hook(fail)
        (older.sum() + younger.sum()).backward()  # type: ignore[no-untyped-call]

    list(MemoryLimits().split_on_oom("update_tokens", [1, 2], 5, work))
    return seen[0]


def test_failed_backward_pass_leaves_the_autograd_queue_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not held_by_the_queue()
    monkeypatch.setattr(torch.autograd, "grad", lambda *_, **__: None)
    assert held_by_the_queue()
