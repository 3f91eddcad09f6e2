"""Recipes of PPO: for each check a wrong recipe, its problem, and a similar valid recipe; names of other libraries; the
adapters that are not in the policy's stack."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from recipe_helpers import problems_of

from lowrank_tune.config import Recipe, from_dict, load, load_any
from lowrank_tune.config.adapter_stack import frozen_adapters_of

HELDOUT = {"eval_dataset": {"dataset": "builtin:arithmetic", "split": "heldout"}}
JUDGE = {"reward": {"path": "runs/reward"}}
LEARNED = [{"name": "reward_model"}]


def made(algorithm: str = "ppo", **sections: Any) -> dict[str, Any]:
    """Returns a small valid recipe with other sections."""
    dataset = "builtin:arithmetic" if algorithm in ("sft", "grpo", "ppo") else "builtin:arithmetic-preferences"
    rewards = {"rewards": [{"name": "answer"}]} if algorithm in ("grpo", "ppo") else {}
    return {
        "algorithm": algorithm,
        "data": {"train": [{"dataset": dataset}]},
        "train": {"max_steps": 10},
        **rewards,
        **sections,
    }


RULES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "section": (
        made("grpo", ppo={"cliprange": 0.1}),
        "ppo: does nothing for grpo (it belongs to ppo)",
        made(ppo={"cliprange": 0.1}),
    ),
    "grpo's": (
        made(grpo={"epsilon": 0.1}),
        "grpo: does nothing for ppo (it belongs to grpo)",
        made("grpo", grpo={"epsilon": 0.1}),
    ),
    "rewards": (made(rewards=[]), "rewards: is missing: list the rewards", made()),
    "a reward": (
        made(rewards=[{"name": "format"}]),
        "rewards.0.pattern: is missing",
        made(rewards=[{"name": "format", "pattern": "a"}]),
    ),
    "alone": (
        made("grpo", rollout={"num_generations": 1}),
        "rollout.num_generations: must be at least 2, found 1",
        made(rollout={"num_generations": 1}),
    ),
    "penalty": (
        made(ppo={"truncated_completions": "bootstrap", "missing_eos_penalty": 2.0}),
        "ppo.missing_eos_penalty: does nothing without `ppo.truncated_completions`: penalize",
        made(ppo={"missing_eos_penalty": 2.0}),
    ),
    "gain": (
        made(ppo={"kl_gain": 0.5}),
        "ppo.kl_gain: does nothing without `ppo.kl_target`",
        made(ppo={"kl_gain": 0.5, "kl_target": 0.1}),
    ),
    "nothing to steer": (
        made(ppo={"kl_coef": 0.0, "kl_target": 0.1}),
        "ppo.kl_target: cannot be reached from `ppo.kl_coef`: 0",
        made(ppo={"kl_coef": 0.0}),
    ),
    "weight": (
        made(ppo={"vf_coef": 0.5}),
        "ppo.vf_coef: does nothing with `ppo.critic`: separate",
        made(ppo={"vf_coef": 0.5, "critic": "shared"}),
    ),
    "trunk from": (
        made(ppo={"critic": "shared", "critic_init": "policy"}),
        "ppo.critic_init: does nothing with `ppo.critic`: shared",
        made(ppo={"critic_init": "policy"}),
    ),
    "trunk's adapter": (
        made(ppo={"critic": "shared"}, adapters={"value": {"r": 4}}),
        "adapters.value: does nothing with `ppo.critic`: shared",
        made(adapters={"value": {"r": 4}}),
    ),
    "from where": (
        made(ppo={"critic_init": "policy"}, adapters={"value": {"path": "runs/ppo/final/value"}}),
        "ppo.critic_init: does nothing beside `adapters.value.path`",
        made(adapters={"value": {"path": "runs/ppo/final/value"}}),
    ),
    "no reward model": (
        made(ppo={"critic_init": "reward"}),
        "ppo.critic_init: needs the adapter of a reward model",
        made(ppo={"critic_init": "reward"}, adapters=JUDGE, rewards=LEARNED),
    ),
    "shape of a copy": (
        made(ppo={"critic_init": "reward"}, adapters={**JUDGE, "value": {"r": 4}}, rewards=LEARNED),
        "adapters.value.r: comes from the reward model",
        made(adapters={**JUDGE, "value": {"r": 4}}, rewards=LEARNED),
    ),
    "dropout": (
        made(adapters={"policy": {"lora_dropout": 0.1}}),
        "adapters.policy.lora_dropout: must be 0 with ppo",
        made(adapters={"policy": {"r": 4}}),
    ),
    "value's dropout": (
        made(adapters={"value": {"lora_dropout": 0.1}}),
        "adapters.value.lora_dropout: must be 0",
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
        made(data={"train": [{"dataset": "builtin:arithmetic-preferences"}]}),
        "data.train.0.dataset: contains pairs, and ppo learns from completions",
        made(),
    ),
    "loss decides": (
        made(evaluate={**HELDOUT, "metric_for_best_model": "loss"}),
        "evaluate.metric_for_best_model: `loss` needs validation rows",
        made(evaluate=HELDOUT),
    ),
    "clip": (
        made(ppo={"cliprange": 1.0}),
        "ppo.cliprange: must be smaller than 1.0, found 1.0",
        made(ppo={"cliprange": 0.9}),
    ),
}


@pytest.mark.parametrize("name", list(RULES))
def test_check_refuses_the_wrong_recipe_and_accepts_the_right_one(name: str) -> None:
    wrong, message, right = RULES[name]
    problems = problems_of(copy.deepcopy(wrong))
    assert len(problems) == 1 and problems[0].startswith(message), problems
    recipe = from_dict(copy.deepcopy(right))
    assert from_dict(recipe.to_dict()) == recipe and Recipe.model_validate(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("ppo.value_loss_coef", "vf_coef"),
        ("ppo.clip_range_vf", "cliprange_value"),
        ("ppo.lambd", "lam"),
        ("ppo.target", "kl_target"),
        ("ppo.ppo_epochs", "num_ppo_epochs"),
        ("train.missing_eos_penalty", "ppo.missing_eos_penalty"),
        ("train.batch_size", "prompts_per_step"),
        ("rollout.response_length", "max_new_tokens"),
        ("ppo.ent_coef", "entropy"),
        ("ppo.critic_lr", "value_learning_rate"),
    ],
)
def test_name_of_another_library_suggests_the_setting(key: str, meant: str) -> None:
    section, _, word = key.partition(".")
    data = made()
    data[section] = {**data.get(section, {}), word: 1}
    assert problems_of(data) == [f"{key}: unknown key; did you mean `{meant}`?"]


def test_value_and_reward_adapters_are_in_no_stack() -> None:
    recipe = from_dict(
        made(adapters={"sft": {"path": "runs/sft"}, "value": {"r": 4}, **JUDGE}, rewards=LEARNED, reference="sft")
    )
    assert (
        recipe.trained_adapter == "policy"
        and recipe.extra_adapters == ("value",)
        and recipe.metric_for_best_model == "loss"
    )
    stages = [
        from_dict({**made(adapters={"low": {"path": "a"}, "value": {"path": "b"}}), "name": "one"}),
        from_dict({**made(), "name": "two"}),
    ]
    assert list(frozen_adapters_of(stages, 1)) == ["low"]


def test_tiny_ppo_preset_loads_with_overrides() -> None:
    recipe = load("tiny-ppo")
    assert (
        recipe.metric_for_best_model == "accuracy"
        and recipe.ppo.critic == "separate"
        and "value" not in recipe.adapters
    )
    assert load("tiny-ppo", ["ppo.critic=shared", "rollout.num_generations=1"]).rollout.num_generations == 1
    assert load_any("tiny-ppo").algorithm == "ppo"
