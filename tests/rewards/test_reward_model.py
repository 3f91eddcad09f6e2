"""A reward model in GRPO: its scores are those of its own run, over the adapters that it was trained over, on one
base."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CPU, load_base_of, perturb, reward_roles

import lowrank_tune.assembly.model as model_module
from lowrank_tune import Chain, Recipe, UserError, run
from lowrank_tune.assembly.reward_model import append_end_of_turn, encode_answer, end_of_turn_ids, score_rows
from lowrank_tune.config import BaseConfig, RewardConfig
from lowrank_tune.data import ChatTemplate
from lowrank_tune.data.message import Message
from lowrank_tune.errors import ConfigError
from lowrank_tune.evaluation import score_completions, score_file
from lowrank_tune.events import Event, GroupLogged, LogMessage, RunStarted, StepEnd
from lowrank_tune.model.base import load_tokenizer
from lowrank_tune.rewards import RewardInput, WorkerPool, build_rewards

FEW = {"micro_batch_size": 8, "max_steps": 2, "learning_rate": 5e-3, "gradient_checkpointing": False}
ROWS, PAIRS = (
    {"train": [{"dataset": "builtin:arithmetic", "max_samples": 40}]},
    {"train": [{"dataset": "builtin:arithmetic-preferences", "max_samples": 24}]},
)
LEARNED: dict[str, Any] = {
    "name": "grpo",
    "algorithm": "grpo",
    "data": ROWS,
    "rewards": [{"name": "reward_model"}, {"name": "length", "target_tokens": 8, "weight": 0.1}],
    "rollout": {"num_generations": 4, "max_new_tokens": 40},
    "train": {**FEW, "prompts_per_step": 3},
}
CHAIN: dict[str, Any] = {
    "name": "learned",
    "base": {"model": "tiny-tutor"},
    "stages": [
        {"name": "warm", "algorithm": "sft", "data": ROWS, "train": {**FEW, "max_steps": 10, "global_batch_size": 8}},
        {
            "name": "judge",
            "algorithm": "reward",
            "data": {**PAIRS, "eval_fraction": 0.2},
            "train": {**FEW, "global_batch_size": 8},
        },
        {"name": "dpo", "algorithm": "dpo", "data": PAIRS, "train": {**FEW, "global_batch_size": 8, "max_steps": 1}},
        LEARNED,
    ],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event], list[str]]:
    """Runs the chain; returns its folder, its events, and the bases that were loaded."""
    os.environ["LOWRANK_TUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    out, events, bases = tmp_path_factory.mktemp("learned") / "one", list[Event](), list[str]()
    with pytest.MonkeyPatch.context() as patched:
        real = model_module.load_base
        patched.setattr(
            model_module,
            "load_base",
            lambda wanted, *rest, **more: bases.append(wanted.model) or real(wanted, *rest, **more),
        )
        assert run(Chain.from_dict(CHAIN), out=out, ui="none", device=CPU, on_event=events.append).status == "done"
    return out, events, bases


@pytest.mark.slow
def test_scores_are_those_of_the_reward_models_own_run(
    finished: tuple[Path, list[Event], list[str]], tmp_path: Path
) -> None:
    out, events, _ = finished
    shown = [(event.prompt, one) for event in events if isinstance(event, GroupLogged) for one in event.completions]
    ended = [(prompt, one) for prompt, one in shown if one["finish_reason"] == "stop"]
    assert len(shown) == 8 and len(ended) >= 2, "nothing to compare"
    rows = [json.dumps({"prompt": prompt, "completion": one["text"]}) for prompt, one in ended]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    alone, _ = score_file(out / "2-judge", str(tmp_path / "rows.jsonl"), lambda event: None, CPU)
    found = [one["parts"]["reward_model"] for _, one in ended]
    assert found == pytest.approx([one.score for one in alone], abs=1e-5) and max(map(abs, found)) > 1e-3
    for _, one in shown:
        assert one["reward"] == pytest.approx(one["parts"]["reward_model"] + 0.1 * one["parts"]["length"])
    steps = [
        event.stats for event in events if isinstance(event, StepEnd) and "rewards/reward_model/mean" in event.stats
    ]
    assert len(steps) == 2


def test_score_completions_reads_as_the_run_did(finished: tuple[Path, list[Event], list[str]], tmp_path: Path) -> None:
    """The scores of the run equal those of a file with its completions, complete and truncated ones."""
    out, events, _ = finished
    shown = [(event.prompt, one) for event in events if isinstance(event, GroupLogged) for one in event.completions]
    rows = [json.dumps({"prompt": prompt, "completions": [one]}) for prompt, one in shown]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, json.dumps({"completion": "of no prompt"})]))
    found = score_completions(
        Recipe.from_dict(below(out, "warm", "dpo", "reward")),
        str(tmp_path / "rows.jsonl"),
        None,
        lambda event: None,
        CPU,
    )
    values = [scores[0].value for scores in found.scores]
    assert values[:-1] == pytest.approx([one["parts"]["reward_model"] for _, one in shown], abs=1e-5)
    assert values[-1] is None and "it has no prompt" in found.scores[-1][0].reason


def test_one_base_is_loaded_and_the_reward_model_is_not_changed(finished: tuple[Path, list[Event], list[str]]) -> None:
    out, events, bases = finished
    assert bases == ["tiny-tutor"]
    roles = [dict(event.roles) for event in events if isinstance(event, RunStarted)][-1]
    assert roles == {"policy": ["warm", "dpo", "policy"], "reference": ["warm", "dpo"], "reward": ["warm", "reward"]}
    summary = json.loads((out / "4-grpo" / "summary.json").read_text())
    assert (
        set(summary["adapter_hashes"]) == {"warm", "dpo", "reward"}
        and summary["base_hash"]["start"] == summary["base_hash"]["end"]
    )
    saved = [path.name for path in (out / "4-grpo" / "final").iterdir() if path.is_dir()]
    assert saved == ["policy"], "the rest of its stack is folded into the root, and the reward model is no part of it"
    assert not json.loads((out / "4-grpo" / "final" / "adapter_config.json").read_text()).get("modules_to_save")


def below(out: Path, *names: str) -> dict[str, Any]:
    folders = {"warm": "1-warm", "dpo": "3-dpo", "reward": "2-judge"}
    return {
        **LEARNED,
        "base": {"model": "tiny-tutor"},
        "adapters": {name: {"path": str(out / folders[name])} for name in names},
    }


@pytest.mark.slow
def test_the_reward_model_does_not_change_what_the_policy_writes(
    finished: tuple[Path, list[Event], list[str]], tmp_path: Path
) -> None:
    """The stage alone gives the same result; and the policy generates the same completions without a reward model."""
    out, logged, _ = finished
    found = [[event for event in logged if isinstance(event, GroupLogged)]]
    for number, recipe in enumerate(
        (below(out, "warm", "dpo", "reward"), {**below(out, "warm", "dpo"), "rewards": [{"name": "answer"}]})
    ):
        events: list[Event] = []
        run(Recipe.from_dict(recipe), out=tmp_path / str(number), ui="none", device=CPU, on_event=events.append)
        found.append([event for event in events if isinstance(event, GroupLogged)])
    chained, alone, without = found
    assert [event.completions for event in chained] == [event.completions for event in alone]
    assert [one["text"] for one in without[0].completions] == [one["text"] for one in chained[0].completions]


def test_a_reward_model_without_the_adapter_below_it_is_refused(
    finished: tuple[Path, list[Event], list[str]], tmp_path: Path
) -> None:
    out, _, _ = finished
    with pytest.raises(
        UserError, match=r"adapters\.reward\.path: the reward model in .*2-judge.* was trained over the adapter `warm`"
    ):
        run(Recipe.from_dict(below(out, "reward")), out=tmp_path / "one", ui="none", device=CPU)
    swapped = below(out, "warm", "reward")
    swapped["adapters"]["reward"]["path"] = str(out / "1-warm")
    with pytest.raises(UserError, match="is a policy adapter .*not a reward adapter"):
        run(Recipe.from_dict(swapped), out=tmp_path / "two", ui="none", device=CPU)


def test_a_reward_model_that_sees_no_difference_gives_a_warning_and_no_error(
    finished: tuple[Path, list[Event], list[str]],
) -> None:
    _, events, _ = finished
    messages = [
        event.message for event in events if isinstance(event, LogMessage) and "reward reward_model:" in event.message
    ]
    assert len(messages) == 1 and "(shaping)" in messages[0]


# --- the pieces -------------------------------------------------------------------------------------------------------


def test_rows_in_any_order_and_batch_have_one_score() -> None:
    roles = reward_roles(load_base_of(16), lower=["sft"])
    perturb(roles, "sft", "reward", size=0.05)
    stream = torch.Generator().manual_seed(3)
    rows = [torch.randint(2, 90, (length,), generator=stream).tolist() for length in (9, 3, 12, 1, 7)]
    several = [score_rows(roles, rows, 0, tokens) for tokens in (1, 20, 10_000)]
    alone = [score_rows(roles, [row], 0, 99)[0] for row in rows]
    for found in several:
        assert found == pytest.approx(alone, abs=1e-5)
    assert score_rows(roles, [], 0, 10) == [] and len(set(alone)) == 5


def test_the_ids_are_those_of_the_trained_rows() -> None:
    template = ChatTemplate.from_tokenizer(load_tokenizer(BaseConfig()))
    end = end_of_turn_ids(template)
    assert (
        append_end_of_turn([7, 8, end[0]], end) == [7, 8, *end]
        and append_end_of_turn([7, 8], end) == [7, 8]
        and append_end_of_turn([], end) == []
    )
    assert append_end_of_turn([7, end[-1]], end) == [7, end[-1]] and len(end) == 2
    for question, answer in (("What is 2 + 3?", "2 + 3 = 5. So it is 5."), ("Hm?", " spaced "), ("A\nB", "x")):
        conversation = [Message("user", question)]
        row = template.encode([*conversation, Message("assistant", answer)])
        answer_tokens = encode_answer(template, answer)
        assert [*template.prompt(conversation), *answer_tokens] == list(row.input_ids)
        assert answer_tokens[-len(end) :] == end


def test_all_are_scored_together_and_a_broken_score_is_an_error() -> None:
    [weighted] = build_rewards([RewardConfig(name="reward_model")], Path())
    batch_sizes: list[int] = []

    def read(rows: Any) -> list[float]:
        batch_sizes.append(len(rows))
        return [float("nan") if len(row) == 2 else float(sum(row)) for row in rows]

    weighted.reward.score_batch = read  # type: ignore[attr-defined]
    rows = [[1, 2, 3], [4, 5], [], [6]]
    with WorkerPool[int](
        [build_rewards([RewardConfig(name="length", target_tokens=9)], Path())[0].reward, weighted.reward]
    ) as scorer:
        for key, ids in enumerate(rows):
            scorer.submit(key, RewardInput("asked", "said", None, {}, True, 3, ids))
        found = scorer.collect()
        assert scorer.collect() == {}
    assert batch_sizes == [3] and weighted.on_error == "drop"
    assert [found[key][1].value for key in range(4)] == [6.0, None, None, 6.0] and all(
        scores[0].value == 1.0 for scores in found.values()
    )
    assert [found[key][1].verdict for key in range(4)] == ["graded", "error", "error", "graded"] and "nan" in found[1][
        1
    ].reason


# --- recipes ----------------------------------------------------------------------------------------------------------


def faults(data: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        (Chain if "stages" in data else Recipe).from_dict(data)
    return str(caught.value).splitlines()


def test_recipes_need_an_adapter_for_the_reward_model_and_no_other(tmp_path: Path) -> None:
    alone = {**LEARNED, "base": {"model": "tiny-tutor"}}
    assert len(errors := faults(alone)) == 1 and errors[0].startswith(
        "rewards.0.name: needs a reward model: `adapters: {reward: {path:"
    )
    given = {**alone, "adapters": {"reward": {"path": "runs/judge"}}}
    recipe = Recipe.from_dict({**given, "reference": "base"})
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    idle = {**given, "rewards": [{"name": "answer"}]}
    assert len(errors := faults(idle)) == 1 and errors[0].startswith(
        "adapters.reward: does nothing without the reward `reward_model`"
    )
    assert len(faults({**CHAIN, "stages": [CHAIN["stages"][0], LEARNED]})) == 1

    chain = Chain.from_dict(CHAIN)
    assert Chain.from_dict(chain.to_dict()) == chain and set(chain.stages[3].adapters) == {"policy"}
    adapters = chain.recipe_of(3, {"warm": "a", "judge": "b", "dpo": "c"}).adapters
    assert {name: adapter.path for name, adapter in adapters.items()} == {
        "warm": "a",
        "dpo": "c",
        "reward": "b",
        "policy": None,
    }
    named = {**LEARNED, "adapters": {"reward": {"path": "mine"}}}
    chain = Chain.from_dict({**CHAIN, "stages": [*CHAIN["stages"][:3], named]})
    assert chain.recipe_of(3, {"warm": "a", "judge": "b", "dpo": "c"}).adapters["reward"].path == "mine"
    wrong = {**CHAIN, "stages": [{**CHAIN["stages"][0], "name": "reward"}, CHAIN["stages"][2]]}
    assert any("is not a name for a stage of sft: `reward` is the reward model" in fault for fault in faults(wrong))
