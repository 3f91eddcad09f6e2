"""The presets: which there are, what they rest on, and that they can be told without the network."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lowrank_tune.cli import app
from lowrank_tune.memory_planner import plan
from lowrank_tune.model import configs
from lowrank_tune.recipe import Chain, Recipe, list_presets, load_any, presets

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
}
"""The split to learn from and the columns of each data set, as its author publishes it."""


def stages_of(name: str) -> tuple[Recipe, ...]:
    loaded = load_any(name)
    return loaded.stages if isinstance(loaded, Chain) else (loaded,)


@pytest.mark.parametrize("name", NAMES)
def test_bases_have_a_shape_and_sources_their_true_columns(name: str) -> None:
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


def test_what_people_look_for_is_there() -> None:
    single = {"sft", "reward", "dpo", "grpo", "ppo"}
    by_base: dict[str, set[str]] = {}
    for name in NAMES:
        base, _, what = name.rpartition("-")
        by_base.setdefault(base, set()).add(what)
    for base in ("tiny", "qwen2.5-3b", "qwen2.5-7b", "llama-3.1-8b"):
        assert by_base[base] == single | {"preference", "rlvr", "rlhf"}
    assert {preset.group for preset in list_presets()} == {
        "Tiny: the base that ships with the package, on any CPU",
        "3B and 4B",
        "7B and 8B",
        "14B",
        "32B",
    }
    assert [(preset.name, preset.description) for preset in sorted(list_presets(), key=lambda each: each.name)] == [
        each[:2] for each in presets()
    ]


def test_the_list_fits_a_narrow_terminal_and_goes_from_small_to_large() -> None:
    result = CliRunner().invoke(app, ["presets"])
    lines = result.output.splitlines()
    assert result.exit_code == 0 and max(map(len, lines)) <= 80 and all(line == line.rstrip() for line in lines)
    assert [line.split()[0] for line in lines if line.startswith("    ")] == NAMES
    sizes = [preset.billions for preset in list_presets()]
    assert sizes == sorted(sizes) and sizes[0] == 0.0 and sizes[-1] == 32.0


def peaks() -> Any:
    spec = importlib.util.spec_from_file_location(
        "preset_peaks", Path(__file__).parent.parent / "benchmarks" / "preset_peaks.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_peak_that_a_preset_states_fits_its_gpu() -> None:
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
def test_the_peak_that_a_preset_states_is_the_planned_one(name: str) -> None:
    (preset,) = (preset for preset in list_presets() if preset.name == name)
    gib, _ = peaks().planned(name)
    if preset.peak_gib is None:
        pytest.skip(f"{gib:.1f} GiB planned, and its file tells none yet: benchmarks/preset_peaks.py --write")
    assert preset.peak_gib == pytest.approx(gib, rel=0.01, abs=0.051)


def test_a_stranger_below_is_planned_like_the_trained_adapter() -> None:
    """`myllm-dpo` stands on a run that nobody has made yet."""
    (found,) = plan(load_any("myllm-dpo", "evaluate={}"), 0.0)
    assert any("nothing lies at runs/myllm-sft yet" in note for note in found.notes)
    (update,) = (phase.bytes for phase in found.phases if phase.name == "update")
    assert update["adapters"] > 1.9 * update["gradients"] > 0, "two adapters, of which one is trained"


def test_a_variant_is_shown_whole() -> None:
    written, whole = (
        CliRunner().invoke(app, ["presets", "show", "qwen3-8b-dpo", *more]).output for more in ((), ("--resolved",))
    )
    assert "extends: qwen2.5-7b-dpo" in written and "beta" not in written
    assert "extends" not in whole and "beta: 0.1" in whole and "model: Qwen/Qwen3-8B" in whole
