"""The presets: their names, their values, and the pages about them; without the network."""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lowrank_tune.cli import app
from lowrank_tune.config import Chain, Recipe, list_presets, load_any, presets
from lowrank_tune.config.schema import DEFAULT_LEARNING_RATES
from lowrank_tune.memory_planner import plan
from lowrank_tune.model import configs

ROOT = Path(__file__).parents[2]
NAMES = [preset.name for preset in list_presets()]
HUB = {
    "AI-MO/NuminaMath-CoT": ("train", ("source", "problem", "solution", "messages")),
    "nvidia/OpenMathInstruct-2": ("train_1M", ("problem", "generated_solution", "expected_answer", "problem_source")),
    "HuggingFaceH4/ultrachat_200k": ("train_sft", ("prompt", "prompt_id", "messages")),
    "microsoft/orca-math-word-problems-200k": ("train", ("question", "answer")),
    "meta-math/MetaMathQA": ("train", ("type", "query", "original_question", "response")),
    "HuggingFaceH4/ultrafeedback_binarized": (
        "train_prefs",
        ("prompt", "prompt_id", "chosen", "rejected", "messages", "score_chosen", "score_rejected"),
    ),
    "openai/gsm8k": ("train", ("question", "answer")),
    "roneneldan/TinyStories": ("train", ("text",)),
}
"""The training split and the columns of each data set, as its author publishes them."""


def stages_of(name: str) -> tuple[Recipe, ...]:
    loaded = load_any(name)
    return loaded.stages if isinstance(loaded, Chain) else (loaded,)


@pytest.mark.parametrize("name", NAMES)
def test_preset_has_a_known_base_and_columns_of_its_data_sets(name: str) -> None:
    for stage in stages_of(name):
        assert stage.base.model == "tiny-tutor" or configs.file_of(stage.base.model) is not None, (
            "its config.json is not in the package"
        )
        for source in (*stage.data.train, *stage.data.validation):
            if source.dataset.startswith("builtin:arithmetic"):
                continue
            split, columns = HUB[source.dataset]
            assert source.split == split and set(source.columns.values()) <= set(columns)
        assert len({stage.base.model for stage in stages_of(name)}) == 1, "a chain has one base"


def test_presets_cover_every_algorithm_of_the_main_bases() -> None:
    single = {"sft", "reward", "dpo", "kto", "grpo", "ppo"}
    by_base: dict[str, set[str]] = {}
    for name in NAMES:
        base, _, what = name.rpartition("-")
        by_base.setdefault(base, set()).add(what)
    for base in ("tiny", "qwen2.5-3b", "qwen2.5-7b", "llama-3.1-8b"):
        assert by_base[base] == single | {"preference", "rlvr", "rlhf"}
    assert {preset.group for preset in list_presets()} == {
        "Tiny: the base that ships with the package, on any CPU",
        "3B and 4B",
        "7B to 9B",
        "14B",
        "32B",
    }
    assert [(preset.name, preset.description) for preset in sorted(list_presets(), key=lambda each: each.name)] == [
        each[:2] for each in presets()
    ]


def test_preset_list_fits_80_columns_and_is_sorted_by_size() -> None:
    result = CliRunner().invoke(app, ["presets"])
    lines = result.output.splitlines()
    assert result.exit_code == 0 and max(map(len, lines)) <= 80 and all(line == line.rstrip() for line in lines)
    assert [line.split()[0] for line in lines if line.startswith("    ")] == NAMES
    sizes = [preset.billions for preset in list_presets()]
    assert sizes == sorted(sizes) and sizes[0] == 0.0 and sizes[-1] == 32.0


def load_script(path: str) -> Any:
    """Returns the module of a file that is in no package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def peaks() -> Any:
    return load_script("benchmarks/preset_peaks.py")


def test_stated_peak_fits_24_gib() -> None:
    presets = [preset for preset in list_presets() if preset.peak_gib is not None]
    assert len(presets) > 20 and all(preset.billions * 0.5 < (preset.peak_gib or 0.0) < 23.0 for preset in presets)


@pytest.mark.parametrize(
    "name",
    [
        name if name == "qwen2.5-3b-sft" else pytest.param(name, marks=pytest.mark.slow)
        for name in NAMES
        if not name.startswith("tiny-")
    ],
)
def test_stated_peak_equals_the_planned_one(name: str) -> None:
    (preset,) = (preset for preset in list_presets() if preset.name == name)
    gib, _ = peaks().planned(name)
    if preset.peak_gib is None:
        pytest.skip(f"{gib:.1f} GiB planned, and its file states none yet: benchmarks/preset_peaks.py --write")
    assert preset.peak_gib == pytest.approx(gib, rel=0.01, abs=0.051)


@pytest.mark.slow
def test_missing_frozen_adapter_is_planned_like_the_trained_one() -> None:
    """`myllm-dpo` is on top of a run that does not exist yet."""
    (found,) = plan(load_any("myllm-dpo", "evaluate={}"), 0.0)
    assert any("runs/myllm-sft does not exist yet" in note for note in found.notes)
    (update,) = (phase.bytes for phase in found.phases if phase.name == "update")
    # The trained one in fp32, the frozen one in bf16.
    assert 1.45 * update["gradients"] < update["adapters"] < 1.55 * update["gradients"]


def test_presets_show_resolved_prints_inherited_settings() -> None:
    written, whole = (
        CliRunner().invoke(app, ["presets", "show", "qwen3-8b-dpo", *more]).output for more in ((), ("--resolved",))
    )
    assert "extends: qwen2.5-7b-dpo" in written and "beta" not in written
    assert "extends" not in whole and "beta: 0.1" in whole and "model: Qwen/Qwen3-8B" in whole


def test_the_page_lists_every_preset() -> None:
    page = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in page for name in NAMES)


def choices() -> list[list[str]]:
    """Returns the rows of the table of values in docs/preset-choices.md."""
    text = (ROOT / "docs" / "preset-choices.md").read_text(encoding="utf-8")
    section = text[text.index("## The values") : text.index("## All algorithms")]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def chosen_row(stage: Recipe) -> list[str]:
    """Returns the settings of a stage in the format of the table."""
    train, adapter = stage.train, stage.adapters[stage.trained_adapter]
    online = stage.algorithm in ("grpo", "ppo")
    other = {
        "sft": [],
        "reward": [("center_rewards_coefficient", stage.reward.center_rewards_coefficient)],
        "dpo": [("beta", stage.dpo.beta), ("sft_coef", stage.dpo.sft_coef or None)],
        "kto": [("beta", stage.kto.beta)],
        "grpo": [("beta", stage.grpo.beta)],
        "ppo": [
            ("kl_coef", stage.ppo.kl_coef),
            ("kl_target", stage.ppo.kl_target),
            ("value_learning_rate", stage.ppo.value_learning_rate),
            ("num_ppo_epochs", stage.ppo.num_ppo_epochs),
            ("target_kl", stage.ppo.target_kl),
        ],
    }[stage.algorithm]
    return [
        str(adapter.r),
        f"{adapter.lora_alpha:g}",
        short(train.learning_rate),
        f"{train.prompts_per_step} x {stage.rollout.num_generations}" if online else str(train.global_batch_size),
        f"{train.max_steps} steps"
        if online
        else f"{train.num_train_epochs:g} epoch{'s' * (train.num_train_epochs != 1)}",
        str(train.warmup_steps),
        ", ".join(f"`{name}` {short(value)}" for name, value in other if value is not None),
    ]


def short(number: float) -> str:
    """Returns 5e-06 as 5e-6; a number below 0.01 always has an exponent."""
    text = f"{number:.0e}" if number < 0.01 else f"{number:g}"
    return text.replace("e-0", "e-")


@pytest.mark.parametrize("name", NAMES)
def test_preset_has_the_values_of_the_page(name: str) -> None:
    for stage in stages_of(name):
        rows = [row for row in choices() if row[0] == stage.algorithm and fnmatch.fnmatch(name, row[1])]
        written = [*rows[-1][2:8], rows[-1][8]]
        assert [cell.replace("`", "") for cell in written] == [cell.replace("`", "") for cell in chosen_row(stage)]


def test_every_row_of_the_page_belongs_to_a_preset() -> None:
    used = set()
    for name in NAMES:
        for stage in stages_of(name):
            rows = [n for n, row in enumerate(choices()) if row[0] == stage.algorithm and fnmatch.fnmatch(name, row[1])]
            used.add(rows[-1])
    assert used == set(range(len(choices())))


@pytest.mark.parametrize("algorithm", sorted(DEFAULT_LEARNING_RATES))
def test_default_learning_rate_equals_that_of_the_presets(algorithm: str) -> None:
    online, pairs = algorithm in ("grpo", "ppo"), algorithm in ("reward", "dpo", "kto")
    dataset = "builtin:arithmetic-preferences" if pairs else "builtin:arithmetic"
    recipe: dict[str, Any] = {
        "algorithm": algorithm,
        "data": {"train": [{"dataset": dataset}]},
        "train": {"max_steps": 1},
        **({"rewards": [{"name": "answer"}]} if online else {}),
    }
    found = Recipe.from_dict(recipe).train.learning_rate
    (preset,) = stages_of(f"qwen2.5-7b-{algorithm}")
    assert found == DEFAULT_LEARNING_RATES[algorithm] == preset.train.learning_rate
    given = Recipe.from_dict({**recipe, "train": {"max_steps": 1, "learning_rate": 0.5}})
    assert given.train.learning_rate == 0.5 and Recipe.from_dict(given.to_dict()) == given


@pytest.mark.slow
def test_preset_sweep_runs(tmp_path: Path) -> None:
    file = tmp_path / "sweep.jsonl"
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "preset_sweep.py"), "--tiny", "--json", str(file), "sft", "dpo"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cells = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(cell["algorithm"], cell["steps"]) for cell in cells] == [("sft", 2)] * 12 + [("dpo", 2)] * 4
    first = {cell["r"]: cell["after"] for cell in cells if cell["learning_rate"] == 2e-4}
    assert max(first.values()) - min(first.values()) < 0.01, (
        "with a fixed alpha the first steps hardly depend on the rank"
    )
    assert "| r 64 |" in done.stdout and "| learning rate | exact answers: SFT | after dpo |" in done.stdout
