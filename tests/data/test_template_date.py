"""The date in a chat template: the rendering of transformers on that day, on any later day."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from stopped_clock import stop_clock
from template_shapes import DATED
from tokenizers_for_tests import CHATML, tiny

from lowrank_tune import Recipe
from lowrank_tune.data import ChatTemplate
from lowrank_tune.data.message import Message
from lowrank_tune.data.tokenize import tokenize
from lowrank_tune.errors import ConfigError, UserError

QUESTION = [Message("user", "Hm?")]
FORMATS = (
    "%d %b %Y",
    "%Y-%m-%d",
    "%A, %-d %B %y",
    "%a %j",
    "%m/%d/%Y",
    "%F week %V of %G",
    "%d%% %%d %%%d",
    "%^b %_d %-e %-V %Od %3d",
    "%n|%t|%z|%Z|%q",
)
VARIABLE = (
    "{% if date_string is not defined %}{% set date_string = '26 Jul 2024' %}{% endif %}{{ date_string }}\n" + CHATML
)
SetClock = Callable[[str], None]


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> SetClock:
    """Sets transformers' clock and ours to noon of a day."""
    return partial(stop_clock, monkeypatch)


def prompt_text(template: ChatTemplate) -> str:
    return template.decode(template.prompt(QUESTION), special_tokens=True)


@pytest.mark.parametrize("day", ["2024-02-29", "2026-11-08", "2027-01-01", "2026-10-30"])
def test_a_fixed_date_is_what_transformers_writes_on_that_day(set_clock: SetClock, day: str) -> None:
    text = "".join(f"{{{{ strftime_now('{format}') }}}}|" for format in FORMATS) + CHATML
    set_clock(day)
    expected = tiny(text).apply_chat_template([vars(QUESTION[0])], add_generation_prompt=True, tokenize=False)
    set_clock("2030-05-05")
    assert prompt_text(ChatTemplate.from_tokenizer(tiny(text), day)) == expected


def test_the_time_of_a_fixed_date_is_midnight() -> None:
    text = "{{ strftime_now('%a %j %H:%M:%S %p %k %l %P') }}|" + CHATML
    assert prompt_text(ChatTemplate.from_tokenizer(tiny(text), "2026-01-02")).startswith(
        "Fri 002 00:00:00 AM  0 12 am|"
    )


@pytest.mark.parametrize("front", ["", "\n", "  ", "\n  {% if true %}x{% endif %}\n", "  {%- if true %}\nx{% endif %}"])
def test_fixing_the_date_changes_nothing_else(set_clock: SetClock, front: str) -> None:
    """A template that begins with white space, which Jinja trims around blocks."""
    set_clock("2026-11-08")
    text = front + CHATML + "{# strftime_now #}"
    expected = tiny(text).apply_chat_template([vars(QUESTION[0])], add_generation_prompt=True, tokenize=False)
    assert prompt_text(ChatTemplate.from_tokenizer(tiny(text), "2026-11-08")) == expected


def test_without_a_date_given_it_is_the_day_on_which_the_template_was_loaded(set_clock: SetClock) -> None:
    set_clock("2026-11-27")
    template = ChatTemplate.from_tokenizer(tiny(DATED))
    set_clock("2026-11-28")
    assert "Today Date: 27 Nov 2026" in prompt_text(template) and "2026-11-27" in template.describe()
    answered = template.encode([*QUESTION, Message("assistant", "Yes.")])
    assert "Today Date: 27 Nov 2026" in template.decode(answered.input_ids)


def test_a_template_without_a_clock_keeps_its_own_date_unless_one_is_given(set_clock: SetClock) -> None:
    set_clock("2026-11-27")
    template = ChatTemplate.from_tokenizer(tiny(VARIABLE))
    assert prompt_text(template).startswith("26 Jul 2024\n") and template.date_written is None
    assert prompt_text(ChatTemplate.from_tokenizer(tiny(VARIABLE), "2026-01-02")).startswith("02 Jan 2026\n")


def test_the_fingerprint_holds_the_date_and_no_date_where_none_is_written(set_clock: SetClock) -> None:
    def fingerprint(text: str | None, day: str | None = None) -> str:
        return ChatTemplate.from_tokenizer(tiny(text), day).fingerprint

    assert len({fingerprint(DATED, day) for day in ("2026-11-27", "2026-11-28", "2026-11-27")}) == 2
    before = [fingerprint(text) for text in (CHATML, VARIABLE, None)]
    set_clock("2031-01-01")
    assert before == [fingerprint(text) for text in (CHATML, VARIABLE, None)]


def test_the_token_cache_is_one_for_each_date(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": "Hm?", "answer": "Yes."}) + "\n")
    recipe = Recipe.load("tiny-sft", f'data.train=[{{"dataset": "{rows}"}}]')
    texts = []
    for day in ("2026-11-27", "2026-11-28", "2026-11-27"):
        template = ChatTemplate.from_tokenizer(tiny(DATED), day)
        store = tokenize(recipe.data.train, recipe.data, template, 0, lambda event: None, tmp_path / "cache")
        texts.append(template.decode([int(token) for token in store[0].input_ids]))
    assert "27 Nov 2026" in texts[0] and "28 Nov 2026" in texts[1] and texts[2] == texts[0]
    assert len([folder for folder in (tmp_path / "cache").iterdir() if folder.is_dir()]) == 2


@pytest.mark.parametrize("text", [CHATML, None])
def test_a_date_that_would_not_be_written_is_refused(text: str | None) -> None:
    with pytest.raises(
        UserError, match=r"data\.template_date: 2026-01-02, but the base's chat template writes no date"
    ):
        ChatTemplate.from_tokenizer(tiny(text), "2026-01-02")


@pytest.mark.parametrize("value", ["2026-02-30", "20260102", "2026-W30-1", "today", "02.01.2026"])
def test_an_invalid_date_is_one_sentence(value: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.template_date: must be a day as YYYY-MM-DD, found"):
        Recipe.load("tiny-sft", f'data.template_date="{value}"')


def test_a_date_needs_no_quotes_in_a_recipe() -> None:
    assert Recipe.load("tiny-sft", "data.template_date=2026-01-02").data.template_date == "2026-01-02"
