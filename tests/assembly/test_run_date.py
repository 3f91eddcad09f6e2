"""The date in the prompts of a run is that of its first day, also if it is continued on another day."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from crash import run_fingerprint, small_recipe
from export_fixtures import make_base
from run_summaries import DONE_SUMMARY
from stopped_clock import stop_clock

from lowrank_tune import Chain, Recipe, run
from lowrank_tune.assembly.run_date import with_template_date
from lowrank_tune.errors import ConfigError
from lowrank_tune.events import CheckpointSaved, Event
from lowrank_tune.model.base import load_tokenizer

UNDATED = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end_of_turn|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
DATED = "{{ strftime_now('%d %b %Y') }}" + UNDATED


def interrupt_after_save(event: Event) -> None:
    if isinstance(event, CheckpointSaved):
        raise KeyboardInterrupt


def test_continued_run_has_the_date_of_its_first_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every prompt is tokenized anew on the next day: the caches are others."""
    small = small_recipe(max_steps=4, save_steps=2) | {"base": {"model": base_of(tmp_path, DATED)}}
    small["adapters"] = {"policy": {"r": 4}}
    for day, cache in (("2026-11-27", "one"), ("2026-11-28", "two")):
        stop_clock(monkeypatch, day)
        monkeypatch.setenv("LOWRANK_TUNE_CACHE", str(tmp_path / cache))
        if cache == "one":
            with pytest.raises(KeyboardInterrupt):
                run(Recipe.from_dict(small), out=tmp_path / "run", ui="none", on_event=interrupt_after_save)
        else:
            assert run(Recipe.from_dict(small), out=tmp_path / "run", ui="none").status == "done"
        assert 'template_date: "2026-11-27"' in (tmp_path / "run" / "recipe.yaml").read_text()
    dated = small | {"data": {**small["data"], "template_date": "2026-11-27"}}
    run(Recipe.from_dict(dated), out=tmp_path / "straight", ui="none")
    assert run_fingerprint(tmp_path / "run") == run_fingerprint(tmp_path / "straight")


def base_of(tmp_path: Path, template: str) -> str:
    base = make_base(tmp_path / "base", "llama", tied=False)
    (base / "chat_template.jinja").write_text(template)
    return str(base)


def test_the_date_is_that_of_an_unfinished_run_else_of_today(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_clock(monkeypatch, "2026-11-28")
    recipe = Recipe.load("tiny-sft", f"base.model={base_of(tmp_path, DATED)}")
    folder = tmp_path / "run"
    fresh = with_template_date(recipe, folder)
    assert fresh.data.template_date == "2026-11-28"
    given = replace_date(recipe, "2026-01-02")
    assert with_template_date(given, folder) == given
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"version": 2, "recipe": replace_date(recipe, "2026-11-27").to_dict()}))
    assert with_template_date(recipe, folder).data.template_date == "2026-11-27"
    (folder / "summary.json").write_text(json.dumps(DONE_SUMMARY))
    assert with_template_date(recipe, folder).data.template_date == "2026-11-28", "it would be a new run"


def replace_date(recipe: Recipe, day: str) -> Recipe:
    return Recipe.from_dict({**recipe.to_dict(), "data": {**recipe.to_dict()["data"], "template_date": day}})


def test_continued_run_of_an_older_version_has_no_date(tmp_path: Path) -> None:
    recipe = Recipe.load("tiny-sft", f"base.model={base_of(tmp_path, DATED)}")
    (tmp_path / "run" / "checkpoints" / "step-2").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"version": 2, "recipe": recipe.to_dict()}))
    assert with_template_date(recipe, tmp_path / "run") == recipe


def test_a_template_without_a_date_leaves_the_recipe_as_it_is(tmp_path: Path) -> None:
    recipe = Recipe.load("tiny-sft", f"base.model={base_of(tmp_path, UNDATED)}")
    assert with_template_date(recipe, tmp_path / "run") == recipe
    assert "template_date" not in recipe.to_dict()["data"]


def test_of_several_templates_the_default_one_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_clock(monkeypatch, "2026-11-28")
    for default, other, day in ((UNDATED, DATED, None), (DATED, UNDATED, "2026-11-28")):
        recipe = Recipe.load("tiny-sft", f"base.model={base_of(tmp_path, default)}")
        (tmp_path / "base" / "additional_chat_templates").mkdir(exist_ok=True)
        (tmp_path / "base" / "additional_chat_templates" / "tool_use.jinja").write_text(other)
        assert set(load_tokenizer(recipe.base).chat_template) == {"default", "tool_use"}
        assert with_template_date(recipe, tmp_path / "run").data.template_date == day


def test_a_chain_has_one_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_clock(monkeypatch, "2026-11-28")
    chain = Chain.load("tiny-preference", f"base.model={base_of(tmp_path, DATED)}")
    dated = with_template_date(chain, tmp_path / "run")
    assert [stage.data.template_date for stage in dated.stages] == 2 * ["2026-11-28"]
    assert Chain.from_dict(dated.to_dict()) == dated
    with pytest.raises(ConfigError, match=r"stages.dpo.data.template_date: is not set in stage sft, and all stages"):
        Chain.load("tiny-preference", "stages.dpo.data.template_date=2026-01-02")
