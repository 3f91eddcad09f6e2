"""Recipes with stages: layers, overrides, adapters of earlier stages, problems with their lines, malformed files."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed_yaml import MAX_CPU_SECONDS
from recipe_helpers import Steps, Write, places, problems_of_file, with_values

from lowrank_tune.config import Chain, Recipe, differences, dump, load_any, presets, schema
from lowrank_tune.errors import ConfigError, UserError

PAIRS = {"train": [{"dataset": "builtin:arithmetic-preferences"}]}
SFT: dict[str, Any] = {
    "algorithm": "sft",
    "data": {"train": [{"dataset": "builtin:arithmetic"}]},
    "train": {"max_steps": 9},
}
REWARD: dict[str, Any] = {"algorithm": "reward", "data": PAIRS, "train": {"max_steps": 8}}
DPO: dict[str, Any] = {"algorithm": "dpo", "data": PAIRS, "train": {"max_steps": 7}}
GRPO: dict[str, Any] = {
    "algorithm": "grpo",
    "data": {"train": [{"dataset": "builtin:arithmetic"}]},
    "train": {"max_steps": 6},
    "rewards": [{"name": "answer"}],
}
RLHF: dict[str, Any] = {"name": "all", "seed": 3, "stages": [SFT, REWARD, DPO]}

CHAIN = """\
description: SFT, a reward model, DPO
base: {model: tiny-tutor}
seed: 3
dpo: {beta: 0.2}
reward: {center_rewards_coefficient: 0.01}
train: {max_steps: 5}
adapters: {reward: {r: 4}, policy: {r: 8}}
evaluate: {eval_dataset: {dataset: builtin:arithmetic, split: heldout}, num_completions_to_print: 1}
stages:
  - {name: start, extends: tiny-sft}
  - algorithm: reward
    data: {train: [{dataset: builtin:arithmetic-preferences}]}
  - name: prefer
    algorithm: dpo
    data: {train: [{dataset: builtin:arithmetic-preferences}]}
    train: {num_train_epochs: 1}
    evaluate: {num_completions_to_print: null}
    reference: start
"""


def problems_of_chain(data: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        Chain.from_dict(data)
    return str(caught.value).splitlines()


def chained(*stages: dict[str, Any], **shared: Any) -> dict[str, Any]:
    return {"name": "all", **shared, "stages": list(stages)}


def test_chain_stage_equals_the_same_single_recipe(write: Write) -> None:
    chain = Chain.load(write(CHAIN))
    shared = {"base": {"model": "tiny-tutor"}, "seed": 3}
    heldout = {"dataset": "builtin:arithmetic", "split": "heldout"}
    start = Recipe.load("tiny-sft", "name=start", "seed=3", "adapters.policy.r=16")
    reward = Recipe.from_dict(
        {
            **REWARD,
            **shared,
            "name": "reward",
            "train": {"max_steps": 5},
            "adapters": {"reward": {"r": 4}},
            "reward": {"center_rewards_coefficient": 0.01},
            "evaluate": {"eval_dataset": heldout, "num_completions_to_print": 1},
        }
    )
    prefer = Recipe.from_dict(
        {
            **DPO,
            **shared,
            "name": "prefer",
            "train": {"num_train_epochs": 1},
            "adapters": {"policy": {"r": 8}},
            "dpo": {"beta": 0.2},
            "evaluate": {"eval_dataset": heldout},
        }
    )
    assert start.description and chain.stages[0] == start.model_copy(update={"description": ""})
    assert chain.stages[1:] == (reward, prefer.model_copy(update={"reference": "start"}))
    assert (chain.name, chain.description, chain.algorithm) == (
        "my",
        "SFT, a reward model, DPO",
        "sft -> reward -> dpo",
    )


@pytest.mark.parametrize(
    "data",
    [
        RLHF,
        chained(SFT),
        chained({**SFT, "name": "one"}, {**SFT, "name": "two"}, {**DPO, "reference": "two"}),
        chained(
            SFT,
            DPO,
            description="null",
            train={"logging_steps": 2},
            dpo={"loss_type": "robust", "label_smoothing": 0.3},
        ),
        chained({**SFT, "adapters": {"low": {"path": "runs/low"}}}, {**DPO, "reference": "sft"}, name=""),
        chained(SFT, {**SFT, "name": "more", "adapters": {"policy": {"path": "runs/x"}}}, DPO),
        chained(DPO, REWARD, reference="base"),
        chained(SFT, {**GRPO, "reference": "sft"}, {**DPO, "reference": "grpo"}),
        chained(SFT, GRPO, {**GRPO, "name": "more", "reference": "grpo"}),
        chained(
            SFT,
            GRPO,
            train={"length_window": 3, "prompts_per_step": 2},
            data={"max_length": 99, "max_prompt_length": 9},
            grpo={"beta": 0},
        ),
        chained(*({**SFT, "name": f"s{index}", "description": "é: 1"} for index in range(8))),
    ],
)
def test_saved_chain_loads_as_an_equal_one(data: dict[str, Any], write: Write) -> None:
    before = copy.deepcopy(data)
    chain = Chain.from_dict(data)
    assert data == before
    assert Chain.from_dict(chain.to_dict()) == chain
    loaded = load_any(write(dump(chain)))
    assert loaded == chain and dump(loaded) == dump(chain)
    assert differences(chain.to_dict(), loaded.to_dict()) == []
    assert Chain(chain.name, chain.description, chain.stages) == chain


def test_override_changes_every_stage_or_the_named_one(write: Write) -> None:
    path = write(CHAIN)
    chain = Chain.load(
        path,
        "train.learning_rate=1e-5",
        "stages.prefer.train.learning_rate=2e-5",
        "train.num_train_epochs=3",
        "stages.reward.train.max_steps=2",
        "adapters.policy.r=2",
        "dpo.beta=0.9",
        "name=other",
        "stages.start.data.train.0.max_samples=5",
        "seed=4",
    )
    assert [stage.train.learning_rate for stage in chain.stages] == [1e-5, 1e-5, 2e-5]
    assert [(stage.train.max_steps, stage.train.num_train_epochs) for stage in chain.stages] == [
        (None, 3),
        (2, None),
        (None, 3),
    ]
    assert [stage.seed for stage in chain.stages] == [4, 4, 4]
    assert [stage.adapters[stage.trained_adapter].r for stage in chain.stages] == [2, 4, 2]
    assert chain.name == "other" and [stage.name for stage in chain.stages] == ["start", "reward", "prefer"]
    assert chain.stages[2].dpo.beta == 0.9 and chain.stages[0].data.train[0].max_samples == 5


def test_override_of_one_stage_replaces_the_common_one_in_any_order(write: Write) -> None:
    for overrides in (["seed=1", "stages.prefer.seed=2"], ["stages.prefer.seed=2", "seed=1"]):
        assert [stage.seed for stage in Chain.load(write(CHAIN), *overrides).stages] == [1, 1, 2]
    nested = Chain.load(
        write(CHAIN),
        "evaluate={num_prompts: 4, eval_dataset: {dataset: builtin:arithmetic}}",
        "stages.start.evaluate.eval_dataset.split=heldout",
    )
    assert [stage.evaluate.eval_dataset.split for stage in nested.stages if stage.evaluate.eval_dataset] == [
        "heldout",
        "train",
        "train",
    ]
    assert [stage.evaluate.num_prompts for stage in nested.stages] == [4, 4, 4]


def test_stage_setting_replaces_the_common_one_and_null_removes_it(write: Write) -> None:
    chain = Chain.load(write(CHAIN))
    assert [(stage.train.max_steps, stage.train.num_train_epochs) for stage in chain.stages] == [
        (None, 4),
        (5, None),
        (None, 1),
    ]
    assert [stage.evaluate.num_completions_to_print for stage in chain.stages] == [4, 1, 3]
    gone = Chain.load(write(CHAIN.replace("extends: tiny-sft}", "extends: tiny-sft, evaluate: null}")))
    assert gone.stages[0].evaluate.eval_dataset is None and gone.stages[1].evaluate.eval_dataset is not None


def test_common_setting_is_left_out_of_stages_that_do_not_use_it() -> None:
    chain = Chain.from_dict(
        chained(
            SFT,
            GRPO,
            train={"global_batch_size": 8, "prompts_per_step": 2, "micro_batch_size": 3},
            rollout={"max_num_seqs": 5},
            data={"eval_fraction": 0.5, "max_length": 99, "max_prompt_length": 9},
        )
    )
    sft, grpo = (stage.to_dict() for stage in chain.stages)
    assert (sft["train"]["global_batch_size"], sft["data"]["eval_fraction"], sft["data"]["max_length"]) == (8, 0.5, 99)
    assert (grpo["train"]["prompts_per_step"], grpo["data"]["max_prompt_length"], grpo["rollout"]["max_num_seqs"]) == (
        2,
        9,
        5,
    )
    assert sft["train"]["micro_batch_size"] == grpo["train"]["micro_batch_size"] == 3
    assert "max_num_seqs" not in sft["rollout"]
    assert not {"rewards", "grpo"} & set(sft) and not {"max_length", "eval_fraction", "validation"} & set(grpo["data"])


def test_extends_of_chain_and_stage_is_relative_to_its_file(write: Write) -> None:
    one = (
        "algorithm: sft\ndata: {train: [{dataset: builtin:arithmetic, max_samples: 7}]}\ntrain: {max_steps: 4}\n"
        "description: not inherited\nname: nor-this\n"
    )
    write(one, "far/one.yaml")
    write(
        "seed: 5\nstages:\n  - extends: ./one.yaml\n"
        "  - {extends: ./one.yaml, name: two, train: {save_total_limit: 1}}\n",
        "far/chain.yaml",
    )
    chain = Chain.load(write("extends: far/chain.yaml\nseed: 6\ntrain: {logging_steps: 3}\n"))
    assert chain.name == "my" and [stage.name for stage in chain.stages] == ["sft", "two"]
    assert [
        (stage.seed, stage.train.max_steps, stage.train.save_total_limit, stage.train.logging_steps)
        for stage in chain.stages
    ] == [
        (6, 4, 2, 3),
        (6, 4, 1, 3),
    ]
    assert [stage.description for stage in chain.stages] == ["", ""] and chain.stages[0].data.train[0].max_samples == 7
    other = Chain.load(
        write("extends: far/chain.yaml\nstages: [{extends: far/one.yaml, train: {num_train_epochs: 1}}]\n")
    )
    assert [(stage.train.max_steps, stage.train.num_train_epochs) for stage in other.stages] == [(None, 1)]


def test_recipe_of_stage_has_the_adapters_of_earlier_stages(write: Write) -> None:
    low, mine = {"path": "runs/low"}, {"path": "runs/mine"}
    chain = Chain.from_dict(
        chained(
            {**SFT, "adapters": {"low": low, "policy": {"r": 4}}},
            REWARD,
            {**DPO, "name": "prefer", "adapters": {"policy": {"r": 2}, "mine": mine}, "reference": "sft"},
            {**REWARD, "name": "judge", "adapters": {"low": low, "reward": {"r": 3}}},
            {**SFT, "name": "last", "reference": "prefer"},
        )
    )
    folders = {name: f"runs/all/{name}/final" for name in ("sft", "reward", "prefer", "judge")}
    recipes = [chain.recipe_of(index, folders) for index in range(5)]
    assert [list(recipe.adapters) for recipe in recipes] == [
        ["low", "policy"],
        ["low", "sft", "reward"],
        ["mine", "low", "sft", "policy"],
        ["low", "mine", "sft", "prefer", "reward"],
        ["low", "mine", "sft", "prefer", "policy"],
    ]
    assert recipes[0] == chain.stages[0] and recipes[2].reference == "sft" and recipes[2].name == "prefer"
    paths = [adapter.path for adapter in recipes[4].adapters.values()]
    assert paths == ["runs/low", "runs/mine", folders["sft"], folders["prefer"], None]
    assert recipes[2].adapters["policy"].r == 2 and recipes[3].adapters["reward"].r == 3
    for recipe in recipes:
        assert Recipe.from_dict(recipe.to_dict()) == recipe
        assert load_any(write(dump(recipe))) == recipe
    assert chain.recipe_of(0, {}) == chain.stages[0]
    with pytest.raises(KeyError):
        chain.recipe_of(1, {})


FAULTY = """\
base: {model: tiny-tutor}
seed: x
train: {lr: 3}
stages:
  - {name: sft, extends: tiny-sft}
  - name: dpo
    algorithm: dpo
    base: {bits: 16}
    data: {train: [{dataset: builtin:arithmetic}]}
    train: {num_train_epoch: 1, max_steps: 9}
    reference: base
"""


def test_faulty_chain_reports_every_problem_at_once(write: Write) -> None:
    overrides = [
        "stages.dop.seed=1",
        "stages.dpo=3",
        "stages=3",
        "stages.dpo.name=x",
        "name=/",
        "train.x=1",
        "data.train.5.max_samples=2",
        "stages.dpo.data.train.4.max_samples=1",
        "stages.1.seed=3",
        "stages.sft.train.save_total_limt=1",
        "evaluate.eval_steps=0",
        "extends=b",
        "stages.dpo.extends=a",
    ]
    assert sorted(problems_of_file(write(FAULTY), *overrides)) == sorted(
        [
            "my.yaml:2: seed: expected a whole number, found 'x'",
            "my.yaml:3: train.lr: unknown key; did you mean `learning_rate`?",
            "my.yaml:8: stages.dpo.base.bits: is 4 in stage sft, and a chain has one base in memory",
            "my.yaml:9: stages.dpo.data.train.0.dataset: contains single answers, and dpo learns from pairs; use "
            "builtin:arithmetic-preferences",
            "my.yaml:10: stages.dpo.train.num_train_epoch: unknown key; did you mean `num_train_epochs`?",
            "my.yaml:11: stages.dpo.reference: will be `sft`, the adapter directly below it: it is always the policy's "
            "stack without its top; "
            "write that, or leave it out",
            "override: stages.dop.seed: no stage is called 'dop'; did you mean `dpo`?",
            "override: stages.dpo: is not a single setting; write stages.dpo.train.max_steps=100",
            "override: stages: is not a single setting; write stages.NAME.train.max_steps=100",
            "override: stages.dpo.name: cannot be given here; write it in the file",
            "override: stages.dpo.extends: cannot be given here; write it in the file",
            "override: extends: cannot be given here; name that recipe itself",
            "override: name: may have letters, digits, `.`, `_` and `-`, a letter or digit first, at most 64, found "
            "'/'",
            "override: train.x: unknown key",
            "override: stages.dpo.data.train.4.max_samples: `data.train` is a list with entries 0 to 0",
            "override: data.train.5.max_samples: `data.train` is a list with entries 0 to 0",
            "override: stages.1.seed: no stage is called '1'; there are sft, dpo",
            "override: stages.sft.train.save_total_limt: unknown key; did you mean `save_total_limit`?",
            "override: evaluate.eval_steps: must be at least 1, found 0",
        ]
    )


def test_problem_of_one_stage_contains_its_name_and_of_all_stages_none(write: Write) -> None:
    write("algorithm: sft\ndata: {train: [{dataset: builtin:arithmetic}]}\ntrain:\n  max_step: 4\n", "above.yaml")
    assert problems_of_file(
        write("stages:\n  - extends: above.yaml\n    train: {max_steps: 2, save_total_limit: 0}\n")
    ) == [
        "my.yaml:3: stages.sft.train.save_total_limit: must be at least 1, found 0",
        "above.yaml:4: stages.sft.train.max_step: unknown key; did you mean `max_steps`?",
    ]
    both = problems_of_file(
        write(
            "stages:\n  - {extends: above.yaml, train: {max_steps: 2}}\n"
            "  - {extends: above.yaml, train: {num_train_epochs: 2}, name: b}\n"
        )
    )
    assert both == ["above.yaml:4: train.max_step: unknown key; did you mean `max_steps`?"]
    assert problems_of_file(
        write(
            "train: {max_steps: 1}\nstages:\n  - algorithm: sft\n    data: {train: [{dataset: builtin:arithmetic}]}\n"
            "  - algorithm: sftt\n"
        )
    ) == [
        "my.yaml:5: stages.sftt.algorithm: expected one of sft, reward, dpo, kto, ppo, grpo, found 'sftt'; did you "
        "mean "
        "`sft`?",
        "my.yaml:5: stages.sftt.data: is missing",
    ]


CONFLICTS: dict[str, tuple[dict[str, Any], str]] = {
    "same name": (chained(SFT, {**DPO, "name": "sft"}), "stages.1.name: a second stage is called `sft`"),
    "same algorithm": (chained(SFT, SFT), "stages.1: a second stage is called `sft`; give each a `name` of its own"),
    "base": (chained({**SFT, "name": "base"}), "stages.0.name: is not a name for a stage: `base` is the base itself"),
    "letters": (chained({**SFT, "name": "My stage"}), "stages.0.name: is not a name for a stage: small letters"),
    "number": (chained({**SFT, "name": 7}), "stages.0.name: is not a name for a stage: small letters"),
    "policy": (
        chained({**SFT, "name": "policy"}, DPO),
        "stages.dpo.adapters.policy: is also the name of an earlier stage",
    ),
    "reward": (
        chained({**SFT, "name": "reward"}, {**REWARD, "name": "r"}),
        "stages.reward.name: is not a name for a stage of sft",
    ),
    "adapter": (
        chained(SFT, {**DPO, "adapters": {"sft": {"path": "a"}}}),
        "stages.dpo.adapters.sft: is also the name of an earlier stage",
    ),
    "two of one name": (
        chained({**SFT, "adapters": {"low": {"path": "a"}}}, {**DPO, "adapters": {"low": {"path": "b"}}}),
        "stages.dpo.adapters.low: is also the name of another adapter",
    ),
    "trained and loaded": (
        chained({**SFT, "adapters": {"reward": {"path": "a"}}}, REWARD),
        "stages.sft.adapters.reward: does nothing without the reward",
    ),
    "its own": (
        chained({**SFT, "adapters": {"sft": {"path": "a"}}}),
        "stages.sft.name: is also the name of an adapter below this stage",
    ),
    "loaded before": (
        chained({**SFT, "adapters": {"dpo": {"path": "a"}}}, DPO),
        "stages.dpo.name: is also the name of an adapter below this stage",
    ),
    "another base": (
        chained(SFT, {**DPO, "base": {"model": "a/b"}}),
        "stages.dpo.base.model: is 'tiny-tutor' in stage sft",
    ),
    "reference": (chained(SFT, {**DPO, "reference": "base"}), "stages.dpo.reference: will be `sft`"),
    "reference of grpo": (chained(SFT, {**GRPO, "reference": "base"}), "stages.grpo.reference: will be `sft`"),
    "above grpo": (chained(GRPO, {**SFT, "reference": "base"}), "stages.sft.reference: will be `grpo`"),
    "rewards of a stage that has none": (
        chained({**SFT, "rewards": [{"name": "answer"}]}, GRPO),
        "stages.sft.rewards: does nothing for sft",
    ),
    "no rewards in a chain": (
        chained(SFT, {**GRPO, "rewards": []}),
        "stages.grpo.rewards: is missing: list the rewards",
    ),
    "rows of grpo": (
        chained(SFT, {**GRPO, "train": {"max_steps": 1, "global_batch_size": 4}}),
        "stages.grpo.train.global_batch_size: does nothing for grpo (it belongs to sft, reward, dpo, kto); there is "
        "`train.prompts_per_step`",
    ),
    "a reward model is no reference": (
        chained(REWARD, {**DPO, "reference": "reward"}),
        "stages.dpo.reference: will be `base`",
    ),
    "common, used by none": (
        chained(SFT, {**SFT, "name": "b"}, dpo={"beta": 0.3}),
        "dpo: does nothing for sft (it belongs to dpo)",
    ),
    "own, of another stage": (
        chained({**SFT, "dpo": {"beta": 0.3}}, DPO),
        "stages.sft.dpo: does nothing for sft (it belongs to dpo)",
    ),
    "nested": (
        chained({**SFT, "stages": [DPO]}, DPO),
        "stages.sft.stages: unknown key; a single recipe and a stage have none",
    ),
    "heading": (chained(SFT, REWARD, description=7), "description: expected text, found 7"),
    "extends in Python": (chained({**SFT, "extends": "tiny-sft"}), "stages.sft.extends: unknown key"),
    "no list": ({"stages": {"sft": SFT}}, "stages: expected a list of recipes, found a mapping"),
    "int": ({"stages": 7}, "stages: expected a list of recipes, found 7"),
    "null": ({"stages": None}, "stages: expected a list of recipes, found nothing"),
    "empty": ({"stages": []}, "stages: must have at least one entry"),
    "entry": (chained(SFT, 7), "stages.1: expected a recipe (`key: value` lines), found 7"),  # type: ignore[arg-type]
    "too many": (chained(*[SFT] * 9), "stages: has 9 entries, and a chain has at most 8"),
    "no stages": (SFT, "stages: is missing: a single recipe is read by Recipe.from_dict"),
}


@pytest.mark.parametrize("case", CONFLICTS)
def test_conflicting_stages_are_one_problem(case: str) -> None:
    data, message = CONFLICTS[case]
    problems = problems_of_chain(data)
    assert len(problems) == 1 and problems[0].startswith(message), problems


@pytest.mark.parametrize(
    "data",
    [
        chained(REWARD, DPO, {**SFT, "name": "policy"}),
        chained(REWARD, {**DPO, "name": "policy", "reference": "base"}),
        chained({**SFT, "base": {"model": "a/b"}}, {**DPO, "base": {"model": "a/b", "bits": 4}}),
        chained(SFT, {**DPO, "seed": 9}),
        chained(SFT, DPO, dpo={"beta": 0.3}, adapters={"policy": {"r": 2}}),
        chained(SFT, REWARD, adapters={"policy": {"r": 2}, "reward": {"r": 2}}),
    ],
)
def test_similar_stages_without_conflict_load(data: dict[str, Any]) -> None:
    assert len(Chain.from_dict(data).stages) == len(data["stages"])


def test_chain_made_in_python_is_checked() -> None:
    sft, dpo = Recipe.from_dict({**SFT, "name": "sft"}), Recipe.from_dict({**DPO, "name": "dpo", "reference": "base"})
    with pytest.raises(ConfigError, match="stages.dpo.reference: will be `sft`"):
        Chain("x", "", (sft, dpo))
    with pytest.raises(ConfigError, match="a second stage is called `sft`"):
        Chain("x", "", (sft, sft))
    with pytest.raises(ConfigError, match="at least one entry"):
        Chain("x", "", ())
    with pytest.raises(ConfigError, match=r"stages.0.name: is not a name for a stage"):
        Chain("x", "", (Recipe.from_dict(SFT),))


def test_recipe_and_chain_loaders_refuse_the_other_kind(write: Write) -> None:
    path = write(CHAIN)
    with pytest.raises(UserError, match=r"my is a chain of several runs; `lowrank-tune run` runs it"):
        Recipe.load(path)
    with pytest.raises(UserError, match="tiny-sft is a single recipe, without stages"):
        Chain.load("tiny-sft")
    with pytest.raises(ConfigError, match="stages: makes this a chain of several runs; use Chain.from_dict"):
        Recipe.from_dict(RLHF)
    assert load_any("tiny-sft", "seed=3") == Recipe.load("tiny-sft", "seed=3")
    assert isinstance(load_any(path), Chain)
    assert problems_of_file("tiny-sft", "stages.sft.seed=1") == [
        "override: stages: unknown key; a single recipe and a stage have none; "
        "a chain is a recipe file with a list of them"
    ]
    with pytest.raises(AttributeError):
        load_any(path).name = "other"  # type: ignore[misc]


def test_presets_contain_chains_and_stages_cannot_extend_them(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write(CHAIN.replace("tiny-sft", "one"), "presets/chain.yaml")
    write(
        "description: one\nalgorithm: sft\ndata: {train: [{dataset: builtin:arithmetic}]}\ntrain: {max_steps: 4}\n",
        "presets/one.yaml",
    )
    monkeypatch.setattr("lowrank_tune.config.extends.preset_folders", lambda: [Path("presets").resolve()])
    assert presets() == [("chain", "SFT, a reward model, DPO", "sft -> reward -> dpo"), ("one", "one", "sft")]
    assert problems_of_file(write("stages: [{name: a, extends: chain}]")) == [
        "my.yaml:1: stages.0.extends: is a chain itself, and chains do not nest; name one of its recipes",
    ]


def test_schema_contains_every_key_of_a_chain() -> None:
    shape = schema()
    stage = shape["$defs"]["Stage"]["properties"]
    assert shape["properties"]["stages"]["items"] == {"$ref": "#/$defs/Stage"} and "stages" not in stage
    data = Chain.from_dict(RLHF).to_dict()
    assert set(data) <= set(shape["properties"]) and all(set(each) <= set(stage) for each in data["stages"])


def test_differences_of_chains_list_what_cannot_change() -> None:
    old = Chain.from_dict(RLHF).to_dict()
    new = copy.deepcopy(old)
    new["stages"][2]["train"].update(max_steps=99, learning_rate=1.0, save_total_limit=9)
    new["stages"][0]["description"] = new["name"] = "other"
    new["stages"][1]["adapters"]["reward"]["r"] = 2
    assert differences(old, new) == [
        "stages.reward.adapters.reward.r: was 16, is 2",
        "stages.dpo.train.learning_rate: was 5e-06, is 1.0",
    ]
    swapped = {**old, "stages": [old["stages"][index] for index in (1, 0, 2)]}
    assert differences(old, swapped) == ["stages: was 'sft -> reward -> dpo', is 'reward -> sft -> dpo'"]
    assert differences(old, {**old, "stages": old["stages"][:2]}) == [
        "stages: was 'sft -> reward -> dpo', is 'sft -> reward'"
    ]
    assert any(
        line.startswith("stages: was not set, is 'sft") for line in differences(Recipe.from_dict(SFT).to_dict(), old)
    )


GOOD = "algorithm: sft, data: {train: [{dataset: builtin:arithmetic}]}, train: {max_steps: 5}"
HOSTILE: dict[str, tuple[str, str]] = {
    "word": ("stages: sft\n", ":1: stages: expected a list of recipes, found 'sft'"),
    "int": ("seed: 1\nstages: 7\n", ":2: stages: expected a list of recipes, found 7"),
    "null": ("seed: 1\nstages:\n", ":2: stages: expected a list of recipes, found nothing"),
    "mapping": (f"stages: {{{GOOD}}}\n", ":1: stages: expected a list of recipes, found a mapping"),
    "empty": ("stages: []\n", ":1: stages: must have at least one entry"),
    "entries": (
        f"stages:\n- {{{GOOD}}}\n- 3\n-\n- [x]\n",
        ":3: stages.1: expected a recipe (`key: value` lines), found 3",
    ),
    "endless": (
        f"stages:\n{f'- {{{GOOD}}}' + chr(10)}" + "- {}\n" * 600,
        ":1: stages: has 601 entries, and a chain has at most 8",
    ),
    "nested": (
        f"stages:\n- {{{GOOD}}}\n- name: b\n  stages:\n  - {{{GOOD}}}\n",
        ":4: stages.b.stages: unknown key; a single recipe",
    ),
    "stage extends a chain": (
        f"stages:\n- {{{GOOD}}}\n- {{name: b, extends: ./chain.yaml}}\n",
        ":3: stages.1.extends: is a chain itself",
    ),
    "stage extends its own file": ("stages:\n- {extends: ./bad.yaml}\n", ":2: stages.0.extends: is a chain itself"),
    "stage extends nothing": (
        "stages:\n- {name: a, extends: 3}\n",
        ":2: stages.0.extends: expected the name of a preset",
    ),
    "stage extends no preset": (
        "stages:\n- {extends: tiny-sftt}\n",
        ":2: stages.0.extends: no preset is called 'tiny-sftt'; did you mean",
    ),
    "stage extends a list": ("stages:\n- {extends: [a]}\n", ":2: stages.0.extends: expected the name of a preset"),
    "anchor": (f"stages:\n- &a {{{GOOD}}}\n- *a\n", ":2: stages.0: has an anchor (&a)"),
    "alias": (f"stages:\n- {{{GOOD}}}\n- *a\n", ":3: stages.1: has an alias (*a)"),
    "twice": (f"stages:\n- {{{GOOD}, seed: 1, seed: 2}}\n", ":2: stages.0.seed: is written twice"),
    "base": (
        f"base: 7\nstages:\n- {{{GOOD}}}\n- {{{GOOD}, name: b, base: {{bits: 16}}}}\n",
        ":1: stages.sft.base: expected a mapping",
    ),
    "adapters": (f"adapters: [x]\nstages:\n- {{{GOOD}}}\n- {{{GOOD}, name: b}}\n", ":1: adapters: expected a mapping"),
    "algorithm": (f"stages:\n- {{{GOOD}}}\n- {{algorithm: [x]}}\n", ":3: stages.1.algorithm: expected one of"),
    "no algorithm": (f"stages:\n- {{{GOOD}}}\n- {{seed: 1}}\n", ":3: stages.1.algorithm: is missing"),
    "reference": (f"reference: [x]\nstages:\n- {{{GOOD}}}\n- {{{GOOD}, name: b}}\n", ":1: reference: expected text"),
    "escapes": (f'stages:\n- {{{GOOD}, name: "a\\u202e"}}\n', ":2: stages.0.name: is not a name for a stage"),
    "algorithm's own": ('stages:\n- {algorithm: "\\u202e"}\n', ":2: stages.0.algorithm: expected one of"),
    "many keys": (
        "".join(f"k{n}: {n}\n" for n in range(700))
        + "stages:\n"
        + "".join(f"- {{{GOOD}, name: s{n}}}\n" for n in range(8)),
        "unknown key",
    ),
    "many keys of all": (
        "stages:\n"
        + "".join(f"- {{{GOOD}, name: s{n}, {', '.join(f'kay{m}: 1' for m in range(90))}}}\n" for n in range(8)),
        "unknown key",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_malformed_chain_file_ends_in_problems(case: str, write: Write) -> None:
    write(f"stages: [{{{GOOD}}}]\n", "chain.yaml")
    text, message = HOSTILE[case]
    path = write(text, "bad.yaml")
    start = time.process_time()
    lines = problems_of_file(path)
    assert time.process_time() - start < MAX_CPU_SECONDS
    assert all(line.startswith("bad.yaml") and len(line) < 400 and line.isprintable() for line in lines)
    assert len(lines) <= 51 and any(message in line for line in lines), lines


BROKEN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["sft", "dpo", "reward", "policy", "base", 10**30]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=8) | st.sampled_from(["path", "name"]), inner, max_size=3)
    ),
    max_leaves=4,
)
WHOLE = {
    **RLHF,
    "adapters": {"policy": {"r": 4}, "low": {"path": "a"}},
    "dpo": {"beta": 0.2},
    "base": {"bits": 4},
    "reference": None,
    "stages": [SFT, REWARD, {**DPO, "name": "prefer", "reference": "sft", "adapters": {"policy": {"r": 2}}}],
}


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.sampled_from(places(WHOLE)), BROKEN), min_size=1, max_size=3),
    st.lists(
        st.tuples(
            st.sampled_from(["stages.prefer.", "stages.sft.", "stages.x.", ""]), st.sampled_from(places(WHOLE)), BROKEN
        ),
        max_size=2,
    ),
)
def test_chain_with_random_values_loads_or_reports_problems(
    changes: list[tuple[Steps, Any]], overrides: list[tuple[str, Steps, Any]]
) -> None:
    """The result is a chain that loads as saved, or a ConfigError, and no other exception."""
    try:
        chain = Chain.from_dict(with_values(WHOLE, changes))
    except ConfigError as error:
        assert all(str(problem).isprintable() and len(str(problem)) < 400 for problem in error.problems)
    else:
        assert Chain.from_dict(chain.to_dict()) == chain and dump(chain)
        for index in range(len(chain.stages)):
            chain.recipe_of(index, {stage.name: "runs/x" for stage in chain.stages})
    whole.write_text(yaml.safe_dump(WHOLE))
    try:
        load_any(str(whole), *(f"{prefix}{'.'.join(map(str, path))}={value}" for prefix, path, value in overrides))
    except ConfigError as error:
        assert all(problem.file for problem in error.problems)


whole = Path()


@pytest.fixture(scope="module", autouse=True)
def _folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    global whole
    whole = tmp_path_factory.mktemp("chain") / "whole.yaml"
