"""RoPE types whose frequencies transformers selects by the longest row of a call: set once, for all calls of a base."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import (
    CPU,
    DYNAMIC,
    LONGROPE,
    LONGROPE_LENGTH,
    TOKENIZER,
    VOCAB,
    llama_roles,
    make_batch,
    perturb,
    random_model,
    roles_over,
    unquantized_base,
)
from transformers import AutoConfig

from lowrank_tune import Chain, Recipe, UserError, assembly, run
from lowrank_tune.assembly.rope import check_heldout_length, select_rope
from lowrank_tune.config import BaseConfig
from lowrank_tune.errors import ConfigError
from lowrank_tune.events import Event, LogMessage
from lowrank_tune.export.model_card import rope_sentence
from lowrank_tune.generation import Engine
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.model import unsloth
from lowrank_tune.model.adapters import CONFIG, ROPE, adapter_rope_factors
from lowrank_tune.model.base import combined_hash, load_base, load_tokenizer
from lowrank_tune.model.rotary import (
    FixedRope,
    RopeFactors,
    check_frequencies,
    fix_frequencies,
    fixed_rope,
    select_factors,
    stored_factors,
)

SHORT, LONG = FixedRope("longrope", LONGROPE_LENGTH, "short"), FixedRope("longrope", LONGROPE_LENGTH, "long")
PHIMOE = {
    **LONGROPE,
    "num_local_experts": 2,
    "rope_parameters": LONGROPE["rope_parameters"]
    | {"original_max_position_embeddings": LONGROPE_LENGTH, "short_mscale": 1.2, "long_mscale": 1.2},
}


def rotary_of(model: Any) -> Any:
    return next(module for module in model.modules() if hasattr(module, "inv_freq"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The folders of a longrope and of a dynamic base."""
    place = tmp_path_factory.mktemp("rope")
    random_model("phi3", **LONGROPE).save_pretrained(place / "longrope")
    random_model("llama", **DYNAMIC).save_pretrained(place / "dynamic")
    load_tokenizer(BaseConfig()).save_pretrained(place / "dynamic")
    return lambda name: str(place / name)


# --- the frequencies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factors", ["short", "long"])
@pytest.mark.parametrize("positions", [[0, 3, 9], [5, 40, 200]])
def test_rotations_are_those_of_the_paper(factors: RopeFactors, positions: list[int]) -> None:
    """arXiv:2402.13753 and the factors of the model, by hand in double precision, for any positions of a call."""
    rotary = rotary_of(unquantized_base("phi3", factors, **LONGROPE).model)
    by_hand = [
        position / (factor * 10000.0 ** (2 * i / 16))
        for position in positions
        for i, factor in enumerate(LONGROPE["rope_parameters"][f"{factors}_factor"])
    ]
    angles = torch.tensor(by_hand, dtype=torch.float64).view(len(positions), 8).repeat(1, 2)
    scaling = math.sqrt(1 + math.log(256 / LONGROPE_LENGTH) / math.log(LONGROPE_LENGTH))
    cosines, sines = rotary(torch.zeros(1), torch.tensor([positions]))
    assert torch.allclose(cosines[0].double(), angles.cos() * scaling, atol=1e-4)
    assert torch.allclose(sines[0].double(), angles.sin() * scaling, atol=1e-4)


def test_short_rows_of_a_long_run_are_what_transformers_computes_in_a_long_call() -> None:
    """transformers' own model selects the long factors for a call with a long row."""
    stream = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, VOCAB, (length,), generator=stream).tolist() for length in (7, 30)]
    batch = make_batch(rows)
    with torch.no_grad():
        logits = random_model("phi3", **LONGROPE)(input_ids=batch.input_ids, use_cache=False).logits
    expected = logits[0, :6].double().log_softmax(dim=-1)[range(6), rows[0][1:]]
    roles = roles_over(unquantized_base("phi3", "long", **LONGROPE))
    with roles.inference_mode():
        logps = roles.logps("policy", make_batch(rows[:1])).logps[0, 1:]
    assert float((logps - expected).abs().max()) < 1e-4


def test_no_call_changes_the_base() -> None:
    """What a run compares at its end: the hash of every parameter and buffer."""
    for factors in ("short", "long"):
        roles = roles_over(unquantized_base("phi3", factors, **LONGROPE))
        before = combined_hash(roles.base.hashes())
        for length in (4, 40, 4):
            roles.logps("policy", make_batch([list(range(3, 3 + length))]))
        assert combined_hash(roles.base.hashes()) == before


def test_rows_that_share_a_prompt_have_the_same_log_probs() -> None:
    roles = roles_over(unquantized_base("phi3", "long", **LONGROPE))
    perturb(roles, "policy")
    prompt = list(range(3, 17))
    rows = [[*prompt, *range(20 + 9 * i, 20 + 9 * i + length)] for i, length in enumerate((9, 1, 4))]
    mask = [[False] * 14 + [True] * (len(row) - 14) for row in rows]
    alone, shared = make_batch(rows, mask), make_batch(rows, mask)
    shared.shared_prefix = torch.tensor([0, 14, 14])
    with roles.inference_mode():
        expected, packed = roles.logps("policy", alone).logps, roles.logps("policy", shared).logps
        assert roles.decoder.pack(shared) is not None
    assert float((expected - packed).abs().max()) < 1e-4


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text", "gpt_neox"])
def test_other_rope_types_are_left_alone(kind: str) -> None:
    model = random_model(kind)
    before = {name: (type(module), vars(module).get("rope_type")) for name, module in model.named_modules()}
    tensors = {name: tensor.clone() for name, tensor in model.named_buffers()}
    fix_frequencies(model, "long")
    assert {name: (type(module), vars(module).get("rope_type")) for name, module in model.named_modules()} == before
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.named_buffers())
    assert fixed_rope(model.config) is None


def test_a_base_is_loaded_with_its_factors(saved: Callable[[str], str]) -> None:
    wanted = BaseConfig(model=saved("longrope"))
    long, short = (load_base(wanted, TOKENIZER, CPU, rope_factors=factors) for factors in ("long", "short"))
    assert (long.rope, short.rope) == (LONG, SHORT)
    assert (long.max_row_length, short.max_row_length) == (None, LONGROPE_LENGTH)
    assert long.hashes() != short.hashes()
    dynamic = load_base(BaseConfig(model=saved("dynamic")), TOKENIZER, CPU, rope_factors="long")
    assert dynamic.rope == FixedRope("dynamic", 32, None) and dynamic.max_row_length == 32
    assert llama_roles().base.rope is None


def test_model_that_selects_its_frequencies_in_its_own_code_is_refused() -> None:
    model = random_model("phi3", **LONGROPE)
    fix_frequencies(model, "long")
    check_frequencies(model, LONG)
    rotary = rotary_of(model)
    own = type(rotary).forward

    def by_length(self: Any, x: torch.Tensor, positions: torch.Tensor) -> Any:
        cosines, sines = own(self, x, positions)
        return (cosines * 2, sines * 2) if int(positions.max()) >= LONGROPE_LENGTH else (cosines, sines)

    rotary.forward = by_length.__get__(rotary)
    check_frequencies(model, SHORT)
    with pytest.raises(UserError, match=r"^base.model: phi3 models compute .*use rows of up to 16 tokens"):
        check_frequencies(model, LONG)
    del rotary.rope_type
    with pytest.raises(UserError, match="code of their own"):
        check_frequencies(model, SHORT)


def test_long_factors_that_a_model_never_reads_are_refused() -> None:
    """transformers' PhiMoE computes the short factors in each call."""
    model = random_model("phimoe", **PHIMOE)
    fix_frequencies(model, "long")
    with pytest.raises(UserError, match="^base.model: phimoe models compute"):
        check_frequencies(model, LONG)
    check_frequencies(model, SHORT)


# --- the configuration ------------------------------------------------------------------------------------------------


def config_of(kind: str, **changes: Any) -> Any:
    return random_model(kind, **changes).config


def test_the_rope_type_of_a_configuration() -> None:
    assert fixed_rope(config_of("phi3", **LONGROPE), "long") == LONG
    assert fixed_rope(config_of("llama", **DYNAMIC), "long") == FixedRope("dynamic", 32, None)
    assert fixed_rope(config_of("llama")) is None
    alpha = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0, "alpha": 100.0}
    assert fixed_rope(config_of("hunyuan_v1_dense", rope_parameters=alpha)) is None
    published = {  # as Phi-3-mini-128k and Phi-3.5 publish it
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
    }
    assert fixed_rope(AutoConfig.for_model("phi3", **published)) == FixedRope("longrope", 4096, "short")


def test_the_longest_row_selects_the_factors() -> None:
    config = config_of("phi3", **LONGROPE)
    assert [select_factors(config, length) for length in (0, 16, 17)] == ["short", "short", "long"]
    assert select_factors(config_of("llama"), 1 << 20) == "short"
    assert [stored_factors(facts) for facts in ({}, {"rope_factors": None}, {"rope_factors": "long"})] == [
        "short",
        "short",
        "long",
    ]


# --- the settings -----------------------------------------------------------------------------------------------------


def recipe(model: str, **changes: Any) -> dict[str, Any]:
    return {
        "algorithm": "sft",
        "base": {"model": model},
        "data": {"train": [{"dataset": "builtin:arithmetic", "max_samples": 4}], "max_length": 16},
        "train": {"max_steps": 1},
        **changes,
    }


def grpo(model: str, max_new_tokens: int, **changes: Any) -> dict[str, Any]:
    data = {"train": [{"dataset": "builtin:arithmetic", "max_samples": 4}], "max_prompt_length": 10}
    rollout = {"max_new_tokens": max_new_tokens, "num_generations": 2}
    return recipe(model, algorithm="grpo", data=data, rollout=rollout, rewards=[{"name": "answer"}]) | changes


def selected(*recipes: dict[str, Any]) -> tuple[FixedRope | None, list[LogMessage]]:
    events: list[Event] = []
    rope = select_rope([Recipe.from_dict(one) for one in recipes], events.append)
    return rope, [event for event in events if isinstance(event, LogMessage)]


def data(max_length: int) -> dict[str, Any]:
    return {"train": [{"dataset": "builtin:arithmetic", "max_samples": 4}], "max_length": max_length}


def test_settings_select_the_factors_and_one_line_names_them(saved: Callable[[str], str]) -> None:
    model = saved("longrope")
    rope, (line,) = selected(recipe(model))
    assert rope == SHORT and line.message == (
        "RoPE type `longrope`: every call uses the short factors, which are for contexts of up to 16 tokens "
        "(by `data.max_length` the longest row has 16 tokens)"
    )
    rope, (line,) = selected(recipe(model, data=data(17)))
    assert rope == LONG and "the long factors" in line.message and "has 17 tokens" in line.message
    assert selected(grpo(model, 6))[0] == SHORT and selected(grpo(model, 7))[0] == LONG
    heldout = {"eval_dataset": {"dataset": "builtin:arithmetic", "split": "heldout"}, "max_new_tokens": 7}
    rope, (line,) = selected(grpo(model, 6, evaluate=heldout))
    assert rope == LONG and "by `evaluate.max_new_tokens` the longest row has 17 tokens" in line.message
    assert selected(recipe("tiny-tutor")) == (None, [])


def test_a_chain_has_one_set_of_factors(saved: Callable[[str], str]) -> None:
    model = saved("longrope")
    assert selected(recipe(model), grpo(model, 7))[0] == LONG
    assert selected(recipe(model), grpo(model, 6))[0] == SHORT


def test_adapter_determines_the_factors(saved: Callable[[str], str], tmp_path: Path) -> None:
    model = saved("longrope")
    for name, factors in (("long", "long"), ("short", "short"), ("other", None)):
        final = tmp_path / name / "final"
        final.mkdir(parents=True)
        (final / CONFIG).write_text("{}")
        if factors:
            (final / ROPE).write_text(json.dumps({"version": 1, "factors": factors}))
    adapters = {name: {"path": str(tmp_path / name)} for name in ("long", "short", "other")}
    rope, (line, warning) = selected(recipe(model, adapters=adapters))
    assert rope == LONG and f"{tmp_path / 'long'} was trained with them" in line.message
    assert warning.level == "warning" and f"{tmp_path / 'short'} was trained with the short factors" in warning.message
    assert selected(recipe(model, adapters={"short": adapters["short"]}))[0] == SHORT
    (tmp_path / "long" / "final" / ROPE).write_text('{"factors": "wide"}')
    with pytest.raises(UserError, match=r"rope.json is broken: `factors` is 'wide'"):
        adapter_rope_factors(str(tmp_path / "long"))


def test_rows_that_are_too_long_for_dynamic_are_refused(saved: Callable[[str], str]) -> None:
    model = saved("dynamic")
    rope, (line,) = selected(recipe(model, data=data(32)))
    assert rope == FixedRope("dynamic", 32, None) and "up to 32 tokens, and longer rows are refused" in line.message
    with pytest.raises(ConfigError, match=r"^data.max_length: it allows rows of 33 tokens.*allow at most 32$"):
        selected(recipe(model, data=data(33)))
    with pytest.raises(
        ConfigError, match=r"^rollout.max_new_tokens: it and `data.max_prompt_length` allow rows of 33 "
    ):
        selected(grpo(model, 23))
    with pytest.raises(ConfigError) as failed:
        selected(recipe(model, name="warm", data=data(33)), grpo(model, 9, name="fine"), grpo(model, 30, name="rl"))
    assert [problem.key for problem in failed.value.problems] == [
        "stages.warm.data.max_length",
        "stages.rl.rollout.max_new_tokens",
    ]


def test_held_out_answers_that_are_too_long_are_refused() -> None:
    heldout = {"eval_dataset": {"dataset": "builtin:arithmetic", "split": "heldout"}, "max_new_tokens": 6}
    sft = Recipe.from_dict(recipe("tiny-tutor", evaluate=heldout))
    for rope in (LONG, SHORT, FixedRope("dynamic", 16, None)):
        check_heldout_length(sft, 10, rope)
    check_heldout_length(sft, 1000, LONG)
    with pytest.raises(
        ConfigError, match=r"^evaluate.max_new_tokens: 6 tokens after .* of 11 .*: set it to 5 or less, or"
    ):
        check_heldout_length(sft, 11, SHORT)
    with pytest.raises(ConfigError, match=r"set it to 5 or less$"):
        check_heldout_length(sft, 11, FixedRope("dynamic", 16, None))
    with pytest.raises(ConfigError, match=r"use shorter prompts in `evaluate.eval_dataset`$"):
        check_heldout_length(sft, 16, FixedRope("dynamic", 16, None))


def test_a_run_with_long_held_out_answers_is_refused_before_its_base_is_loaded(
    saved: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWRANK_TUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(assembly.model, "load_base", lambda *_, **__: pytest.fail("the base was loaded"))
    heldout = {"eval_dataset": {"dataset": "builtin:arithmetic", "split": "heldout"}, "max_new_tokens": 30}
    rows = data(32) | {"max_invalid_fraction": 1.0}
    wanted = recipe(saved("dynamic"), data=rows, evaluate=heldout)
    with pytest.raises(ConfigError, match=r"^evaluate.max_new_tokens: 30 tokens after a held-out prompt of "):
        assembly.build(Recipe.from_dict(wanted), lambda event: None, CPU)


def test_a_chain_is_refused_before_its_first_stage(saved: Callable[[str], str], tmp_path: Path) -> None:
    stages = [
        {key: value for key, value in one.items() if key != "base"}
        for one in (recipe("", name="warm", data=data(32)), grpo("", 30, name="rl"))
    ]
    chain = Chain.from_dict({"name": "two", "base": {"model": saved("dynamic")}, "stages": stages})
    with pytest.raises(ConfigError, match=r"^stages.rl.rollout.max_new_tokens: "):
        run(chain, out=tmp_path / "two", ui="none", device=CPU)
    assert not (tmp_path / "two").exists()


# --- uses -------------------------------------------------------------------------------------------------------------


def test_completions_that_would_be_too_long_are_refused() -> None:
    roles = roles_over(unquantized_base("phi3", **LONGROPE))
    engine = Engine(roles, "policy", 4)
    assert list(engine.generate([[3, 4, 5]], 1, SamplingParams(13, frozenset({1}), 0.0)))
    with pytest.raises(UserError, match=r"17 tokens together, above 16, the limit of the base's short factors of RoPE"):
        next(engine.generate([[3, 4, 5]], 1, SamplingParams(14, frozenset({1}), 0.0)))
    long = roles_over(unquantized_base("phi3", "long", **LONGROPE))
    assert list(Engine(long, "policy", 4).generate([[3, 4, 5]], 1, SamplingParams(20, frozenset({1}), 0.0)))


@pytest.mark.parametrize(
    ("rope", "sentence"),
    [
        (
            SHORT,
            "with a context of at most 16 tokens (vLLM's `--max-model-len`, llama.cpp's `-c`); a longer one selects",
        ),
        (LONG, "with a context of more than 16 tokens (vLLM's `--max-model-len`, llama.cpp's `-c`); a shorter one"),
        (FixedRope("dynamic", 16, None), "with a context of at most 16 tokens"),
    ],
)
def test_a_model_card_names_the_frequencies(rope: FixedRope, sentence: str) -> None:
    text = rope_sentence(rope)
    assert sentence in text and text.count(".") - text.count("llama.cpp") == 1
    assert rope_sentence(None) == ""


def test_unsloth_is_refused(saved: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace())
    wanted = BaseConfig(model=saved("dynamic"), backend="unsloth")
    with pytest.raises(UserError, match="^base.backend: `unsloth` is not used for RoPE type `dynamic`"):
        unsloth.load_base(wanted, TOKENIZER, 16, CPU)
