"""Properties of the rollout engine: greedy completions equal those of transformers, log-probs are those of the sampled
distribution, and no sequence depends on the others in its batch."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from models import (
    LONGROPE,
    VOCAB,
    all_tensors,
    changed_tensors,
    count_forwards,
    gradients,
    llama_roles,
    load_base_of,
    make_batch,
    perturb,
    relative_error,
    roles_over,
    unquantized_base,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lowrank_tune.errors import TrainingError
from lowrank_tune.generation import (
    Engine,
    attention,
    cpu_linears,
    cpu_norms,
    decode_scheduler,
    linear_weights,
    sampler,
    select_cache,
)
from lowrank_tune.generation.fallback_caches import DynamicCacheStore, NoCacheStore
from lowrank_tune.generation.kv_cache import KVStore
from lowrank_tune.generation.linear_weights import ScratchLimits
from lowrank_tune.generation.outputs import Completion
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.generation.static_slot_cache import StaticSlotCache
from lowrank_tune.generation.stopping import StoppingCriteria
from lowrank_tune.model.logprobs import Head
from lowrank_tune.model.roles import Roles

PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17], [40, 41], [5, 6, 7, 8]]
NO_STOP: frozenset[int] = frozenset()


def perturbed_roles(bits: int = 4, lower: Sequence[str] = ("sft",), **more: Any) -> Roles:
    roles = llama_roles(bits, lower=list(lower), **more)
    perturb(roles, "policy", *lower)
    return roles


def by_name(found: Sequence[Completion]) -> dict[tuple[int, int], Completion]:
    names = {(one.prompt, one.sample): one for one in found}
    assert len(names) == len(found)
    return names


def run(
    roles: Roles,
    n: int = 1,
    role: str = "policy",
    slots: int = 256,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    tokens: int = 12,
    stop: frozenset[int] = NO_STOP,
    temperature: float = 1.0,
    seed: int = 0,
) -> dict[tuple[int, int], Completion]:
    return by_name(
        list(Engine(roles, role, slots).generate(prompts, n, SamplingParams(tokens, stop, temperature, seed)))
    )


# --- greedy -----------------------------------------------------------------------------------------------------------


def transformers_greedy(roles: Roles, role: str, prompt: Sequence[int], tokens: int) -> tuple[list[int], list[float]]:
    """`model.generate` of one prompt alone, and for each token the gap between the best two logits."""
    model = roles.base.model
    with roles.inference_mode(), roles.activate(role):
        ids = torch.tensor([list(prompt)])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=tokens,
            use_cache=True,
            eos_token_id=-1,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    best = torch.stack(out.logits)[:, 0].topk(2, dim=-1).values
    return out.sequences[0, len(prompt) :].tolist(), (best[:, 0] - best[:, 1]).tolist()


def num_greedy_differences(roles: Roles, role: str = "policy", tokens: int = 12, slots: int = 256) -> int:
    """Completions that differ from transformers' at a token that was no near-tie (gap of at least 1e-4)."""
    found, wrong = run(roles, role=role, temperature=0.0, tokens=tokens, slots=slots), 0
    for index, prompt in enumerate(PROMPTS):
        theirs, gaps = transformers_greedy(roles, role, prompt, tokens)
        mine = found[index, 0].token_ids
        at = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), None)
        wrong += at is not None and gaps[at] >= 1e-4
    return wrong


@pytest.mark.parametrize("role", ["policy", "reference", "base"])
@pytest.mark.parametrize("bits", [4, 16])
def test_greedy_equals_transformers(bits: int, role: str) -> None:
    roles = perturbed_roles(bits, checkpointing=True)
    assert num_greedy_differences(roles, role) == 0
    completions = {
        role: [one.token_ids for one in run(roles, role=role, temperature=0.0).values()]
        for role in ("policy", "reference", "base")
    }
    assert len({str(ids) for ids in completions.values()}) == 3, (
        "the roles must say different things, or this test is blind"
    )


@pytest.mark.parametrize(
    "kind", ["qwen3", "mistral", "gemma2", "gemma3_text", "cohere", "granite", "phi", "gpt_neox", "gpt_neo", "gpt2"]
)
def test_greedy_equals_transformers_on_other_architectures(kind: str) -> None:
    """Sliding windows shorter than the text among them: their caches forget, and shrink with the batch too."""
    window = {"sliding_window": 6} if kind in ("mistral", "gemma2", "gemma3_text") else {}
    roles = roles_over(unquantized_base(kind, **window))
    perturb(roles, "policy")
    assert num_greedy_differences(roles) == 0
    assert num_greedy_differences(roles, slots=2) == 0


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("dropped", ["attention_mask", "position_ids"])
def test_a_model_that_forgets_where_it_is_gets_another_store(
    monkeypatch: pytest.MonkeyPatch, kind: str, dropped: str
) -> None:
    model = unquantized_base(kind).model
    assert select_cache.cache_fault(StaticSlotCache, model) is None
    decoder = model.get_decoder()
    monkeypatch.setattr(
        model, "get_decoder", lambda: lambda **given: decoder(**{**given, dropped: None}), raising=False
    )
    assert "differ" in str(select_cache.cache_fault(StaticSlotCache, model))


def test_models_get_the_store_that_serves_them() -> None:
    """gpt_neo makes masks by itself, from the columns of the cache."""
    for kind, wanted in (("llama", StaticSlotCache), ("gpt_neo", DynamicCacheStore)):
        with torch.no_grad():
            assert type(select_cache.select_cache(unquantized_base(kind).model)) is wanted
            assert type(select_cache.select_cache_without_values(unquantized_base(kind).model)) is wanted


@pytest.mark.parametrize("fault", ["none", "position_ids", "attention_mask"])
def test_rounding_of_another_batch_shape_does_not_reject_a_store(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """A deep model in bf16 whose hidden states change by 7 % with the number of rows, as measured on a GPU."""
    model = unquantized_base("llama").model.bfloat16()
    decoder = model.get_decoder()

    def rounded(**given: Any) -> Any:
        output = decoder(**{**given, fault: None} if fault != "none" else given)
        states = output.last_hidden_state
        noise = torch.randn(states.shape[-1], generator=torch.Generator().manual_seed(len(states)))
        noise = (noise / noise.norm()).to(states.dtype)
        output.last_hidden_state = states + 0.05 * states.norm(dim=-1, keepdim=True) * noise
        return output

    monkeypatch.setattr(model, "get_decoder", lambda: rounded, raising=False)
    notes: list[Any] = []
    with torch.no_grad():
        sequence = [5, 6, 7]
        assert (
            select_cache.relative_difference(
                select_cache._uncached_state(model, sequence, 3), select_cache._uncached_state(model, sequence)
            )
            > select_cache.HALF_TOLERANCE
        )
        store = select_cache.select_cache(model, notes.append)
    if fault == "none":
        assert type(store) is StaticSlotCache and not notes
        return
    assert type(store) is not StaticSlotCache
    (note,) = notes
    assert note.level == "warning" and "which is slower" in note.message and "is allowed" in note.message


def test_a_slower_store_is_announced_once() -> None:
    roles = roles_over(unquantized_base("gpt_neo"))
    notes: list[Any] = []
    roles.limits.emit = notes.append
    for _ in range(2):
        run(roles, tokens=2)
    (note,) = notes
    assert "the model's own cache for each prompt, which is slower" in note.message and "gpt_neo" in note.message


def test_store_with_nan_states_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    model = unquantized_base("llama").model
    decode_probes = select_cache.decode_probes

    def broken(store: KVStore, vocabulary: int) -> Any:
        *probes, last = decode_probes(store, vocabulary)
        return [*probes, last._replace(hidden_state=last.hidden_state * torch.nan)]

    monkeypatch.setattr(select_cache, "decode_probes", broken)
    with torch.no_grad():
        assert select_cache.cache_fault(StaticSlotCache, model) is not None


@pytest.mark.parametrize("kind", ["llama", "gpt_neo"])
@pytest.mark.parametrize("store", [DynamicCacheStore, NoCacheStore])
def test_other_stores_sample_the_same(monkeypatch: pytest.MonkeyPatch, store: type[KVStore], kind: str) -> None:
    roles = roles_over(unquantized_base(kind))
    perturb(roles, "policy")
    with torch.no_grad():
        assert select_cache.cache_fault(store, roles.base.model) is None
    monkeypatch.setitem(select_cache._cache_by_model, roles.base.model, store)
    assert num_greedy_differences(roles) == num_greedy_differences(roles, slots=2) == 0
    assert depends_on_batch(roles, 1.0) == []


def near_ties(roles: Roles, prompts: Sequence[Sequence[int]], tokens: int = 24) -> int:
    """Prompts at which the two part at a near-tie (gap under 1e-4); they must not part anywhere else."""
    found, ties = run(roles, prompts=prompts, temperature=0.0, tokens=tokens, slots=48), 0
    for index, prompt in enumerate(prompts):
        theirs, gaps = transformers_greedy(roles, "policy", prompt, tokens)
        at = next((i for i, (a, b) in enumerate(zip(found[index, 0].token_ids, theirs, strict=True)) if a != b), None)
        assert at is None or gaps[at] < 1e-4, (
            f"prompt {index} parts at token {at} where the best two logits are {gaps[at]:.1e} apart"
        )
        ties += at is not None
    return ties


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "mistral"])
@pytest.mark.parametrize("bits", [4, 16])
def test_greedy_equals_transformers_on_two_hundred_prompts(kind: str, bits: int) -> None:
    stream = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 90, (200,), generator=stream).tolist()  # gemma3's window of 64 is shorter than some
    prompts = [torch.randint(2, VOCAB, (length,), generator=stream).tolist() for length in lengths]
    roles = roles_over(load_base_of(bits, kind))
    perturb(roles, "policy")
    assert near_ties(roles, prompts) < 4


# --- what was drawn ---------------------------------------------------------------------------------------------------


def error_of_logps(roles: Roles, temperature: float) -> float:
    """Largest difference between the engine's log-probs and those of one teacher-forced forward pass in train mode."""
    found, worst = run(roles, n=3, temperature=temperature, tokens=10, stop=frozenset(range(2, 10))), 0.0
    for (index, _), one in found.items():
        assert one.logps is not None and len(one.logps) == len(one.token_ids)
        row = [*PROMPTS[index], *one.token_ids]
        forced = roles.logps("policy", make_batch([row]), temperature or 1.0).logps[0, len(PROMPTS[index]) :]
        worst = max(worst, float((forced.detach() - torch.tensor(one.logps)).abs().max()))
    return worst if worst == worst else math.inf


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_log_probs_are_those_of_the_trainer(temperature: float) -> None:
    assert error_of_logps(perturbed_roles(), temperature) < 1e-4


def _cold(self: Head, hidden: Tensor, temperature: float = 1.0) -> Tensor:
    return real_logits(self, hidden, 1.0)


real_logits = Head.logits


def test_log_probs_at_another_temperature_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    roles = perturbed_roles()
    real = Roles.logps
    monkeypatch.setattr(Roles, "logps", lambda self, role, batch, temperature=1.0: real(self, role, batch, 1.0))
    assert error_of_logps(roles, 1.0) < 1e-4 < 1e-2 < error_of_logps(roles, 0.7)


def chi_square(temperature: float, draws: int = 4000) -> float:
    """Drawn words of a vocabulary of eight against the model's own probabilities in float64; 7 degrees of freedom."""
    roles = roles_over(unquantized_base("llama", vocab_size=8, gain=1.5))
    perturb(roles, "policy", size=0.03)
    found = Counter(
        one.token_ids[0]
        for one in run(roles, n=draws, prompts=[[5, 3]], tokens=1, temperature=temperature, slots=1000).values()
    )
    with roles.activate("policy"), torch.no_grad():
        p = torch.softmax(
            roles.base.model(input_ids=torch.tensor([[5, 3]])).logits[0, -1].double() / temperature, dim=-1
        )
    assert float(p.max()) < 0.7 and float(p.min()) * draws > 5, "too uneven for the test"
    return float(((torch.tensor([found[word] for word in range(8)]) - draws * p) ** 2 / (draws * p)).sum())


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_the_sampler_draws_the_models_distribution(temperature: float) -> None:
    assert chi_square(temperature) < 29.9  # one in ten thousand lies above


def test_sampler_without_temperature_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Head, "logits", _cold)
    assert chi_square(0.7) > 60


def test_sampler_that_omits_tokens_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = sampler._inverse_cdf

    def without_the_rare(blocks: Tensor, upto: Tensor, uniform: Tensor) -> Tensor:
        words = real(blocks, upto, uniform)
        rare = blocks.flatten(1).gather(1, words) < 0.05 * upto[:, -1:]
        return torch.where(rare, (words + 1) % 8, words)

    monkeypatch.setattr(sampler, "_inverse_cdf", without_the_rare)
    assert chi_square(1.0) > 60


def test_the_ends_of_the_unit_interval_are_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draw of exactly 0, or next to 1, is a word that has a probability."""
    roles = perturbed_roles()
    real = torch.rand
    for value in (0.0, 1.0 - 2**-53):
        monkeypatch.setattr(
            decode_scheduler.torch, "rand", lambda *a, value=value, **k: torch.full_like(real(*a, **k), value)
        )
        for one in run(roles, tokens=6).values():
            assert all(0 <= word < VOCAB for word in one.token_ids) and one.logps is not None and min(one.logps) > -100
        monkeypatch.undo()


# --- alone or among others --------------------------------------------------------------------------------------------


def depends_on_batch(roles: Roles, temperature: float) -> list[tuple[int, int]]:
    """Completions that differ between batches of 256, of 4 and of 1. Near-ties could; at these seeds none does."""
    stop = frozenset(range(2, 6))
    alone, few, many = (run(roles, n=3, slots=slots, temperature=temperature, stop=stop) for slots in (1, 4, 256))
    return [
        name
        for name in alone
        if not alone[name].token_ids == few[name].token_ids == many[name].token_ids
        or alone[name].finish_reason != many[name].finish_reason
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_completion_is_the_same_alone_and_among_others(temperature: float) -> None:
    assert depends_on_batch(perturbed_roles(), temperature) == []


def test_one_random_stream_for_a_batch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = torch.Generator().manual_seed(0)
    monkeypatch.setattr(decode_scheduler, "sequence_generator", lambda *_: stream)
    assert depends_on_batch(perturbed_roles(), 1.0) != []


def test_each_sample_and_each_seed_has_its_own_random_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    roles = perturbed_roles(16)

    def different() -> int:
        return len({tuple(one.token_ids) for one in run(roles, n=8, prompts=[[5, 6], [5, 6]]).values()})

    assert different() == 16
    assert run(roles, n=2) == run(roles, n=2) != run(roles, n=2, seed=1)
    real = decode_scheduler.sequence_generator
    monkeypatch.setattr(decode_scheduler, "sequence_generator", lambda seed, prompt, sample: real(seed, prompt, 0))
    assert different() == 2


def test_each_sample_of_each_prompt_and_seed_has_its_own_generator() -> None:
    """Up to numbers of several digits, which a key without separators confuses: 1 and 11 with 11 and 1."""
    numbers = [0, 1, 2, 10, 11, 12, 21, 111]
    names = list(itertools.product(numbers, repeat=3))
    seeds = {decode_scheduler.sequence_generator(*name).initial_seed() for name in names}
    assert len(seeds) == len(names)
    assert (
        decode_scheduler.sequence_generator(3, 1, 11)
        .get_state()
        .equal(decode_scheduler.sequence_generator(3, 1, 11).get_state())
    )


def test_the_numbers_of_a_sequence_are_one_stream_of_torch() -> None:
    """No block of them comes again, however long the completion is."""
    drawn = list(itertools.islice(decode_scheduler.uniform_stream(torch.Generator().manual_seed(5)), 200))
    assert drawn == torch.rand(200, generator=torch.Generator().manual_seed(5), dtype=torch.float64).tolist()
    assert len(set(drawn)) == 200


def test_the_global_stream_is_left_alone() -> None:
    roles = perturbed_roles(16)
    before = torch.get_rng_state()
    run(roles)
    assert torch.equal(before, torch.get_rng_state())


def test_other_roles_may_be_used_between_two_tokens() -> None:
    """The caller of the generator enters another role, trains, and does both, while completions come."""
    roles = perturbed_roles()
    expected = run(roles, n=2, stop=frozenset(range(2, 30)))
    found = []
    for one in Engine(roles, "policy").generate(PROMPTS, 2, SamplingParams(12, frozenset(range(2, 30)))):
        assert roles._active == [] and roles.base.model.training and torch.is_grad_enabled()
        found.append(one)
        roles.logps("reference", make_batch([[5, 6, 7, 8]]))
    assert by_name(found) == expected


# --- ends -------------------------------------------------------------------------------------------------------------


def wrong_ends(roles: Roles, stop: frozenset[int], tokens: int) -> list[str]:
    """Against the same draws without a stop id: cut after the first stop id, which belongs to it. Empty is right."""
    free, found, wrong = run(roles, n=4, tokens=tokens), run(roles, n=4, tokens=tokens, stop=stop), []
    for name, one in found.items():
        at = next((i for i, word in enumerate(free[name].token_ids) if word in stop), None)
        if one.token_ids != (free[name].token_ids if at is None else free[name].token_ids[: at + 1]):
            wrong.append(f"{name}: ids")
        if one.finish_reason != ("length" if at is None else "stop"):
            wrong.append(f"{name}: finish")
    finishes = {one.finish_reason for one in found.values()}
    assert finishes == {"stop", "length"}, "both must be met, or this test is blind"
    return wrong


def test_completion_ends_with_its_stop_id(monkeypatch: pytest.MonkeyPatch) -> None:
    roles = perturbed_roles(16)
    stop = frozenset(range(2, 20))
    assert wrong_ends(roles, stop, 12) == []
    assert all(one.finish_reason == "length" and len(one.token_ids) == 12 for one in run(roles).values())

    def without_stop(prompt: int, sample: int, ids: list[int], finish: str, logps: list[float]) -> Completion:
        return Completion(prompt, sample, ids[:-1] if finish == "stop" else ids, finish, logps)  # type: ignore[arg-type]

    monkeypatch.setattr(decode_scheduler, "Completion", without_stop)
    assert wrong_ends(roles, stop, 12) != []


def test_a_stop_at_the_last_token_is_a_stop() -> None:
    roles = perturbed_roles(16)
    assert {one.finish_reason for one in run(roles, tokens=1, stop=frozenset(range(VOCAB))).values()} == {"stop"}
    assert {one.finish_reason for one in run(roles, tokens=1).values()} == {"length"}


def passes_of(roles: Roles, slots: int) -> tuple[list[int], list[int], dict[tuple[int, int], Completion]]:
    """Rows of each prefill and of each step, and the completions."""
    read, steps = list[int](), list[int]()
    handle = roles.base.model.get_decoder().register_forward_pre_hook(
        lambda _, args, given: (steps if "position_ids" in given else read).append(len(given["input_ids"])),
        with_kwargs=True,
    )
    found = run(roles, n=4, stop=frozenset(range(2, 20)), slots=slots)
    handle.remove()
    return read, steps, found


def test_prompts_are_read_once_and_finished_rows_leave() -> None:
    roles = perturbed_roles(16)
    run(roles)  # chooses the store
    read, steps, found = passes_of(roles, 256)
    assert read == [5], "all prompts at once, each once for its four samples"
    assert steps == sorted(steps, reverse=True) and steps[-1] < steps[0] <= 20
    assert sum(steps) == sum(len(one.token_ids) - 1 for one in found.values())


def test_waiting_sequences_take_the_slots_of_finished_ones() -> None:
    roles = perturbed_roles(16)
    run(roles)
    read, steps, found = passes_of(roles, 6)
    assert sum(read) == 5 < len(steps) and steps == sorted(steps, reverse=True)
    assert steps.count(6) > len(steps) / 2, "six speak until nobody waits"
    assert {name: one.token_ids for name, one in found.items()} == {
        name: one.token_ids for name, one in passes_of(roles, 256)[2].items()
    }


def test_memory_bounds_the_slots() -> None:
    """Two layers of keys and values, two heads of 16 numbers in fp32: 512 bytes a token; prompts of up to 7 and 12 more
    tokens."""
    roles = perturbed_roles(16)
    expected = {name: one.token_ids for name, one in run(roles, n=4).items()}
    for limit, slots in ((1 << 30, 20), (5 * 512 * 19 * 5 // 4, 5), (1, 1)):
        engine = Engine(roles, "policy", cache_bytes=limit)
        store = select_cache.select_cache(roles.base.model)
        assert store.allocate(20, 19, limit) == slots
        found = by_name(list(engine.generate(PROMPTS, 4, SamplingParams(12, NO_STOP))))
        assert {name: one.token_ids for name, one in found.items()} == expected


def letters(ids: Sequence[int]) -> str:
    return "".join(chr(97 + token % 26) for token in ids)


def test_completion_ends_with_its_stop_string() -> None:
    roles = perturbed_roles(16)
    free = run(roles, n=4)
    string = letters(free[2, 1].token_ids[4:6])
    found = by_name(
        list(
            Engine(roles, "policy", decode=letters).generate(
                PROMPTS, 4, SamplingParams(12, NO_STOP, stop_strings=("!", string))
            )
        )
    )
    ended = 0
    for name, one in found.items():
        at = letters(free[name].token_ids).find(string)
        assert (one.token_ids, one.finish_reason) == (
            (free[name].token_ids, "length") if at < 0 else (free[name].token_ids[: at + 2], "stop")
        )
        assert len(one.logps or []) == len(one.token_ids)
        ended += at >= 0
    assert 1 <= ended < len(found)
    for strings, decode in (((string,), None), (("",), letters)):
        with pytest.raises(ValueError, match="stop string"):
            Engine(roles, "policy", decode=decode).generate(
                PROMPTS, 1, SamplingParams(12, NO_STOP, stop_strings=strings)
            )


@pytest.mark.parametrize("string", ["\N{GRINNING FACE}" * 10, "\N{EURO SIGN}\N{CJK UNIFIED IDEOGRAPH-4E2D}" * 6, "end"])
def test_a_stop_string_of_byte_tokens_is_found(string: str) -> None:
    """A byte-level vocabulary may spend four tokens on a character. The string ends the completion with its last byte,
    and not before."""

    def decode(token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode(errors="replace")

    stops = StoppingCriteria(SamplingParams(1000, NO_STOP, stop_strings=(string,)), decode)
    token_ids = list(f"A beginning of some length, \N{EURO SIGN}. {string}".encode())
    assert stops.finish_reason(token_ids) == "stop"
    assert [stops.finish_reason(token_ids[:end]) for end in range(1, len(token_ids))] == [None] * (len(token_ids) - 1)


@pytest.mark.parametrize("budget", [0, 1, 3, 40, 57, 10_000])
@pytest.mark.parametrize("slots", [1, 6, 256])
def test_a_budget_bounds_the_whole_call(budget: int, slots: int) -> None:
    roles = perturbed_roles(16)
    free = run(roles, n=4)
    found = by_name(
        list(Engine(roles, "policy", slots).generate(PROMPTS, 4, SamplingParams(12, NO_STOP, budget=budget)))
    )
    assert found.keys() == free.keys(), "every sequence is told, begun or not"
    spent = sum(len(one.token_ids) for one in found.values())
    assert spent <= budget and (spent == 240 or spent > budget - 20)
    assert all(one.token_ids == free[name].token_ids[: len(one.token_ids)] for name, one in found.items())
    assert all(one.finish_reason == ("length" if len(one.token_ids) == 12 else "budget") for one in found.values())


def test_logits_that_are_not_finite_end_the_run() -> None:
    roles = perturbed_roles(16)
    with torch.no_grad():
        roles.parameters("policy")[0].fill_(torch.nan)
    with pytest.raises(TrainingError, match="not finite"):
        run(roles)


def test_empty_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="empty prompt"):
        Engine(perturbed_roles(16), "policy").generate([[5], []], 1, SamplingParams(3, NO_STOP))


# --- narrowed distributions -------------------------------------------------------------------------------------------


NARROW = [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 5, "top_p": 0.8, "min_p": 0.1}]


def narrowed(p: list[float], top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> list[float]:
    """By hand: words from the likeliest on, each kept if it is among the first k, if those before it hold less than
    top_p of what is left, and if it is not much less likely than the first one."""
    words = sorted(range(len(p)), key=lambda word: -p[word])[: top_k or None]
    whole_mass, before, kept = sum(p[word] for word in words), 0.0, []
    for word in words:
        if before / whole_mass < top_p and p[word] >= min_p * p[words[0]]:
            kept.append(word)
        before += p[word]
    mass = sum(p[word] for word in kept)
    return [p[word] / mass if word in kept else 0.0 for word in range(len(p))]


def narrow_chi_square(narrow: dict[str, Any], draws: int = 4000) -> tuple[float, float, int]:
    """Chi-square of what was drawn over the words that may be drawn, the worst error of its log-probs, and the degrees
    of freedom."""
    logits = torch.randn(8, generator=torch.Generator().manual_seed(3)).mul(1.2)
    p = narrowed(logits.double().softmax(0).tolist(), **narrow)
    sampling = SamplingParams(1, NO_STOP, **narrow)
    uniform = torch.rand(draws, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    tokens, logps = sampler.sample(logits.expand(draws, 8).clone(), sampling, uniform)
    found, expected = Counter(tokens.tolist()), [draws * mass for mass in p]
    error = max(
        abs(logp - math.log(p[token])) if p[token] else math.inf
        for token, logp in zip(tokens.tolist(), logps.tolist(), strict=True)
    )
    chi = sum((found[word] - mass) ** 2 / mass for word, mass in enumerate(expected) if mass)
    return chi, error, sum(mass > 0 for mass in expected) - 1


@pytest.mark.parametrize("narrow", NARROW)
def test_filtered_distributions_are_sampled_from_and_reported(narrow: dict[str, Any]) -> None:
    chi, error, freedom = narrow_chi_square(narrow)
    assert 0 < freedom < 7 and chi < {1: 15.2, 2: 18.5, 3: 21.2, 4: 23.6, 5: 25.8, 6: 27.9}[freedom] and error < 1e-5


@pytest.mark.parametrize("narrow", NARROW)
def test_sampler_that_does_not_narrow_is_found(narrow: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "apply_top_k_top_p", lambda logits, sampling: logits)
    assert narrow_chi_square(narrow)[1] > 1e-2


@pytest.mark.parametrize("vocabulary", [1, 7, 128, 129, 1000])
@pytest.mark.parametrize("value", [0.0, 1e-300, 0.5, 1.0 - 2**-53])
def test_only_words_with_a_probability_are_drawn(vocabulary: int, value: float) -> None:
    """Exact 0 and next to 1, with most words impossible, over borders of blocks."""
    logits = torch.full((50, vocabulary), -torch.inf)
    stream = torch.Generator().manual_seed(0)
    for row in range(50):
        places = torch.randint(vocabulary, (3,), generator=stream)
        logits[row, places] = torch.randn(3, generator=stream) * 20
    tokens, logps = sampler.sample(
        logits.clone(), SamplingParams(1, NO_STOP), torch.full((50,), value, dtype=torch.float64)
    )
    expected = torch.log_softmax(logits.double(), dim=1).gather(1, tokens[:, None]).squeeze(1)
    assert torch.isfinite(expected).all() and torch.allclose(logps, expected, atol=1e-5)
    flat = torch.softmax(logits.double(), dim=1).cumsum(dim=1)
    assert bool((flat.gather(1, tokens[:, None]).squeeze(1) >= value - 1e-9).all())


# --- linears of a rollout ---------------------------------------------------------------------------------------------


def test_packed_weights_are_unpacked_once_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    roles = perturbed_roles(4)
    before, unpacked = all_tensors(roles.base.model), [0]
    real = linear_weights.dequantize_4bit
    monkeypatch.setattr(
        linear_weights, "dequantize_4bit", lambda *given: unpacked.__setitem__(0, unpacked[0] + 1) or real(*given)
    )
    packed = sum(isinstance(module, Linear4bit) for module in roles.base.model.modules())
    made: list[Any] = []
    build = cpu_linears.FastLinears.__init__
    monkeypatch.setattr(
        cpu_linears.FastLinears, "__init__", lambda self, *given: (made.append(self), build(self, *given))[1] or None
    )
    generator = Engine(roles, "policy").generate(PROMPTS, 2, SamplingParams(12, frozenset(range(2, 30))))
    next(generator)
    assert (
        unpacked == [packed]
        and made[0].scratch_bytes
        == 4
        * sum(
            module.in_features * module.out_features
            for module in roles.base.model.modules()
            if isinstance(module, Linear4bit)
        )
        + 4 * roles.head.weight.numel()
    )
    assert not any("forward" in vars(module) for module in roles.base.model.modules()), (
        "between two completions all is as it was"
    )
    generator.close()  # type: ignore[attr-defined]
    assert made[0].scratch_bytes == 0 and made[0].forwards == [], "the scratch is given back"
    assert changed_tensors(before, all_tensors(roles.base.model)) == set()


@pytest.mark.parametrize("limit", [0, 1 << 30])
@pytest.mark.parametrize("role", ["policy", "reference", "base"])
def test_a_rollout_without_scratch_samples_the_same(limit: int, role: str) -> None:
    roles = perturbed_roles(4)
    expected = run(roles, n=2, role=role, temperature=0.0)
    found = by_name(
        list(Engine(roles, role, scratch_bytes=limit).generate(PROMPTS, 2, SamplingParams(12, NO_STOP, 0.0)))
    )
    assert {name: one.token_ids for name, one in found.items()} == {
        name: one.token_ids for name, one in expected.items()
    }


def fast_linears(roles: Roles, role: str) -> cpu_linears.FastLinears:
    return cpu_linears.FastLinears(roles.base.model, roles.stacks[role], roles.head, ScratchLimits(1 << 30))


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("rslora", [False, True])
def test_linears_of_a_rollout_compute_the_same(bits: int, rslora: bool) -> None:
    roles = perturbed_roles(bits, use_rslora=rslora)
    ids = torch.tensor([PROMPTS[2]])
    with roles.inference_mode(), roles.activate("policy"):
        plain = roles.base.model(input_ids=ids).logits
        fast = fast_linears(roles, "policy")
        assert len(fast.forwards) == 14 + 5 + 1, "linears, norms and the decoder"
        with fast:
            assert (
                relative_error(roles.base.model(input_ids=ids).logits, plain) < 1e-5
            )  # sums in another order, in fp32
        assert torch.equal(roles.base.model(input_ids=ids).logits, plain)
        with fast_linears(roles, "reference"):
            assert relative_error(roles.base.model(input_ids=ids).logits, plain) > 1e-2, (
                "another stack must say something else, or this test is blind"
            )


# --- modes ------------------------------------------------------------------------------------------------------------


def test_train_mode_is_restored_and_dropout_is_off() -> None:
    roles = perturbed_roles(16, dropout=0.5, checkpointing=True)
    assert run(roles, temperature=0.0) == run(roles, temperature=0.0)
    assert roles.base.model.training and roles._active == []
    with count_forwards(roles) as count:
        run(roles, prompts=[[5, 6]], tokens=3)
        assert count[0] == 3  # one layer call a token: the cache works, nothing is recomputed


@pytest.mark.parametrize("kind", ["llama", "phi3, longrope", "qwen2", "gemma3_text", "gpt_neo"])
def test_a_rollout_leaves_a_model_that_learns_as_before(kind: str) -> None:
    """Autograd refuses tensors of inference mode: none may stay, and rotary frequencies are among what could."""
    changes = LONGROPE if "longrope" in kind else {}
    roles = roles_over(unquantized_base(kind.split(",")[0], "long", **changes))
    perturb(roles, "policy")

    def learned(row: Sequence[int]) -> torch.Tensor:
        for parameter in roles.parameters("policy"):
            parameter.grad = None
        roles.logps("policy", make_batch([row, [9, 10]])).logps.sum().backward()
        return gradients(roles)

    before = learned(PROMPTS[0])
    run(roles, n=2)
    assert learned(range(5, 15)).norm() > 0
    assert torch.equal(learned(PROMPTS[0]), before) and before.norm() > 0
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_dropped_generator_frees_everything() -> None:
    roles = perturbed_roles(16)
    generator = Engine(roles, "policy").generate(PROMPTS, 1, SamplingParams(5, NO_STOP))
    next(generator)
    generator.close()  # type: ignore[attr-defined]
    assert roles.base.model.training and roles._active == [] and torch.is_grad_enabled()


def test_an_exception_in_the_model_restores_everything() -> None:
    roles = perturbed_roles(16)

    def broken(*_: Any) -> None:
        raise RuntimeError("out of something")

    handle = roles.base.model.get_decoder().layers[1].register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="out of something"):
        run(roles)
    handle.remove()
    assert roles.base.model.training and roles._active == [] and torch.is_grad_enabled()


def test_generate_without_prompts_or_samples_yields_nothing() -> None:
    roles = perturbed_roles(16)
    assert run(roles, prompts=[]) == {} and run(roles, n=0) == {}


# --- attention and norms of a rollout ---------------------------------------------------------------------------------


@pytest.mark.parametrize("attend", [attention.decode_attention, attention.grouped_sdpa])
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("additive", [False, True])
def test_one_query_attends_as_softmax_does(attend: Any, heads: int, additive: bool) -> None:
    """Against a float64 loop over rows and heads; query heads share keys in groups; a slice of a longer cache is not
    contiguous."""
    query, key, value = (
        torch.randn(3, 6, 1, 8),
        torch.randn(4, heads, 9, 8)[:3, :, :7],
        torch.randn(4, heads, 9, 8)[:3, :, :7],
    )
    lengths = [7, 1, 4]
    seen = torch.tensor([[column < length for column in range(7)] for length in lengths])[:, None, None]
    mask = torch.where(seen, 0.0, -torch.inf) if additive else seen
    found, _ = attend(torch.nn.Module(), query, key, value, mask, scaling=0.3)
    for row, length in enumerate(lengths):
        for head in range(6):
            mine = head * heads // 6
            weights = (0.3 * key[row, mine, :length].double() @ query[row, head, 0].double()).softmax(0)
            assert relative_error(found[row, 0, head], (weights @ value[row, mine, :length].double()).float()) < 1e-6


def test_grouped_attention_handles_a_mask_for_each_head_and_passes_other_calls_to_transformers() -> None:
    module = torch.nn.Module()
    module.num_key_value_groups = 3
    query, key, value = torch.randn(2, 6, 1, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    for mask in (torch.randn(2, 6, 1, 5), torch.randn(2, 1, 1, 5), None):
        output, _ = attention.grouped_sdpa(module, query, key, value, mask)
        expected, _ = attention.sdpa_attention_forward(module, query, key, value, mask)
        assert output.shape == expected.shape == (2, 1, 6, 8) and relative_error(output, expected) < 1e-6
    queries = torch.randn(2, 6, 5, 8)
    output, _ = attention.grouped_sdpa(module, queries, key, value, torch.ones(5, 5).tril().bool()[None, None])
    assert relative_error(output, attention.sdpa_attention_forward(module, queries, key, value, None)[0]) < 1e-6


class CopiedElements(TorchDispatchMode):
    """Counts the elements that copies and clones write."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.overloadpacket in (
            torch.ops.aten.clone,
            torch.ops.aten.copy_,
            torch.ops.aten._to_copy,
            torch.ops.aten.repeat,
        ):
            self.elements += output.numel()
        return output


def test_grouped_attention_does_not_copy_keys_and_values() -> None:
    """transformers 5.17 copies both once per query head if there is a mask; a slice of the cache is read in place."""
    module = torch.nn.Module()
    module.num_key_value_groups = 4
    query, cache = torch.randn(3, 8, 1, 8), torch.randn(2, 4, 2, 300, 8)
    key, value = (one[:3, :, :256] for one in cache)
    mask = torch.zeros(3, 1, 1, 256)
    with CopiedElements() as copied:
        attention.grouped_sdpa(module, query, key, value, mask)
    assert copied.elements < key.numel()
    with CopiedElements() as copied:
        repeat_kv(key, 4)
    assert copied.elements >= 4 * key.numel(), "the counter misses copies"


def test_a_gpu_decodes_with_grouped_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it generates is what plain `sdpa` generates, and every layer of every step attends with it."""
    roles = perturbed_roles(16)
    config = SimpleNamespace(**{attention.ATTENTION_KEY: "sdpa"})
    model = SimpleNamespace(device=torch.device("cuda"), get_decoder=lambda: SimpleNamespace(config=config))
    with attention.batched_attention(model):
        assert vars(config)[attention.ATTENTION_KEY] == attention.GROUPED_SDPA_NAME
    assert vars(config)[attention.ATTENTION_KEY] == "sdpa"
    calls: list[tuple[int, ...]] = []

    def counted(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(tuple(query.shape))
        return attention.grouped_sdpa(module, query, *args, **kwargs)

    attention.AttentionInterface.register("counted", counted)
    attention.AttentionMaskInterface.register("counted", attention.sdpa_mask)
    monkeypatch.setattr(attention, "ATTENTION_BY_DEVICE", {})
    plain = run(roles, n=2)
    monkeypatch.setattr(attention, "ATTENTION_BY_DEVICE", {"cpu": "counted"})
    grouped = run(roles, n=2)
    assert plain.keys() == grouped.keys()
    for key, completion in plain.items():
        assert grouped[key].token_ids == completion.token_ids
        assert relative_error(torch.tensor(grouped[key].logps), torch.tensor(completion.logps)) < 1e-5
    assert sum(shape[2] == 1 for shape in calls) > 2 * roles.base.model.config.num_hidden_layers


def test_attention_is_what_it_was_between_completions() -> None:
    roles = perturbed_roles(16)
    config = roles.base.model.get_decoder().config
    before = config._attn_implementation
    generator = Engine(roles, "policy").generate(PROMPTS, 2, SamplingParams(12, frozenset(range(2, 30))))
    next(generator)
    assert config._attn_implementation == before == "sdpa"
    with attention.batched_attention(roles.base.model):
        assert config._attn_implementation == attention.DECODE_ATTENTION_NAME
    assert config._attn_implementation == before


class PlusOneRMSNorm(LlamaRMSNorm):  # type: ignore[misc]
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * (1 + weight)  # type: ignore[no-any-return]


class MeanRMSNorm(LlamaRMSNorm):  # type: ignore[misc]
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("kind", "fused"), [(LlamaRMSNorm, True), (PlusOneRMSNorm, True), (MeanRMSNorm, False)])
def test_norms_are_fused_where_they_compute_the_same(kind: type[torch.nn.Module], fused: bool) -> None:
    norm = kind(16, 1e-2)  # an epsilon that shows
    torch.nn.init.normal_(norm.weight)
    found = dict(cpu_norms.fused_norms(torch.nn.ModuleList([norm, torch.nn.LayerNorm(16)])))
    assert list(found) == ([norm] if fused else [])
    x = 0.1 * torch.randn(3, 2, 16)
    assert not fused or relative_error(found[norm](x), norm(x)) < 1e-6
