"""Recipes: layers, exact problems, unused settings, saving and loading, presets, schema."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import time
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from recipe_helpers import Write, is_setting, problems_of_file

from lowrank_tune.config import (
    Chain,
    DataConfig,
    EvaluationConfig,
    Recipe,
    SourceConfig,
    TrainingConfig,
    differences,
    dump,
    find_preset,
    from_dict,
    load,
    load_any,
    presets,
    schema,
)
from lowrank_tune.config.schema import USED_BY
from lowrank_tune.errors import ConfigError, UserError

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {"algorithm": "sft", "data": {"train": [{"dataset": "rows.jsonl"}]}, "train": {"max_steps": 10}}


def changed(**sections: Any) -> dict[str, Any]:
    """Returns SMALL with some sections changed; None removes a key."""
    data = {**SMALL}
    for key, value in sections.items():
        merged = {**data.get(key, {}), **value} if isinstance(value, dict) else value
        data[key] = (
            {name: each for name, each in merged.items() if each is not None} if isinstance(merged, dict) else merged
        )
    return data


FAULTY = """\
algorithm: sft
base: {model: tiny-tutor, bits: 8}
adapters:
  policy: {rank: 8, lora_alpha: ten}
lr: 1e-4
data:
  train:
    - dataset: rows.jsonl
      max_sample: 0
    - dataset: 7
  max_seq_length: 512
train:
  max_steps: no
  learning_rat: 2e-4
  optim: adam
  logging_steps: 0
  weight_decay: .nan
  gradient_checkpointing: off
  gradient_accumulation_steps: 4
evaluate:
  num_samples: 4
output_dir: out
"""


def test_faulty_recipe_reports_every_problem_at_once(write: Write) -> None:
    assert problems_of_file(
        write(FAULTY), "train.save_total_limit=-1", "train.save_total_limt=2", "data.train.5.max_samples=1", "steps"
    ) == [
        "my.yaml:2: base.bits: expected one of 4, 16, found 8",
        "my.yaml:4: adapters.policy.lora_alpha: expected a number, found 'ten'",
        "my.yaml:4: adapters.policy.rank: unknown key; did you mean `r`?",
        "my.yaml:5: lr: unknown key; did you mean `train.learning_rate`?",
        "my.yaml:9: data.train.0.max_sample: unknown key; did you mean `max_samples`?",
        "my.yaml:10: data.train.1.dataset: expected text, found 7 (put it in quotes)",
        "my.yaml:11: data.max_seq_length: unknown key; did you mean `max_length`?",
        "my.yaml:13: train.max_steps: expected a whole number, found 'no'",
        "my.yaml:14: train.learning_rat: unknown key; did you mean `learning_rate`?",
        "my.yaml:15: train.optim: expected one of adamw, adamw_8bit, paged_adamw, paged_adamw_8bit, found "
        "'adam'; did you mean `adamw`?",
        "my.yaml:16: train.logging_steps: must be at least 1, found 0",
        "my.yaml:17: train.weight_decay: must be a finite number, found nan",
        "my.yaml:18: train.gradient_checkpointing: expected true or false or one of none, all, auto or a whole "
        "number, found 'off' "
        "(write `false`)",
        "my.yaml:19: train.gradient_accumulation_steps: unknown key; it follows from `train.global_batch_size` and "
        "`train.micro_batch_size`",
        "my.yaml:21: evaluate.num_samples: does nothing without `evaluate.eval_dataset`",
        "my.yaml:22: output_dir: unknown key; the run's folder is `runs/NAME`, or given by --out",
        "override: 'steps' is not of the form key=value, as train.max_steps=100",
        "override: data.train.5.max_samples: `data.train` is a list with entries 0 to 1",
        "override: train.save_total_limit: must be at least 1, found -1",
        "override: train.save_total_limt: unknown key; did you mean `save_total_limit`?",
    ]


def test_missing_setting_is_reported_at_the_line_of_its_section(write: Write) -> None:
    assert problems_of_file(write("# a comment\nname: x\ndata:\n  max_length: 64\n")) == [
        "my.yaml:2: algorithm: is missing: one of sft, reward, dpo, kto, ppo, grpo",
        "my.yaml:2: train.max_steps: is missing: give `train.max_steps` or `train.num_train_epochs`",
        "my.yaml:3: data.train: is missing",
    ]


def test_unknown_key_does_not_suggest_itself(write: Write) -> None:
    """`name` and `algorithm` are keys of a recipe; in a source, `name` is the argument of `load_dataset`."""
    file = write(
        "algorithm: sft\ndata:\n  train: [{dataset: a/b, name: main}]\n  algorithm: sft\ntrain: {max_steps: 1}\n"
    )
    named, algorithm = problems_of_file(file)
    assert named == "my.yaml:3: data.train.0.name: unknown key; did you mean `config_name`?"
    assert algorithm.startswith("my.yaml:4: data.algorithm: unknown key") and "did you mean" not in algorithm


def test_problem_of_an_inherited_setting_has_the_line_of_the_parent(write: Write) -> None:
    write(
        "algorithm: sft\ndata:\n  train: [{dataset: builtin:arithmetic}]\n  max_length: 1\ntrain:\n"
        "  num_train_epoch: 1\n",
        "base/above.yaml",
    )
    child = write("extends: base/above.yaml\ntrain:\n  max_steps: 5\n  save_total_limit: many\n")
    assert problems_of_file(child) == [
        "my.yaml:4: train.save_total_limit: expected a whole number, found 'many'",
        "base/above.yaml:4: data.max_length: must be at least 8, found 1",
        "base/above.yaml:6: train.num_train_epoch: unknown key; did you mean `num_train_epochs`?",
    ]


@pytest.mark.parametrize(
    ("extends", "message"),
    [
        ("./my.yaml", "my.yaml:1: extends: goes in a circle: my.yaml -> my.yaml"),
        ("./gone.yaml", "my.yaml:1: extends: gone.yaml: there is no such file"),
        (
            "tiny-sftt",
            "my.yaml:1: extends: no preset is called 'tiny-sftt'; did you mean `tiny-sft` or `tiny-kto` "
            "or `tiny-rlhf`? `lowrank-tune presets` lists them",
        ),
        ("3", "my.yaml:1: extends: expected the name of a preset, or a path relative to this file"),
    ],
)
def test_extends_without_a_readable_recipe_is_a_problem(write: Write, extends: str, message: str) -> None:
    assert message in problems_of_file(
        write(f"extends: {extends}\nalgorithm: sft\ndata: {{train: [{{dataset: builtin:arithmetic}}]}}\n")
    )


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("my", "my.yaml"),
        ("my.yml", "my.yaml"),
        ("mine-7b", "mine-7.yaml"),
        ("tiny-sft.yaml", "tiny-sft"),
        ("tiny-stf", "tiny-sft"),
        ("sub/ny.yaml", ""),
        ("zzz", ""),
    ],
)
def test_unknown_recipe_name_suggests_the_nearest_one(write: Write, name: str, meant: str) -> None:
    """The suggestion is a recipe file of the same folder, or a preset; the message lists at most three names."""
    write("extends: tiny-sft\n")
    write("extends: tiny-sft\n", "mine-7.yaml")
    with pytest.raises(UserError) as failed:
        load_any(name)
    message = str(failed.value)
    found = re.search("did you mean `(.*?)`", message)
    assert (found[1] if found else "") == meant and message.count("`") <= 8
    assert ("`lowrank-tune presets` lists them" in message) == ("no preset is called" in message)
    if name in ("my", "my.yml"):
        assert message.count(" or ") == 0, "only the ending of the name was wrong"


def test_extends_in_a_circle_or_over_many_files_is_a_problem(write: Write) -> None:
    write("extends: ./b.yaml\n", "a.yaml")
    write("extends: ./a.yaml\n", "b.yaml")
    assert "b.yaml:1: extends: goes in a circle: a.yaml -> b.yaml -> a.yaml" in problems_of_file("./a.yaml")
    for index in range(12):
        write(f"extends: ./c{index + 1}.yaml\n", f"c{index}.yaml")
    assert any("goes through more than 8 files" in problem for problem in problems_of_file("./c0.yaml"))


def test_extends_merges_mappings_and_replaces_lists(write: Write) -> None:
    child = write(
        "extends: tiny-sft\ndata:\n  train: [{dataset: a.jsonl}, {dataset: b.jsonl}]\nadapters: {policy: {r: 4}}\n"
    )
    recipe = load(child)
    assert [source.dataset for source in recipe.data.train] == ["a.jsonl", "b.jsonl"]
    assert recipe.adapters["policy"].r == 4 and recipe.adapters["policy"].lora_alpha == 32
    assert recipe.name == "my" and recipe.description == ""


def test_later_layer_replaces_an_exclusive_setting_and_null_removes_one(write: Write) -> None:
    assert load("tiny-sft").train.num_train_epochs is not None
    recipe = load("tiny-sft", ["train.max_steps=10"])
    assert (recipe.train.max_steps, recipe.train.num_train_epochs) == (10, None)
    recipe = load(write("extends: tiny-sft\ntrain: {max_steps: 7, tokens_per_step: 999}\nevaluate: null\n"))
    assert (recipe.train.max_steps, recipe.train.num_train_epochs, recipe.train.global_batch_size) == (7, None, None)
    assert recipe.evaluate == EvaluationConfig()
    assert "override: train.num_train_epochs: contradicts `train.max_steps`: give one of the two" in problems_of_file(
        "tiny-sft", "train.max_steps=1", "train.num_train_epochs=1"
    )


def test_overrides_set_values_of_every_type(write: Write) -> None:
    recipe = load(
        "tiny-sft",
        [
            "train.learning_rate=1e-4",
            "data.train.0.max_samples=200",
            "data.system_prompt=Answer: briefly, #1",
            "adapters.policy.target_modules=[q_proj, 'no']",
            "evaluate.eval_dataset={dataset: builtin:arithmetic, split: train}",
            "train.max_steps=5",
            "name='a-b'",
        ],
    )
    assert recipe.train.learning_rate == 1e-4 and recipe.data.train[0].max_samples == 200
    assert recipe.data.system_prompt == "Answer: briefly, #1"
    assert recipe.adapters["policy"].target_modules == ("q_proj", "no")
    assert recipe.evaluate.eval_dataset is not None and recipe.evaluate.eval_dataset.split == "train"
    assert recipe.name == "a-b"
    assert Recipe.load("tiny-sft", "train.max_steps=5").train.max_steps == 5


@pytest.mark.parametrize(
    "text",
    [
        "train.max_steps=",
        "=5",
        "train..max_steps=5",
        "train.max_steps=[1",
        "train.max_steps=[1, &a 2]",
        "seed.x=1",
        "nothing.at.all=1",
        "data.train.x=1",
        "data.train=[]",
        "train.max_steps='5'",
        "train=5",
        "extends=x",
        "data.system_prompt=\x00",
        "train.max_steps={a: 1}\nb: 2",
        "algorithm=rloo",
        "data.train.99999999999999999999.max_samples=1",
        "train.max_steps=" + "9" * 5000,
        "data.train.-1.max_samples=1",
        "adapters.Bad={}",
        "name=../x",
    ],
)
def test_faulty_override_is_reported_as_override(text: str) -> None:
    assert all(problem.startswith("override: ") for problem in problems_of_file("tiny-sft", text))


CONTRADICTIONS = {
    "steps and epochs": (
        changed(train={"num_train_epochs": 1}),
        "train.num_train_epochs: contradicts `train.max_steps`",
    ),
    "neither": (
        changed(train={"max_steps": None}),
        "train.max_steps: is missing: give `train.max_steps` or `train.num_train_epochs`",
    ),
    "rows and tokens": (
        changed(train={"global_batch_size": 8, "tokens_per_step": 99}),
        "train.tokens_per_step: contradicts",
    ),
    "micro": (
        changed(train={"micro_batch_size": 8, "micro_batch_tokens": 99}),
        "train.micro_batch_tokens: contradicts",
    ),
    "warm-up": (changed(train={"warmup_steps": 10}), "train.warmup_steps: must be smaller than `train.max_steps`, 10"),
    "some weights": (
        changed(data={"train": [{"dataset": "a", "weight": 0.5}, {"dataset": "b"}]}),
        "data.train.1.weight: is missing: give every source a weight, or none",
    ),
    "sum": (
        changed(data={"train": [{"dataset": "a", "weight": 0.5}, {"dataset": "b", "weight": 0.4}]}),
        "data.train.0.weight: the weights of the sources sum to 0.9, and must sum to 1",
    ),
    "one weight": (
        changed(data={"train": [{"dataset": "a", "weight": 1.0}]}),
        "data.train.0.weight: does nothing with a single source",
    ),
    "no prompts": (
        changed(evaluate={"num_samples": 9}),
        "evaluate.num_samples: does nothing without `evaluate.eval_dataset`",
    ),
    "none shown": (
        changed(data={"eval_fraction": 0}, evaluate={"num_completions_to_print": 9}),
        "evaluate.num_completions_to_print: does nothing with neither",
    ),
    "never": (
        changed(data={"eval_fraction": 0}, evaluate={"eval_steps": 9}),
        "evaluate.eval_steps: does nothing with neither",
    ),
    "greedy": (
        changed(evaluate={"eval_dataset": {"dataset": "builtin:arithmetic", "split": "heldout"}, "temperature": 0.7}),
        "evaluate.temperature: does nothing with one sample",
    ),
    "best of none": (
        changed(data={"eval_fraction": 0.0}, train={"load_best_model_at_end": True}),
        "train.load_best_model_at_end: `true` needs validation rows",
    ),
    "two validations": (
        changed(data={"validation": [{"dataset": "v.jsonl"}], "eval_fraction": 0.1}),
        "data.eval_fraction: contradicts `data.validation`",
    ),
    "frozen shape": (
        changed(adapters={"low": {"path": "runs/a", "r": 8}}),
        "adapters.low.r: comes from the file at `path`; leave it out",
    ),
    "frozen dropout": (
        changed(adapters={"low": {"path": "runs/a", "lora_dropout": 0.1}}),
        "adapters.low.lora_dropout: does nothing for a frozen",
    ),
    "continued shape": (
        changed(adapters={"policy": {"path": "runs/a", "lora_alpha": 8}}),
        "adapters.policy.lora_alpha: comes from the file",
    ),
    "no path": (changed(adapters={"low": {}}), "adapters.low.path: is missing: only `policy` is trained"),
    "adapter name": (changed(adapters={"Low.1": {"path": "x"}}), "adapters.Low.1: is not a name for an adapter"),
    "adapter base": (changed(adapters={"base": {"path": "x"}}), "adapters.base: is not a name for an adapter"),
    "revision": (changed(base={"model": "a/b@"}), "base.model: has no revision after the @"),
    "builtin:arithmetic": (
        changed(data={"train": [{"dataset": "builtin:arithmetic", "ground_truth": "boxed"}]}),
        "data.train.0.ground_truth: does nothing for `builtin:arithmetic`",
    ),
    "no such builtin": (
        changed(data={"train": [{"dataset": "builtin:arithmetics"}]}),
        "data.train.0.dataset: there is no 'builtin:arithmetics'; the built-in data sets are builtin:arithmetic and",
    ),
    "builtin split": (
        changed(data={"train": [{"dataset": "builtin:arithmetic", "split": "test"}]}),
        "data.train.0.split: `builtin:arithmetic` has the splits",
    ),
    "file name": (
        changed(data={"train": [{"dataset": "a.csv", "config_name": "x"}]}),
        "data.train.0.config_name: does nothing for a file",
    ),
    "validation weight": (
        changed(data={"validation": [{"dataset": "v", "weight": 1.0}]}),
        "data.validation.0.weight: does nothing here",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradiction_or_unused_setting_is_one_problem(case: str) -> None:
    data, message = CONTRADICTIONS[case]
    with pytest.raises(ConfigError) as caught:
        from_dict(data)
    assert len(caught.value.problems) == 1 and str(caught.value).startswith(message)
    with pytest.raises(ConfigError):
        Recipe(**data)


@pytest.mark.parametrize(
    "data",
    [
        SMALL,
        changed(train={"max_steps": None, "num_train_epochs": 0.5, "warmup_steps": 100}),
        changed(data={"train": [{"dataset": "a", "weight": 1 / 3}, {"dataset": "b", "weight": 2 / 3}]}),
        changed(
            data={"validation": [{"dataset": "v.jsonl"}]},
            train={"load_best_model_at_end": True},
            evaluate={"eval_steps": 2},
        ),
        changed(data={"eval_fraction": 0}),
        changed(adapters={"low": {"path": "runs/a"}, "policy": {"r": 4, "lora_dropout": 0.1}}),
        changed(adapters={"policy": {"path": "runs/a", "lora_dropout": 0.1}}),
        changed(
            evaluate={
                "eval_dataset": {"dataset": "builtin:arithmetic", "split": "heldout"},
                "num_samples": 4,
                "temperature": 0.7,
            }
        ),
        changed(data={"system_prompt": 'Zeile\n  "zwei": - no #\ttab ~ é 世界 \u2028 end '}, description="null"),
        changed(
            data={"train": [{"dataset": "x", "columns": {"question": "no", "answer": "1e5"}}]}, seed=7, name="a.b-c"
        ),
        changed(base={"model": "org/name@v1.0", "bits": 16}),
    ],
)
def test_saved_recipe_loads_as_an_equal_one(data: dict[str, Any], write: Write) -> None:
    recipe = from_dict(data)
    assert isinstance(recipe, Recipe)
    assert from_dict(recipe.to_dict()) == recipe
    loaded = load(write(dump(recipe)))
    assert loaded == recipe
    assert dump(loaded) == dump(recipe)
    assert differences(recipe.to_dict(), loaded.to_dict()) == []


def test_recipe_of_python_objects_is_checked() -> None:
    source = SourceConfig(dataset="builtin:arithmetic")
    recipe = Recipe(algorithm="sft", data=DataConfig(train=(source,)), train=TrainingConfig(max_steps=3))
    assert recipe.train.max_steps == 3
    with pytest.raises(ConfigError, match="train.num_train_epochs: contradicts"):
        Recipe(
            algorithm="sft",
            data=DataConfig(train=(source,)),
            train=TrainingConfig(max_steps=3, num_train_epochs=1),
        )


def test_setting_of_another_algorithm_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(USED_BY, "evaluate", ("dpo",))
    monkeypatch.setitem(USED_BY, "train.length_window", ("dpo", "grpo"))
    with pytest.raises(ConfigError) as caught:
        from_dict(changed(evaluate={"eval_steps": 5}, train={"length_window": 4}))
    assert str(caught.value).splitlines() == [
        "train.length_window: does nothing for sft (it belongs to dpo, grpo)",
        "evaluate: does nothing for sft (it belongs to dpo)",
    ]


@pytest.mark.parametrize("key", list(USED_BY))
def test_keys_of_used_by_are_settings(key: str) -> None:
    assert is_setting(key)


@pytest.mark.parametrize("name", [name for name, _, _ in presets()])
def test_preset_loads_and_has_only_keys_of_the_schema(name: str) -> None:
    recipe = load_any(name)
    assert recipe.name == name == find_preset(name).stem
    assert 10 < len(recipe.description) < 120
    shape = schema()
    for each in recipe.stages if isinstance(recipe, Chain) else (recipe,):
        assert set(each.to_dict()) <= set(shape["properties"])
        for section in ("base", "data", "train", "evaluate"):
            definition = type(getattr(each, section)).__name__
            assert set(each.to_dict()[section]) <= set(shape["$defs"][definition]["properties"])


def test_schema_has_descriptions_and_required_keys() -> None:
    shape = schema()
    assert shape["properties"]["extends"]["type"] == "string"
    assert shape["anyOf"] == [{"required": ["extends"]}, {"required": ["stages"]}, {"required": ["algorithm", "data"]}]
    learning_rate = shape["$defs"]["TrainingConfig"]["properties"]["learning_rate"]
    assert learning_rate["description"].startswith("Peak learning rate; by default 2e-4 for `sft`,")
    assert shape["additionalProperties"] is False


def test_path_or_name_that_does_not_exist_is_a_user_error(write: Write) -> None:
    for name in ("gone.yaml", "tiny-sff", "../tiny-sft", "", ".", "/", "a\x00.yaml", "x" * 5000 + ".yaml"):
        with pytest.raises(UserError) as caught:
            load(name)
        assert "\n" not in str(caught.value)
    Path("folder.yaml").mkdir()
    with pytest.raises(UserError, match=r"folder\.yaml: is a folder"):
        load("folder.yaml")


def test_default_name_of_a_recipe_is_its_file_name(write: Write) -> None:
    assert (
        load(write(dump(from_dict(SMALL)).replace("name: ''\n", "").replace('name: ""\n', ""), "Mein Lauf ü.yaml")).name
        == "Mein-Lauf-"
    )


def test_differences_list_what_a_continued_run_cannot_change() -> None:
    old, new = (
        load("tiny-sft").to_dict(),
        load("tiny-sft", ["train.max_steps=9", "train.save_total_limit=3", "name=other"]).to_dict(),
    )
    assert differences(old, new) == []
    new = load(
        "tiny-sft",
        [
            "train.learning_rate=1e-3",
            "data.train=[{dataset: builtin:arithmetic}, {dataset: a.csv}]",
            "evaluate.eval_steps=5",
        ],
    ).to_dict()
    assert differences(old, new) == [
        "data.train.0.max_samples: was 400, is not set",
        f"train.learning_rate: was {old['train']['learning_rate']}, is 0.001",
        "data.train.1.dataset: was not set, is 'a.csv'",
        "data.train.1.split: was not set, is 'train'",
        "data.train.1.format: was not set, is 'auto'",
        "data.train.1.columns: was not set, is a mapping",
        "data.train.1.ground_truth: was not set, is 'auto'",
        "data.train.1.score_margin_scale: was not set, is 0.0",
    ]


@pytest.mark.parametrize(("name", "place"), [("tiny-sft", ()), ("tiny-rlvr", ("stages", 1))])
def test_new_setting_at_its_default_is_not_a_difference(name: str, place: tuple[Any, ...]) -> None:
    """A run of an older version can continue. With another value than its default, the new setting is a change."""
    whole = load_any(name).to_dict()
    old = copy.deepcopy(whole)
    stage = reduce(lambda data, key: data[key], place, old)
    del stage["base"]["backend"], stage["train"]["max_grad_norm"]
    assert differences(old, whole) == []
    reduce(lambda data, key: data[key], place, whole)["train"]["max_grad_norm"] = 2.0
    [line] = differences(old, whole)
    assert line.endswith("train.max_grad_norm: was 1.0, is 2.0")
    stage["train"]["of_a_later_version"] = 1
    assert any("of_a_later_version: was 1, is not set" in line for line in differences(old, whole))


def test_faulty_recipe_is_reported_without_torch(write: Write) -> None:
    code = (
        "import sys\nfrom lowrank_tune import Recipe, UserError\n"
        f"try:\n    Recipe.load({write(FAULTY)!r})\nexcept UserError as error:\n    print(error)\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    seconds = []
    for _ in range(3):  # the first start may compile bytecode, and others use this machine too
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=True
        )
        seconds.append(time.perf_counter() - start)
    assert "my.yaml:2: base.bits" in done.stdout and done.stdout.endswith("False False\n")
    assert min(seconds) < 10  # torch alone would take most of it; benchmarks/startup.py measures
