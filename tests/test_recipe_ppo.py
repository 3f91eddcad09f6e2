"""Recipes of PPO: every rule once with its cure, and beside it the neighbour that is valid; other kits' words; what
lies beside the policy."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from test_recipe_pairs import faults_of

from lowrank_tune.recipe import Recipe, from_dict, load, load_any
from lowrank_tune.recipe.stack import frozen_adapters_of

HELDOUT = {"heldout": {"dataset": "tutor", "split": "heldout"}}
JUDGE = {"reward": {"path": "runs/reward"}}
LEARNED = [{"use": "reward_model"}]


def made(algorithm: str = "ppo", **sections: Any) -> dict[str, Any]:
    """A small valid recipe with other sections."""
    dataset = "tutor" if algorithm in ("sft", "grpo", "ppo") else "tutor-preferences"
    rewards = {"rewards": [{"use": "answer"}]} if algorithm in ("grpo", "ppo") else {}
    return {
        "algorithm": algorithm,
        "data": {"train": [{"dataset": dataset}]},
        "train": {"steps": 10},
        **rewards,
        **sections,
    }


RULES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "section": (
        made("grpo", ppo={"clip": 0.1}),
        "ppo: does nothing for grpo (it belongs to ppo)",
        made(ppo={"clip": 0.1}),
    ),
    "grpo's": (
        made(grpo={"clip": 0.1}),
        "grpo: does nothing for ppo (it belongs to grpo)",
        made("grpo", grpo={"clip": 0.1}),
    ),
    "rewards": (made(rewards=[]), "rewards: is missing: say what completions earn", made()),
    "a reward": (
        made(rewards=[{"use": "format"}]),
        "rewards.0.pattern: is missing",
        made(rewards=[{"use": "format", "pattern": "a"}]),
    ),
    "alone": (
        made("grpo", rollout={"num_generations": 1}),
        "rollout.num_generations: must be at least 2, found 1",
        made(rollout={"num_generations": 1}),
    ),
    "penalty": (
        made(ppo={"truncated": "bootstrap", "penalty": 2.0}),
        "ppo.penalty: does nothing without `ppo.truncated`: penalise",
        made(ppo={"penalty": 2.0}),
    ),
    "gain": (
        made(ppo={"kl_gain": 0.5}),
        "ppo.kl_gain: does nothing without `ppo.kl_target`",
        made(ppo={"kl_gain": 0.5, "kl_target": 0.1}),
    ),
    "nothing to steer": (
        made(ppo={"kl": 0.0, "kl_target": 0.1}),
        "ppo.kl_target: cannot be reached from `ppo.kl`: 0",
        made(ppo={"kl": 0.0}),
    ),
    "weight": (
        made(ppo={"value_weight": 0.5}),
        "ppo.value_weight: does nothing with `ppo.value`: adapter",
        made(ppo={"value_weight": 0.5, "value": "trunk"}),
    ),
    "trunk from": (
        made(ppo={"value": "trunk", "value_from": "policy"}),
        "ppo.value_from: does nothing with `ppo.value`: trunk",
        made(ppo={"value_from": "policy"}),
    ),
    "trunk's adapter": (
        made(ppo={"value": "trunk"}, adapters={"value": {"r": 4}}),
        "adapters.value: does nothing with `ppo.value`: trunk",
        made(adapters={"value": {"r": 4}}),
    ),
    "from where": (
        made(ppo={"value_from": "policy"}, adapters={"value": {"path": "runs/ppo/final/value"}}),
        "ppo.value_from: does nothing beside `adapters.value.path`",
        made(adapters={"value": {"path": "runs/ppo/final/value"}}),
    ),
    "no reward model": (
        made(ppo={"value_from": "reward"}),
        "ppo.value_from: needs the adapter of a reward model",
        made(ppo={"value_from": "reward"}, adapters=JUDGE, rewards=LEARNED),
    ),
    "shape of a copy": (
        made(ppo={"value_from": "reward"}, adapters={**JUDGE, "value": {"r": 4}}, rewards=LEARNED),
        "adapters.value.r: comes from the reward model",
        made(adapters={**JUDGE, "value": {"r": 4}}, rewards=LEARNED),
    ),
    "dropout": (
        made(adapters={"policy": {"dropout": 0.1}}),
        "adapters.policy.dropout: must be 0 with ppo",
        made(adapters={"policy": {"r": 4}}),
    ),
    "value's dropout": (
        made(adapters={"value": {"dropout": 0.1}}),
        "adapters.value.dropout: must be 0",
        made(adapters={"value": {"r": 4}}),
    ),
    "value of grpo": (
        made("grpo", adapters={"value": {"r": 4}}),
        "adapters.value.path: is missing: only `policy` is trained",
        made(adapters={"value": {"r": 4}}),
    ),
    "reference": (
        made(reference="value", adapters={"value": {"r": 4}}),
        "reference: will be `base`",
        made(reference="base", adapters={"value": {"r": 4}}),
    ),
    "pairs": (
        made(data={"train": [{"dataset": "tutor-preferences"}]}),
        "data.train.0.dataset: holds pairs, and ppo learns from completions",
        made(),
    ),
    "loss decides": (
        made(evaluate={**HELDOUT, "best_by": "loss"}),
        "evaluate.best_by: `loss` needs validation rows",
        made(evaluate=HELDOUT),
    ),
    "clip": (made(ppo={"clip": 1.0}), "ppo.clip: must be smaller than 1.0, found 1.0", made(ppo={"clip": 0.9})),
}


@pytest.mark.parametrize("name", list(RULES))
def test_each_rule_and_its_neighbor(name: str) -> None:
    wrong, message, right = RULES[name]
    faults = faults_of(copy.deepcopy(wrong))
    assert len(faults) == 1 and faults[0].startswith(message), faults
    recipe = from_dict(copy.deepcopy(right))
    assert from_dict(recipe.to_dict()) == recipe and Recipe.model_validate(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("ppo.vf_coef", "value_weight"),
        ("ppo.cliprange_value", "value_clip"),
        ("ppo.lam", "gae_lambda"),
        ("ppo.target_kl", "kl_target"),
        ("ppo.ppo_epochs", "epochs"),
        ("ppo.missing_eos_penalty", "penalty"),
        ("train.batch_size", "prompts_per_step"),
        ("rollout.response_length", "max_new_tokens"),
        ("ppo.ent_coef", "entropy"),
        ("ppo.critic_lr", "value_learning_rate"),
    ],
)
def test_names_of_other_libraries(key: str, meant: str) -> None:
    section, _, word = key.partition(".")
    data = made()
    data[section] = {**data.get(section, {}), word: 1}
    assert faults_of(data) == [f"{key}: unknown key; did you mean `{meant}`?"]


def test_what_lies_beside_the_policy_is_in_no_stack() -> None:
    recipe = from_dict(
        made(adapters={"sft": {"path": "runs/sft"}, "value": {"r": 4}, **JUDGE}, rewards=LEARNED, reference="sft")
    )
    assert recipe.trained_adapter == "policy" and recipe.extra_adapters == ("value",) and recipe.best_by == "loss"
    stages = [
        {**made(adapters={"low": {"path": "a"}, "value": {"path": "b"}}), "name": "one"},
        {**made(), "name": "two"},
    ]
    assert list(frozen_adapters_of(stages, 1)) == ["low"]


def test_the_preset() -> None:
    recipe = load("tiny-ppo")
    assert recipe.best_by == "exact" and recipe.ppo.value == "adapter" and "value" not in recipe.adapters
    assert load("tiny-ppo", ["ppo.value=trunk", "rollout.num_generations=1"]).rollout.num_generations == 1
    assert load_any("tiny-ppo").algorithm == "ppo"
