"""What `lowrank-tune plan` prints agrees with itself: the verdict, the total, the exit code, and the settings that it
suggests, which are typed."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from lowrank_tune.cli import app
from lowrank_tune.config import load_any
from lowrank_tune.memory_planner.fit import Search
from lowrank_tune.memory_planner.plan_report import Plan
from lowrank_tune.memory_planner.sizes import Sizes
from lowrank_tune.memory_planner.specs import simulation_specs

WIDE = {"COLUMNS": "400"}
VERDICT = re.compile(r"^(fits|does not fit): ([\d.]+) of ([\d.]+) GiB", re.MULTILINE)
SUMMARY = re.compile(r"worst stage: \S+, [\d.]+ of [\d.]+ GiB, (fits|does not fit)\b")
SUGGESTED = re.compile(r"^(?:fits with|faster:) .*", re.MULTILINE)
SETTING = re.compile(r"[\w.-]+=[\w.-]+")
CASES = [
    ("qwen2.5-7b-sft", 7.2),
    ("qwen2.5-7b-sft", 8),
    ("qwen2.5-3b-dpo", 5),
    ("qwen2.5-7b-grpo", 8),
    ("qwen2.5-3b-preference", 5),
]


def planned(recipe: str, vram: float, *settings: str) -> tuple[bool, list[str]]:
    """Whether the plan fits, and the settings that it suggests. The figures and the exit code agree with it."""
    done = CliRunner().invoke(app, ["plan", recipe, "--vram", str(vram), *settings], env=WIDE)
    stages = VERDICT.findall(done.output)
    assert stages, done.output
    for verdict, total, memory in stages:
        assert (verdict == "fits") == (float(total) <= float(memory)), done.output
    fits = all(verdict == "fits" for verdict, _, _ in stages)
    assert done.exit_code == (0 if fits else 2), done.output
    if len(stages) > 1:
        last_line = done.output.splitlines()[-1]
        summary = SUMMARY.match(last_line)
        assert summary is not None and (summary[1] == "fits") == fits, last_line
    suggestions = [setting for line in SUGGESTED.findall(done.output) for setting in SETTING.findall(line)]
    return fits, suggestions


def test_a_suggested_row_fits_although_another_phase_needs_most_of_it() -> None:
    """Of the recipe's rows the first phase needs most, and of short ones the second."""
    (spec,) = simulation_specs(load_any("tiny-sft", "data.max_length=2048", "train.micro_batch_size=4"), "cuda")
    plan = Plan("", "sft", "a model", 4, "cuda", 2, 2, spec.sizes, (), vram=700)
    search = Search(spec, plan)

    def need(sizes: Sizes, recomputed: int) -> int:
        tokens = sizes.units * sizes.length
        return max(100 + tokens, 550 + tokens // 2)

    search.need = need  # type: ignore[assignment]
    assert search.single_row() == 256


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "vram"), CASES)
def test_a_suggested_setting_gives_a_plan_that_fits(recipe: str, vram: float) -> None:
    fits, suggestions = planned(recipe, vram)
    assert not fits and suggestions
    assert planned(recipe, vram, *suggestions)[0], suggestions
