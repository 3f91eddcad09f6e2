"""Something else where a run writes is found before the first step, not after the last one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from crash import small_recipe
from run_summaries import DONE_SUMMARY

from lowrank_tune import Recipe
from lowrank_tune.config import Chain, RecipeConfig
from lowrank_tune.errors import ConfigError
from lowrank_tune.events import ignore_event
from lowrank_tune.preflight import check_before_loading

STAGES = {
    "name": "both",
    "base": {"model": "tiny-tutor"},
    "train": {"max_steps": 2},
    "stages": [
        {"name": "one", "algorithm": "sft", "data": {"train": [{"dataset": "builtin:arithmetic"}]}},
        {"name": "two", "algorithm": "sft", "data": {"train": [{"dataset": "builtin:arithmetic"}]}},
    ],
}


def faults(loaded: RecipeConfig | Chain, folder: Path) -> list[str]:
    try:
        check_before_loading(loaded, folder, frozenset(), None, ignore_event)
    except ConfigError as error:
        return [problem.message for problem in error.problems]
    return []


def add_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine", encoding="utf-8")


def add_folder(path: Path) -> None:
    add_file(path / "notes.txt")


def add_link(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to("nowhere/at/all")


@pytest.mark.parametrize(
    ("name", "add", "words"),
    [
        ("final", add_file, "is not a folder"),
        ("final", add_link, "is not a folder"),
        ("final", add_folder, "did not write (notes.txt)"),
        ("checkpoints", add_file, "is not a folder"),
        ("summary.json", add_folder, "is not a file"),
        ("report.html", add_folder, "is not a file"),
        ("scores.json", add_folder, "is not a file"),
        ("data.json", add_link, "is not a file"),
    ],
)
def test_an_output_that_cannot_be_replaced_is_found(
    tmp_path: Path, name: str, add: Callable[[Path], None], words: str
) -> None:
    recipe = Recipe.from_dict(small_recipe())
    add_file(tmp_path / "run.json")
    assert faults(recipe, tmp_path) == []
    add(tmp_path / name)
    (message,) = faults(recipe, tmp_path)
    assert message.startswith(str(tmp_path / name)) and words in message and "--out" in message


def test_what_a_run_has_written_is_replaced(tmp_path: Path) -> None:
    for name in ("run.json", "final/manifest.json", "final/README.md", "summary.json", "report.html", "events.jsonl"):
        add_file(tmp_path / name)
    (tmp_path / "checkpoints").mkdir()
    assert faults(Recipe.from_dict(small_recipe()), tmp_path) == []
    (tmp_path / "final" / "manifest.json").unlink()
    (tmp_path / "final" / "README.md").unlink()
    assert faults(Recipe.from_dict(small_recipe()), tmp_path) == [], "an empty folder is replaced"


def test_the_folders_of_later_stages_and_of_the_chain_are_checked(tmp_path: Path) -> None:
    chain = Chain.from_dict(STAGES)
    assert faults(chain, tmp_path) == []
    add_folder(tmp_path / "2-two")
    (message,) = faults(chain, tmp_path)
    assert str(tmp_path / "2-two") in message and "is not a run" in message
    add_file(tmp_path / "2-two" / "run.json")
    add_folder(tmp_path / "2-two" / "final")
    (message,) = faults(chain, tmp_path)
    assert message.startswith(str(tmp_path / "2-two" / "final"))
    add_folder(tmp_path / "summary.json")
    found = set(faults(chain, tmp_path))
    assert len(found) == 2 and any(text.startswith(str(tmp_path / "summary.json")) for text in found)


def test_many_foreign_files_are_counted(tmp_path: Path) -> None:
    add_file(tmp_path / "run.json")
    for number in range(5):
        add_file(tmp_path / "final" / f"{number}.txt")
    assert "(0.txt, 1.txt, 2.txt and 2 more)" in faults(Recipe.from_dict(small_recipe()), tmp_path)[0]


def test_the_damaged_final_folder_of_a_finished_stage_is_no_fault(tmp_path: Path) -> None:
    chain = Chain.from_dict(STAGES)
    add_file(tmp_path / "1-one" / "run.json")
    add_file(tmp_path / "1-one" / "final" / "README.md")
    assert len(faults(chain, tmp_path)) == 1
    (tmp_path / "1-one" / "summary.json").write_text(json.dumps(DONE_SUMMARY), encoding="utf-8")
    assert faults(chain, tmp_path) == []
