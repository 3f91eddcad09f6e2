"""Laws of the learned reward in GRPO: the reward model's own scores, over the adapters that it was trained over, on the
one base."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CPU, load, reward_roles, shake

import lowrank_tune.build as build_module
from lowrank_tune import Chain, Recipe, UserError, run
from lowrank_tune.build.learned import answer_ids, closed, closing, score_rows
from lowrank_tune.data import Template
from lowrank_tune.errors import Faults
from lowrank_tune.evaluate import score_file
from lowrank_tune.events import Event, Grouped, Note, RunStarted, StepDone
from lowrank_tune.model.base import load_tokenizer
from lowrank_tune.rewards import Item, Scorer, make
from lowrank_tune.settings import Base, RewardUse
from lowrank_tune.types import Message
from lowrank_tune.verify import verify

FEW = {"micro_batch_size": 8, "steps": 2, "learning_rate": 5e-3, "gradient_checkpointing": False}
ROWS, PAIRS = {"train": [{"dataset": "tutor", "rows": 40}]}, {"train": [{"dataset": "tutor-preferences", "rows": 24}]}
LEARNED: dict[str, Any] = {
    "name": "grpo",
    "algorithm": "grpo",
    "data": ROWS,
    "rewards": [{"use": "reward_model"}, {"use": "length", "target_tokens": 8, "weight": 0.1}],
    "rollout": {"num_generations": 4, "max_new_tokens": 40},
    "train": {**FEW, "prompts_per_step": 3},
}
CHAIN: dict[str, Any] = {
    "name": "learned",
    "base": {"model": "tiny-tutor"},
    "stages": [
        {"name": "warm", "algorithm": "sft", "data": ROWS, "train": {**FEW, "steps": 10, "rows_per_step": 8}},
        {
            "name": "judge",
            "algorithm": "reward",
            "data": {**PAIRS, "validation_share": 0.2},
            "train": {**FEW, "rows_per_step": 8},
        },
        {"name": "dpo", "algorithm": "dpo", "data": PAIRS, "train": {**FEW, "rows_per_step": 8, "steps": 1}},
        LEARNED,
    ],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event], list[str]]:
    """The chain, what it told, and which bases were loaded."""
    os.environ["LOWRANK_TUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    out, heard, bases = tmp_path_factory.mktemp("learned") / "one", list[Event](), list[str]()
    with pytest.MonkeyPatch.context() as patched:
        real = build_module.load_base
        patched.setattr(
            build_module, "load_base", lambda wanted, *rest: bases.append(wanted.model) or real(wanted, *rest)
        )
        assert run(Chain.from_dict(CHAIN), out=out, ui="none", device=CPU, on_event=heard.append).status == "done"
    return out, heard, bases


def test_scores_are_those_of_the_reward_models_own_run(
    finished: tuple[Path, list[Event], list[str]], tmp_path: Path
) -> None:
    out, heard, _ = finished
    shown = [(event.prompt, one) for event in heard if isinstance(event, Grouped) for one in event.completions]
    ended = [(prompt, one) for prompt, one in shown if one["finish"] == "stop"]
    assert len(shown) == 8 and len(ended) >= 2, "nothing to compare"
    rows = [json.dumps({"prompt": prompt, "completion": one["text"]}) for prompt, one in ended]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    alone, _ = score_file(out / "2-judge", str(tmp_path / "rows.jsonl"), lambda event: None, CPU)
    found = [one["parts"]["reward_model"] for _, one in ended]
    assert found == pytest.approx([one.score for one in alone], abs=1e-5) and max(map(abs, found)) > 1e-3
    for _, one in shown:
        assert one["reward"] == pytest.approx(one["parts"]["reward_model"] + 0.1 * one["parts"]["length"])
    steps = [event.stats for event in heard if isinstance(event, StepDone) and "reward_reward_model" in event.stats]
    assert len(steps) == 2


def test_verify_reads_as_the_run_did(finished: tuple[Path, list[Event], list[str]], tmp_path: Path) -> None:
    """What stands in the record of the run comes out of a file of its completions again: ended ones and cut ones."""
    out, heard, _ = finished
    shown = [(event.prompt, one) for event in heard if isinstance(event, Grouped) for one in event.completions]
    rows = [json.dumps({"prompt": prompt, "completions": [one]}) for prompt, one in shown]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, json.dumps({"completion": "of no prompt"})]))
    found = verify(
        Recipe.from_dict(below(out, "warm", "dpo", "reward")),
        str(tmp_path / "rows.jsonl"),
        None,
        lambda event: None,
        CPU,
    )
    values = [scores[0].value for scores in found.rows]
    assert values[:-1] == pytest.approx([one["parts"]["reward_model"] for _, one in shown], abs=1e-5)
    assert values[-1] is None and "it has no prompt" in found.rows[-1][0].reason


def test_one_base_and_a_reward_model_that_stays_what_it_was(finished: tuple[Path, list[Event], list[str]]) -> None:
    out, heard, bases = finished
    assert bases == ["tiny-tutor"]
    roles = [dict(event.roles) for event in heard if isinstance(event, RunStarted)][-1]
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


def test_the_policy_does_not_hear_the_reward_model(
    finished: tuple[Path, list[Event], list[str]], tmp_path: Path
) -> None:
    """Written alone the stage is the same; and beside a reward model the policy writes what it writes without one."""
    out, heard, _ = finished
    found = [[event for event in heard if isinstance(event, Grouped)]]
    for number, recipe in enumerate(
        (below(out, "warm", "dpo", "reward"), {**below(out, "warm", "dpo"), "rewards": [{"use": "answer"}]})
    ):
        events: list[Event] = []
        run(Recipe.from_dict(recipe), out=tmp_path / str(number), ui="none", device=CPU, on_event=events.append)
        found.append([event for event in events if isinstance(event, Grouped)])
    chained, alone, without = found
    assert [event.completions for event in chained] == [event.completions for event in alone]
    assert [one["text"] for one in without[0].completions] == [one["text"] for one in chained[0].completions]


def test_what_it_was_trained_over_must_be_there(finished: tuple[Path, list[Event], list[str]], tmp_path: Path) -> None:
    out, _, _ = finished
    with pytest.raises(
        UserError, match=r"adapters\.reward\.path: the reward model in .*2-judge.* was trained over the adapter `warm`"
    ):
        run(Recipe.from_dict(below(out, "reward")), out=tmp_path / "one", ui="none", device=CPU)
    swapped = below(out, "warm", "reward")
    swapped["adapters"]["reward"]["path"] = str(out / "1-warm")
    with pytest.raises(UserError, match="is a policy adapter .*not a reward adapter"):
        run(Recipe.from_dict(swapped), out=tmp_path / "two", ui="none", device=CPU)


def test_a_reward_model_that_sees_no_difference_is_told_not_refused(
    finished: tuple[Path, list[Event], list[str]],
) -> None:
    _, heard, _ = finished
    told = [event.message for event in heard if isinstance(event, Note) and "reward reward_model:" in event.message]
    assert len(told) == 1 and "does not judge" in told[0]


# --- the pieces -------------------------------------------------------------------------------------------------------


def test_rows_in_any_order_and_batch_have_one_score() -> None:
    roles = reward_roles(load(16), lower=["sft"])
    shake(roles, "sft", "reward", size=0.05)
    stream = torch.Generator().manual_seed(3)
    rows = [torch.randint(2, 90, (length,), generator=stream).tolist() for length in (9, 3, 12, 1, 7)]
    several = [score_rows(roles, rows, 0, tokens) for tokens in (1, 20, 10_000)]
    alone = [score_rows(roles, [row], 0, 99)[0] for row in rows]
    for found in several:
        assert found == pytest.approx(alone, abs=1e-5)
    assert score_rows(roles, [], 0, 10) == [] and len(set(alone)) == 5


def test_the_ids_are_those_of_the_trained_rows() -> None:
    template = Template.of(load_tokenizer(Base()))
    end = closing(template)
    assert closed([7, 8, end[0]], end) == [7, 8, *end] and closed([7, 8], end) == [7, 8] and closed([], end) == []
    assert closed([7, end[-1]], end) == [7, end[-1]] and len(end) == 2
    for question, answer in (("What is 2 + 3?", "2 + 3 = 5. So it is 5."), ("Hm?", " spaced "), ("A\nB", "x")):
        talk = [Message("user", question)]
        row = template.encode([*talk, Message("assistant", answer)])
        said = answer_ids(template, answer)
        assert [*template.prompt(talk), *said] == list(row.ids)
        assert said[-len(end) :] == end


def test_all_are_scored_together_and_a_broken_score_is_an_error() -> None:
    [weighted] = make([RewardUse(use="reward_model")], Path())
    asked: list[int] = []

    def read(rows: Any) -> list[float]:
        asked.append(len(rows))
        return [float("nan") if len(row) == 2 else float(sum(row)) for row in rows]

    weighted.reward.read = read  # type: ignore[attr-defined]
    rows = [[1, 2, 3], [4, 5], [], [6]]
    with Scorer[int]([make([RewardUse(use="length", target_tokens=9)], Path())[0].reward, weighted.reward]) as scorer:
        for key, ids in enumerate(rows):
            scorer.submit(key, Item("asked", "said", None, {}, True, 3, ids))
        found = scorer.collect()
        assert scorer.collect() == {}
    assert asked == [3] and weighted.on_error == "drop"
    assert [found[key][1].value for key in range(4)] == [6.0, None, None, 6.0] and all(
        scores[0].value == 1.0 for scores in found.values()
    )
    assert [found[key][1].verdict for key in range(4)] == ["graded", "error", "error", "graded"] and "nan" in found[1][
        1
    ].reason


# --- recipes ----------------------------------------------------------------------------------------------------------


def faults(data: dict[str, Any]) -> list[str]:
    with pytest.raises(Faults) as caught:
        (Chain if "stages" in data else Recipe).from_dict(data)
    return str(caught.value).splitlines()


def test_recipes_with_a_reward_model(tmp_path: Path) -> None:
    alone = {**LEARNED, "base": {"model": "tiny-tutor"}}
    assert len(told := faults(alone)) == 1 and told[0].startswith(
        "rewards.0.use: needs a reward model: `adapters: {reward: {path:"
    )
    given = {**alone, "adapters": {"reward": {"path": "runs/judge"}}}
    recipe = Recipe.from_dict({**given, "reference": "base"})
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    idle = {**given, "rewards": [{"use": "answer"}]}
    assert len(told := faults(idle)) == 1 and told[0].startswith(
        "adapters.reward: does nothing without the reward `reward_model`; no other"
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
    assert any("is no name for a stage of sft: `reward` is the reward model" in fault for fault in faults(wrong))
