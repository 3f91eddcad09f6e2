"""Recipes of the reward model and of DPO: for each check a wrong recipe, its problem, and a similar valid recipe."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from recipe_helpers import is_setting, problems_of

from lowrank_tune.config import Recipe, dump, from_dict
from lowrank_tune.config.validate import findings, partial_recipe
from lowrank_tune.errors import ConfigError

LOADED = {"sft": {"path": "runs/sft/final"}}
SECOND = "there is no second model"


def made(algorithm: str, source: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    """Returns a small valid recipe of an algorithm, with other sections."""
    dataset = "builtin:arithmetic" if algorithm == "sft" else "builtin:arithmetic-preferences"
    return {
        "algorithm": algorithm,
        "data": {"train": [source or {"dataset": dataset}]},
        "train": {"max_steps": 10},
        **sections,
    }


def validated(algorithm: str, source: dict[str, Any]) -> dict[str, Any]:
    data = made(algorithm)
    data["data"]["validation"] = [source]
    return data


RULES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "policy under reward": (
        made("reward", adapters={"policy": {"r": 8}}),
        "adapters.policy.path: is missing: only `reward` is trained by reward, every other adapter is loaded; did "
        "you mean `adapters.reward`?",
        made("reward", adapters={"policy": {"path": "runs/sft"}, "reward": {"r": 8}}),
    ),
    "reward under dpo": (
        made("dpo", adapters={"reward": {}}),
        "adapters.reward.path: is missing: only `policy` is trained by dpo",
        made("dpo", adapters=LOADED),
    ),
    "other under reward": (
        made("reward", adapters={"low": {}}),
        "adapters.low.path: is missing: only `reward` is trained by reward",
        made("reward", adapters=LOADED),
    ),
    "shape of a loaded reward": (
        made("reward", adapters={"reward": {"path": "runs/a", "r": 8}}),
        "adapters.reward.r: comes from the file at `path`; leave it out",
        made("reward", adapters={"reward": {"path": "runs/a", "lora_dropout": 0.1}}),
    ),
    "dropout of a frozen policy": (
        made("reward", adapters={"policy": {"path": "runs/a", "lora_dropout": 0.1}}),
        "adapters.policy.lora_dropout: does nothing for a frozen adapter",
        made("reward", adapters={"policy": {"path": "runs/a"}}),
    ),
    "reward section": (
        made("dpo", reward={"center_rewards_coefficient": 0.1}),
        "reward: does nothing for dpo (it belongs to reward)",
        made("reward", reward={"center_rewards_coefficient": 0.1}),
    ),
    "dpo section": (
        made("sft", dpo={"beta": 0.2}),
        "dpo: does nothing for sft (it belongs to dpo)",
        made("dpo", dpo={"beta": 0.2}),
    ),
    "dpo section of a reward": (made("reward", dpo={}), "dpo: does nothing for reward", made("reward")),
    "smoothing": (
        made("dpo", dpo={"loss_type": "ipo", "label_smoothing": 0.2}),
        "dpo.label_smoothing: does nothing for the loss ipo",
        made("dpo", dpo={"loss_type": "robust", "label_smoothing": 0.2}),
    ),
    "smoothing by default": (
        made("dpo", dpo={"label_smoothing": 0.2}),
        "dpo.label_smoothing: does nothing for the loss sigmoid",
        made("dpo"),
    ),
    "unknown loss": (
        made("dpo", dpo={"loss_type": "robst", "label_smoothing": 0.2}),
        "dpo.loss_type: expected one of",
        made("dpo", dpo={"loss_type": "hinge"}),
    ),
    "dropout": (
        made("dpo", adapters={"policy": {"lora_dropout": 0.1}}),
        "adapters.policy.lora_dropout: must be 0 with dpo",
        made("dpo", adapters={"policy": {"lora_dropout": 0.0}}),
    ),
    "dropout, continued": (
        made("dpo", adapters={"policy": {"path": "runs/a", "lora_dropout": 0.1}}),
        "adapters.policy.lora_dropout: must be 0 with dpo",
        made("reward", adapters={"reward": {"lora_dropout": 0.1}}),
    ),
    "reference over a base": (
        made("dpo", reference="sft"),
        "reference: will be `base`, as no adapter is below it",
        made("dpo", reference="base"),
    ),
    "reference over an adapter": (
        made("dpo", reference="base", adapters=LOADED),
        "reference: will be `sft`, the adapter directly below it",
        made("dpo", reference="sft", adapters=LOADED),
    ),
    "reference is the lowest": (
        made("dpo", reference="low", adapters={"low": {"path": "a"}, "policy": {}, "high": {"path": "b"}}),
        "reference: will be `high`",
        made("dpo", reference="high", adapters={"low": {"path": "a"}, "policy": {}, "high": {"path": "b"}}),
    ),
    "reference of sft": (
        made("sft", reference="policy"),
        "reference: will be `base`",
        made("sft", reference="sft", adapters=LOADED),
    ),
    "reference of a reward": (
        made("reward", reference="base"),
        "reference: does nothing for reward (it belongs to sft, dpo, kto, grpo, ppo)",
        made("reward"),
    ),
    "messages for a reward": (
        made("reward", {"dataset": "a.jsonl", "format": "messages"}),
        "data.train.0.format: reward learns from pairs, a chosen and a rejected answer; write `preference`, or leave "
        "it out",
        made("reward", {"dataset": "a.jsonl", "format": "preference"}),
    ),
    "alpaca for validation": (
        validated("dpo", {"dataset": "a.jsonl", "format": "alpaca"}),
        "data.validation.0.format: dpo learns from pairs",
        validated("dpo", {"dataset": "a.jsonl", "format": "auto"}),
    ),
    "pairs for sft": (
        made("sft", {"dataset": "a.jsonl", "format": "preference"}),
        "data.train.0.format: means pairs, and sft learns from single answers; train with dpo or reward, or use the "
        "chosen answers",
        made("sft", {"dataset": "a.jsonl", "format": "prompt_completion", "columns": {"completion": "chosen"}}),
    ),
    "problems for dpo": (
        made("dpo", {"dataset": "builtin:arithmetic"}),
        "data.train.0.dataset: contains single answers, and dpo learns from pairs; use builtin:arithmetic-preferences",
        made("dpo", {"dataset": "builtin:arithmetic-preferences", "split": "heldout", "max_samples": 9}),
    ),
    "problems to validate a reward": (
        validated("reward", {"dataset": "builtin:arithmetic"}),
        "data.validation.0.dataset: contains single answers",
        validated("reward", {"dataset": "builtin:arithmetic-preferences", "split": "heldout"}),
    ),
    "built-in pairs for sft": (
        made("sft", {"dataset": "builtin:arithmetic-preferences"}),
        "data.train.0.dataset: contains pairs, and sft learns from single answers; use builtin:arithmetic",
        made("sft"),
    ),
    "built-in pairs held out": (
        made("dpo", evaluate={"eval_dataset": {"dataset": "builtin:arithmetic-preferences"}}),
        "evaluate.eval_dataset.dataset: contains pairs, and held-out prompts have one gold answer; use builtin:",
        made("dpo", evaluate={"eval_dataset": {"dataset": "builtin:arithmetic", "split": "heldout"}}),
    ),
    "pairs held out": (
        made("reward", evaluate={"eval_dataset": {"dataset": "a.jsonl", "format": "preference"}}),
        "evaluate.eval_dataset.format: means pairs",
        made("reward", evaluate={"eval_dataset": {"dataset": "a.jsonl", "format": "question_answer"}}),
    ),
    "split of the pairs": (
        made("dpo", {"dataset": "builtin:arithmetic-preferences", "split": "test"}),
        "data.train.0.split: `builtin:arithmetic-preferences` has the splits train and heldout",
        made("dpo", {"dataset": "org/pairs", "split": "test"}),
    ),
    "split to validate": (
        validated("sft", {"dataset": "builtin:arithmetic", "split": "test"}),
        "data.validation.0.split: `builtin:arithmetic` has the splits train and heldout",
        validated("sft", {"dataset": "builtin:arithmetic", "split": "heldout"}),
    ),
    **{
        f"{key} of the pairs": (
            made("dpo", {"dataset": "builtin:arithmetic-preferences", key: value}),
            f"data.train.0.{key}: does nothing for `builtin:arithmetic-preferences`, the built-in pairs",
            made("dpo", {"dataset": "org/pairs", key: value}),
        )
        for key, value in {
            "config_name": "main",
            "format": "preference",
            "columns": {"chosen": "a"},
            "ground_truth": "boxed",
        }.items()
    },
    **{
        f"{algorithm}: its loop": (
            made(algorithm, train={"max_steps": 5, "length_window": 0}),
            "train.length_window: must be at least 1",
            made(
                algorithm, train={"max_steps": 5, "length_window": 4, "tokens_per_step": 999, "micro_batch_tokens": 99}
            ),
        )
        for algorithm in ("sft", "reward", "dpo")
    },
}

OTHER_WORDS = {
    "beta": "did you mean `dpo.beta`?",
    "loss_type": "did you mean `dpo.loss_type`?",
    "rpo_alpha": "did you mean `dpo.sft_coef`?",
    "label_smoothing": "did you mean `dpo.label_smoothing`?",
    "center_rewards_coefficient": "did you mean `reward.center_rewards_coefficient`?",
    "truncation_mode": "did you mean `data.truncation`?",
    "ref_model": SECOND,
    "reference_model": SECOND,
    "ref_adapter_name": SECOND,
    "precompute_ref_log_probs": "always computed once",
    "max_prompt_length": "`data.max_length` limits a prompt and its answer together",
    "margin": "in a column `margin`",
    "disable_dropout": "dropout is off wherever log-probs are compared",
}


@pytest.mark.parametrize("case", RULES)
def test_check_refuses_the_wrong_recipe_and_accepts_the_right_one(case: str) -> None:
    wrong, message, right = RULES[case]
    problems = problems_of(wrong)
    assert len(problems) == 1 and problems[0].startswith(message), problems
    recipe = from_dict(right)
    assert from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    "case",
    [
        case
        for case, (_, message, _) in RULES.items()
        if "must be at least" not in message and "expected" not in message
    ],
)
def test_recipe_made_in_python_has_the_problem_of_a_file(case: str) -> None:
    wrong, message, right = RULES[case]
    with pytest.raises(ConfigError) as caught:
        Recipe(**wrong)
    assert str(caught.value).startswith(message)
    assert Recipe(**right) == from_dict(right)


@pytest.mark.parametrize("word", OTHER_WORDS)
def test_name_of_another_library_suggests_the_setting(word: str) -> None:
    for problems in (problems_of({**made("dpo"), word: 1}), problems_of(made("dpo", train={"max_steps": 10, word: 1}))):
        assert len(problems) == 1 and "unknown key; " in problems[0] and OTHER_WORDS[word] in problems[0], problems


@pytest.mark.parametrize("meant", [path for path in OTHER_WORDS.values() if path.startswith("did")])
def test_suggested_settings_exist(meant: str) -> None:
    assert is_setting(meant.split("`")[1])


@pytest.mark.parametrize("algorithm", ["sft", "reward", "dpo"])
def test_saved_recipe_has_only_used_settings(algorithm: str) -> None:
    recipe = from_dict(made(algorithm))
    saved = recipe.to_dict()
    assert {"reward", "dpo"} & set(saved) == ({algorithm} - {"sft"})
    assert list(saved["adapters"]) == [recipe.trained_adapter] == ["reward" if algorithm == "reward" else "policy"]
    assert "label_smoothing" not in saved.get("dpo", {}) and "label_smoothing" not in dump(recipe)
    assert not findings(partial_recipe(saved)[0])


def test_saved_recipe_has_the_label_smoothing_of_the_robust_loss() -> None:
    recipe = from_dict(made("dpo", dpo={"loss_type": "robust", "label_smoothing": 0.3}))
    assert recipe.to_dict()["dpo"]["label_smoothing"] == 0.3
    assert from_dict(recipe.to_dict()).dpo.label_smoothing == 0.3


@pytest.mark.parametrize("algorithm", [[], {}, None, 7, "rloo", "\ud800"])
@pytest.mark.parametrize("place", ["adapters", "reference", "reward", "dpo", "evaluate"])
def test_invalid_algorithm_is_reported_beside_other_invalid_values(algorithm: Any, place: str) -> None:
    """An invalid algorithm is reported, and no check raises another exception."""
    data = copy.deepcopy(
        made("dpo", **{place: {"eval_dataset": [7], "policy": {"lora_dropout": "x"}, "label_smoothing": None}})
    )
    data["algorithm"] = algorithm
    assert any(problem.startswith("algorithm: ") for problem in problems_of(data))
