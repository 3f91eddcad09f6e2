"""Whole runs over a base of RoPE type `longrope`, with rows on both sides of its original length: they end, and what
they leave is used with the factors of the run."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from export_fixtures import make_base
from models import CPU, LONGROPE
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lowrank_tune import Chain, Recipe, UserError, run
from lowrank_tune.assembly.finished_run import load_finished_run
from lowrank_tune.chat import load_chat_model
from lowrank_tune.config import BaseConfig
from lowrank_tune.data import ChatTemplate
from lowrank_tune.data.message import Message
from lowrank_tune.evaluation import Options, evaluate, scoring
from lowrank_tune.evaluation.evaluation import _select_rope
from lowrank_tune.evaluation.questions import EvalQuestion, EvalQuestions
from lowrank_tune.evaluation.target import EvalRewardModel, EvalTarget, check_reward_model
from lowrank_tune.events import Event, LogMessage, StepEnd
from lowrank_tune.export.export import _compare_base
from lowrank_tune.export.merge import merge
from lowrank_tune.model.base import Base, load_tokenizer
from lowrank_tune.toy import problems

ORIGINAL_LENGTH = 32
EVALUATION = {
    "eval_steps": 2,
    "num_completions_to_print": 1,
    "eval_dataset": {"dataset": "builtin:arithmetic", "split": "heldout"},
    "num_prompts": 3,
    "max_new_tokens": 4,
}
TRAIN = {"max_steps": 2, "logging_steps": 1, "save_steps": 1, "gradient_checkpointing": False, "learning_rate": 1e-3}


def quiet(event: object) -> None:
    pass


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ["LOWRANK_TUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    changes = LONGROPE | {"original_max_position_embeddings": ORIGINAL_LENGTH}
    return make_base(tmp_path_factory.mktemp("base"), "phi3", False, **changes)


def sft(base: Path, max_length: int = 64) -> dict[str, Any]:
    return {
        "name": "warm",
        "algorithm": "sft",
        "base": {"model": str(base), "bits": 16},
        "data": {
            "train": [{"dataset": "builtin:arithmetic", "max_samples": 24}],
            "max_length": max_length,
            "eval_fraction": 0.2,
            "max_invalid_fraction": 1.0,
        },
        "train": {**TRAIN, "global_batch_size": 8, "micro_batch_size": 4},
        "evaluate": EVALUATION,
    }


def grpo(base: Path) -> dict[str, Any]:
    return {
        "name": "rl",
        "algorithm": "grpo",
        "base": {"model": str(base), "bits": 16},
        "data": {"train": [{"dataset": "builtin:arithmetic", "max_samples": 24}], "max_prompt_length": 48},
        "rewards": [{"name": "answer"}, {"name": "length", "target_tokens": 8, "weight": 0.1}],
        "rollout": {"num_generations": 2, "max_new_tokens": 24},
        "train": {**TRAIN, "prompts_per_step": 2, "micro_batch_size": 2},
        "evaluate": EVALUATION,
    }


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    out, events = tmp_path_factory.mktemp("runs") / "warm", list[Event]()
    assert run(Recipe.from_dict(sft(base)), out=out, ui="none", device=CPU, on_event=events.append).status == "done"
    return out, events


def factors_in(folder: Path) -> tuple[str, str]:
    """Those of the run, and those beside its adapter."""
    return tuple(
        json.loads((folder / file).read_text())[key]
        for file, key in (("base.json", "rope_factors"), ("final/rope.json", "factors"))
    )  # type: ignore[return-value]


def lines(events: list[Event]) -> list[str]:
    return [event.message for event in events if isinstance(event, LogMessage) and "longrope" in event.message]


def test_a_run_ends_and_stores_its_factors(finished: tuple[Path, list[Event]]) -> None:
    out, events = finished
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "done" and summary["base_hash"]["start"] == summary["base_hash"]["end"]
    (line,) = lines(events)
    assert "every call uses the long factors" in line and "by `evaluate.max_new_tokens`" in line
    assert factors_in(out) == ("long", "long")
    assert "serve it with a context of more than 32 tokens" in (out / "final" / "README.md").read_text()


def test_chat_and_eval_use_the_factors_of_the_run(
    base: Path, finished: tuple[Path, list[Event]], tmp_path: Path
) -> None:
    """Also if the folder of the adapter was moved; a base alone is evaluated with the factors for its rows."""
    out, _ = finished
    assert load_chat_model(str(out), quiet, device=CPU).roles.base.rope.factors == "long"  # type: ignore[union-attr]
    assert load_chat_model(str(out), quiet, device=CPU).positions == 256
    shutil.copytree(out / "final", tmp_path / "adapter")
    alone = load_chat_model(str(tmp_path / "adapter"), quiet, 16, device=CPU)
    assert alone.roles.base.rope.factors == "long"  # type: ignore[union-attr]
    plain = load_chat_model(str(base), quiet, 16, device=CPU, max_new_tokens=8)
    assert plain.positions == ORIGINAL_LENGTH, "a short answer selects the short factors, and rows are bounded"
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1?", "answer": "1"}\n')
    for name, factors in ((out, "long"), (tmp_path / "adapter", "long"), (base, "short")):
        events: list[Event] = []
        options = Options(dataset=str(rows), max_new_tokens=2, bits=None if name == out else 16)
        evaluate(str(name), options, events.append, CPU)
        assert f"the {factors} factors" in lines(events)[0], "rows this short select the short factors by themselves"


def test_losses_of_eval_are_those_of_transformers_in_calls_with_a_long_row(
    base: Path, finished: tuple[Path, list[Event]]
) -> None:
    """In such a call transformers selects the long factors for all rows; alone it would take the short ones."""
    out, _ = finished
    options = Options(dataset="builtin:arithmetic", num_prompts=6, max_new_tokens=2)
    found = evaluate(str(out), options, quiet, CPU).record["metrics"]["sft"]["loss"]["value"]
    template = ChatTemplate.from_tokenizer(load_tokenizer(BaseConfig(model=str(base))))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(plain, out / "final").eval()
    total, count, lengths = 0.0, 0, []
    for row in problems.rows(6, 0, heldout=True):
        user, assistant = Message("user", row["question"]), Message("assistant", row["answer"])
        ids, start = list(template.encode([user, assistant]).input_ids), len(template.prompt([user]))
        padded = torch.tensor([ids + [5] * (2 * ORIGINAL_LENGTH)])
        with torch.no_grad():
            logps = tuned(input_ids=padded).logits[0].double().log_softmax(dim=-1)
        total -= sum(float(logps[place - 1, ids[place]]) for place in range(start, len(ids)))
        count, lengths = count + len(ids) - start, [*lengths, len(ids)]
    assert min(lengths) < ORIGINAL_LENGTH < max(lengths), "rows lie on both sides of the original length"
    assert found == pytest.approx(total / count, rel=1e-4)


def test_a_merged_model_is_compared_with_the_factors_of_the_run(
    finished: tuple[Path, list[Event]], tmp_path: Path
) -> None:
    out, _ = finished
    report = merge(out, tmp_path / "merged", "dequantized", quiet, quiet, CPU).report
    assert report.kl < 1e-3 and report.parted == 0
    assert "serve it with a context of more than 32 tokens" in (tmp_path / "merged" / "README.md").read_text()


def test_rollouts_agree_with_the_policy_and_a_short_run_stays_short(base: Path, tmp_path: Path) -> None:
    """GRPO's own measure of sampler and policy, in the rows that cross the original length."""
    events: list[Event] = []
    assert run(Recipe.from_dict(grpo(base)), out=tmp_path / "rl", ui="none", device=CPU, on_event=events.append)
    mismatches = [
        event.stats["sampling/sampling_logp_difference/mean"] for event in events if isinstance(event, StepEnd)
    ]
    assert len(mismatches) == 2 and max(mismatches) < 1e-4
    assert factors_in(tmp_path / "rl") == ("long", "long")
    short = sft(base, max_length=ORIGINAL_LENGTH) | {"evaluate": {"num_completions_to_print": 2, "eval_steps": 2}}
    assert run(Recipe.from_dict(short), out=tmp_path / "short", ui="none", device=CPU).status == "done"
    assert factors_in(tmp_path / "short") == ("short", "short")
    assert load_chat_model(str(tmp_path / "short"), quiet, device=CPU).positions == ORIGINAL_LENGTH


def test_the_base_of_a_run_is_compared_with_its_factors(finished: tuple[Path, list[Event]]) -> None:
    """A GGUF adapter is exported over a base that is compared tensor by tensor; another set of factors differs."""
    run_of = load_finished_run(finished[0])
    _compare_base(run_of, quiet, CPU)
    with pytest.raises(UserError, match="is not the base that"):
        _compare_base(replace(run_of, facts={**run_of.facts, "rope_factors": "short"}), quiet, CPU)


def test_questions_that_are_too_long_for_the_factors_of_a_run_are_left_out(base: Path) -> None:
    config = BaseConfig(model=str(base))
    questions = [EvalQuestion([5] * length, "", None, n) for n, length in enumerate((8, 25, 24))]
    for factors, left in (("short", [0, 2]), ("long", [0, 1, 2]), (None, [0, 1, 2])):
        events: list[Event] = []
        target = EvalTarget("warm", "run", config, {}, rope_factors=factors)  # type: ignore[arg-type]
        selected, usable = _select_rope(target, EvalQuestions(questions, "rows"), 8, events.append)
        assert [question.number for question in usable.questions] == left and selected == (factors or "long")
        warnings = [one.message for one in events if isinstance(one, LogMessage) and one.level == "warning"]
        assert len(warnings) == (len(left) < 3) and all(
            one.startswith("1 of 3 questions are left out") for one in warnings
        )
    target = EvalTarget("warm", "run", config, {}, rope_factors="short")
    with pytest.raises(UserError, match="may have 38 tokens together, above 32"):
        _select_rope(target, EvalQuestions(questions, "rows"), 30, quiet)


@pytest.mark.parametrize(
    "known", [{"facts": {"rope_factors": "long"}}, {"rope_factors": "long"}], ids=["by a run", "by an adapter"]
)
def test_a_reward_model_of_other_factors_is_refused(base: Path, known: dict[str, Any]) -> None:
    config = BaseConfig(model=str(base))
    target = EvalTarget("warm", "run", config, {}, **known)
    for factors in ("long", None):
        check_reward_model(target, EvalRewardModel(Path("rm"), config, {}, {"rope_factors": factors}))
    with pytest.raises(
        UserError, match=r"^--reward-model: rm was trained with the short factors .* warm with the long"
    ):
        check_reward_model(target, EvalRewardModel(Path("rm"), config, {}, {"rope_factors": "short"}))


def test_a_target_without_factors_uses_those_of_the_reward_model(base: Path) -> None:
    config = BaseConfig(model=str(base))
    questions = EvalQuestions([EvalQuestion([5] * 8, "", None)], "rows")
    target = EvalTarget("base", "model", config, {})
    for factors, selected in (("long", "long"), ("short", "short"), (None, "short")):
        reward_model = EvalRewardModel(Path("rm"), config, {}, {"rope_factors": factors})
        check_reward_model(target, reward_model)
        assert _select_rope(target, questions, 8, quiet, reward_model)[0] == selected


@pytest.mark.slow
def test_scores_of_a_reward_model_are_computed_with_the_factors_of_its_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = sft(base) | {"name": "score", "algorithm": "reward", "evaluate": {"eval_steps": 2}}
    reward["data"] = reward["data"] | {"train": [{"dataset": "builtin:arithmetic-preferences", "max_samples": 24}]}
    assert run(Recipe.from_dict(reward), out=tmp_path / "score", ui="none", device=CPU).status == "done"
    assert factors_in(tmp_path / "score") == ("long", "long")
    loaded: list[Base] = []
    load = scoring.load_base

    def recorded_load(*given: Any, **more: Any) -> Base:
        loaded.append(load(*given, **more))
        return loaded[-1]

    monkeypatch.setattr(scoring, "load_base", recorded_load)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1?", "answer": "1"}\n')
    scoring.score_file(tmp_path / "score", str(rows), quiet, CPU)
    recipe = {key: value for key, value in grpo(base).items() if key != "evaluate"} | {
        "rewards": [{"name": "reward_model"}],
        "adapters": {"reward": {"path": str(tmp_path / "score")}},
        "rollout": {"num_generations": 2, "max_new_tokens": 8},
        "data": {
            "train": [{"dataset": "builtin:arithmetic", "max_samples": 8}],
            "max_prompt_length": 24,
            "max_invalid_fraction": 1.0,
        },
    }
    scoring.score_completions(Recipe.from_dict(recipe), None, 2, quiet, CPU)
    assert [one.rope.factors for one in loaded if one.rope is not None] == ["long", "long"]


@pytest.mark.slow
def test_a_chain_computes_all_stages_with_the_factors_of_its_longest_rows(base: Path, tmp_path: Path) -> None:
    stages = [
        {key: value for key, value in one.items() if key != "base"} for one in (sft(base, ORIGINAL_LENGTH), grpo(base))
    ]
    stages[0]["evaluate"] = {"num_completions_to_print": 1}
    chain = Chain.from_dict({"name": "two", "base": {"model": str(base), "bits": 16}, "stages": stages})
    events: list[Event] = []
    assert run(chain, out=tmp_path / "two", ui="none", device=CPU, on_event=events.append).status == "done"
    assert [factors_in(tmp_path / "two" / stage) for stage in ("1-warm", "2-rl")] == [("long", "long")] * 2
    assert len(lines(events)) == 2, "each stage names them once, and warns of nothing"
