"""The presets: which there are, what they rest on, and that they can be told without the network."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from lowrank_tune.cli import app
from lowrank_tune.model import shapes
from lowrank_tune.recipe import Chain, Recipe, load_any, presets, shelf

NAMES = [preset.name for preset in shelf()]
HUB = {
    "AI-MO/NuminaMath-CoT": ("train", ("source", "problem", "solution", "messages")),
    "nvidia/OpenMathInstruct-2": ("train_1M", ("problem", "generated_solution", "expected_answer", "problem_source")),
    "HuggingFaceH4/ultrachat_200k": ("train_sft", ("prompt", "prompt_id", "messages")),
    "microsoft/orca-math-word-problems-200k": ("train", ("question", "answer")),
    "meta-math/MetaMathQA": ("train", ("type", "query", "original_question", "response")),
    "HuggingFaceH4/ultrafeedback_binarized": (
        "train_prefs", ("prompt", "prompt_id", "chosen", "rejected", "messages", "score_chosen", "score_rejected")),
    "openai/gsm8k": ("train", ("question", "answer")),
}  # fmt: skip
"""The split to learn from and the columns of each data set, as its author publishes it."""


def stages_of(name: str) -> tuple[Recipe, ...]:
    loaded = load_any(name)
    return loaded.stages if isinstance(loaded, Chain) else (loaded,)


@pytest.mark.parametrize("name", NAMES)
def test_bases_have_a_shape_and_sources_their_true_columns(name: str) -> None:
    for stage in stages_of(name):
        assert stage.base.model == "tiny-tutor" or shapes.file_of(stage.base.model) is not None, "its config.json is not in the package"
        for source in (*stage.data.train, *stage.data.validation):
            if source.dataset.startswith("tutor"):
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
    assert {preset.group for preset in shelf()} == {
        "Tiny: the base that ships with the package, on any CPU", "3B and 4B", "7B and 8B", "14B", "32B"}  # fmt: skip
    assert [(preset.name, preset.description) for preset in sorted(shelf(), key=lambda each: each.name)] == [each[:2] for each in presets()]


def test_the_list_fits_a_narrow_terminal_and_goes_from_small_to_large() -> None:
    told = CliRunner().invoke(app, ["presets"])
    lines = told.output.splitlines()
    assert told.exit_code == 0 and max(map(len, lines)) <= 80 and all(line == line.rstrip() for line in lines)
    assert [line.split()[0] for line in lines if line.startswith("    ")] == NAMES
    sizes = [preset.billions for preset in shelf()]
    assert sizes == sorted(sizes) and sizes[0] == 0.0 and sizes[-1] == 32.0


def test_a_variant_is_shown_whole() -> None:
    written, whole = (CliRunner().invoke(app, ["presets", "show", "qwen3-8b-dpo", *more]).output for more in ((), ("--whole",)))
    assert "extends: qwen2.5-7b-dpo" in written and "beta" not in written
    assert "extends" not in whole and "beta: 0.1" in whole and "model: Qwen/Qwen3-8B" in whole
