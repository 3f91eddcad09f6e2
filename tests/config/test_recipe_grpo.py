"""Recipes of GRPO: for each check a wrong recipe, its problem, and a similar recipe that is valid."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from recipe_helpers import Steps, is_setting, places, problems_of, with_values

from lowrank_tune.config import Recipe, dump, from_dict
from lowrank_tune.config.schema import REPLACEMENTS
from lowrank_tune.config.validate import findings, partial_recipe
from lowrank_tune.errors import ConfigError

HELDOUT = {"eval_dataset": {"dataset": "builtin:arithmetic", "split": "heldout"}}
OWN = {"name": "./mine.py:brief"}
ROWS = "(it belongs to sft, reward, dpo, kto)"
FULL = "training samples the full distribution"


def made(algorithm: str = "grpo", **sections: Any) -> dict[str, Any]:
    """Returns a small valid recipe with other sections; keys of `data` and `train` are added."""
    extra = {key: sections.pop(key, {}) for key in ("data", "train")}
    dataset = "builtin:arithmetic" if algorithm in ("sft", "grpo") else "builtin:arithmetic-preferences"
    data = {
        "algorithm": algorithm,
        "data": {"train": [{"dataset": dataset}], **extra["data"]},
        "train": {"max_steps": 10, **extra["train"]},
    }
    return {**data, **({"rewards": [{"name": "answer"}]} if algorithm == "grpo" else {}), **sections}


def from_file(**source: Any) -> dict[str, Any]:
    return {"train": [{"dataset": "a.jsonl", **source}]}


OURS = "(it belongs to grpo, ppo)"
RULES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "rewards of sft": (made("sft", rewards=[{"name": "answer"}]), f"rewards: does nothing for sft {OURS}", made("sft")),
    "rewards of a reward model": (
        made("reward", rewards=[OWN]),
        f"rewards: does nothing for reward {OURS}; there is `reward`",
        made("reward", reward={"center_rewards_coefficient": 0.1}),
    ),
    "reward section": (
        made(reward={"center_rewards_coefficient": 0.1}),
        "reward: does nothing for grpo (it belongs to reward); there is `rewards`",
        made(),
    ),
    "dpo section": (
        made(dpo={"beta": 0.1}),
        "dpo: does nothing for grpo (it belongs to dpo)",
        made(grpo={"beta": 0.1}),
    ),
    "grpo section": (made("dpo", grpo={}), "grpo: does nothing for dpo (it belongs to grpo)", made(grpo={})),
    "rollout section": (
        made("sft", rollout={"max_num_seqs": 4}),
        f"rollout.max_num_seqs: does nothing for sft {OURS}",
        made(rollout={"max_num_seqs": 4}),
    ),
    "prompts of sft": (
        made("sft", train={"prompts_per_step": 4}),
        f"train.prompts_per_step: does nothing for sft {OURS}; there is `train.global_batch_size`",
        made("sft", train={"global_batch_size": 4}),
    ),
    "prompt length of dpo": (
        made("dpo", data={"max_prompt_length": 99}),
        f"data.max_prompt_length: does nothing for dpo {OURS}; there is `data.max_length`, which limits",
        made("dpo", data={"max_length": 99}),
    ),
    "rows": (
        made(train={"global_batch_size": 4}),
        f"train.global_batch_size: does nothing for grpo {ROWS}; there is `train.prompts_per_step`",
        made(train={"prompts_per_step": 4}),
    ),
    "tokens": (
        made(train={"tokens_per_step": 99}),
        f"train.tokens_per_step: does nothing for grpo {ROWS}",
        made(train={"micro_batch_tokens": 99}),
    ),
    "window": (
        made(train={"length_window": 2}),
        f"train.length_window: does nothing for grpo {ROWS}",
        made(train={"micro_batch_size": 2}),
    ),
    "length": (
        made(data={"max_length": 99}),
        f"data.max_length: does nothing for grpo {ROWS}; there is `data.max_prompt_length` and "
        "`rollout.max_new_tokens`",
        made(data={"max_prompt_length": 99}, rollout={"max_new_tokens": 9}),
    ),
    "too long": (
        made(data={"truncation": "drop"}),
        f"data.truncation: does nothing for grpo {ROWS}",
        made(data={"max_invalid_fraction": 0.5}),
    ),
    "validation": (
        made(data={"validation": [{"dataset": "b.jsonl"}]}),
        f"data.validation: does nothing for grpo {ROWS}; there is `evaluate.eval_dataset`",
        made(evaluate=HELDOUT),
    ),
    "share": (
        made(data={"eval_fraction": 0.5}),
        f"data.eval_fraction: does nothing for grpo {ROWS}",
        made("sft", data={"eval_fraction": 0.5}),
    ),
    "micro": (
        made(train={"micro_batch_size": 2, "micro_batch_tokens": 99}),
        "train.micro_batch_tokens: contradicts `train.micro_batch_size`",
        made(train={"micro_batch_tokens": 99}),
    ),
    "no rewards": (
        {key: value for key, value in made().items() if key != "rewards"},
        "rewards: is missing: list the rewards of completions, as in `rewards: [{name: answer}]`",
        made(),
    ),
    "empty rewards": (made(rewards=[]), "rewards: is missing: list the rewards", made(rewards=[OWN])),
    "no reward": (
        made(rewards=[{"name": "quite"}]),
        "rewards.0.name: is not a reward; there are answer, ",
        made(rewards=[{"name": "length", "target_tokens": 9}]),
    ),
    "nearly a reward": (
        made(rewards=[OWN, {"name": "anser"}]),
        "rewards.1.name: is not a reward; did you mean `answer`?",
        made(rewards=[OWN]),
    ),
    "reward of others": (
        made(rewards=[{"name": "accuracy_reward"}]),
        "rewards.0.name: is not a reward; did you mean `answer`?",
        made(),
    ),
    "file alone": (
        made(rewards=[{"name": "./mine.py"}]),
        "rewards.0.name: is not a function in a file; write it as `./file.py:function`",
        made(rewards=[{"name": "mine.py:f"}]),
    ),
    "no file": (
        made(rewards=[{"name": "mine:f"}]),
        "rewards.0.name: is not a function in a file",
        made(rewards=[{"name": "/a b/mine.py:f"}]),
    ),
    "no function": (
        made(rewards=[{"name": "a.py:1f"}]),
        "rewards.0.name: is not a function in a file",
        made(rewards=[{"name": "a.py:f1"}]),
    ),
    "pattern": (
        made(rewards=[{"name": "answer", "pattern": "."}]),
        "rewards.0.pattern: does nothing for this reward; it belongs to `format`",
        made(rewards=[{"name": "format", "pattern": "."}]),
    ),
    "no answer type": (
        made(rewards=[{"name": "smt"}]),
        "rewards.0.answer_type: is missing: what a completion contains: `statement`, `witness` or",
        made(rewards=[{"name": "smt", "answer_type": "witness"}]),
    ),
    "answer type of another": (
        made(rewards=[{**OWN, "answer_type": "witness"}]),
        "rewards.0.answer_type: does nothing for this reward; it belongs to `smt`",
        made(rewards=[{**OWN, "kind": "shaping"}]),
    ),
    "program": (
        made(rewards=[{**OWN, "program": ["lean"]}]),
        "rewards.0.program: does nothing for this reward; it belongs to `lean`",
        made(rewards=[{"name": "lean", "program": ["lean"]}, {"name": "lean"}]),
    ),
    "no pattern": (made(rewards=[{"name": "format"}]), "rewards.0.pattern: is missing: the regular expression", made()),
    "bad pattern": (
        made(rewards=[{"name": "format", "pattern": "(a"}]),
        "rewards.0.pattern: is not a regular expression of RE2: missing )",
        made(rewards=[{"name": "format", "pattern": r"\(a"}]),
    ),
    "lookaround": (
        made(rewards=[{"name": "regex", "pattern": "(?!b)a"}]),
        "rewards.0.pattern: has lookaround, which the linear-time",
        made(rewards=[{"name": "regex", "pattern": "a(?s)[[]"}]),
    ),
    "endless pattern": (
        made(rewards=[{"name": "format", "pattern": "a{1,9999}"}]),
        "rewards.0.pattern: is not a regular expression of RE2: inv",
        made(rewards=[{"name": "format", "pattern": "a{1,999}"}]),
    ),
    "huge pattern": (
        made(rewards=[{"name": "format", "pattern": r"(\pL{30}){30}"}]),
        "rewards.0.pattern: is not a regular expression of RE2: pattern too large",
        made(),
    ),
    "ngram": (
        made(rewards=[{**OWN, "ngram": 3}]),
        "rewards.0.ngram: does nothing for this reward; it belongs to `repetition`",
        made(rewards=[OWN, {"name": "repetition"}, {"name": "repetition", "ngram": 3}]),
    ),
    "target": (
        made(rewards=[{**OWN, "target_tokens": 9}]),
        "rewards.0.target_tokens: does nothing for this reward; it belongs to `length`",
        made(rewards=[OWN, {"name": "length", "target_tokens": 9}]),
    ),
    "no target": (
        made(rewards=[{"name": "length"}]),
        "rewards.0.target_tokens: is missing: up to how many tokens",
        made(),
    ),
    "endless weight": (
        made(rewards=[{**OWN, "weight": float("inf")}]),
        "rewards.0.weight: must be a finite number",
        made(rewards=[{**OWN, "weight": -1e9}]),
    ),
    "no weight": (
        made(rewards=[{**OWN, "weight": 0}, {"name": "answer", "weight": -0.0}]),
        "rewards.0.weight: the weights of the rewards are all 0",
        made(rewards=[{**OWN, "weight": 0}, {"name": "answer", "weight": -0.5}]),
    ),
    "no golds": (
        made(data=from_file(ground_truth="none")),
        "data.train.0.ground_truth: leaves the reward `answer` without an answer",
        made(data=from_file(ground_truth="none"), rewards=[OWN]),
    ),
    "penalty": (
        made(grpo={"missing_eos_penalty": 2.0}),
        "grpo.missing_eos_penalty: does nothing without `grpo.truncated_completions`: penalize",
        made(grpo={"missing_eos_penalty": 2.0, "truncated_completions": "penalize"}),
    ),
    "penalty of masked": (
        made(grpo={"missing_eos_penalty": 2.0, "truncated_completions": "mask"}),
        "grpo.missing_eos_penalty: does nothing",
        made(grpo={"truncated_completions": "mask"}),
    ),
    "half a pair": (
        made(grpo={"loss_type": "cispo", "epsilon": 0.1}),
        "grpo.epsilon: does nothing for the loss cispo",
        made(grpo={"loss_type": "gspo", "epsilon": 0.1, "epsilon_high": 0.2}),
    ),
    "place of no KL": (
        made(grpo={"beta": 0, "kl_in_reward": False}),
        "grpo.kl_in_reward: does nothing if `grpo.beta` is 0",
        made(grpo={"beta": 1e-9, "kl_in_reward": True}),
    ),
    "estimator of no KL": (
        made(grpo={"beta": 0.0, "kl_estimator": "k2"}),
        "grpo.kl_estimator: does nothing if `grpo.beta` is 0",
        made(grpo={"kl_estimator": "exact", "kl_in_reward": False}),
    ),
    "estimator in the reward": (
        made(grpo={"kl_in_reward": True, "kl_estimator": "k3"}),
        "grpo.kl_estimator: does nothing with `grpo.kl_in_reward`",
        made(grpo={"kl_in_reward": True, "old_logprobs_from": "sampler"}),
    ),
    "share of what stops": (
        made(rewards=[OWN], rollout={"max_reward_failure_rate": 0.1}),
        "rollout.max_reward_failure_rate: does nothing if every",
        made(rewards=[{**OWN, "on_error": "drop"}], rollout={"max_reward_failure_rate": 0.1}),
    ),
    "share of stopping built-in rewards": (
        made(rewards=[{"name": "answer", "on_error": "stop"}, OWN], rollout={"max_reward_failure_rate": 0}),
        "rollout.max_reward_failure_rate: does nothing",
        made(rollout={"max_reward_failure_rate": 0.0}),
    ),
    "no reward model": (
        made(rewards=[{"name": "reward_model"}]),
        "rewards.0.name: needs a reward model: `adapters: {reward:",
        made(rewards=[{"name": "reward_model"}], adapters={"reward": {"path": "runs/r"}}, reference="base"),
    ),
    "idle reward model": (
        made(adapters={"reward": {"path": "runs/r"}}),
        "adapters.reward: does nothing without the reward `reward_model`",
        made(adapters={"sft": {"path": "runs/r"}}),
    ),
    "reward model below": (
        made("sft", adapters={"reward": {"path": "runs/r"}}),
        "adapters.reward: does nothing without",
        made("sft"),
    ),
    "dropout": (
        made(adapters={"policy": {"lora_dropout": 0.1}}),
        "adapters.policy.lora_dropout: must be 0 with grpo",
        made(adapters={"policy": {"r": 2}}),
    ),
    "reference": (
        made(reference="sft"),
        "reference: will be `base`",
        made(reference="sft", adapters={"sft": {"path": "runs/sft"}}),
    ),
    "built-in pairs": (
        made(data={"train": [{"dataset": "builtin:arithmetic-preferences"}]}),
        "data.train.0.dataset: contains pairs, and grpo learns from completions that it draws itself; use builtin:",
        made(),
    ),
    "pairs": (
        made(data=from_file(format="preference")),
        "data.train.0.format: means pairs, and grpo learns from completions that it draws "
        "itself; use the format of single answers",
        made(data=from_file(format="question_answer")),
    ),
    "shown of nothing": (
        made(evaluate={"num_completions_to_print": 2}),
        "evaluate.num_completions_to_print: does nothing without `evaluate.eval_dataset`",
        made(evaluate=HELDOUT),
    ),
    "every of nothing": (
        made(evaluate={"eval_steps": 2}),
        "evaluate.eval_steps: does nothing without",
        made(evaluate={**HELDOUT, "eval_steps": 2}),
    ),
    "best of nothing": (
        made(train={"load_best_model_at_end": True}),
        "train.load_best_model_at_end: `true` needs `evaluate.eval_dataset`, and there are none",
        made(train={"load_best_model_at_end": True}, evaluate=HELDOUT),
    ),
    "best by loss": (
        made(evaluate={**HELDOUT, "metric_for_best_model": "loss"}),
        "evaluate.metric_for_best_model: `loss` needs validation rows, and there are none",
        made("sft", evaluate={**HELDOUT, "metric_for_best_model": "loss"}),
    ),
    "best by no answers": (
        made("sft", evaluate={"metric_for_best_model": "accuracy"}),
        "evaluate.metric_for_best_model: `accuracy` needs questions: `evaluate.eval_dataset`",
        made(
            "sft",
            data={"eval_fraction": 0},
            evaluate={**HELDOUT, "metric_for_best_model": "accuracy"},
            train={"load_best_model_at_end": True},
        ),
    ),
    "best scores": (
        made("reward", evaluate={**HELDOUT, "metric_for_best_model": "accuracy"}),
        "evaluate.metric_for_best_model: `accuracy` needs answers, and a reward model",
        made("reward", evaluate={**HELDOUT, "metric_for_best_model": "loss"}),
    ),
    "group of one": (
        made(rollout={"num_generations": 1}),
        "rollout.num_generations: must be at least 2",
        made(rollout={"num_generations": 2}),
    ),
}

OTHER_WORDS = {
    "num_generations": "`rollout.num_generations`",
    "max_completion_length": "`rollout.max_new_tokens`",
    "beta": "`grpo.beta`",
    "max_prompt_length": "`data.max_prompt_length`",
    "max_length": "`data.max_prompt_length`",
    "epsilon": "`grpo.epsilon`",
    "epsilon_high": "`grpo.epsilon_high`",
    "clip_ratio_low": "`grpo.epsilon`",
    "loss_type": "`grpo.loss_type`",
    "reward_funcs": "`rewards`",
    "reward_weights": "`rewards.0.weight`",
    "mask_truncated_completions": "`grpo.truncated_completions`",
    "num_iterations": "`grpo.num_iterations`",
    "kl_loss_type": "`grpo.kl_estimator`",
    "filter_groups": "`grpo.zero_std_groups`",
    "temperature": "`rollout.temperature`",
    "scale_rewards": "`grpo.loss_type`: dr_grpo",
    "use_vllm": "in this process",
    "vllm_mode": "in this process",
    "vllm_server_port": "in this process",
    "fast_inference": "in this process",
    "top_p": FULL,
    "top_k": FULL,
    "min_p": FULL,
    "repetition_penalty": FULL,
    "generation_kwargs": FULL,
    "ref_model": "there is no second model",
    "steps_per_generation": "`grpo.num_iterations`",
    "disable_dropout": "dropout is off",
}


@pytest.mark.parametrize("case", RULES)
def test_check_refuses_the_wrong_recipe_and_accepts_the_right_one(case: str) -> None:
    wrong, message, right = RULES[case]
    problems = problems_of(wrong)
    assert len(problems) == 1 and problems[0].startswith(message) and len(problems[0]) < 400, problems
    recipe = from_dict(right)
    assert from_dict(recipe.to_dict()) == recipe
    assert not findings(partial_recipe(recipe.to_dict())[0])


@pytest.mark.parametrize(
    "case",
    [case for case, (_, message, _) in RULES.items() if "must be at least" not in message and "finite" not in message],
)
def test_recipe_made_in_python_has_the_problem_of_a_file(case: str) -> None:
    wrong, message, right = RULES[case]
    with pytest.raises(ConfigError) as caught:
        Recipe(**wrong)
    assert len(caught.value.problems) == 1 and str(caught.value).startswith(message)
    assert Recipe(**right) == from_dict(right)


@pytest.mark.parametrize("word", OTHER_WORDS)
def test_name_of_another_library_suggests_the_setting(word: str) -> None:
    for problems in (problems_of({**made(), word: 1}), problems_of(made(train={word: 1}))):
        assert len(problems) == 1 and "unknown key; " in problems[0] and OTHER_WORDS[word] in problems[0], problems


@pytest.mark.parametrize("section", ["grpo", "rollout", "evaluate"])
@pytest.mark.parametrize("word", ["top_p", "top_k", "min_p"])
def test_sampling_cutoff_is_an_unknown_key_with_the_reason(section: str, word: str) -> None:
    assert (
        FULL
        in problems_of(made(evaluate=HELDOUT) | {section: {**(HELDOUT if section == "evaluate" else {}), word: 0.9}})[0]
    )


@pytest.mark.parametrize(
    ("algorithm", "word", "meant"),
    [
        ("sft", "num_generations", "evaluate.num_samples"),
        ("sft", "beta", "dpo.beta"),
        ("dpo", "max_completion_length", "evaluate.max_new_tokens"),
        ("sft", "max_new_tokens", "evaluate.max_new_tokens"),
        ("grpo", "max_new_tokens", "rollout.max_new_tokens"),
        ("sft", "num_iterations", "max_steps"),
        ("dpo", "batch_size", "global_batch_size"),
        ("grpo", "batch_size", "prompts_per_step"),
    ],
)
def test_suggestion_is_a_setting_of_the_algorithm(algorithm: str, word: str, meant: str) -> None:
    assert problems_of(made(algorithm, train={word: 3})) == [f"train.{word}: unknown key; did you mean `{meant}`?"]


def test_suggested_settings_exist() -> None:
    for key in [*(meant.strip("`") for meant in OTHER_WORDS.values() if meant.endswith("`")), *REPLACEMENTS]:
        assert is_setting("rewards" if key.startswith("rewards") else key), key


def test_saved_recipe_has_only_used_settings() -> None:
    recipe = from_dict(
        made(
            rewards=[{"name": "format", "pattern": "(?s)a: .*"}, OWN],
            grpo={"beta": 0, "epsilon": 0.1, "epsilon_high": 0.2},
        )
    )
    saved = recipe.to_dict()
    assert saved["rewards"] == [{"name": "format", "weight": 1.0, "pattern": "(?s)a: .*"}, {**OWN, "weight": 1.0}]
    assert set(saved["grpo"]) == {
        "loss_type",
        "epsilon",
        "epsilon_high",
        "beta",
        "num_iterations",
        "old_logprobs_from",
        "max_logprob_mismatch",
        "truncated_completions",
        "zero_std_groups",
    }
    assert set(saved["data"]) == {"train", "max_prompt_length", "max_invalid_fraction", "chat_template_kwargs"}
    assert not {"reward", "dpo", "validation"} & set(saved) and not {
        "global_batch_size",
        "length_window",
        "load_best_model_at_end",
    } & set(saved["train"])
    assert "(?s)a: .*" in dump(recipe) and from_dict(saved) == recipe


def test_needs_ground_truth_with_the_reward_answer() -> None:
    assert (
        from_dict(made()).needs_ground_truth and from_dict(made(rewards=[OWN, {"name": "answer"}])).needs_ground_truth
    )
    assert not from_dict(made(rewards=[OWN])).needs_ground_truth and not from_dict(made("sft")).needs_ground_truth


def test_saved_recipe_has_only_the_clip_range_of_its_loss() -> None:
    assert {"epsilon", "epsilon_high"} & set(from_dict(made(grpo={"loss_type": "cispo"})).to_dict()["grpo"]) == set()
    assert from_dict(made(grpo={"loss_type": "dapo"})).to_dict()["grpo"]["epsilon"] == 0.2


WHOLE = made(
    rewards=[{"name": "format", "pattern": "a", "weight": 0.5}, {"name": "length", "target_tokens": 5}, OWN],
    rollout={"num_generations": 4, "max_new_tokens": 9, "temperature": 0.9, "max_num_seqs": 3},
    evaluate={**HELDOUT, "metric_for_best_model": "accuracy"},
    grpo={
        "loss_type": "dapo",
        "epsilon": 0.1,
        "epsilon_high": 0.3,
        "beta": 0.1,
        "kl_in_reward": False,
        "kl_estimator": "k2",
        "num_iterations": 2,
        "old_logprobs_from": "sampler",
        "max_logprob_mismatch": 0.2,
        "truncated_completions": "penalize",
        "missing_eos_penalty": 0.5,
        "zero_std_groups": "resample",
    },
    data={"max_prompt_length": 9, "max_invalid_fraction": 0.5},
    train={"prompts_per_step": 3, "load_best_model_at_end": True},
)
BROKEN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["answer", "format", "length", "(", "a.py:f", "cispo", "reward", "grpo", 10**30, "\ud800", "[[\u202e"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=8) | st.sampled_from(["name", "weight"]), inner, max_size=3)
    ),
    max_leaves=4,
)


@limits(max_examples=300)
@given(st.lists(st.tuples(st.sampled_from(places(WHOLE)), BROKEN), max_size=3))
def test_grpo_recipe_with_random_values_loads_or_reports_problems(changes: list[tuple[Steps, Any]]) -> None:
    """The result is a recipe that loads as saved, or a ConfigError, and no other exception."""
    try:
        recipe = from_dict(with_values(WHOLE, changes))
    except ConfigError as error:
        assert changes and all(line.isprintable() and len(line) < 400 for line in str(error).splitlines())
    else:
        assert from_dict(recipe.to_dict()) == recipe
