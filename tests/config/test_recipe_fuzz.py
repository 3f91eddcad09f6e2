"""A valid recipe with invalid values: the result is a recipe or a ConfigError, and no other exception."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_helpers import Steps, places, section_at, with_values

from lowrank_tune.config import Recipe, dump, from_dict, load
from lowrank_tune.errors import ConfigError, UserError

FULL: dict[str, Any] = {
    "name": "full",
    "description": "every setting that can stand together",
    "algorithm": "sft",
    "seed": 1,
    "base": {"model": "org/model@main", "bits": 16, "trust_remote_code": False},
    "adapters": {
        "low": {"path": "runs/low"},
        "policy": {
            "r": 8,
            "lora_alpha": 16.0,
            "lora_dropout": 0.1,
            "target_modules": ["q_proj", "v_proj"],
            "use_rslora": True,
        },
    },
    "data": {
        "train": [
            {
                "dataset": "a/b",
                "config_name": "main",
                "split": "train",
                "format": "alpaca",
                "columns": {"instruction": "x"},
                "max_samples": 9,
                "weight": 0.25,
            },
            {"dataset": "b.jsonl", "ground_truth": "boxed", "weight": 0.75},
        ],
        "validation": [{"dataset": "c.csv"}],
        "system_prompt": "Be brief.",
        "max_length": 64,
        "truncation": "truncate",
        "max_invalid_fraction": 0.5,
    },
    "rollout": {"sync_every": 4, "cuda_graphs": False, "prefix_caching": True},
    "train": {
        "max_steps": 50,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "length_window": 4,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "linear",
        "warmup_steps": 3,
        "optim": "adamw",
        "weight_decay": 0.01,
        "adam_beta1": 0.8,
        "adam_beta2": 0.99,
        "max_grad_norm": 0.5,
        "gradient_checkpointing": False,
        "max_nonfinite_steps": 2,
        "logging_steps": 2,
        "save_steps": 5,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
    },
    "evaluate": {
        "eval_steps": 10,
        "eval_dataset": {"dataset": "builtin:arithmetic", "split": "heldout"},
        "num_prompts": 5,
        "num_samples": 2,
        "temperature": 0.7,
        "max_new_tokens": 9,
        "num_completions_to_print": 1,
    },
}

BROKEN = {
    "null": None,
    "wrong type": [],
    "mapping": {},
    "text": "ten",
    "number": 7,
    "truth": True,
    "negative": -1,
    "huge": 10**30,
    "endless": 10**5000,
    "tiny": 1e-320,
    "nan": float("nan"),
    "infinite": float("inf"),
    "unicode": "\u202e\ud800\x00é",
    "empty": "",
    "bytes": b"x",
    "object": object(),
    "nested": {"a": {"b": [None, {}]}},
    "list": [1, "a", None],
    "keys": {1: 2, None: 3},
    "set": {1},
}


PATHS = places(FULL)


def check_recipe_or_problems(data: Any) -> None:
    """Fails unless the data is a recipe that can be saved and loaded, or raises printable problems."""
    try:
        recipe = from_dict(data)
    except ConfigError as error:
        lines = str(error).splitlines()
        assert len(lines) == len(error.problems) and all(line.isprintable() and len(line) < 400 for line in lines)
    else:
        assert from_dict(recipe.to_dict()) == recipe
        dump(recipe)


def test_full_recipe_is_valid() -> None:
    assert set(from_dict(FULL).to_dict()) == set(FULL)


@pytest.mark.parametrize("kind", [*BROKEN, "missing", "unknown key"])
def test_recipe_with_one_wrong_value_loads_or_reports_problems(kind: str) -> None:
    for path in PATHS:
        data = copy.deepcopy(FULL)
        section = section_at(data, path)
        if kind == "missing":
            del section[path[-1]]
        elif kind != "unknown key":
            section[path[-1]] = BROKEN[kind]
        elif isinstance(section, dict):
            section[f"{path[-1]}_x"] = section.pop(path[-1])
        check_recipe_or_problems(data)


@pytest.mark.parametrize("path", [path for path in PATHS if isinstance(path[-1], str)], ids=str)
def test_key_written_twice_is_a_problem(path: Steps, tmp_path: Path) -> None:
    """The key is added under another name, which is then replaced by the key itself."""
    data = copy.deepcopy(FULL)
    section = section_at(data, path)
    section["zzz_again"] = section[path[-1]]
    file = tmp_path / "twice.yaml"
    file.write_text(yaml.safe_dump(data, sort_keys=False).replace("zzz_again:", f"{path[-1]}:"))
    with pytest.raises(ConfigError, match=rf"{path[-1]}: is written twice"):
        load(str(file))


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([value for kind, value in BROKEN.items() if kind != "endless"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(PATHS), values), min_size=1, max_size=4))
def test_recipe_with_random_values_loads_or_reports_problems(changes: list[tuple[Steps, Any]]) -> None:
    check_recipe_or_problems(with_values(FULL, changes))


@settings(max_examples=150)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(PATHS), values).map(lambda pair: f"{'.'.join(map(str, pair[0]))}={pair[1]}"),
            st.text(max_size=30),
        ),
        max_size=3,
    )
)
def test_random_overrides_load_or_report_problems(overrides: list[str]) -> None:
    try:
        assert isinstance(load("tiny-sft", overrides), Recipe)
    except ConfigError as error:
        assert all(problem.file for problem in error.problems)


@settings(max_examples=150)
@given(st.binary(max_size=200) | st.text(alphabet="a:-[]{}&*!|>'\"%@`#,? \n\t0e.~<=\\x", max_size=80).map(str.encode))
def test_random_bytes_are_a_user_error(raw: bytes) -> None:
    file = Path(fuzz_folder.name) / "any.yaml"
    file.write_bytes(raw)
    with pytest.raises(UserError):
        load(str(file))


@settings(max_examples=60)
@given(st.text(max_size=40), st.integers(0, 2**32 - 1), st.floats(1e-300, 1e300), st.text(max_size=20))
def test_random_texts_and_numbers_load_as_saved(description: str, seed: int, rate: float, system: str) -> None:
    data = {**FULL, "description": description, "seed": seed}
    data["train"] = {**FULL["train"], "learning_rate": rate}
    data["data"] = {**FULL["data"], "system_prompt": system}
    try:
        recipe = from_dict(data)
    except ConfigError:
        return
    file = Path(fuzz_folder.name) / "replay.yaml"
    file.write_text(dump(recipe))
    assert load(str(file)) == recipe


@pytest.fixture(scope="module", autouse=True)
def _folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    fuzz_folder.name = str(tmp_path_factory.mktemp("fuzz"))


# hypothesis does not support fixtures of single functions
class fuzz_folder:
    name = ""
