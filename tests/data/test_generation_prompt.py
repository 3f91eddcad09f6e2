"""A law over chat templates: what is trained and sampled from is the prompt that `apply_chat_template` gives, and an
answer is trained only behind its own."""

from __future__ import annotations

import functools
import importlib.util
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from template_shapes import REFUSED, SHAPES, TRL_IMAGE_TEMPLATES
from tokenizers_for_tests import tiny

from lowrank_tune.data import ChatTemplate, InvalidRow
from lowrank_tune.errors import UserError
from lowrank_tune.types import Message, Row

DAY = "2024-07-26"
"""The day on which Llama 3.1's template stands still."""
THOUGHT = "<think>\nTwo and two.\n</think>\n\n"
ANSWERS = {"plain": ("It is 4.", "Yes."), "thoughts": (f"{THOUGHT}It is 4.", f"{THOUGHT}Yes.")}


def trl_templates() -> dict[str, str]:
    """TRL's original templates, where TRL is installed."""
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        return {}
    files = sorted((Path(spec.origin).parent / "chat_templates").glob("*.jinja"))
    return {file.stem: file.read_text() for file in files if not file.stem.endswith("_training")}


TEMPLATES = {**SHAPES, **{f"trl/{name}": text for name, text in trl_templates().items()}}
TEXT_TEMPLATES = [name for name in TEMPLATES if name.removeprefix("trl/") not in TRL_IMAGE_TEMPLATES]


@functools.cache
def made(name: str, marks: str) -> Any:
    """A tokenizer with a template: a vocabulary to which its control tokens are foreign (`foreign`), special tokens
    (`special`), or special tokens with the tags of thoughts among them (`tags`)."""
    text = TEMPLATES[name]
    one = tiny(text, split=True)
    found = set(re.findall(r"<\|[\w ]+\|>|<｜[^<>｜]+｜>|<\|?\w+\|>|<\|\w+\|?>|<(?:start|end)_of_turn>", text))
    tokens = {"foreign": set(), "special": found, "tags": found | {"<think>", "</think>"}}[marks]
    one.add_special_tokens({"additional_special_tokens": sorted(tokens)})
    return one


@functools.cache
def template_of(name: str, marks: str) -> ChatTemplate:
    dated = "strftime_now" in TEMPLATES[name]
    return ChatTemplate.from_tokenizer(made(name, marks), DAY if dated else None)


def stock(name: str, marks: str, messages: list[Message]) -> list[int] | None:
    """The ids of transformers' own prompt; None where the template takes no such turns."""
    one = made(name, marks)
    try:
        return list(
            one.apply_chat_template(
                [vars(message) for message in messages], add_generation_prompt=True, tokenize=True, return_dict=False
            )
        )
    except Exception:
        return None


def conversation(system: bool, exchanges: int, answers: tuple[str, str]) -> list[Message]:
    turns = [Message("system", "Be brief.")] if system else []
    for number in range(exchanges):
        turns += [Message("user", ("What is 2 + 2?", "Sure?")[number]), Message("assistant", answers[number])]
    return turns


def stretches(row: Row) -> list[tuple[int, int]]:
    """The trained tokens, from where to where."""
    edges = [
        index for index, (before, now) in enumerate(pairwise([False, *row.completion_mask, False])) if before != now
    ]
    return list(zip(edges[::2], edges[1::2], strict=True))


@pytest.fixture
def on_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops transformers' clock at noon of `DAY`."""
    import datetime

    from transformers.utils import chat_template_utils

    class Stopped(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Stopped:
            return cls(2024, 7, 26, 12)

    monkeypatch.setattr(chat_template_utils, "datetime", Stopped)


@pytest.mark.usefixtures("on_day")
@pytest.mark.parametrize("name", TEXT_TEMPLATES)
def test_the_prompt_is_the_one_of_other_software(name: str) -> None:
    checked = 0
    for marks in ("foreign", "special", "tags"):
        for system in (False, True):
            for exchanges in (1, 2):
                for answers in ANSWERS.values():
                    checked += check(name, marks, conversation(system, exchanges, answers))
    assert checked >= 12


def check(name: str, marks: str, messages: list[Message]) -> bool:
    """The law for one conversation; False where the template takes no such turns."""
    template, prompt = template_of(name, marks), stock(name, marks, messages[:-1])
    if prompt is None:
        assert name in ("trl/gemma",) and messages[0].role == "system"
        return False
    assert template.prompt(messages[:-1]) == prompt
    row = template.encode_many([messages])[0]
    if isinstance(row, InvalidRow):
        assert "generation prompt closes the thought" in row.reason and "</think>" in messages[-1].content
        return False
    *earlier, (start, end) = stretches(row)
    assert start == len(prompt) and list(row.input_ids[:start]) == prompt
    assert row.input_ids[end - 1] in template.end_ids
    own_prompts = [stock(name, marks, messages[:index]) for index in range(1, len(messages) - 1)]
    for first, _ in earlier:
        assert list(row.input_ids[:first]) in own_prompts, "an earlier answer behind ids that nobody asks with"
    check_parsed(template, list(row.input_ids[:start]), list(row.input_ids[start:end]), messages[-1].content)
    return True


def check_parsed(template: ChatTemplate, prompt: list[int], trained: list[int], answer: str) -> None:
    """A reasoning parser finds in what is trained what the row says."""
    text = template.decode(trained, special_tokens=True)
    thought, _, rest = answer.rpartition("</think>")
    assert rest.strip() in text
    if thought:
        assert "Two and two." in text, "its thought is dropped"
    if template.decode(prompt, special_tokens=True).rstrip().endswith("<think>"):
        found, closing, answered = text.partition("</think>")
        assert closing and "<think>" not in text and "</think>" not in answered
        assert found.strip() == ("Two and two." if thought else "")
        assert answered.strip().startswith(rest.strip())


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match="the base's chat template"):
        ChatTemplate.from_tokenizer(tiny(REFUSED[name]))


@pytest.mark.parametrize("name", TRL_IMAGE_TEMPLATES)
def test_trls_templates_for_images_are_refused_by_name(name: str) -> None:
    pytest.importorskip("trl")
    with pytest.raises(UserError, match="the base's chat template"):
        ChatTemplate.from_tokenizer(tiny(TEMPLATES[f"trl/{name}"]))
