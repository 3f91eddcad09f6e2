"""Laws of the rollout engine: transformers' own greedy words, log-probs of what was drawn, and no row that hangs on its neighbours."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models import VOCAB, counting, llama_roles, make_batch, roles_over, shake, whole
from torch import Tensor

from lowrank_tune.model.logps import Head
from lowrank_tune.model.roles import Roles
from lowrank_tune.rollout import Engine
from lowrank_tune.rollout import engine as engine_module
from lowrank_tune.types import Completion, Sampling

PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17], [40, 41], [5, 6, 7, 8]]
NO_STOP: frozenset[int] = frozenset()


def speaking(bits: int = 4, lower: Sequence[str] = ("sft",), **more: Any) -> Roles:
    roles = llama_roles(bits, lower=list(lower), **more)
    shake(roles, "policy", *lower)
    return roles


def by_name(found: Sequence[Completion]) -> dict[tuple[int, int], Completion]:
    names = {(one.prompt, one.sample): one for one in found}
    assert len(names) == len(found)
    return names


def run(roles: Roles, n: int = 1, role: str = "policy", slots: int = 256, prompts: Sequence[Sequence[int]] = PROMPTS, tokens: int = 12,
        stop: frozenset[int] = NO_STOP, temperature: float = 1.0, seed: int = 0) -> dict[tuple[int, int], Completion]:  # fmt: skip
    return by_name(list(Engine(roles, role, slots).generate(prompts, n, Sampling(tokens, stop, temperature, seed))))


# --- greedy ----------------------------------------------------------------------------------------------------------------------------


def transformers_greedy(roles: Roles, role: str, prompt: Sequence[int], tokens: int) -> tuple[list[int], list[float]]:
    """`model.generate` of one prompt alone, and for each token the gap between the best two logits."""
    model = roles.base.model
    with roles.quiet(), roles.use(role):
        ids = torch.tensor([list(prompt)])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, use_cache=True,
                             eos_token_id=-1, pad_token_id=0, output_logits=True, return_dict_in_generate=True)  # fmt: skip
    best = torch.stack(out.logits)[:, 0].topk(2, dim=-1).values
    return out.sequences[0, len(prompt) :].tolist(), (best[:, 0] - best[:, 1]).tolist()


def wrong_greedy_words(roles: Roles, role: str = "policy", tokens: int = 12, slots: int = 256) -> int:
    """Completions that differ from transformers' at a token that was no near-tie (gap of at least 1e-4)."""
    found, wrong = run(roles, role=role, temperature=0.0, tokens=tokens, slots=slots), 0
    for index, prompt in enumerate(PROMPTS):
        theirs, gaps = transformers_greedy(roles, role, prompt, tokens)
        mine = found[index, 0].ids
        at = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), None)
        wrong += at is not None and gaps[at] >= 1e-4
    return wrong


@pytest.mark.parametrize("role", ["policy", "reference", "base"])
@pytest.mark.parametrize("bits", [4, 16])
def test_greedy_equals_transformers(bits: int, role: str) -> None:
    roles = speaking(bits, checkpointing=True)
    assert wrong_greedy_words(roles, role) == 0
    said = {role: [one.ids for one in run(roles, role=role, temperature=0.0).values()] for role in ("policy", "reference", "base")}
    assert len({str(ids) for ids in said.values()}) == 3, "the roles must say different things, or this test is blind"


@pytest.mark.parametrize("kind", ["qwen3", "mistral", "gemma2", "gemma3_text", "cohere", "granite", "phi", "gpt_neox", "gpt_neo", "gpt2"])
def test_greedy_equals_transformers_on_other_architectures(kind: str) -> None:
    """Sliding windows shorter than the text among them: their caches forget, and shrink with the batch too."""
    window = {"sliding_window": 6} if kind in ("mistral", "gemma2", "gemma3_text") else {}
    roles = roles_over(whole(kind, **window))
    shake(roles, "policy")
    assert wrong_greedy_words(roles) == 0
    assert wrong_greedy_words(roles, slots=2) == 0


@pytest.mark.parametrize(("kind", "dropped"), [("llama", ["attention_mask", "position_ids"]), ("gpt2", ["position_ids"])])
def test_padding_of_prompts_that_is_looked_at_is_seen(monkeypatch: pytest.MonkeyPatch, kind: str, dropped: list[str]) -> None:
    roles = roles_over(whole(kind))
    shake(roles, "policy")
    decoder = roles.base.model.get_decoder()
    monkeypatch.setattr(roles.base.model, "get_decoder", lambda: lambda **given: decoder(**{**given, **dict.fromkeys(dropped)}), raising=False)
    mine = run(roles, temperature=0.0)
    monkeypatch.undo()
    assert any(mine[i, 0].ids != transformers_greedy(roles, "policy", prompt, 12)[0] for i, prompt in enumerate(PROMPTS))


# --- what was drawn --------------------------------------------------------------------------------------------------------------------


def error_of_logps(roles: Roles, temperature: float) -> float:
    """Largest difference between the engine's log-probs and those of one teacher-forced forward pass in train mode."""
    found, worst = run(roles, n=3, temperature=temperature, tokens=10, stop=frozenset(range(2, 10))), 0.0
    for (index, _), one in found.items():
        assert one.logps is not None and len(one.logps) == len(one.ids)
        row = [*PROMPTS[index], *one.ids]
        forced = roles.logps("policy", make_batch([row]), temperature or 1.0).logps[0, len(PROMPTS[index]) :]
        worst = max(worst, float((forced.detach() - torch.tensor(one.logps)).abs().max()))
    return worst if worst == worst else math.inf


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_log_probs_are_those_of_the_trainer(temperature: float) -> None:
    assert error_of_logps(speaking(), temperature) < 1e-4


def _cold(self: Head, hidden: Tensor, temperature: float = 1.0) -> Tensor:
    return real_logits(self, hidden, 1.0)


real_logits = Head.logits


def test_log_probs_at_another_temperature_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    roles = speaking()
    real = Roles.logps
    monkeypatch.setattr(Roles, "logps", lambda self, role, batch, temperature=1.0: real(self, role, batch, 1.0))
    assert error_of_logps(roles, 1.0) < 1e-4 < 1e-2 < error_of_logps(roles, 0.7)


def chi_square(temperature: float, draws: int = 4000) -> float:
    """Drawn words of a vocabulary of eight against the model's own probabilities in float64; 7 degrees of freedom."""
    roles = roles_over(whole("llama", vocab_size=8, gain=1.5))
    shake(roles, "policy", size=0.03)
    found = Counter(one.ids[0] for one in run(roles, n=draws, prompts=[[5, 3]], tokens=1, temperature=temperature, slots=1000).values())
    with roles.use("policy"), torch.no_grad():
        p = torch.softmax(roles.base.model(input_ids=torch.tensor([[5, 3]])).logits[0, -1].double() / temperature, dim=-1)
    assert float(p.max()) < 0.7 and float(p.min()) * draws > 5, "too uneven for the test"
    return float(((torch.tensor([found[word] for word in range(8)]) - draws * p) ** 2 / (draws * p)).sum())


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_the_sampler_draws_the_models_distribution(temperature: float) -> None:
    assert chi_square(temperature) < 29.9  # one in ten thousand lies above


def test_a_sampler_that_forgets_the_temperature_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Head, "logits", _cold)
    assert chi_square(0.7) > 60


def test_a_sampler_that_leaves_words_out_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.searchsorted

    def without_the_rare(cumulative: Tensor, uniform: Tensor, right: bool) -> Tensor:
        words = real(cumulative, uniform, right=right)
        rare = cumulative.diff(prepend=torch.zeros_like(cumulative[:, :1])) < 0.05
        return (words + rare.gather(1, words).long()) % 8

    monkeypatch.setattr(engine_module.torch, "searchsorted", without_the_rare)
    assert chi_square(1.0) > 60


def test_the_ends_of_the_unit_interval_are_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draw of exactly 0, or next to 1, is a word that has a probability."""
    roles = speaking()
    real = torch.rand
    for value in (0.0, 1.0 - 2**-53):
        monkeypatch.setattr(engine_module.torch, "rand", lambda *a, value=value, **k: torch.full_like(real(*a, **k), value))
        for one in run(roles, tokens=6).values():
            assert all(0 <= word < VOCAB for word in one.ids) and one.logps is not None and min(one.logps) > -100
        monkeypatch.undo()


# --- alone or among others -------------------------------------------------------------------------------------------------------------


def hangs_on_neighbours(roles: Roles, temperature: float) -> list[tuple[int, int]]:
    """Completions that differ between batches of 256, of 4 and of 1. Near-ties could; at these seeds none does."""
    stop = frozenset(range(2, 6))
    alone, few, many = (run(roles, n=3, slots=slots, temperature=temperature, stop=stop) for slots in (1, 4, 256))
    return [name for name in alone if not alone[name].ids == few[name].ids == many[name].ids or alone[name].finish != many[name].finish]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_completion_is_the_same_alone_and_among_others(temperature: float) -> None:
    assert hangs_on_neighbours(speaking(), temperature) == []


def test_one_stream_for_a_batch_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = torch.Generator().manual_seed(0)
    monkeypatch.setattr(engine_module, "_stream", lambda *_: stream)
    assert hangs_on_neighbours(speaking(), 1.0) != []


def test_samples_have_streams_of_their_own_and_seeds_too(monkeypatch: pytest.MonkeyPatch) -> None:
    roles = speaking(16)

    def different() -> int:
        return len({tuple(one.ids) for one in run(roles, n=8, prompts=[[5, 6], [5, 6]]).values()})

    assert different() == 16
    assert run(roles, n=2) == run(roles, n=2) != run(roles, n=2, seed=1)
    real = engine_module._stream
    monkeypatch.setattr(engine_module, "_stream", lambda seed, prompt, sample: real(seed, prompt, 0))
    assert different() == 2


def test_the_global_stream_is_left_alone() -> None:
    roles = speaking(16)
    before = torch.get_rng_state()
    run(roles)
    assert torch.equal(before, torch.get_rng_state())


def test_others_may_speak_between_two_tokens() -> None:
    """The caller of the generator enters another role, trains, and does both, while completions come."""
    roles = speaking()
    expected = run(roles, n=2, stop=frozenset(range(2, 30)))
    found = []
    for one in Engine(roles, "policy").generate(PROMPTS, 2, Sampling(12, frozenset(range(2, 30)))):
        assert roles._active == [] and roles.base.model.training and torch.is_grad_enabled()
        found.append(one)
        roles.logps("reference", make_batch([[5, 6, 7, 8]]))
    assert by_name(found) == expected


# --- ends ------------------------------------------------------------------------------------------------------------------------------


def wrong_ends(roles: Roles, stop: frozenset[int], tokens: int) -> list[str]:
    """Against the same draws without a stop id: cut after the first stop id, which belongs to it. Empty is right."""
    free, found, wrong = run(roles, n=4, tokens=tokens), run(roles, n=4, tokens=tokens, stop=stop), []
    for name, one in found.items():
        at = next((i for i, word in enumerate(free[name].ids) if word in stop), None)
        if one.ids != (free[name].ids if at is None else free[name].ids[: at + 1]):
            wrong.append(f"{name}: ids")
        if one.finish != ("length" if at is None else "stop"):
            wrong.append(f"{name}: finish")
    finishes = {one.finish for one in found.values()}
    assert finishes == {"stop", "length"}, "both must be met, or this test is blind"
    return wrong


def test_stop_ids_end_and_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    roles = speaking(16)
    stop = frozenset(range(2, 20))
    assert wrong_ends(roles, stop, 12) == []
    assert all(one.finish == "length" and len(one.ids) == 12 for one in run(roles).values())

    def without_stop(prompt: int, sample: int, ids: list[int], finish: str, logps: list[float]) -> Completion:
        return Completion(prompt, sample, ids[:-1] if finish == "stop" else ids, finish, logps)  # type: ignore[arg-type]

    monkeypatch.setattr(engine_module, "Completion", without_stop)
    assert wrong_ends(roles, stop, 12) != []


def test_a_stop_at_the_last_token_is_a_stop() -> None:
    roles = speaking(16)
    assert {one.finish for one in run(roles, tokens=1, stop=frozenset(range(VOCAB))).values()} == {"stop"}
    assert {one.finish for one in run(roles, tokens=1).values()} == {"length"}


def test_finished_rows_leave_the_batch() -> None:
    roles = speaking(16)
    widths: list[int] = []
    decoder = roles.base.model.get_decoder()
    handle = decoder.register_forward_pre_hook(lambda _, args, given: widths.append(len(given["input_ids"])), with_kwargs=True)
    found = run(roles, n=4, stop=frozenset(range(2, 40)))
    handle.remove()
    assert widths == sorted(widths, reverse=True) and widths[0] == 20 > widths[-1]
    assert sum(widths) == sum(len(one.ids) for one in found.values())


# --- modes -----------------------------------------------------------------------------------------------------------------------------


def test_train_mode_comes_back_and_dropout_sleeps() -> None:
    roles = speaking(16, dropout=0.5, checkpointing=True)
    assert run(roles, temperature=0.0) == run(roles, temperature=0.0)
    assert roles.base.model.training and roles._active == []
    with counting(roles) as count:
        run(roles, prompts=[[5, 6]], tokens=3)
        assert count[0] == 3  # one layer call a token: the cache works, nothing is recomputed


def test_a_generator_that_is_dropped_leaves_nothing_behind() -> None:
    roles = speaking(16)
    generator = Engine(roles, "policy").generate(PROMPTS, 1, Sampling(5, NO_STOP))
    next(generator)
    generator.close()  # type: ignore[attr-defined]
    assert roles.base.model.training and roles._active == [] and torch.is_grad_enabled()


def test_an_exception_in_the_model_restores_everything() -> None:
    roles = speaking(16)

    def broken(*_: Any) -> None:
        raise RuntimeError("out of something")

    handle = roles.base.model.get_decoder().layers[1].register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="out of something"):
        run(roles)
    handle.remove()
    assert roles.base.model.training and roles._active == [] and torch.is_grad_enabled()


def test_nothing_to_do() -> None:
    roles = speaking(16)
    assert run(roles, prompts=[]) == {} and run(roles, n=0) == {}
